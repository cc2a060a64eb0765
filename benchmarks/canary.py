"""How often a canary is stopped that is as good, and how often one goes through that is worse: simulated rollouts, whole.

Three phases of 5, 25 and 50 % with two looks each, as ``DeployModelOperator`` has them by default. Requests come in bursts, take times
with a heavy tail that slow stretches of the service make longer for both versions, and fail now and then in stretches for both. Each
simulation is one rollout with the default policy; nothing is tuned to it.

Among the requests of one row may be batches of 10,000 rows that are alike, one in two minutes. In an A/B test (one phase of 50 %, two
looks) 2,000 callers stay with their version; how often each of them asks follows Pareto's distribution (exponent 1.2: a twentieth makes
half of the traffic), and each has times, answers and failures of his own.

    python benchmarks/canary.py --simulations 1000
    python benchmarks/canary.py --simulations 1000 --worlds batches A/B "large requests"
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from airflow_mlops.core.rollouts.canary import Analysis, CanaryPolicy, analyze
from airflow_mlops.core.rollouts.drawn_requests import DrawnRequests, draw_requests, merge_drawn
from airflow_mlops.core.rollouts.mean_losses import Losses, losses_of
from airflow_mlops.core.rollouts.observations import (
    AnswerCells,
    Observations,
    VersionObservations,
    count_times,
    draw_answers,
    time_cells,
)
from airflow_mlops.core.rollouts.rollout import (
    RolloutEvent,
    action_after,
    next_action,
    plan_rollout,
    state_after,
)

SECONDS = 600.0
CELLS = AnswerCells(edges=tuple(np.linspace(5.0, 40.0, 41)))
START = datetime(2024, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """How a new version differs.

    :param name: in words.
    :param failing: share of its requests that fail on top of the stable version's (.001, in bad minutes .01).
    :param slower: its times are longer by this factor.
    :param stalls: share of its requests that take ten times as long.
    :param shift: its answers are higher by so many standard deviations.
    :param loss: its mean loss is larger by this factor; ``None``: no labels come.
    :param misrouted: share of its requests that go to the stable version instead.
    :param batches: whether some requests have many rows.
    :param callers: whether callers stay with their version.
    """

    name: str
    failing: float = 0.0
    slower: float = 1.0
    stalls: float = 0.0
    shift: float = 0.0
    loss: float | None = None
    misrouted: float = 0.0
    batches: bool = False
    callers: bool = False


WORLDS = (
    World(name="as good"),
    World(name="as good, with labels", loss=1.0),
    World(name="25 % slower: just tolerated", slower=1.25),
    World(name="0.5 points more fail: just tolerated", failing=0.005),
    World(name="answers 0.5 sd higher (tolerated)", shift=0.5),
    World(name="2 % of requests fail", failing=0.019),
    World(name="half of the requests fail", failing=0.5),
    World(name="50 % slower", slower=1.5),
    World(name="4 % of requests stall", stalls=0.04),
    World(name="answers 2 sd higher", shift=2.0),
    World(name="loss 20 % larger", loss=1.2),
    World(name="a third of its traffic goes elsewhere", misrouted=1 / 3),
    World(name="batches: as good", batches=True),
    World(name="batches: answers 0.5 sd higher (tolerated)", shift=0.5, batches=True),
    World(name="batches: answers 2 sd higher", shift=2.0, batches=True),
    World(name="large requests: as good, with labels", loss=1.0, batches=True),
    World(name="large requests: loss 20 % larger", loss=1.2, batches=True),
    World(name="A/B: as good", callers=True),
    World(name="A/B: 25 % slower: just tolerated", slower=1.25, callers=True),
    World(name="A/B: 0.5 points more fail: just tolerated", failing=0.005, callers=True),
    World(name="A/B: answers 0.5 sd higher (tolerated)", shift=0.5, callers=True),
    World(name="A/B: 4 % of requests fail", failing=0.039, callers=True),
    World(name="A/B: twice as slow", slower=2.0, callers=True),
    World(name="A/B: answers 2 sd higher", shift=2.0, callers=True),
)

BATCH_ROWS = 10_000
CALLERS = 2_000


def main() -> None:
    """Print how rollouts end, world by world."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=1_000)
    parser.add_argument("--rates", type=float, nargs="+", default=[5.0, 20.0], help="requests a second")
    parser.add_argument("--worlds", nargs="+", default=[""], help="only those whose names hold one of these")
    arguments = parser.parse_args()
    print("| new version | requests/s | passed | stopped | no data | minutes until stopped (median) |")
    print("|---|---|---|---|---|---|")
    for world in [one for one in WORLDS if any(part in one.name for part in arguments.worlds)]:
        for rate in arguments.rates:
            ends = [
                roll_out(world, rate, np.random.default_rng(seed)) for seed in range(arguments.simulations)
            ]
            shares = [np.mean([end == kind for end, _ in ends]) for kind in ("passed", "stopped", "no data")]
            minutes = [spent / 60.0 for end, spent in ends if end == "stopped"]
            median = f"{np.median(minutes):.0f}" if minutes else ""
            print(
                f"| {world.name} | {rate:g} | {shares[0]:.1%} | {shares[1]:.1%} | {shares[2]:.1%} | {median} |",
                flush=True,
            )


def roll_out(world: World, rate: float, random: np.random.Generator) -> tuple[str, float]:
    """Carry out one rollout; give how it ended, and after how many seconds."""
    plan = (
        plan_rollout("ab", shares=[0.5], seconds=SECONDS)
        if world.callers
        else plan_rollout("canary", seconds=SECONDS)
    )
    policy = CanaryPolicy()
    now, events = START, []
    traffic: Traffic | None = None

    def note(what: str, phase: int, analysis: Analysis | None = None) -> None:
        events.append(
            RolloutEvent(number=len(events) + 1, what=what, phase=phase, at=now, analysis=analysis, reason="")  # type: ignore[arg-type]
        )

    while True:
        state = state_after(events)
        action = next_action(plan, state, now=now, steered=True)
        if action.what == "look" and traffic is not None:
            seen, losses = traffic.until((now - START).total_seconds())
            analysis = analyze(
                seen,
                stable="1",
                new="2",
                policy=policy,
                looks=plan.all_looks,
                most_looks=plan.most_looks,
                share=plan.phases[state.phase].share,
                sticky=plan.sticky,
                losses=losses if world.loss is not None else None,
            )
            action = action_after(plan, state, analysis, now=now)
            note("looked", state.phase, analysis)
            if action.what == "roll_back":
                end = "no data" if analysis.judgement == "no data" else "stopped"
                return end, (now - START).total_seconds()
        if action.what == "enter":
            note("entered", action.phase)
            share = plan.phases[action.phase].share
            begun = (now - START).total_seconds()
            traffic = (TrafficOfCallers if world.callers else Traffic)(world, rate, share, begun, random)
        elif action.what == "wait" and action.until is not None:
            now = max(action.until, now + timedelta(seconds=1))
        elif action.what == "finish":
            return "passed", (now - START).total_seconds()


class Traffic:
    """Requests of one phase, drawn as they are asked for."""

    def __init__(
        self, world: World, rate: float, share: float, begun: float, random: np.random.Generator
    ) -> None:
        self.world, self.rate, self.share, self.random = world, rate, share, random
        self.begun = self.drawn = begun
        self.versions = {"1": VersionObservations(), "2": VersionObservations()}
        self.losses: dict[str, list[np.ndarray]] = {"1": [], "2": []}
        self.losses_of_batches: dict[str, list[np.ndarray]] = {"1": [], "2": []}

    def until(self, at: float) -> tuple[Observations, tuple[Losses, Losses]]:
        """Give all up to a time."""
        while self.drawn < at:
            self._minute(min(60.0, at - self.drawn))
        losses = tuple(self._losses(name) for name in ("1", "2"))
        return Observations(revision=1, cells=CELLS, versions=dict(self.versions)), losses  # type: ignore[return-value]

    def _losses(self, name: str) -> Losses:
        single, batches = np.concatenate([np.empty(0), *self.losses[name]]), self.losses_of_batches[name]
        if len(single) < 2:
            return Losses()
        requests = [str(number) for number in range(len(single) + len(batches))]
        drawn = requests[: len(single)]
        for request in requests[len(single) :]:
            drawn += [request] * BATCH_ROWS
        return losses_of(np.concatenate([single, *batches]), drawn)

    def _minute(self, seconds: float) -> None:
        """Draw a minute: its rate, its slowness and its failures are the same for both versions."""
        random, world = self.random, self.world
        self.drawn += seconds
        count = random.poisson(self.rate * seconds * random.gamma(2.0, 0.5))
        slow, failing = math.exp(random.normal(0.0, 0.4)), 10.0 if random.random() < 0.05 else 1.0
        new = random.random(count) < self.share * (1.0 - world.misrouted)
        for name, asked in (("1", int((~new).sum())), ("2", int(new.sum()))):
            is_new = name == "2"
            share = 0.001 * failing + (world.failing if is_new else 0.0)
            failed = int((random.random(asked) < share).sum())
            answered = asked - failed
            times = (
                0.002 * slow * np.exp(random.normal(0.0, 0.6, answered)) * (world.slower if is_new else 1.0)
            )
            stall = random.random(answered) < (0.01 + (world.stalls if is_new else 0.0))
            times = np.where(stall, 10.0 * times, times)
            answers = random.normal(20.0 + 5.0 * (world.shift if is_new else 0.0), 5.0, answered)
            self.versions[name] += VersionObservations(
                requests=asked,
                failed=failed,
                rows=answered,
                times=tuple(count_times(times).tolist()),
                answers=tuple(CELLS.counts(answers.tolist()).tolist()),
            )
            if world.batches:
                self.versions[name] += self._batches(
                    seconds * (self.share if is_new else 1.0 - self.share), is_new
                )
            if world.loss is not None:
                labelled = random.exponential(2.0 * (world.loss if is_new else 1.0), answered)
                self.losses[name].append(labelled[random.random(answered) < 0.5])

    def _batches(self, seconds: float, is_new: bool) -> VersionObservations:
        """Draw requests of many rows that are alike: of one city, or one product."""
        random, count = self.random, self.random.poisson(seconds / 120.0)
        mean = 20.0 + 5.0 * (self.world.shift if is_new else 0.0)
        rows = [random.normal(random.normal(mean, 5.0), 2.0, BATCH_ROWS) for _ in range(count)]
        if self.world.loss is not None:
            larger = 2.0 * (self.world.loss if is_new else 1.0)
            self.losses_of_batches["2" if is_new else "1"] += [
                larger * random.lognormal(-0.32, 0.8) * random.exponential(size=BATCH_ROWS)
                for _ in range(count)
            ]
        return VersionObservations(
            requests=count,
            rows=BATCH_ROWS * count,
            times=tuple(count_times(np.full(count, 0.05).tolist()).tolist()) if count else (),
            answers=tuple(CELLS.counts(draw_answers(rows, random)).tolist()) if count else (),
        )


class TrafficOfCallers(Traffic):
    """Requests of callers who stay with their version, who have habits, and of whom some ask very often."""

    def __init__(
        self, world: World, rate: float, share: float, begun: float, random: np.random.Generator
    ) -> None:
        super().__init__(world, rate, share, begun, random)
        self.keys = random.integers(0, 2**64, size=CALLERS, dtype=np.uint64)
        self.of_new = random.random(CALLERS) < share
        self.often = np.cumsum(random.pareto(1.2, CALLERS) + 1.0)
        self.slowness = np.exp(random.normal(0.0, 0.5, CALLERS))
        self.level = random.normal(20.0, 4.0, CALLERS)
        self.careless = np.where(random.random(CALLERS) < 0.02, 0.05, 0.0)
        self.seen = DrawnRequests(versions=("1", "2"))

    def until(self, at: float) -> tuple[Observations, tuple[Losses, Losses]]:
        """Give all up to a time."""
        while self.drawn < at:
            self._minute(min(60.0, at - self.drawn))
        return Observations(revision=1, cells=CELLS, drawn=self.seen), (Losses(), Losses())

    def _minute(self, seconds: float) -> None:
        random, world = self.random, self.world
        self.drawn += seconds
        count = random.poisson(self.rate * seconds * random.gamma(2.0, 0.5))
        slow, failing = math.exp(random.normal(0.0, 0.4)), 10.0 if random.random() < 0.05 else 1.0
        who = np.searchsorted(self.often, random.random(count) * self.often[-1])
        is_new = self.of_new[who]
        failed = random.random(count) < self.careless[who] + 0.001 * failing + world.failing * is_new
        seconds_taken = 0.002 * slow * self.slowness[who] * np.exp(random.normal(0.0, 0.3, count))
        times = time_cells((seconds_taken * np.where(is_new, world.slower, 1.0)).tolist())
        answers = CELLS.of(
            (self.level[who] + random.normal(0.0, 3.0, count) + 5.0 * world.shift * is_new).tolist()
        )
        new = draw_requests(
            versions=self.seen.versions,
            answered_by=is_new.astype(int),
            callers=self.keys[who],
            times=np.where(failed, -1, times),
            answers=np.where(failed, -1, answers),
            random=random,
        )
        self.seen = merge_drawn([self.seen, new])


if __name__ == "__main__":
    main()

"""Rollout: the way of a new version to an endpoint, as a state machine that knows no clock and no network.

A rollout is a list of phases. What happened to it is a list of events, which the ledger keeps; :func:`state_after` folds them into
where it stands, and :func:`next_action` says what is to be done. Whoever carries it out may be killed at any point: his successor
reads the same events and goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from airflow_mlops.core.rollouts.canary import Analysis
from airflow_mlops.core.rollouts.desired_state import DesiredState, ServedVersion

Strategy = Literal["recreate", "blue_green", "shadow", "canary", "ab"]
STRATEGIES: tuple[Strategy, ...] = ("recreate", "blue_green", "shadow", "canary", "ab")

#: How often a phase is begun again after nobody steered it for a while.
MOST_RESTARTS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A stretch of a rollout in which traffic is split in one way.

    :param name: what people call it.
    :param share: of the requests that the new version answers.
    :param mirror: which of the two answers every request as well, unseen: ``new``, ``old`` or neither.
    :param seconds: how long it lasts, at least.
    """

    name: str
    share: float
    mirror: Literal["new", "old"] | None = None
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutPlan:
    """How a version is rolled out.

    :param strategy: what it is called.
    :param phases: in order; none: at once.
    :param looks: how often one looks in each phase.
    :param patience: for how many times its length a phase is waited for when there is no data, before it has failed.
    :param sticky: requests with the same key are answered by the same version.
    :param ends_with: version that serves when all phases have passed.
    """

    strategy: Strategy
    phases: tuple[Phase, ...]
    looks: int = 2
    patience: float = 3.0
    sticky: bool = False
    ends_with: Literal["new", "old"] = "new"

    @property
    def all_looks(self) -> int:
        """How often one looks at versions that have answered enough, in all phases together."""
        return max(1, self.looks * len(self.phases))

    @property
    def most_looks(self) -> int:
        """How often one looks at most, with the looks at what is not enough yet."""
        return max(1, (self.looks + math.ceil(2.0 * self.looks * self.patience) + 1) * len(self.phases))


def plan_rollout(
    strategy: Strategy,
    *,
    shares: Sequence[float] = (0.05, 0.25, 0.5),
    seconds: float = 600.0,
    looks: int = 2,
    patience: float = 3.0,
) -> RolloutPlan:
    """Plan a rollout.

    :param strategy: ``recreate``: at once. ``blue_green``: at once, with the old version loaded and answering unseen beside it until it has
        proved itself. ``shadow``: the new version answers unseen, and is not served at the end. ``canary``: it answers a growing
        share. ``ab``: it answers the first of the shares, from .03 to .97, always the same callers.
    :param shares: of a canary's phases, ascending; of ``ab`` one.
    :param seconds: of each phase.
    :raises ValueError: shares out of order, or times that are none.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is none of {', '.join(STRATEGIES)}")
    if seconds < 0.0 or looks < 1 or patience < 1.0:
        raise ValueError(
            f"seconds={seconds:g}, looks={looks}, patience={patience:g}: at least 0, 1 and 1 are needed"
        )
    steps = list(shares) if strategy == "canary" else list(shares)[:1] if strategy == "ab" else []
    if strategy in ("canary", "ab") and (
        not steps or steps != sorted({*steps}) or not 0.0 < steps[0] <= steps[-1] < 1.0
    ):
        raise ValueError(f"shares {list(shares)}: above 0 and below 1, each larger than the one before")
    if strategy == "ab" and not 0.03 <= steps[0] <= 0.97:
        raise ValueError(
            f"share {steps[0]:g} of an A/B test: from 0.03 to 0.97, as of many callers 8,192 to 16,384 are kept for the comparison, and "
            "each version needs some hundreds of them"
        )
    phases: dict[Strategy, tuple[Phase, ...]] = {
        "recreate": (),
        "blue_green": (Phase(name="both loaded", share=1.0, mirror="old", seconds=seconds),),
        "shadow": (Phase(name="shadow", share=0.0, mirror="new", seconds=seconds),),
        "canary": tuple(Phase(name=f"canary {share:.4g}", share=share, seconds=seconds) for share in steps),
        "ab": tuple(Phase(name=f"a/b {share:.4g}", share=share, seconds=seconds) for share in steps),
    }
    return RolloutPlan(
        strategy=strategy,
        phases=phases[strategy],
        looks=looks,
        patience=patience,
        sticky=strategy == "ab",
        ends_with="old" if strategy == "shadow" else "new",
    )


def phase_state(
    current: DesiredState, plan: RolloutPlan, phase: Phase, new: ServedVersion, *, rollout: str
) -> DesiredState:
    """Give what an endpoint is to serve in a phase; whoever answered before is the one to fall back to."""
    stable = current.stable
    mirror = {"new": new.model_version, "old": stable.model_version, None: None}[phase.mirror]
    return DesiredState(
        model_name=current.model_name,
        versions=(
            ServedVersion(
                model_version=stable.model_version,
                package_digest=stable.package_digest,
                share=1.0 - phase.share,
            ),
            ServedVersion(
                model_version=new.model_version, package_digest=new.package_digest, share=phase.share
            ),
        ),
        mirror=mirror,
        sticky=plan.sticky,
        leased=True,
        rollout=rollout,
        previous_version=current.previous_version,
        revision=current.revision + 1,
    )


#: What is to be done next.
What = Literal["enter", "wait", "look", "finish", "roll_back", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutEvent:
    """Something that happened in a rollout.

    :param number: counts from 1.
    :param what: ``entered`` a phase, ``looked`` at it, ``stopping``: it is about to be rolled back, ``finished`` the rollout or
        ``rolled_back``.
    :param phase: number of the phase, from 0.
    :param revision: of the desired state, where one was written.
    :param at: when.
    :param analysis: of a look.
    :param then: what follows from it, so that whoever comes next acts on it and does not look again.
    :param seconds: that it took to serve what had served before.
    :param reason: a sentence.
    """

    number: int
    what: Literal["entered", "looked", "stopping", "finished", "rolled_back"]
    phase: int
    revision: int | None = None
    at: datetime
    analysis: Analysis | None = None
    then: What | None = None
    seconds: float | None = None
    reason: str


Status = Literal["new", "running", "finished", "rolled_back"]
_STATUS_AFTER: dict[str, Status] = {
    "looked": "running",
    "stopping": "running",
    "finished": "finished",
    "rolled_back": "rolled_back",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutState:
    """Where a rollout stands.

    :param status: ``new``, ``running``, ``finished`` or ``rolled_back``.
    :param phase: number of the phase it is in.
    :param revision: of the desired state of that phase.
    :param since: when the phase was entered.
    :param looks: looks at it since then that had data.
    :param then: what follows from the last look, or was asked for; whoever was about to do it may not have come to.
    :param entries: how often this phase was entered.
    :param events: how many there were.
    :param reason: what the last event said.
    """

    status: Status = "new"
    phase: int = 0
    revision: int | None = None
    since: datetime | None = None
    looks: int = 0
    then: What | None = None
    entries: int = 0
    events: int = 0
    reason: str = ""


def state_after(events: Iterable[RolloutEvent]) -> RolloutState:
    """Fold what happened into where a rollout stands."""
    state = RolloutState()
    for event in events:
        if event.what == "entered":
            again = state.status == "running" and state.phase == event.phase
            state = RolloutState(
                status="running",
                phase=event.phase,
                revision=event.revision,
                since=event.at,
                entries=state.entries + 1 if again else 1,
                events=event.number,
                reason=event.reason,
            )
            continue
        found = event.analysis.judgement if event.analysis is not None else None
        told = event.what == "looked" and found != "no data"
        status = _STATUS_AFTER[event.what]
        state = RolloutState(
            status=status,
            phase=event.phase,
            revision=state.revision if status == "running" else event.revision,
            since=state.since,
            looks=state.looks + told,
            then=event.then,
            entries=state.entries,
            events=event.number,
            reason=event.reason,
        )
    return state


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """What is to be done next.

    :param what: ``enter`` a phase, ``wait`` until a time, ``look`` now, ``finish`` or ``roll_back``.
    :param phase: number of the phase to enter.
    :param until: to wait for.
    :param reason: why, a sentence.
    """

    what: What
    phase: int = 0
    until: datetime | None = None
    reason: str = ""


def next_action(plan: RolloutPlan, state: RolloutState, *, now: datetime, steered: bool) -> Action:
    """Say what is to be done.

    :param now: the present.
    :param steered: the endpoint serves the phase's desired state; it does not when nobody steered for too long.
    """
    if state.status in ("finished", "rolled_back"):
        return Action(what="none", reason=state.reason)
    if state.then in ("enter", "finish", "roll_back"):
        return Action(what=state.then, phase=state.phase + 1, reason=state.reason)
    if state.status == "new" or state.since is None:
        return _enter(plan, 0, "the rollout begins")
    if not steered:
        if state.entries > MOST_RESTARTS:
            return Action(what="roll_back", reason=f"nobody steered it {state.entries} times in a row")
        return Action(
            what="enter", phase=state.phase, reason="nobody steered for a while: the phase begins again"
        )
    phase = plan.phases[state.phase]
    due = state.since + timedelta(seconds=phase.seconds * min(state.looks + 1, plan.looks) / plan.looks)
    return Action(what="look") if now >= due else Action(what="wait", until=due, reason=state.reason)


def action_after(plan: RolloutPlan, state: RolloutState, analysis: Analysis, *, now: datetime) -> Action:
    """Say what follows from a look, which is not among the state's looks yet.

    :param analysis: what it found.
    """
    phase = plan.phases[state.phase]
    since = state.since or now
    if analysis.judgement == "worse":
        return Action(what="roll_back", reason=analysis.sentence)
    if analysis.judgement == "no data":
        end = since + timedelta(seconds=phase.seconds * plan.patience)
        if now >= end:
            return Action(what="roll_back", reason=f"there is not enough to judge it by: {analysis.sentence}")
        pause = timedelta(seconds=max(1.0, phase.seconds / plan.looks / 2.0))
        return Action(what="wait", until=min(end, now + pause), reason=analysis.sentence)
    if state.looks + 1 < plan.looks:
        due = since + timedelta(seconds=phase.seconds * (state.looks + 2) / plan.looks)
        return Action(what="wait", until=max(due, now), reason=analysis.sentence)
    return _enter(plan, state.phase + 1, analysis.sentence)


def _enter(plan: RolloutPlan, phase: int, reason: str) -> Action:
    if phase < len(plan.phases):
        return Action(what="enter", phase=phase, reason=reason)
    return Action(what="finish", phase=phase, reason=reason)

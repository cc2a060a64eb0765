from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np
import pytest

from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.core.decision.challengers import (
    ALL,
    MOST_WINDOWS,
    RECENT,
    ChallengerCheck,
    ChallengerPolicy,
    Contender,
    Gap,
    came_back,
    judge_challengers,
    measure_gap,
)
from airflow_mlops.core.decision.evidence import RetrainingHistory, WindowEvidence
from airflow_mlops.core.decision.retraining import Outcome, RetrainingPolicy, decide_retraining
from airflow_mlops.core.windows import Window
from airflow_mlops.ledger import EntryKind, LedgerEntry
from airflow_mlops.steps.retraining import collect_evidence

POLICY = ChallengerPolicy()
FIRST = datetime(2020, 1, 1)
ROWS = 900


def window(number: int) -> Window:
    return Window(start=FIRST + timedelta(days=30 * number), end=FIRST + timedelta(days=30 * (number + 1)))


class World:
    """Models of a stream whose losses are known: by how many windows old a model is and how it was made."""

    def __init__(self, loss_at_age: Mapping[str, float], *, champion_age: int, seed: int = 0) -> None:
        self.slope = loss_at_age
        self.champion_age = champion_age
        self.noise = np.random.default_rng(seed)
        self.number = 20
        self.checks: list[ChallengerCheck] = []

    def live(
        self,
        *,
        level: float = 1.0,
        champion: str | None = None,
        extra: Mapping[str, float] | None = None,
        former: Sequence[str] = (),
    ) -> None:
        """Live through a window: the loss of a model is the level plus its recipe's slope times its age.

        :param former: champions of the past, the best one last.
        """
        now, hard = window(self.number), self.noise.normal(0.0, 0.2, ROWS)
        models = {f"{recipe}{self.number - age}": (recipe, age) for recipe in self.slope for age in (0, 1)}
        name = champion or f"{ALL}{20 - self.champion_age}"
        for version in (name, *former):
            recipe = ALL if version.startswith(ALL) else RECENT
            models[version] = (recipe, self.number - int(version.removeprefix(recipe)))
        losses = {
            version: level
            + self.slope[kind] * age
            + (extra or {}).get(version, 0.0)
            + hard
            + self.noise.normal(0.0, 0.05, ROWS)
            for version, (kind, age) in models.items()
        }
        newest = [f"{kind}{self.number}" for kind in self.slope]

        def contender(version: str) -> Contender:
            kind, age = models[version]
            until = now.start - timedelta(days=30 * age)
            return Contender(
                version=version, recipe=kind, trained_until=until, loss=float(losses[version].mean())
            )

        today = [version for version in models if version not in former]
        pairs = [(old, new) for old in today for new in newest if old != new]
        check = ChallengerCheck(
            window=now,
            row_count=ROWS,
            champion=name,
            simple_loss=3.0,
            contenders=tuple(map(contender, today)),
            gaps=(),
            earlier=tuple(map(contender, former)),
        )
        pairs += [(former[-1], check.best_today.version)] if former else []
        gaps = tuple(measure_gap(one, other, losses[one], losses[other]) for one, other in pairs)
        self.checks.append(replace(check, gaps=gaps))
        self.number += 1


class TestVerdict:
    def test_a_champion_that_ages_is_replaced_by_the_recipe_that_keeps_up(self) -> None:
        world = World({RECENT: 0.05, ALL: 0.1}, champion_age=3)
        world.live()
        verdict = judge_challengers(world.checks, POLICY)
        assert verdict.promote
        assert verdict.gain == pytest.approx(0.3, abs=0.02)
        assert "would lose 0.302 ± 0.003 in the next window" in verdict.reason

    def test_equal_models_are_left_alone(self) -> None:
        promoted = 0
        for seed in range(200):
            world = World({RECENT: 0.0, ALL: 0.0}, champion_age=3, seed=seed)
            world.live()
            promoted += judge_challengers(world.checks, POLICY).promote
        # Even what is beyond chance, one time in twenty, does not win back what a promotion has to.
        assert promoted == 0

    def test_what_was_lost_adds_up_until_it_pays_for_a_promotion(self) -> None:
        world = World({RECENT: 0.02, ALL: 0.021}, champion_age=1)
        promoted = []
        for _ in range(5):
            world.live()
            promoted.append(judge_challengers(world.checks, POLICY).promote)
        assert promoted[0] is False
        assert promoted[-1] is True

    def test_where_the_world_stands_still_it_does_not_add_up(self) -> None:
        # Rows alike: a model of recent rows is worse, and the champion is worse by as much as it has fewer rows.
        world = World({RECENT: 0.0, ALL: 0.0}, champion_age=4)
        for _ in range(8):
            recent = f"{RECENT}{world.number}"
            world.live(extra={recent: 0.1, f"{ALL}16": 0.08, f"{RECENT}{world.number - 1}": 0.1})
        verdict = judge_challengers(world.checks, POLICY)
        assert verdict.recipe == ALL
        assert verdict.gain == pytest.approx(0.08, abs=0.02)
        assert not verdict.promote

    def test_a_champion_that_is_the_newest_model_is_judged_by_what_age_cost_before(self) -> None:
        world = World({RECENT: 0.4, ALL: 0.4}, champion_age=2)
        world.live()
        world.live(champion=f"{RECENT}21")
        verdict = judge_challengers(world.checks, POLICY)
        assert verdict.promote
        assert verdict.gain == pytest.approx(0.4, abs=0.1)

    def test_a_difference_within_chance_is_said_to_be(self) -> None:
        world = World({RECENT: 0.0, ALL: 0.0}, champion_age=2, seed=3)
        world.live()
        check = replace(
            world.checks[0],
            gaps=tuple(replace(gap, mean=0.5, standard_error=1.0) for gap in world.checks[0].gaps),
        )
        verdict = judge_challengers([check], POLICY)
        assert not verdict.promote
        assert "not better than version all18 beyond chance" in verdict.reason

    def test_without_a_challenger_both_recipes_are_worth_a_training(self) -> None:
        alone = Contender(version="1", recipe=None, trained_until=FIRST, loss=1.0)
        check = ChallengerCheck(
            window=window(1), row_count=10, champion="1", simple_loss=2.0, contenders=(alone,), gaps=()
        )
        verdict = judge_challengers([check], POLICY)
        assert (verdict.promote, verdict.gain) == (False, None)
        assert set(verdict.train) == {RECENT, ALL}

    def test_a_recipe_far_behind_is_trained_seldom(self) -> None:
        world = World({RECENT: 0.0, ALL: 0.0}, champion_age=2)
        trained = []
        for _ in range(40):  # more than are looked back on
            world.live(extra={f"{ALL}{world.number}": 0.5})
            trained.append(judge_challengers(world.checks, POLICY).train)
        assert [ALL in names for names in trained] == [False, False, False, True] * 10
        assert all(RECENT in names for names in trained)

    def test_also_after_as_many_windows_as_a_decision_is_handed(self) -> None:
        """Their number stays the same from then on."""
        world = World({RECENT: 0.0, ALL: 0.0}, champion_age=2)
        world.live(extra={f"{ALL}{world.number}": 0.5})
        (check,), made_after, trained = world.checks, 0, []
        for number in range(1, 21):
            until = {RECENT: window(number).start, ALL: window(made_after).end}
            contenders = tuple(
                replace(one, trained_until=until[one.recipe or ALL])
                for one in check.contenders
                if one.version.endswith("20")
            )
            now = replace(check, window=window(number), contenders=contenders)
            names = judge_challengers([now] * (MOST_WINDOWS + 1), POLICY).train
            made_after = number if ALL in names else made_after
            trained.append(ALL in names)
        assert trained == [False, False, False, True] * 5

    def test_nothing_to_judge_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="no window has been compared"):
            judge_challengers([], POLICY)


class TestAlarm:
    def levels(self, *values: float) -> bool:
        world = World({RECENT: 0.0, ALL: 0.0}, champion_age=2)
        for value in values:
            world.live(level=value)
        return judge_challengers(world.checks, POLICY).alarm

    def test_a_jump_beyond_the_usual_ups_and_downs(self) -> None:
        assert self.levels(1.0, 1.1, 0.95, 1.05, 2.0)

    def test_a_jump_like_those_before_is_none(self) -> None:
        assert not self.levels(1.0, 1.6, 0.9, 1.5, 1.7)

    def test_three_windows_are_needed_to_know_what_is_usual(self) -> None:
        assert not self.levels(1.0, 1.01, 5.0)

    def test_getting_better_is_none(self) -> None:
        assert not self.levels(1.0, 1.1, 0.95, 1.05, 0.2)


class TestGap:
    def test_neighbors_that_err_alike_are_no_independent_evidence(self) -> None:
        noise = np.random.default_rng(0)
        alone = noise.normal(0.0, 1.0, 4_000)
        related = np.repeat(noise.normal(0.0, 1.0, 80), 50)
        zero = np.zeros(4_000)
        assert measure_gap("1", "2", alone, zero).standard_error == pytest.approx(1.0 / 4_000**0.5, rel=0.3)
        assert (
            measure_gap("1", "2", related, zero).standard_error or 0.0
        ) > 0.07  # of 80 independent values: 0.11

    def test_one_row_tells_nothing_for_sure(self) -> None:
        gap = measure_gap("1", "2", np.array([2.0]), np.array([1.0]))
        assert gap.mean == 1.0
        assert gap.standard_error is None


class TestDecision:
    def evidence(self, check: ChallengerCheck, *, degraded: bool = False) -> WindowEvidence:
        performance = {"measured": True, "degraded": degraded, "reason": "measured"}
        return WindowEvidence(
            window=check.window,
            performance=performance,
            drift=None,
            challengers=check,
            row_count=check.row_count,
        )

    def decide(
        self,
        world: World,
        *,
        since: datetime | None = None,
        degraded: bool = False,
        rows: int = ROWS,
        policy: RetrainingPolicy | None = None,
    ):
        found = [self.evidence(check, degraded=degraded) for check in world.checks]
        found[-1] = replace(found[-1], row_count=rows)
        return decide_retraining(
            found[-1:],
            RetrainingHistory(world_since=since),
            policy or RetrainingPolicy(),
            previous_checks=found[:-1],
        )[0]

    def test_a_promotion_trains_the_recipe_on_all_rows_until_now(self) -> None:
        world = World({RECENT: 0.05, ALL: 0.3}, champion_age=3)
        world.live()
        decision = self.decide(world)
        assert decision.outcome is Outcome.RETRAIN
        assert (decision.promote_on, decision.recipe) == ("predecessors", RECENT)
        assert decision.training is not None
        assert (decision.training.start, decision.training.end) == (None, world.checks[-1].window.end)
        assert decision.training.half_life_days == 30.0

    def test_after_a_change_older_windows_and_rows_are_left_out(self) -> None:
        world = World({RECENT: 0.05, ALL: 0.3}, champion_age=3)
        for _ in range(3):
            world.live()
        since = world.checks[1].window.start
        decision = self.decide(world, since=since)
        assert decision.training is not None
        assert decision.training.start == since

    @pytest.mark.parametrize(("fooled", "back"), [(1.3, True), (0.2, False)])
    def test_an_earlier_champion_that_does_much_better_again_comes_back(
        self, fooled: float, *, back: bool
    ) -> None:
        world = World({RECENT: 0.0, ALL: 0.0}, champion_age=2)
        for level in (1.0, 1.1, 1.0):
            world.live(level=level)
        today = dict.fromkeys((f"{ALL}18", f"{RECENT}23", f"{ALL}23"), fooled)
        world.live(extra={**today, f"{ALL}12": 0.1}, former=(f"{ALL}12", f"{ALL}15"))
        decision = self.decide(world)
        assert (decision.outcome is Outcome.BRING_BACK) is back
        if back:
            assert (decision.version, decision.champion_version) == (f"{ALL}15", f"{ALL}18")
            assert "what it knew is true again" in decision.reason
            assert decision.training is None
            assert decision.undoes_since is None
            unable = RetrainingPolicy(bring_back=False)
            assert self.decide(world, policy=unable).outcome is not Outcome.BRING_BACK

    def test_with_a_champion_from_before_a_change_the_change_is_over(self) -> None:
        world = World({RECENT: 0.0, ALL: 0.0}, champion_age=2)
        world.live(level=2.0)
        since = world.checks[0].window.start
        # Champion and newest models know the changed window alone; the former champion knows everything but that.
        knows = (f"{ALL}18", f"{RECENT}21", f"{ALL}21")
        world.live(extra=dict.fromkeys(knows, 1.3), former=(f"{ALL}17",))
        decision = self.decide(world, since=since)
        (former,) = world.checks[-1].earlier
        assert (decision.outcome, decision.undoes_since) == (Outcome.BRING_BACK, former.trained_until)
        assert decision.shadow == (RECENT, ALL)
        assert "the change of 2021-08-23 did not last" in decision.reason

    @pytest.mark.parametrize(("lasts", "returns"), [(1, 2), (4, 5)])
    def test_worlds_that_take_turns(self, lasts: int, returns: int) -> None:
        """Two champions know a world each; the newest models know both, and neither well."""
        world, champion = World({RECENT: 0.0, ALL: 0.0}, champion_age=8), f"{ALL}12"
        both, came = (f"{ALL}12", f"{ALL}15"), []
        for place in range(6 * lasts):
            other = place // lasts % 2
            newest = (f"{kind}{20 + place - age}" for kind in (RECENT, ALL) for age in (0, 1))
            loss = dict.fromkeys(newest, 0.8) | {both[1 - other]: 2.0}
            (former,) = set(both) - {champion}
            world.live(champion=champion, extra=loss, former=(former,))
            decision = self.decide(world)
            if decision.outcome is Outcome.BRING_BACK:
                champion = str(decision.version)
                came.append(place)
        assert len(came) == returns
        assert all(place % lasts == 0 for place in came)

    def test_what_it_lost_before_it_left_tells_nothing_of_a_champion_that_came_back(self) -> None:
        """It was beaten in another world; since it is back it is as good as any."""
        world = World({RECENT: 0.0, ALL: 0.0}, champion_age=8)
        world.live(extra={f"{ALL}12": 1.0})
        world.live(champion=f"{ALL}20")
        assert not judge_challengers(world.checks, POLICY).promote
        world.live()
        verdict = judge_challengers(world.checks, POLICY)
        assert not verdict.promote
        assert verdict.gain == pytest.approx(0.0, abs=0.02)

    def test_few_rows_tell_nothing_of_an_earlier_champion(self) -> None:
        world = World({RECENT: 0.0, ALL: 0.0}, champion_age=2)
        world.live(extra=dict.fromkeys((f"{ALL}18", f"{RECENT}20", f"{ALL}20"), 1.3), former=(f"{ALL}17",))
        check = world.checks[0]
        unsure = replace(check, gaps=tuple(replace(gap, standard_error=None) for gap in check.gaps))
        assert came_back([check], POLICY) is not None
        assert came_back([unsure], POLICY) is None

    def test_a_champion_of_one_window_does_not_come_back(self) -> None:
        """Its world was over when it came, and will be so again."""
        world = World({RECENT: 0.0, ALL: 0.0}, champion_age=2)
        world.live()
        fooled = dict.fromkeys((f"{ALL}21", f"{RECENT}21"), 1.3)
        world.live(champion=f"{ALL}21", extra=fooled, former=(f"{ALL}18",))
        assert self.decide(world).version == f"{ALL}18"
        world.live()
        today = dict.fromkeys((f"{ALL}18", f"{RECENT}23", f"{ALL}23"), 1.3)
        world.live(extra=today, former=(f"{ALL}21",))
        assert came_back(world.checks[-1:], POLICY) is not None
        assert self.decide(world).outcome is not Outcome.BRING_BACK

    def test_with_fewer_rows_it_has_to_be_surer(self) -> None:
        world = World({RECENT: 0.0, ALL: 0.0}, champion_age=2)
        world.live(extra=dict.fromkeys((f"{ALL}18", f"{RECENT}20", f"{ALL}20"), 1.3), former=(f"{ALL}17",))
        gaps = [replace(gap, standard_error=abs(gap.mean) / 3.0) for gap in world.checks[0].gaps]
        check = replace(world.checks[0], gaps=tuple(gaps))
        assert came_back([check], POLICY) is not None
        assert came_back([replace(check, row_count=100)], POLICY) is None  # four degrees of freedom

    def test_models_from_before_a_change_do_not_tell_how_fast_models_age_after_it(self) -> None:
        world = World({RECENT: 0.0, ALL: 0.0}, champion_age=2)
        world.live()
        world.live(champion=f"{ALL}21", extra={f"{RECENT}20": 1.3, f"{ALL}20": 1.3})
        check = world.checks[-1]
        # Champion and newest models were made after the window of the change; those before know nothing of it.
        since = min(one.trained_until for one in check.contenders)
        assert judge_challengers([check], POLICY).promote  # as if every window of age cost so much
        assert {one.version for one in check.after(since).contenders} == {f"{RECENT}21", f"{ALL}21"}
        assert self.decide(world, since=since).outcome is Outcome.NOTHING

    def test_an_alarm_asks_for_a_model_of_this_window_that_is_tested(self) -> None:
        world = World({RECENT: 0.0, ALL: 0.0}, champion_age=2)
        for level in (1.0, 1.1, 0.95, 1.05, 2.0):
            world.live(level=level)
        decision = self.decide(world, rows=5_000)
        assert (decision.outcome, decision.promote_on) == (Outcome.RETRAIN, "held_out")
        assert decision.training is not None
        assert decision.training.start == world.checks[-1].window.start
        few = self.decide(world, rows=500)
        assert few.training is not None
        assert few.training.start is None

    def test_an_alarm_takes_nothing_from_a_model_that_has_earned_its_promotion(self) -> None:
        """Where the window has too few rows to learn from alone, the same rows are used either way."""
        world = World({RECENT: 0.05, ALL: 0.3}, champion_age=3)
        for level in (1.0, 1.1, 0.95, 1.05, 2.0):
            world.live(level=level)
        few, many = self.decide(world, rows=500), self.decide(world, rows=5_000)
        assert (few.promote_on, few.recipe) == ("predecessors", RECENT)
        assert few.training is not None
        assert few.training.holdout_start is None
        assert many.promote_on == "held_out"

    def test_degraded_and_nothing_better_is_an_alert(self) -> None:
        world = World({RECENT: 0.0, ALL: 0.0}, champion_age=2)
        for _ in range(4):
            world.live()
        assert self.decide(world, degraded=True).outcome is Outcome.ALERT
        assert self.decide(world).outcome is Outcome.NOTHING

    @pytest.mark.parametrize("levels", [(1.6, 1.6, 1.6), (1.6, 1.6), (1.6, 1.0), (1.6, 1.6, 1.0)])
    def test_an_alarm_is_heard_when_labels_of_several_windows_come_at_once(
        self, levels: tuple[float, ...]
    ) -> None:
        """All of them keep what was promised for a harder season. Where the world is the old one in the last, nothing happens."""
        world = World({RECENT: 0.0, ALL: 0.0}, champion_age=2)
        usual = (1.0, 1.1, 0.92, 1.06, 0.95, 1.1)
        for level in (*usual, *levels):
            world.live(level=level)
        found = [self.evidence(check) for check in world.checks]
        decisions = decide_retraining(
            found[len(usual) :],
            RetrainingHistory(),
            RetrainingPolicy(),
            previous_checks=found[: len(usual)],
        )
        trained = [decision.window for decision in decisions if decision.outcome is Outcome.RETRAIN]
        assert trained == ([found[len(usual)].window] if levels[-1] == 1.6 else [])

    def test_degraded_before_it_is_known_what_is_usual_is_an_alarm(self) -> None:
        world = World({RECENT: 0.0, ALL: 0.0}, champion_age=2)
        world.live()
        decision = self.decide(world, degraded=True, rows=5_000)
        assert (decision.outcome, decision.promote_on) == (Outcome.RETRAIN, "held_out")

    def test_where_nothing_was_compared_the_other_checks_decide(self) -> None:
        found_in = window(0)
        payloads = {
            EntryKind.CHALLENGER_CHECK: {"check": None, "reason": "not compared"},
            EntryKind.PERFORMANCE_CHECK: {
                "measured": False,
                "awaits_labels": False,
                "reason": "a new champion",
                "row_count": 0,
            },
        }
        checks = [
            LedgerEntry(
                kind=kind,
                key="fares",
                model_name="fares",
                window=found_in,
                subject=None,
                summary="",
                payload=payload,
                actor="test",
                recorded_at=found_in.end,
            )
            for kind, payload in payloads.items()
        ]
        found = collect_evidence(found_in, checks, found_in.end)
        assert found.challengers is None
        (decision,) = decide_retraining([found], RetrainingHistory(), RetrainingPolicy())
        assert decision.outcome is Outcome.NOTHING

    def test_a_check_survives_the_ledger(self) -> None:
        world = World({RECENT: 0.0, ALL: 0.0}, champion_age=2)
        world.live()
        assert from_dict(ChallengerCheck, to_dict(world.checks[0])) == world.checks[0]
        assert isinstance(world.checks[0].gaps[0], Gap)

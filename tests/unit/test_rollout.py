"""Rollouts as decisions: the desired state, the routes, the state machine, the comparison of versions."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.core.rollouts.canary import (
    Analysis,
    CanaryPolicy,
    Finding,
    analyze,
    clearly_better,
    compare_losses,
)
from airflow_mlops.core.rollouts.desired_state import DesiredState, ServedVersion, serve_alone
from airflow_mlops.core.rollouts.mean_losses import (
    EstimatedLoss,
    Losses,
    PairedLosses,
    losses_of,
    paired_losses_of,
)
from airflow_mlops.core.rollouts.observations import (
    AnswerCells,
    Observations,
    VersionObservations,
    count_times,
    merge_observations,
    time_quantile,
)
from airflow_mlops.core.rollouts.rollout import (
    MOST_RESTARTS,
    RolloutEvent,
    action_after,
    next_action,
    phase_state,
    plan_rollout,
    state_after,
)
from airflow_mlops.core.rollouts.two_samples import more_often, rank_test
from airflow_mlops.exceptions import RolloutError, SchemaMismatchError
from airflow_mlops.integrations import delta
from airflow_mlops.serving.lease import end_lease, grant_lease, read_lease, renew_lease
from airflow_mlops.serving.reconciler import LiveVersion, Reconciler, Routes, workers_behind
from airflow_mlops.steps.rollouts.quality import QualitySpec, losses_with_labels
from airflow_mlops.steps.rollouts.spec import RolloutSpec
from tests.packages import build_package

START = datetime(2024, 1, 1, tzinfo=UTC)
ONE = serve_alone(None, model_name="m", model_version="1", package_digest="sha256:1")
TWO = ServedVersion(model_version="2", package_digest="sha256:2")


def state(*shares: float, **changes: object) -> DesiredState:
    versions = tuple(
        ServedVersion(model_version=str(number), package_digest=f"sha256:{number}", share=share)
        for number, share in enumerate(shares, 1)
    )
    return DesiredState(
        **{"model_name": "m", "versions": versions, "previous_version": None, "revision": 1, **changes}
    )  # type: ignore[arg-type]


def routes(desired: DesiredState) -> Routes:
    model: Any = None  # which version answers does not depend on it
    return Routes(
        desired,
        {
            one.model_version: LiveVersion(
                model_version=one.model_version, package_digest=one.package_digest, model=model
            )
            for one in desired.versions
        },
    )


class TestDesiredState:
    @pytest.mark.parametrize(
        ("shares", "changes", "words"),
        [
            ((0.5, 0.4), {}, "add up to 1"),
            ((1.5, -0.5), {}, "must not be negative"),
            ((), {}, "one at least"),
            ((1.0,), {"mirror": "9"}, "mirror is version '9'"),
            ((1.0,), {"model_name": "../m"}, "plain file names"),
        ],
    )
    def test_what_makes_no_sense_is_refused(
        self, shares: tuple[float, ...], changes: dict, words: str
    ) -> None:
        with pytest.raises(ValueError, match=words):
            state(*shares, **changes)

    def test_it_comes_back_as_it_was_written(self) -> None:
        desired = state(0.75, 0.25, mirror="2", sticky=True, leased=True, rollout="a/b/c")
        assert DesiredState.from_bytes(desired.to_bytes()) == desired

    def test_the_version_before_is_the_one_that_served_alone(self) -> None:
        second = serve_alone(ONE, model_name="m", model_version="2", package_digest="sha256:2")
        assert (second.previous_version, second.revision) == ("1", 2)
        assert serve_alone(second, model_name="m", model_version="2", package_digest="sha256:2") is second
        canary = phase_state(
            second,
            plan_rollout("canary"),
            plan_rollout("canary").phases[0],
            ServedVersion(model_version="3", package_digest="sha256:3"),
            rollout="r",
        )
        back = serve_alone(canary, model_name="m", model_version="2", package_digest="sha256:2")
        assert (back.previous_version, back.revision) == ("1", 4)


class TestRoutes:
    def test_shares_are_kept(self) -> None:
        split = routes(state(0.9, 0.1, leased=True))
        chosen = [split.choose().model_version for _ in range(20_000)]
        assert chosen.count("2") / len(chosen) == pytest.approx(0.1, abs=0.015)

    @given(small=st.floats(0.01, 0.5), more=st.floats(0.01, 0.45))
    @settings(max_examples=20)
    def test_a_share_that_grows_takes_nobody_back(self, small: float, more: float) -> None:
        before = routes(state(1 - small, small, sticky=True))
        after = routes(state(1 - small - more, small + more, sticky=True))
        keys = [f"caller {number}".encode() for number in range(300)]
        had = {key for key in keys if before.choose(key).model_version == "2"}
        has = {key for key in keys if after.choose(key).model_version == "2"}
        assert had <= has
        assert all(before.choose(key) is before.choose(key) for key in keys)

    def test_the_stable_version_is_what_is_left(self) -> None:
        desired = state(0.5, 0.5, leased=True, mirror="2")
        assert {routes(desired.fallback).choose().model_version for _ in range(100)} == {"1"}
        assert desired.fallback.mirror is None


class TestLease:
    def test_what_ran_out_stays_so(self, tmp_path: Path) -> None:
        grant_lease(tmp_path, 3, 60.0)
        renew_lease(tmp_path, 3, 90.0)
        lease = read_lease(tmp_path)
        assert lease is not None
        assert lease.valid
        with pytest.raises(RolloutError, match="revision 2 is not being rolled out"):
            renew_lease(tmp_path, 2, 60.0)
        end_lease(tmp_path, 3)
        with pytest.raises(RolloutError, match="ran out"):
            renew_lease(tmp_path, 3, 60.0)

    def test_a_file_that_is_none_is_no_lease(self, tmp_path: Path) -> None:
        (tmp_path / "lease.json").write_text('{"revision": 1}')
        assert read_lease(tmp_path) is None


class TestReconciler:
    @pytest.fixture
    def digests(self, tmp_path: Path) -> dict[str, str]:
        return {name: build_package(tmp_path / "models" / "m" / name) for name in ("1", "2")}

    def test_what_could_not_be_loaded_is_tried_again_and_said_meanwhile(
        self, tmp_path: Path, digests: dict[str, str]
    ) -> None:
        one = serve_alone(None, model_name="m", model_version="1", package_digest=digests["1"])
        (tmp_path / "desired.json").write_bytes(one.to_bytes())
        looks = Reconciler(tmp_path)
        looks.reconcile()
        (tmp_path / "models" / "m" / "2").rename(tmp_path / "elsewhere")
        two = serve_alone(one, model_name="m", model_version="2", package_digest=digests["2"])
        (tmp_path / "desired.json").write_bytes(two.to_bytes())
        for _ in range(3):
            looks.reconcile()
            assert "no such folder" in str(looks.error)
            assert looks.routes is not None
            assert looks.routes.state.stable.model_version == "1"
        (tmp_path / "elsewhere").rename(tmp_path / "models" / "m" / "2")
        deadline = time.monotonic() + 10
        while looks.error and time.monotonic() < deadline:
            looks.reconcile()
        assert (looks.error, looks.routes.state.stable.model_version) == (None, "2")
        assert workers_behind(tmp_path, two.revision) is None
        assert workers_behind(tmp_path, 7) == f"workers {os.getpid()} do not serve it yet"
        with_another = Reconciler(tmp_path, workers=2)
        with_another.reconcile()
        assert workers_behind(tmp_path, two.revision) == "1 of 2 workers have started"

    def test_a_worker_that_starts_serves_the_stable_version_at_least(
        self, tmp_path: Path, digests: dict[str, str]
    ) -> None:
        both = DesiredState(
            model_name="m",
            versions=(
                ServedVersion(model_version="1", package_digest=digests["1"], share=0.5),
                ServedVersion(model_version="2", package_digest="sha256:" + "0" * 64, share=0.5),
            ),
            leased=True,
            previous_version=None,
            revision=2,
        )
        (tmp_path / "desired.json").write_bytes(both.to_bytes())
        grant_lease(tmp_path, 2, 60.0)
        looks = Reconciler(tmp_path)
        looks.reconcile()
        assert looks.routes is not None
        assert [one.model_version for one in looks.routes.state.versions] == ["1"]
        assert "this is not the package that was registered" in str(looks.error)

    def test_from_phase_to_phase_both_versions_answer(self, tmp_path: Path, digests: dict[str, str]) -> None:
        served: list[tuple[int, list[float], str | None]] = []

        def note(routes: Routes) -> None:
            shares = [one.share for one in routes.state.versions]
            served.append((routes.state.revision, shares, routes.fell_back))

        def desire(revision: int, share: float) -> None:
            versions = tuple(
                ServedVersion(model_version=name, package_digest=digests[name], share=part)
                for name, part in (("1", 1.0 - share), ("2", share))
            )
            desired = state(revision=revision, leased=True, rollout="r", versions=versions)
            (tmp_path / "desired.json").write_bytes(desired.to_bytes())

        looks = Reconciler(tmp_path, on_change=note)
        grant_lease(tmp_path, 2, 60.0)
        desire(2, 0.05)
        looks.reconcile()
        grant_lease(tmp_path, 3, 60.0)  # the next phase's begins before it is served
        looks.reconcile()
        desire(3, 0.25)
        looks.reconcile()
        assert served == [(2, [0.95, 0.05], None), (3, [0.75, 0.25], None)]
        end_lease(tmp_path, 3)
        looks.reconcile()
        assert "nobody steers" in str(served[-1])
        grant_lease(tmp_path, 2, 60.0)  # that of a phase that is over steers nothing
        looks.reconcile()
        assert "nobody steers" in str(looks.error)

    def test_whoever_looks_on_does_not_end_it(self, tmp_path: Path, digests: dict[str, str]) -> None:
        def fails(routes: Routes) -> None:
            raise OSError("too many open files")

        desired = serve_alone(None, model_name="m", model_version="1", package_digest=digests["1"])
        (tmp_path / "desired.json").write_bytes(desired.to_bytes())
        looks = Reconciler(tmp_path, on_change=fails)
        looks.reconcile()
        assert looks.routes is not None
        (tmp_path / "lease.json").mkdir()  # a lease that can't be read: nobody steers
        assert read_lease(tmp_path) is None


class TestPlan:
    @pytest.mark.parametrize("seconds", [0.0, -1.0, 3_601.0, float("nan")])
    def test_a_lease_that_no_service_grants_is_refused(self, seconds: float) -> None:
        with pytest.raises(ValueError, match=r"lease_seconds=.*: above 0 and at most 3600 are needed"):
            RolloutSpec(
                name="r",
                plan=plan_rollout("canary"),
                policy=CanaryPolicy(),
                actor="test",
                lease_seconds=seconds,
            )

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"strategy": "slowly"}, "strategy 'slowly' is none of"),
            ({"strategy": "canary", "shares": [0.5, 0.2]}, "each larger than the one before"),
            ({"strategy": "canary", "shares": [0.5, 1.0]}, "below 1"),
            ({"strategy": "ab", "shares": []}, "above 0"),
            ({"strategy": "ab", "shares": [0.01]}, "share 0.01 of an A/B test: from 0.03"),
            ({"strategy": "canary", "looks": 0}, "looks=0"),
            ({"strategy": "canary", "patience": 0.5}, "patience=0.5"),
        ],
    )
    def test_what_is_no_plan_is_refused(self, arguments: dict, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            plan_rollout(**arguments)


def analysis(judgement: str) -> Analysis:
    return Analysis(judgement=judgement, findings=(), sentence=f"it is {judgement}")  # type: ignore[arg-type]


def live(
    judgements: list[str], *, strategy: str = "canary", kills: list[int] | None = None
) -> tuple[list[RolloutEvent], str]:
    """Live through a rollout on a clock of its own; ``kills``: events after which whoever steers is gone for a while."""
    plan = plan_rollout(strategy, seconds=600.0)  # type: ignore[arg-type]
    now, events, left, kills = START, [], list(judgements), list(kills or [])
    steered = True

    def note(what: str, phase: int, found: Analysis | None = None, then: str | None = None) -> None:
        events.append(
            RolloutEvent(
                number=len(events) + 1,
                what=what,
                phase=phase,
                revision=len(events),
                at=now,
                analysis=found,
                then=then,
                reason=what,
            )  # type: ignore[arg-type]
        )

    for _ in range(200):
        if kills and len(events) >= kills[0]:
            kills.pop(0)
            steered, now = False, now + timedelta(seconds=120)
        current = state_after(events)
        action = next_action(plan, current, now=now, steered=steered)
        if action.what == "look":
            found = analysis(left.pop(0) if left else "fine")
            action = action_after(plan, current, found, now=now)
            note("looked", current.phase, found)
        if action.what == "enter":
            note("entered", action.phase)
            steered = True
        elif action.what == "wait":
            assert action.until is not None
            assert action.until >= now
            now = action.until
        elif action.what in ("finish", "roll_back"):
            note("finished" if action.what == "finish" else "rolled_back", current.phase)
            return events, action.reason
    raise AssertionError("it never ends")


class TestStateMachine:
    def test_all_fine_goes_through_every_phase(self) -> None:
        events, _ = live([])
        assert [event.phase for event in events if event.what == "entered"] == [0, 1, 2]
        assert [event.what for event in events].count("looked") == 6
        assert events[-1].what == "finished"
        assert events[-1].at - START == timedelta(seconds=1800)

    @pytest.mark.parametrize("look", range(6))
    def test_one_bad_look_ends_it(self, look: int) -> None:
        events, reason = live(["fine"] * look + ["worse"])
        assert events[-1].what == "rolled_back"
        assert [event.what for event in events].count("looked") == look + 1
        assert reason == "it is worse"

    def test_without_data_it_waits_and_then_fails(self) -> None:
        events, reason = live(["no data"] * 100)
        assert events[-1].what == "rolled_back"
        assert "not enough to judge it by" in reason
        assert events[-1].at - START == timedelta(seconds=1800)  # three times the phase

    def test_data_that_comes_late_is_looked_at_as_often(self) -> None:
        events, _ = live(["no data"] * 3)
        judged = [event for event in events if event.analysis and event.analysis.judgement == "fine"]
        assert (len(judged), events[-1].what) == (6, "finished")

    @given(
        st.lists(st.sampled_from(["fine", "fine", "fine", "no data", "worse"]), max_size=12),
        st.lists(st.integers(1, 14), max_size=4).map(sorted),
        st.sampled_from(["canary", "shadow", "blue_green", "ab"]),
    )
    @settings(max_examples=150)
    def test_whatever_happens_it_ends(self, judgements: list[str], kills: list[int], strategy: str) -> None:
        events, _ = live(judgements, strategy=strategy, kills=kills)
        ended = state_after(events)
        assert ended.status in {"finished", "rolled_back"}
        worse = any(event.analysis and event.analysis.judgement == "worse" for event in events)
        assert (ended.status == "rolled_back") >= worse
        if ended.status == "finished":
            # Every phase passed, with as many looks as were planned since it was entered last.
            plan = plan_rollout(strategy, seconds=600.0)  # type: ignore[arg-type]
            for phase in range(len(plan.phases)):
                mine = [
                    event for event in events if event.phase == phase and event.what in ("entered", "looked")
                ]
                last = max(number for number, event in enumerate(mine) if event.what == "entered")
                told = [e for e in mine[last + 1 :] if e.analysis and e.analysis.judgement == "fine"]
                assert len(told) == plan.looks
        assert next_action(plan_rollout(strategy), ended, now=START, steered=True).what == "none"  # type: ignore[arg-type]

    def test_what_was_condemned_is_taken_back_by_whoever_comes_next(self) -> None:
        events = [
            RolloutEvent(number=1, what="entered", phase=0, revision=2, at=START, reason=""),
            RolloutEvent(
                number=2,
                what="looked",
                phase=0,
                at=START,
                analysis=analysis("worse"),
                then="roll_back",
                reason="bad",
            ),
        ]
        for steered in (True, False):
            action = next_action(plan_rollout("canary"), state_after(events), now=START, steered=steered)
            assert (action.what, action.reason) == ("roll_back", "bad")

    @pytest.mark.parametrize("entered", [True, False])
    def test_what_was_to_be_stopped_is_stopped_by_whoever_comes_next(self, entered: bool) -> None:
        begun = RolloutEvent(number=1, what="entered", phase=0, revision=2, at=START, reason="")
        told = RolloutEvent(number=2, what="stopping", phase=0, at=START, then="roll_back", reason="killed")
        after = state_after([begun, told] if entered else [replace(told, number=1)])
        assert (after.status, after.revision) == ("running", 2 if entered else None)
        for steered in (True, False):
            action = next_action(plan_rollout("canary"), after, now=START, steered=steered)
            assert (action.what, action.reason) == ("roll_back", "killed")

    def test_nobody_steers_for_ever(self) -> None:
        plan = plan_rollout("canary")
        events = [
            RolloutEvent(number=number, what="entered", phase=0, revision=number, at=START, reason="")
            for number in range(1, MOST_RESTARTS + 2)
        ]
        assert next_action(plan, state_after(events), now=START, steered=False).what == "roll_back"
        assert next_action(plan, state_after(events[:-1]), now=START, steered=False).what == "enter"

    def test_events_come_back_from_json(self) -> None:
        events, _ = live(["no data", "fine", "worse"])
        again = [from_dict(RolloutEvent, json.loads(json.dumps(to_dict(event)))) for event in events]
        assert again == events


CELLS = AnswerCells(edges=tuple(np.linspace(0.0, 10.0, 11).tolist()))


def seen(
    requests: int, *, failed: int = 0, seconds: float = 0.002, center: float = 5.0, seed: int = 0
) -> VersionObservations:
    random = np.random.default_rng(seed)
    answered = requests - failed
    return VersionObservations(
        requests=requests,
        failed=failed,
        rows=answered,
        times=tuple(count_times(seconds * np.exp(random.normal(0.0, 0.5, answered))).tolist()),
        answers=tuple(CELLS.counts(random.normal(center, 2.0, answered).tolist()).tolist()),
    )


def compare(stable: VersionObservations, new: VersionObservations, **how: object) -> Analysis:
    both = Observations(revision=1, cells=CELLS, versions={"1": stable, "2": new})
    asked = {"looks": 6, "policy": CanaryPolicy(), **how}
    return analyze(both, stable="1", new="2", **asked)  # type: ignore[arg-type]


def finding(found: Analysis, metric: str) -> Finding:
    return next(one for one in found.findings if one.metric == metric)


class TestPairs:
    """The same requests, answered by both."""

    def both(self, count: int, *, gap: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(seed)
        hard = random.gamma(2.0, 5.0, count)  # what is hard for one is hard for the other
        return hard + random.normal(0.0, 0.5, count), hard * (1.0 + gap) + random.normal(0.0, 0.5, count)

    def test_it_is_the_paired_test(self) -> None:
        stable, new = self.both(300, gap=0.1)
        pairs = paired_losses_of(stable, new, [None] * 300)
        found = finding(compare(seen(2000), seen(2000, seed=1), losses=pairs), "quality")
        expected = stats.ttest_1samp(new - 1.05 * stable, 0.0, alternative="greater").pvalue
        assert found.p_value == pytest.approx(expected, rel=1e-6)
        assert found.better_p_value == pytest.approx(
            stats.ttest_rel(stable, new, alternative="greater").pvalue
        )

    def test_a_pair_shows_what_two_samples_hide(self) -> None:
        stable, new = self.both(300, gap=0.1)
        alone = (losses_of(stable, [None] * 300), losses_of(new, [None] * 300))
        judged = [
            finding(compare(seen(2000), seen(2000, seed=1), losses=losses), "quality").judgement
            for losses in (paired_losses_of(stable, new, [None] * 300), alone)
        ]
        assert judged == ["worse", "fine"]

    def test_rows_of_one_request_count_as_one(self) -> None:
        stable, new = self.both(60, gap=0.3)
        pairs = paired_losses_of(stable.repeat(10), new.repeat(10), np.arange(60).repeat(10).tolist())
        assert pairs.stable.count == 60
        assert pairs.covariance == pytest.approx(np.cov(stable, new)[0, 1])
        found = finding(compare(seen(2000), seen(2000), losses=pairs), "quality")
        assert (found.judgement, found.sentence) == (
            "no data",
            "60 requests that both versions answered have labels, 200 are needed",
        )

    def test_a_name_that_looks_like_a_row_is_none(self) -> None:
        assert losses_of(np.arange(4.0), ["1", "", None, "1"]).count == 3

    def test_a_few_that_are_wrong_prove_nothing(self) -> None:
        stable, new = np.zeros(400), np.zeros(400)
        stable[:3], new[:10] = 1.0, 1.0
        pairs = paired_losses_of(stable, new, [None] * 400)
        assert pairs.one_wrong == (0, 7)
        found = finding(compare(seen(2000), seen(2000, seed=1), losses=pairs), "quality")
        assert found.p_value is not None
        assert found.p_value >= 0.5**7  # McNemar's
        assert found.judgement == "fine"

    @pytest.mark.parametrize("kind", ["numbers", "labels"])
    def test_what_is_just_tolerated_is_rarely_stopped(self, kind: str) -> None:
        level, stopped = 0.02 / 5 / 6, 0
        random = np.random.default_rng(0)
        for seed in range(1_000):
            if kind == "numbers":
                stable, new = self.both(300, gap=0.05, seed=seed)
            else:
                stable = (random.random(300) < 0.2).astype(float)
                new = np.where(random.random(300) < 0.9, stable, random.random(300) < 0.3)
            pairs = paired_losses_of(stable, new.astype(float), [None] * 300)
            found = finding(compare(seen(300), seen(300), losses=pairs), "quality")
            stopped += found.p_value is not None and found.p_value < 10 * level
        assert stopped / 1_000 < 2 * 10 * level

    def test_versions_that_answer_alike_are_fine(self) -> None:
        stable, _ = self.both(300)
        pairs = paired_losses_of(stable, stable, [None] * 300)
        assert finding(compare(seen(300), seen(300), losses=pairs), "quality").judgement == "fine"


def answered_by(ids: list[str], answers: dict[str, list[Any]]) -> pl.DataFrame:
    """Give what the log holds of requests that every version answered."""
    return pl.concat(
        pl.DataFrame(
            {
                "prediction_id": ids,
                "request_id": ids,
                "model_version": version,
                "prediction": given,
                "received_at": START,
            }
        )
        for version, given in answers.items()
    )


@pytest.mark.parametrize("mirrored", [True, False])
def test_labels_of_another_type_are_not_all_wrong(tmp_path: Path, mirrored: bool) -> None:
    """A table that once held a missing label has 1.0 for 1: read as it is, both versions would be wrong on every row, and alike."""
    ids = [str(number) for number in range(4)]
    truth = pl.DataFrame({"id": ids, "y": [1.0, 0.0, None, 1.0], "t": [START] * 4})
    delta.replace_window(str(tmp_path / "labels"), truth, time_column="t", window=None)
    answered = answered_by(ids, {"1": ["1", "0", "1", "0"], "2": ["0", "0", "1", "0"]})
    quality = QualitySpec(labels=str(tmp_path / "labels"), id_column="id", target="y", metric="accuracy")
    how = {"stable": "1", "new": "2", "mirrored": mirrored, "sticky": False, "classes": ("0", "1")}
    losses = losses_with_labels(quality, answered, **how)  # type: ignore[arg-type]
    one, other = (losses.stable, losses.new) if isinstance(losses, PairedLosses) else losses
    assert (one.count, one.mean) == (3, pytest.approx(1 / 3))
    assert (other.count, other.mean) == (3, pytest.approx(2 / 3))
    with pytest.raises(SchemaMismatchError, match="the model answers yes, no"):
        losses_with_labels(quality, answered, **{**how, "classes": ("yes", "no")})  # type: ignore[arg-type]


@pytest.mark.parametrize("mirrored", [True, False])
def test_labels_and_answers_that_are_no_finite_numbers_are_left_out_and_said(
    tmp_path: Path, mirrored: bool
) -> None:
    ids = [str(number) for number in range(4)]
    truth = pl.DataFrame({"id": ids, "y": [float("inf"), 1.0, 2.0, 3.0], "t": [START] * 4})
    delta.replace_window(str(tmp_path / "labels"), truth, time_column="t", window=None)
    answered = answered_by(ids, {"1": [0.0, 1.0, 2.0, 4.0], "2": [0.0, float("nan"), 3.0, 4.0]})
    quality = QualitySpec(labels=str(tmp_path / "labels"), id_column="id", target="y", metric="mae")
    losses = losses_with_labels(quality, answered, stable="1", new="2", mirrored=mirrored, sticky=False)
    one, other = (losses.stable, losses.new) if isinstance(losses, PairedLosses) else losses
    assert (one.count, one.left_out) == (2 if mirrored else 3, 1)
    assert (other.count, other.mean, other.left_out) == (2, 1.0, 2)
    said = compare_losses(losses, CanaryPolicy(minimum_requests=2), 0.01).sentence
    assert "; 2 answers of the new version and 1 of the stable one are left out" in said


@pytest.mark.parametrize("mirrored", [True, False])
def test_labels_are_read_once_for_both_versions(
    tmp_path: Path, mirrored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [str(number) for number in range(4)]
    truth = pl.DataFrame({"id": ids[:3], "y": [1.0, 2.0, 3.0], "t": [START] * 3})
    delta.replace_window(str(tmp_path / "labels"), truth, time_column="t", window=None)
    read: list[str] = []

    def read_table(uri: str, **how: Any) -> pl.LazyFrame:
        read.append(uri)
        return delta.reading.read_table(uri, **how)

    monkeypatch.setattr(delta, "read_table", read_table)
    answered = answered_by(ids, {"1": [1.0, 2.0, 3.0, 4.0], "2": [2.0, 3.0, 4.0, 5.0], "0": [9.0] * 4})
    quality = QualitySpec(labels=str(tmp_path / "labels"), id_column="id", target="y", metric="mae")
    losses = losses_with_labels(quality, answered, stable="1", new="2", mirrored=mirrored, sticky=False)
    one, other = (losses.stable, losses.new) if isinstance(losses, PairedLosses) else losses
    assert ((one.count, one.mean), (other.count, other.mean)) == ((3, 0.0), (3, 1.0))
    assert len(read) == 1


@pytest.mark.parametrize("nobody", [None, ""])
def test_rows_of_a_caller_or_else_of_a_request_count_once(tmp_path: Path, nobody: str | None) -> None:
    """In an A/B test: who names no caller is drawn anew with each request, and not with each row of it."""
    ids = [str(number) for number in range(9)]
    truth = pl.DataFrame({"id": ids, "y": [0.0] * 9, "t": [START] * 9})
    delta.replace_window(str(tmp_path / "labels"), truth, time_column="t", window=None)
    asked = pl.DataFrame(
        {
            "prediction_id": ids,
            "request_id": [*"aaaabbcde"],
            "caller": [nobody] * 6 + ["anna"] * 3,
            "received_at": START,
        }
    )
    answered = pl.concat(
        asked.with_columns(model_version=pl.lit(version), prediction=answers)
        for version, answers in (
            ("1", pl.Series([0.0] * 9)),
            ("2", pl.Series([1.0] * 4 + [3.0] * 2 + [5.0] * 3)),
        )
    )
    quality = QualitySpec(labels=str(tmp_path / "labels"), id_column="id", target="y", metric="mae")
    for sticky, count in ((True, 3), (False, 5)):
        losses = losses_with_labels(quality, answered, stable="1", new="2", mirrored=False, sticky=sticky)
        assert not isinstance(losses, PairedLosses)
        assert losses[1].count == count
    assert (
        losses_with_labels(quality, answered, stable="1", new="2", mirrored=False, sticky=True)[1].mean == 3.0
    )  # type: ignore[index]


class TestEstimates:
    def estimated(self, mean: float, *, deviation: float = 0.02, count: int = 500) -> EstimatedLoss:
        return EstimatedLoss(metric="mae", count=count, mean=mean, deviation=deviation, folds=8)

    def compared(self, stable: EstimatedLoss, new: EstimatedLoss, **how: object) -> Analysis:
        return compare(seen(2000), seen(500, seed=1), share=0.2, estimates=(stable, new), **how)

    def test_what_is_plainly_worse_is_stopped_and_says_that_it_is_an_estimate(self) -> None:
        found = self.compared(self.estimated(1.0), self.estimated(2.0))
        assert found.judgement == "worse"
        assert found.sentence.startswith(
            "without labels, the new version's mean loss (mae) is estimated to be 2"
        )
        assert not clearly_better(found, CanaryPolicy())

    @pytest.mark.parametrize(("mean", "deviation"), [(1.05, 0.001), (1.2, 0.05), (2.0, 0.4)])
    def test_what_may_be_an_error_of_the_estimate_is_not(self, mean: float, deviation: float) -> None:
        assert (
            self.compared(self.estimated(1.0), self.estimated(mean, deviation=deviation)).judgement == "fine"
        )

    def test_it_proves_nothing_good(self) -> None:
        found = self.compared(self.estimated(1.0), self.estimated(0.1))
        assert finding(found, "estimate").better_p_value is None
        assert not clearly_better(found, CanaryPolicy())

    def test_labels_go_before_it(self) -> None:
        known = Losses(count=300, mean=1.0, variance=1.0)
        found = self.compared(self.estimated(1.0), self.estimated(2.0), losses=(known, known))
        assert found.judgement == "fine"
        assert "estimate" not in {one.metric for one in found.findings}

    def test_it_stops_what_waits_for_labels_and_lets_nothing_pass(self) -> None:
        unknown = Losses(), Losses()
        assert self.compared(self.estimated(1.0), self.estimated(2.0), losses=unknown).judgement == "worse"
        assert self.compared(self.estimated(1.0), self.estimated(0.9), losses=unknown).judgement == "no data"

    def test_of_too_few_there_is_none_and_none_is_missed(self) -> None:
        found = self.compared(self.estimated(1.0), self.estimated(2.0, count=199))
        assert found.judgement == "fine"
        assert "estimate" not in {one.metric for one in found.findings}

    def test_it_takes_half_of_what_is_there_for_quality(self) -> None:
        """Losses that are just beyond chance at the whole level are not at half of it."""
        level = 0.02 / 5 / 6
        gap = stats.t.isf(0.75 * level, 798) * (1 + 1.05**2) ** 0.5 / 20.0
        losses = Losses(count=400, mean=1.0, variance=1.0), Losses(count=400, mean=1.05 + gap, variance=1.0)
        alone = compare(seen(2000), seen(500, seed=1), share=0.2, losses=losses)
        beside = self.compared(self.estimated(1.0), self.estimated(1.0), losses=losses)
        assert [finding(one, "quality").judgement for one in (alone, beside)] == ["worse", "fine"]

    @pytest.mark.parametrize("off", [0.05, 0.2, 0.4])
    def test_estimates_that_are_off_as_they_were_stop_nothing_that_is_tolerated(self, off: float) -> None:
        """How far they are off is known from eight stretches only; Student's distribution allows for that."""
        random = np.random.default_rng(0)
        one, other, level, stopped = seen(300), seen(300, seed=1), 0.01, 0
        for _ in range(1_000):
            pair = [
                self.estimated(
                    mean * max(0.01, 1.0 + random.normal(0.0, off)),
                    deviation=mean * off * float(np.sqrt(random.chisquare(7) / 7)),
                )
                for mean in (1.0, 1.05)
            ]
            found = compare(one, other, share=0.5, estimates=tuple(pair))
            p_value = finding(found, "estimate").p_value
            assert p_value is not None
            stopped += p_value < level
        assert stopped / 1_000 < 2 * level


class TestAnalysis:
    def test_equal_versions_are_fine(self) -> None:
        found = compare(seen(2000), seen(500, seed=1), share=0.2)
        assert found.judgement == "fine"
        assert {one.metric for one in found.findings} == {"split", "errors", "latency", "slowest", "answers"}

    @pytest.mark.parametrize(
        ("new", "metric", "words"),
        [
            (seen(500, failed=25, seed=1), "errors", "5.00% of the new version's requests failed"),
            (seen(500, seconds=0.005, seed=1), "latency", "times as long"),
            (seen(500, center=9.0, seed=1), "answers", "apart"),
            (seen(900, seed=1), "split", "traffic is not split as asked"),
        ],
    )
    def test_what_is_worse_is_named(self, new: VersionObservations, metric: str, words: str) -> None:
        found = compare(seen(2000), new, share=0.2)
        assert found.judgement == "worse"
        assert finding(found, metric).judgement == "worse"
        assert words in found.sentence

    def test_a_few_that_all_fail_are_enough(self) -> None:
        assert compare(seen(300), seen(12, failed=12), share=0.04).judgement == "worse"

    def test_a_few_that_are_fine_are_not(self) -> None:
        found = compare(seen(3000), seen(150, seed=1), share=0.05)
        assert found.judgement == "no data"
        assert "200 each are needed" in found.sentence

    def test_one_failure_proves_nothing(self) -> None:
        assert compare(seen(300), seen(1, failed=1), share=0.01).judgement == "no data"

    def test_only_stalls_are_seen_too(self) -> None:
        slow = seen(2000, seed=1)
        times = np.asarray(slow.times)
        stalls = count_times([0.2] * 200)
        stalled = VersionObservations(
            requests=slow.requests + 200,
            rows=slow.rows + 200,
            answers=slow.answers,
            times=tuple((times + stalls).tolist()),
        )
        found = compare(seen(2000), stalled)
        assert finding(compare(seen(2000), stalled, share=0.52), "slowest").judgement == "worse"
        assert found.judgement == "fine"  # a mirror's slowest are those of the traffic

    def test_labels_decide_an_ab_test(self) -> None:
        better = compare(
            seen(900),
            seen(600, seed=1),
            losses=(Losses(count=900, mean=2.0, variance=1.0), Losses(count=600, mean=1.5, variance=1.0)),
        )
        worse = compare(
            seen(900),
            seen(600, seed=1),
            losses=(Losses(count=900, mean=2.0, variance=1.0), Losses(count=600, mean=2.5, variance=1.0)),
        )
        none = compare(
            seen(900), seen(600, seed=1), losses=(Losses(count=9, mean=2.0, variance=1.0), Losses())
        )
        policy = CanaryPolicy()
        assert (better.judgement, clearly_better(better, policy)) == ("fine", True)
        assert (worse.judgement, clearly_better(worse, policy)) == ("worse", False)
        assert (none.judgement, clearly_better(none, policy)) == ("no data", False)

    def test_rows_that_were_drawn_together_count_once(self) -> None:
        random = np.random.default_rng(2)
        stopped = {"rows": 0, "drawn": 0}
        for _ in range(200):
            sides = []
            for _ in range(2):
                tastes = np.repeat(random.normal(2.0, 1.0, 60), 30)
                names = np.repeat([f"caller {number}" for number in range(60)], 30).tolist()
                losses = tastes + random.normal(0.0, 0.2, len(tastes))
                sides.append((losses, names))
            policy = CanaryPolicy(minimum_requests=50)
            for kind in stopped:
                told = [
                    losses_of(losses, names if kind == "drawn" else [None] * len(losses))
                    for losses, names in sides
                ]
                found = compare(seen(900), seen(600, seed=1), losses=(told[0], told[1]), policy=policy)
                stopped[kind] += clearly_better(found, policy)
        assert stopped["drawn"] / 200 <= 0.09
        assert stopped["rows"] / 200 >= 0.25  # what would be promised wrongly

    def test_losses_of_rows_that_were_drawn_one_by_one(self) -> None:
        losses = np.random.default_rng(0).exponential(size=400)
        told = losses_of(losses, [f"request {number}" for number in range(400)])
        assert (told.count, told.mean) == (400, pytest.approx(losses.mean()))
        assert told.variance == pytest.approx(losses.var(ddof=1))

    def test_as_long_as_something_is_missing_only_failures_are_judged(self) -> None:
        slow = seen(500, seconds=0.01, seed=1)
        found = compare(seen(2000), slow, share=0.2, losses=(Losses(), Losses()))
        assert found.judgement == "no data"
        assert finding(found, "latency").sentence == "latency waits for the others"
        assert (
            compare(seen(2000), seen(500, failed=50), share=0.2, losses=(Losses(), Losses())).judgement
            == "worse"
        )

    def test_answers_without_cells_are_no_pass(self) -> None:
        both = Observations(revision=1, versions={"1": seen(900), "2": seen(600, seed=1)})
        strict, waived = CanaryPolicy(), CanaryPolicy(answer_tolerance=None)
        judged = [
            analyze(both, stable="1", new="2", policy=policy, looks=6).judgement
            for policy in (strict, waived)
        ]
        assert judged == ["no data", "fine"]

    def test_labels_of_classes(self) -> None:
        cells = AnswerCells(labels=("no", "yes"))
        base = seen(1000)

        def with_answers(yes: int) -> VersionObservations:
            counts = cells.counts(["yes"] * yes + ["no"] * (1000 - yes)).tolist()
            return VersionObservations(requests=1000, rows=1000, times=base.times, answers=tuple(counts))

        def judge(yes: int) -> str:
            both = Observations(
                revision=1, cells=cells, versions={"1": with_answers(200), "2": with_answers(yes)}
            )
            return analyze(both, stable="1", new="2", policy=CanaryPolicy(), looks=6).judgement

        assert (judge(250), judge(900)) == ("fine", "worse")


@pytest.mark.parametrize(("share", "count"), [(0.005, 300), (0.02, 2000), (0.0, 200)])
def test_a_share_that_is_just_tolerable_is_seldom_stopped(share: float, count: int) -> None:
    random = np.random.default_rng(5)
    tolerance, level, stopped = 0.005, 0.05, 0
    for _ in range(600):
        one, other = random.binomial(count, share), random.binomial(count, share + tolerance)
        stopped += more_often((int(one), count), (int(other), count), tolerance=tolerance) < level
    assert stopped / 600 <= 0.07


def test_the_rank_test_is_scipys() -> None:
    from scipy import stats

    random = np.random.default_rng(3)
    one, other = random.lognormal(size=300), 1.1 * random.lognormal(size=200)
    counts = count_times(0.001 * one), count_times(0.001 * other)
    cells = [np.repeat(np.arange(len(count)), count) for count in counts]
    expected = stats.mannwhitneyu(cells[1], cells[0], alternative="greater", use_continuity=False)
    p_value, ratio = rank_test(*counts)
    assert p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert ratio == pytest.approx(np.median(np.divide.outer(other, one)), rel=0.06)


def test_what_workers_saw_adds_up() -> None:
    parts = [
        Observations(
            revision=4,
            cells=CELLS,
            versions={"1": seen(300, seed=number), "2": seen(50, failed=3)},
            shed=number,
        )
        for number in range(3)
    ]
    whole = merge_observations(parts)
    assert (whole.of("1").requests, whole.of("2").failed, whole.shed) == (900, 9, 3)
    assert sum(whole.of("1").times) == 900
    assert from_dict(Observations, json.loads(json.dumps(to_dict(whole)))) == whole
    with pytest.raises(ValueError, match="can't be added"):
        merge_observations([parts[0], Observations(revision=5)])


def test_times_have_cells_of_five_percent() -> None:
    times = [0.0001, 0.0123, 7.0, 0.0]
    counts = count_times(times)
    assert counts.sum() == 4
    for share, value in ((0.5, 0.0001), (0.75, 0.0123), (1.0, 7.0)):
        assert value <= time_quantile(counts.tolist(), share) <= value * 1.06
    with pytest.raises(ValueError, match="no request"):
        time_quantile((), 0.5)

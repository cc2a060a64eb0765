"""What counts in a rollout is what was drawn by lot: a request, however many rows it has, or a caller, however often he asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.core.rollouts.canary import CanaryPolicy, analyze
from airflow_mlops.core.rollouts.desired_state import DesiredState, ServedVersion
from airflow_mlops.core.rollouts.mean_losses import larger_of_two, losses_of
from airflow_mlops.core.rollouts.observations import Observations, merge_observations
from airflow_mlops.serving.callers import Callers
from airflow_mlops.serving.in_flight import InFlight, died_in, forget_all
from airflow_mlops.serving.observer import Observer
from airflow_mlops.serving.reconciler import LiveVersion, Routes

POLICY = CanaryPolicy()


def observing(
    folder: Path, share: float, *, sticky: bool = False, seed: int = 0, revision: int = 1
) -> Observer:
    """Give an observer of two versions that answer yes or no."""
    model: Any = SimpleNamespace(manifest=SimpleNamespace(task="classification", classes=("no", "yes")))
    versions = tuple(
        ServedVersion(model_version=name, package_digest=name, share=part)
        for name, part in (("1", 1.0 - share), ("2", share))
    )
    state = DesiredState(
        model_name="m",
        versions=versions,
        sticky=sticky,
        leased=True,
        rollout="r",
        previous_version=None,
        revision=revision,
    )
    live = {name: LiveVersion(model_version=name, package_digest=name, model=model) for name in "12"}
    observer = Observer(folder)
    observer.begin(Routes(state, live))
    observer._random = np.random.default_rng(seed)
    return observer


def judge(seen: Observations, share: float, *, sticky: bool = False, looks: int = 2) -> Counter[str]:
    seen = from_dict(Observations, to_dict(seen))  # as whoever steers gets it
    found = analyze(seen, stable="1", new="2", policy=POLICY, looks=looks, share=share, sticky=sticky)
    return Counter(one.metric for one in found.findings if one.judgement == "worse")


@pytest.mark.parametrize("sticky", [False, True])
def test_a_version_that_refuses_more_is_no_uneven_split(tmp_path: Path, *, sticky: bool) -> None:
    """The old version needs an input that a fifth of callers do not send, the new one does not."""
    random, observer = np.random.default_rng(0), observing(tmp_path, 0.5, seed=0, sticky=sticky)
    for number in range(6_000):
        caller = f"caller {number}".encode() if sticky else None
        if random.random() < 0.5:
            observer.answered("2", 1, 0.001, ["no"], caller)
        elif random.random() < 0.2:
            observer.refused("1", 1, caller)
        else:
            observer.answered("1", 1, 0.001, ["no"], caller)
    counted = from_dict(Observations, to_dict(observer.read()))
    for old in (counted.of("1"), *([counted.of_callers("1")] if sticky else [])):
        assert (old.failed, old.requests, old.refused) == (
            0,
            pytest.approx(2400, rel=0.05),
            pytest.approx(600, rel=0.15),
        )
    assert judge(counted, 0.5, sticky=sticky) == Counter()


_DIES = """
import os, sys
from pathlib import Path
from airflow_mlops.serving.in_flight import InFlight

noted = InFlight(Path(sys.argv[1]), sys.argv[2], ["1", "2"])
with noted.computing("1"):
    pass
with noted.computing("2"), noted.computing("elsewhere"):
    os._exit(139)
"""


def test_who_died_in_the_middle_of_an_answer_has_said_whose(tmp_path: Path) -> None:
    for rollout in ("a", "a", "b"):
        subprocess.run([sys.executable, "-c", _DIES, str(tmp_path), rollout], check=False)
    mine = InFlight(tmp_path, "a", ["1", "2"])
    with mine.computing("1"):  # by one who lives
        assert mine.died() == [("2",), ("2",)]
    assert died_in(tmp_path, "a", ["1", "2"]) == [("2",), ("2",)]
    assert InFlight(tmp_path, "a", ["1", "3"]).died() == []
    mine.forget_others()
    assert InFlight(tmp_path, "b", ["1", "2"]).died() == []
    forget_all(tmp_path)
    assert mine.died() == []
    with mine.computing("1"):  # what is mapped outlives its name
        pass


def test_who_died_and_is_not_buried_yet_has_died(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", _DIES, str(tmp_path), "a"])
    try:
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        assert died_in(tmp_path, "a", ["1", "2"]) == [("2",)]
    finally:
        dead.wait()


def test_a_younger_process_of_the_same_number_is_another_one(tmp_path: Path) -> None:
    mine = InFlight(tmp_path, "a", ["1", "2"])
    with mine.computing("1"):
        assert mine.died() == []
        (path,) = tmp_path.iterdir()
        os.utime(path, (0.0, 0.0))
        assert mine.died() == [("1",)]


@pytest.mark.parametrize(
    ("died", "worse"),
    [
        ([("2",)], True),
        ([("1", "2")], True),  # nobody knows which it was
        ([("1", "2"), ("1",)], False),
        ([("1",), ("2",)], False),
        ([("1",), ("2",), ("1", "2")], True),
        ([("1",)], False),
        ([], False),
    ],
)
def test_workers_that_died_are_held_against_the_version_they_died_with(
    tmp_path: Path, died: list[tuple[str, ...]], *, worse: bool
) -> None:
    observer = observing(tmp_path, 0.5)
    for number in range(1_000):
        observer.answered("12"[number % 2], 1, 0.001, ["no"])
    seen = replace(observer.read(), died=tuple(died))
    assert from_dict(Observations, to_dict(seen)).died == tuple(died)
    assert judge(seen, 0.5) == Counter(["deaths"] if worse else [])


class TestRowsOfARequest:
    def rollout(self, folder: Path, seed: int, *, yes: float = 0.3) -> Counter[str]:
        """Let two versions answer requests of one row, and three of 5,000 rows that are all alike."""
        random, observer = np.random.default_rng(seed), observing(folder, 0.25, seed=seed)
        for number in range(2_003):
            version = "2" if random.random() < 0.25 else "1"
            answer = "yes" if random.random() < (yes if version == "2" else 0.3) else "no"
            observer.answered(version, 1, 0.001, [answer] * (5_000 if number < 3 else 1))
        return judge(observer.read(), 0.25)

    def test_a_version_that_is_the_same_is_not_stopped_by_a_few_that_are_large(self, tmp_path: Path) -> None:
        worse = sum((self.rollout(tmp_path, seed) for seed in range(200)), Counter())
        assert worse.total() <= 4

    def test_one_that_answers_otherwise_is(self, tmp_path: Path) -> None:
        worse = sum((self.rollout(tmp_path, seed, yes=0.9) for seed in range(20)), Counter())
        assert worse["answers"] == 20

    def test_each_row_may_be_the_one(self, tmp_path: Path) -> None:
        observer = observing(tmp_path, 0.5)
        for _ in range(2_000):
            observer.answered("1", 1, 0.001, ["no", "no", "no", "yes"])
        seen = observer.read().of("1")
        assert (seen.requests, seen.rows, sum(seen.answers)) == (2_000, 8_000, 2_000)
        assert seen.answers[1] / 2_000 == pytest.approx(0.25, abs=0.03)

    def test_losses_of_large_requests_do_not_decide(self) -> None:
        random, found = np.random.default_rng(0), []
        for _ in range(200):
            sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
            for number in range(1_003):
                rows = 1_000 if number < 3 else 1
                hard = random.lognormal(0.0, 0.8)
                sides[random.random() < 0.25].append(hard * random.exponential(size=rows))
            one, other = (
                losses_of(np.concatenate(side), np.repeat(np.arange(len(side)), [*map(len, side)]).tolist())
                for side in sides
            )
            found.append(larger_of_two(one, other)("new", 1.0))
        assert np.mean(np.asarray(found) < 0.02) <= 0.06


class TestRequestsOfACaller:
    def rollout(
        self, folder: Path, seed: int, *, slower: float = 1.0, failing: float = 0.0, yes: float = 0.3
    ) -> Counter[str]:
        """Let callers ask who have habits of their own, and of whom a few ask very often."""
        random, observer = np.random.default_rng(seed), observing(folder, 0.5, sticky=True, seed=seed)
        for caller in range(600):
            asks = int(min(100.0, 2.0 * (random.pareto(1.0) + 1.0)))
            is_new, times = random.random() < 0.5, 0.001 * random.lognormal(0.0, 0.5)
            likely = yes if is_new else 0.3
            answer = "yes" if random.random() < likely else "no"
            fails = 0.3 if random.random() < 0.01 else failing * is_new
            for failed in random.random(asks) < fails:
                who = ("2" if is_new else "1", 1)
                if failed:
                    observer.failed(*who, f"{seed} {caller}".encode())
                else:
                    took = times * (slower if is_new else 1.0)
                    observer.answered(*who, took, [answer], f"{seed} {caller}".encode())
        return judge(observer.read(), 0.5, sticky=True)

    def test_a_version_that_is_the_same_is_not_stopped_by_who_asks_often(self, tmp_path: Path) -> None:
        worse = sum((self.rollout(tmp_path, seed) for seed in range(100)), Counter())
        assert worse.total() <= 2

    @pytest.mark.parametrize(
        ("how", "metric"),
        [({"slower": 2.0}, "latency"), ({"failing": 0.1}, "errors"), ({"yes": 1.0}, "answers")],
    )
    def test_one_that_is_worse_is(self, how: dict[str, float], metric: str, tmp_path: Path) -> None:
        worse = sum((self.rollout(tmp_path, seed, **how) for seed in range(10)), Counter())
        assert worse[metric] >= 9

    def test_each_of_his_requests_may_be_the_one(self, tmp_path: Path) -> None:
        observer = observing(tmp_path, 0.5, sticky=True)
        for answer in ("no", "no", "no", "yes"):
            for caller in range(2_000):
                observer.answered("1", 1, 0.001, [answer], b"%d" % caller)
            observer.flush()
        seen = observer.read().of_callers("1")
        assert (seen.requests, sum(seen.times), sum(seen.answers)) == (2_000, 2_000, 2_000)
        assert seen.answers[1] / 2_000 == pytest.approx(0.25, abs=0.03)

    def test_workers_count_a_caller_once(self, tmp_path: Path) -> None:
        workers = [observing(tmp_path, 0.5, sticky=True, seed=seed) for seed in range(2)]
        for number, answer in ((0, "no"), (0, "no"), (0, "no"), (1, "yes")):
            for caller in range(2_000):
                workers[number].answered("1", 1, 0.001, [answer], b"%d" % caller)
        for worker in workers:
            worker.flush()
        seen = merge_observations([worker._seen for worker in workers])
        assert (seen.of("1").requests, seen.of_callers("1").requests) == (8_000, 2_000)
        assert seen.of_callers("1").answers[1] / 2_000 == pytest.approx(0.25, abs=0.03)

    def test_what_they_drew_is_written_now_and_then(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def written() -> int:
            (file,) = (tmp_path / "observed").glob("*.json")
            return from_dict(Observations, json.loads(file.read_text())).of("1").requests

        for sticky, at_once in ((False, 1), (True, 0)):
            observer = observing(tmp_path, 0.5, sticky=sticky, revision=2 if sticky else 1)
            observer.answered("1", 2 if sticky else 1, 0.001, ["no"], b"ann")
            observer.flush_when_due()
            assert written() == at_once
        monkeypatch.setattr("airflow_mlops.serving.observer.WRITE_DRAWN_SECONDS", 0.0)
        observer.flush_when_due()  # nothing new came in
        assert written() == 1

    def test_who_gives_no_key_is_a_caller_each_time(self, tmp_path: Path) -> None:
        observer = observing(tmp_path, 0.5, sticky=True)
        for _ in range(300):
            observer.answered("2", 1, 0.001, ["yes"])
        assert observer.read().of_callers("2").requests == 300

    def test_of_many_callers_an_even_part_is_kept(self, tmp_path: Path) -> None:
        workers = [observing(tmp_path, 0.25, sticky=True, seed=seed) for seed in range(2)]
        for caller in range(40_000):
            version = "2" if caller % 4 == 0 else "1"
            for _ in range(1 if caller % 10 else 5):
                workers[caller % 2].answered(
                    version, 1, 0.001, ["no" if caller % 10 else "yes"], b"%d" % caller
                )
        for worker in workers:
            worker.flush()
        seen = merge_observations([worker._seen for worker in workers])
        one, other = seen.of_callers("1"), seen.of_callers("2")
        kept = one.requests + other.requests
        assert 8_000 < kept <= 16_384
        assert other.requests / kept == pytest.approx(0.25, abs=0.02)
        assert (one.answers[1] + other.answers[1]) / kept == pytest.approx(
            0.1, abs=0.015
        )  # not by how often they ask


class TestCallers:
    def test_workers_agree_and_rollouts_do_not(self, tmp_path: Path) -> None:
        one, other = Callers(tmp_path / "observed"), Callers(tmp_path / "observed")
        assert one.pseudonym(1, b"ann") == other.pseudonym(1, b"ann") != one.pseudonym(1, b"bob")
        assert one.number(1, b"ann") == other.number(1, b"ann")
        assert one.pseudonym(2, b"ann") != other.pseudonym(1, b"ann")
        (key, _) = sorted((tmp_path / "observed").iterdir())
        assert key.stat().st_mode & 0o777 == 0o600

    def test_the_key_goes_with_its_state(self, tmp_path: Path) -> None:
        before = observing(tmp_path, 0.5, sticky=True)
        before.answered("1", 1, 0.001, ["no"], b"ann")
        before.flush()
        assert [path.name for path in (tmp_path / "observed").glob("*.key")] == ["1.key"]
        observing(tmp_path, 0.5, revision=2)
        assert list((tmp_path / "observed").glob("*.key")) == []

"""Changes of level: found, not invented, and not forgotten by training after them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from airflow_mlops.core.monitoring.change import (
    ChangePolicy,
    WindowLoss,
    detect_change,
    effective_count,
    evidence_path,
)


def window(
    number: int, mean: float, *, version: str = "1", spread: float = 1.0, rows: float = 2000
) -> WindowLoss:
    return WindowLoss(
        label=f"window {number}",
        model_version=version,
        mean=mean,
        standard_deviation=spread,
        effective_count=rows,
    )


PROMISED = window(-1, 1.0)


def windows(*means: float, version: str = "1", first: int = 0) -> list[WindowLoss]:
    return [window(first + place, mean, version=version) for place, mean in enumerate(means)]


class TestDetection:
    def test_the_first_bet_by_hand(self) -> None:
        promised = window(-1, 1.0, spread=0.0)
        (evidence,) = evidence_path([window(0, 1.2)], promised=promised)
        scatter = 1.5 * 0.03  # before any window was seen
        surprise = (1.2 - 1.05) / math.hypot(1 / math.sqrt(2000), scatter)
        bets = (0.25, 0.5, 1.0, 2.0, 4.0)
        wins = [math.exp(min(bet * surprise - bet**2 / 2, math.log(5000))) for bet in bets]
        assert evidence == pytest.approx(sum(wins) / 5)

    def test_small_worsenings_add_up(self) -> None:
        found = detect_change(windows(1.01, 0.98, 1.02, *[1.17] * 8), promised=PROMISED)
        assert found.changed
        assert found.since == "window 3"
        assert found.relative_change == pytest.approx(0.17, abs=0.02)
        assert found.reason.startswith("changed: mean loss 1.17 in 8 windows since window 3, ")

    def test_one_large_worsening_is_enough(self) -> None:
        assert detect_change(windows(1.0, 1.0, 2.0), promised=PROMISED).changed

    @pytest.mark.parametrize("level", [0.7, 1.0, 1.04])
    def test_what_is_tolerated_is_no_change_however_long(self, level: float) -> None:
        found = detect_change(windows(*[level] * 60), promised=PROMISED)
        assert not found.changed
        assert "no lasting change" in found.reason

    def test_recovery_takes_the_alarm_back(self) -> None:
        assert detect_change(windows(1.0, 1.0, *[1.5] * 6), promised=PROMISED).changed
        assert not detect_change(windows(1.0, 1.0, *[1.5] * 6, 1.0), promised=PROMISED).changed

    def test_nothing_to_look_at_is_not_fine(self) -> None:
        with pytest.raises(ValueError, match="no graded window"):
            detect_change([], promised=PROMISED)

    def test_a_model_that_is_never_wrong_has_not_changed(self) -> None:
        """A mistake in 500 rows may happen to it; one in twenty, window after window, is a change."""
        promised = window(-1, 0.0, spread=0.0)

        def found(*shares: float) -> bool:
            seen = [
                window(number, share, spread=math.sqrt(share * (1 - share)), rows=500)
                for number, share in enumerate(shares)
            ]
            return detect_change(seen, promised=promised).changed

        assert not found(*[0.0] * 20)
        assert not found(0.0, 0.0, 0.002, 0.0, 0.0, 0.002, 0.0)
        assert found(0.0, 0.0, 0.05, 0.05, 0.05)

    def test_losses_below_zero(self) -> None:
        promised = window(-1, -10.0)
        assert detect_change(windows(*[-7.0] * 3), promised=promised).changed
        assert not detect_change(windows(*[-10.0] * 9), promised=promised).changed


class TestBaseline:
    """A version trained after a change does not make the change its own baseline."""

    def test_a_promise_made_after_the_change_does_not_silence(self) -> None:
        before, after = windows(*[1.0] * 6), windows(*[2.0] * 6, version="2", first=6)
        promised_late = window(-1, 2.0, version="2")
        found = detect_change([*before, *after], promised=promised_late)
        assert found.changed
        assert found.baseline == "earlier"
        assert found.baseline_level == pytest.approx(1.0)
        assert "worse than the best earlier level (1)" in found.reason
        # Compared with its own promise alone, nobody would ever have known.
        assert not detect_change(after, promised=promised_late).changed

    def test_after_so_many_windows_it_is_another_world(self) -> None:
        after = windows(*[2.0] * 40, version="2", first=6)
        found = detect_change(
            [*windows(*[1.0] * 6), *after], promised=window(-1, 2.0), policy=ChangePolicy(memory_windows=24)
        )
        assert not found.changed

    def test_better_than_promised_and_then_as_promised_is_worse(self) -> None:
        found = detect_change(windows(*[0.6] * 6, *[1.0] * 5), promised=PROMISED)
        assert (found.changed, found.baseline, found.since) == (True, "earlier", "window 6")

    def test_a_level_is_kept_for_three_windows(self) -> None:
        found = detect_change(windows(1.0, 0.5, 1.0, 1.0, 1.0, 1.0), promised=PROMISED)
        assert found.baseline == "promised"


class TestFalseAlarms:
    @pytest.mark.parametrize(("scatter", "memory"), [(0.0, 0.0), (0.1, 0.0), (0.1, 0.5)])
    def test_the_rate_is_held(self, scatter: float, memory: float) -> None:
        """At most one alarm in 500 windows: 2,000 windows give 4, and 9 or more with a probability below 2.2 %."""
        random = np.random.default_rng(1)
        alarms = 0
        for _ in range(40):
            noise = random.standard_normal(50)
            for place in range(1, 50):
                noise[place] = memory * noise[place - 1] + math.sqrt(1 - memory**2) * noise[place]
            means = 1.0 + scatter * noise + random.standard_normal(50) / math.sqrt(2000)
            promised = window(-1, 1.0 + float(random.standard_normal()) / math.sqrt(2000))
            path = evidence_path(windows(*means), promised=promised)
            alarms += any(evidence >= 500.0 for evidence in path)
        assert alarms <= 8


class TestEffectiveCount:
    def test_independent_losses_count_in_full(self) -> None:
        counts = [effective_count(np.random.default_rng(seed).exponential(size=4000)) for seed in range(20)]
        assert float(np.mean(counts)) == pytest.approx(3700, rel=0.1)

    def test_neighbors_that_err_alike_count_less(self) -> None:
        """Of an autoregression with 0.9, the mean of n is as sure as that of n / 19 independent ones."""
        counts = []
        for seed in range(20):
            noise = np.random.default_rng(seed).standard_normal(8000)
            for place in range(1, 8000):
                noise[place] += 0.9 * noise[place - 1]
            counts.append(effective_count(noise))
        assert float(np.mean(counts)) == pytest.approx(8000 / 19, rel=0.4)

    def test_a_few_and_equal_ones(self) -> None:
        assert effective_count(np.ones(100)) == 100.0
        assert effective_count(np.array([1.0, 2.0])) == 2.0

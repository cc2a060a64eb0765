"""How often a challenger that is no better is promoted, and how often one that is better is found; 2,000 trials each.

Two equally good models: the share of promotions has to stay near the significance asked for. Errors are independent, heavy-tailed
(Student's t, 3 degrees of freedom), or related, those of both models as well as of the rows: each resembles the one before
(autocorrelation 0.5 to 0.99), or the one 24 rows before (0.7), or is mostly independent with a faint part that stays (a fifth of the
variance, 0.99). A plain paired t-test on rows (a peer) stands beside ours. Power: the share of promotions when the challenger is
better by the minimum detectable difference that the evaluation itself reports; 80 % is promised.

Slices: how often any is called worse where none is, in a world of campaigns (each a stretch of rows, and so a few blocks of unequal
size), and how often the one that is worse is found. ``slices`` as argument runs this part alone.
"""

from __future__ import annotations

import math
import sys

import numpy as np
from scipy import signal, stats

from airflow_mlops.core.comparison.evaluation import compare_models
from airflow_mlops.core.comparison.predictions import Predictions
from airflow_mlops.core.comparison.promotion import PromotionPolicy, Verdict, decide_promotion
from airflow_mlops.core.comparison.resampling import cut_clusters
from airflow_mlops.core.comparison.slices import SlicePolicy, find_worse_slices

TRIALS = 2_000
KINDS = (
    "independent",
    "heavy-tailed",
    "autocorrelation 0.5",
    "autocorrelation 0.8",
    "autocorrelation 0.95",
    "autocorrelation 0.99",
    "a rhythm of 24 rows",
    "faint and long",
)
COUNTS, LEVELS = (20, 100, 300, 1_000, 10_000), (0.05, 0.01)


def noise(random: np.random.Generator, kind: str, count: int) -> np.ndarray:
    """Draw errors with a variance of about one."""
    if kind == "heavy-tailed":
        return random.standard_t(3, count) / math.sqrt(3.0)
    if kind.startswith("autocorrelation"):
        correlation = float(kind.split()[1])
        drawn = random.normal(0, math.sqrt(1.0 - correlation**2), count + 600)
        return np.asarray(signal.lfilter([1.0], [1.0, -correlation], drawn)[600:])
    if kind.startswith("a rhythm"):
        drawn = random.normal(0, math.sqrt(1.0 - 0.7**2), count + 480)
        return np.asarray(signal.lfilter([1.0], [1.0, *[0.0] * 23, -0.7], drawn)[480:])
    if kind.startswith("faint"):
        return random.normal(0, 1, count) + 0.5 * noise(random, "autocorrelation 0.99", count)
    return random.normal(0, 1, count)


def promoted(
    target: np.ndarray, new: Predictions, old: Predictions, metric: str, levels: tuple[float, ...]
) -> np.ndarray:
    """Let the evaluation judge at every level."""
    report = compare_models(
        target=target, challenger=new, champion=old, baselines={"none": old}, metrics=[metric]
    )
    decisions = [decide_promotion(report, PromotionPolicy(significance=level)) for level in levels]
    return np.array([decision.verdict is Verdict.PROMOTE for decision in decisions])


def of_numbers(kind: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Compare two models of a number by their mean absolute error; shares of promotions at every level, ours and the peer's."""
    random = np.random.default_rng([KINDS.index(kind), count])
    ours, rows = np.zeros(len(LEVELS)), np.zeros(len(LEVELS))
    for _ in range(TRIALS):
        target, shared = np.zeros(count), noise(random, kind, count)
        new, old = (shared + noise(random, kind, count) for _ in range(2))
        ours += promoted(target, Predictions(values=new), Predictions(values=old), "mae", LEVELS)
        peer = stats.ttest_1samp(np.abs(old) - np.abs(new), 0.0, alternative="greater").pvalue
        rows += peer <= np.array(LEVELS)
    return ours / TRIALS, rows / TRIALS


def of_labels(metric: str, count: int, level: float, positive: float = 0.2, apart: float = 1.5) -> float:
    """Compare two classifiers that are right equally often.

    :param positive: share of rows with the positive label.
    :param apart: how much higher those score.
    """
    random, ours = np.random.default_rng(2), 0.0
    for _ in range(TRIALS):
        truth = random.random(count) < positive
        shared = random.normal(0, 1, count)
        both = []
        for _ in range(2):
            score = 1.0 / (1.0 + np.exp(-(apart * truth - 1.8 + shared + random.normal(0, 0.5, count))))
            label = np.where(score > 0.5, "b", "a")
            both.append(
                Predictions(
                    values=label, probabilities=np.column_stack([1 - score, score]), classes=("a", "b")
                )
            )
        ours += promoted(np.where(truth, "b", "a"), both[0], both[1], metric, (level,))[0]
    return ours / TRIALS


def power(count: int) -> float:
    """Promote a challenger that is better by what the evaluation says it can find."""
    random, found = np.random.default_rng(3), 0.0
    for _ in range(TRIALS):
        target = np.zeros(count)
        new, old = noise(random, "independent", count), noise(random, "independent", count)
        equal = compare_models(
            target=target,
            challenger=Predictions(values=new),
            champion=Predictions(values=old),
            baselines={},
            metrics=["mae"],
        ).deciding.champion
        detectable = (equal.minimum_detectable_difference if equal else None) or math.nan
        better = new * (1.0 - detectable / math.sqrt(2.0 / math.pi))
        found += promoted(target, Predictions(values=better), Predictions(values=old), "mae", (0.05,))[0]
    return found / TRIALS


def campaigns(random: np.random.Generator, count: int, length: int) -> np.ndarray:
    """Draw eleven stretches of rows, numbered from 1; all other rows are 0."""
    part = np.zeros(count)
    starts = np.sort(random.choice(count // length - 1, 11, replace=False)) * length
    for number, start in enumerate(starts + random.integers(0, length)):
        part[start : start + length] = number + 1
    return part


def of_slices(count: int, length: int, columns: int, more: float = 0.0) -> float:
    """Share of trials with an alarm; ``more``: how much more often the challenger errs than 20 % in one campaign."""
    random, alarms = np.random.default_rng([count, length, columns]), 0
    for _ in range(TRIALS):
        cut = {f"campaign{number}": campaigns(random, count, length) for number in range(columns)}
        here = cut["campaign0"] == 5
        new = (random.random(count) < 0.2 + more * here).astype(float)
        old = (random.random(count) < 0.2).astype(float)
        found = find_worse_slices(cut, new, old, cut_clusters(count, new - old), SlicePolicy(pairs=False))
        alarms += (
            any(item.where == {"campaign0": "5"} for item in found.broken) if more else bool(found.broken)
        )
    return alarms / TRIALS


def print_slices() -> None:
    """Print how often a slice is called worse, and how often one that is worse."""
    print(
        f"\n{'campaigns, error rate 0.2':38} {'equal':>6} {'one 0.3':>8} {'one 0.4':>8} {'one 0.6':>8}",
        flush=True,
    )
    for count, length, columns in ((20_000, 300, 10), (10_000, 200, 20), (20_000, 1_000, 10)):
        rates = [of_slices(count, length, columns, more) for more in (0.0, 0.1, 0.2, 0.4)]
        name = f"{count} rows, {12 * columns} slices of {length}"
        print(f"{name:38} {rates[0]:6.3f} {rates[1]:8.3f} {rates[2]:8.3f} {rates[3]:8.3f}", flush=True)


def main() -> None:
    """Print the rates; the standard error of 5 % in 2,000 trials is 0.5 %."""
    if sys.argv[1:] == ["slices"]:
        print_slices()
        return
    print(f"{'equal models, MAE':24} {'rows':>6} {'level':>6} {'ours':>7} {'t-test on rows':>15}")
    for kind in KINDS:
        for count in COUNTS:
            for level, ours, peer in zip(LEVELS, *of_numbers(kind, count), strict=True):
                print(f"{kind:24} {count:6} {level:6.2f} {ours:7.3f} {peer:15.3f}", flush=True)
    print(f"\n{'equal classifiers':24} {'rows':>6} {'level':>6} {'ours':>7}")
    for metric in ("accuracy", "f1", "roc_auc", "log_loss"):
        print(f"{metric:24} {2_000:6} {0.05:6.2f} {of_labels(metric, 2_000, 0.05):7.3f}", flush=True)
    for metric in ("pr_auc", "f1"):
        rate = of_labels(metric, 20_000, 0.05, positive=0.01, apart=4.0)
        print(f"{metric + ', 1 % positive':24} {20_000:6} {0.05:6.2f} {rate:7.3f}", flush=True)
    print(
        f"\npower at the detectable difference: {power(1_000):.3f} with 1,000 rows, {power(10_000):.3f} with 10,000 rows"
    )

    print_slices()


if __name__ == "__main__":
    main()

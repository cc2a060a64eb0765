"""Inferred suites on a real stream: how often they cry wolf, and which true events they catch.

Run with the folder of the streams: ``python benchmarks/inferred_expectations.py ../shared/data``. A suite is inferred on each month
of ``nyc_taxi_raw`` with the default policy and judges the month after it; its critical expectations raise the alarm. Then the same
rows are shuffled, so that no month differs from another by more than chance: every alarm is false.

What an event is was written down before any suite was inferred, in terms of ``nyc_taxi_data_quality_by_month.csv`` alone: a share
of rows (missing, zero, not positive, surcharged) that moved by at least half a percent of the rows and, it or its complement, by a factor of two, or the
longest distance by a factor of ten upward. Everything else is no event, whatever else may have happened in that month.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl

from airflow_mlops.core.checks.inference import InferencePolicy, infer_expectations
from airflow_mlops.core.checks.validation import judge_compiled
from airflow_mlops.core.checks.verdict import gates, name_expectation

#: Times the rows are shuffled, unless a second argument says otherwise.
SHUFFLES = 10
SHARES = (
    "vendor_null", "passenger_null", "passenger_zero", "congestion_null", "congestion_gt0", "fare_le0", "total_lt0",
    "distance_le0",
)  # fmt: skip


def events(folder: Path) -> dict[str, list[str]]:
    """Find the events of each month, but for the first."""
    table = pl.read_csv(folder / "nyc_taxi_data_quality_by_month.csv").to_dicts()
    found = {}
    for before, now in pairwise(table):
        moved = [
            f"{name} {before[name]} → {now[name]}"
            for name in SHARES
            if is_event(before[name] / before["rows"], now[name] / now["rows"])
        ]
        if now["distance_max"] >= 10 * before["distance_max"]:
            moved.append(f"distance_max {before['distance_max']:g} → {now['distance_max']:g}")
        found[now["file_month"]] = moved
    return found


def is_event(before: float, now: float) -> bool:
    """Tell whether a share moved enough."""
    doubled = any(max(pair) >= 2 * min(pair) for pair in ((before, now), (1 - before, 1 - now)))
    return abs(now - before) >= 0.005 and doubled


def judge(rows: pl.DataFrame, suite: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give what failed."""
    results = judge_compiled(rows.lazy(), suite)
    missing = [item for item, result in zip(suite, results, strict=True) if result is None]
    assert not missing, missing  # noqa: S101 - an inferred suite is judged by polars
    return [result for result in results if result and not result["success"]]


def shuffled(rows: pl.DataFrame, seed: int) -> int:
    """Count false alarms in shuffled rows, without the four values that are errors whenever they come."""
    sound = rows.filter(
        (pl.col("fare_amount").abs() < 1000)
        & (pl.col("tolls_amount").abs() < 500)
        & (pl.col("trip_distance") < 1000)
    ).sample(fraction=1.0, shuffle=True, seed=seed)
    windows = list(sound.iter_slices(10_000))[:-1]
    pairs = pairwise(windows)
    return sum(
        any(map(gates, judge(now, infer_expectations(before.lazy(), InferencePolicy()))))
        for before, now in pairs
    )


def main() -> None:
    """Count, month by month."""
    folder = Path(sys.argv[1])
    shuffles = int(sys.argv[2]) if len(sys.argv) > 2 else SHUFFLES
    raw = pl.read_parquet(folder / "nyc_taxi_raw.parquet")
    months = {
        str(key[0]): rows.drop("file_month", "pickup_datetime", "dropoff_datetime")
        for key, rows in raw.partition_by("file_month", as_dict=True, maintain_order=True).items()
    }
    names = sorted(months)
    true = events(folder)
    suites = {name: infer_expectations(months[name].lazy(), InferencePolicy()) for name in names}
    print(f"{len(suites[names[0]])} expectations from the first month")
    counts = {(event, alarm): 0 for event in (True, False) for alarm in (True, False)}
    warned = 0
    for before, now in pairwise(names):
        failed = judge(months[now], suites[before])
        critical = [name_expectation(one["expectation_config"]) for one in failed if gates(one)]
        counts[bool(true[now]), bool(critical)] += 1
        warned += len(failed) > len(critical) and not true[now]
        if true[now] or failed:
            others = len(failed) - len(critical)
            print(
                f"{now}  event: {'; '.join(true[now]) or '-'}  alarm: {'; '.join(critical) or '-'}  warnings: {others}"
            )
    print(f"event: {counts[True, True]} alarmed, {counts[True, False]} not")
    print(f"no event: {counts[False, True]} alarmed, {counts[False, False]} not")
    print(f"warnings without an event: {warned} months")
    alarms = [shuffled(pl.concat(list(months.values())), seed) for seed in range(shuffles)]
    print(f"shuffled: {sum(alarms)} of {shuffles * 34} windows alarmed")
    print("the suite of", names[0], "on later months, fares and distances:")
    for name in names[1:]:
        found = [
            name_expectation(one["expectation_config"])
            for one in judge(months[name], suites[names[0]])
            if gates(one)
            and one["expectation_config"]["kwargs"].get("column") in ("fare_amount", "trip_distance")
        ]
        print(" ", name, "; ".join(found) or "-")


if __name__ == "__main__":
    main()

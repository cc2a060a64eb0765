"""Alarms of the drift check: false ones on shuffled real streams, and how large a shift must be to be found, and how soon.

Run with the folder of the streams: ``python benchmarks/drift_alarms.py ../shared/data``. A shuffled stream holds real columns and no
change at all: every alarm in it is false. A shift of known size is then put into one column (or into a pair, or into the label) of
the shuffled taxi stream. All of it is counted for the project's rule and for Evidently's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from airflow_mlops.core.monitoring.drift import compare_profiles
from airflow_mlops.core.monitoring.drift_policy import DriftPolicy
from airflow_mlops.core.profiles.profile import Profile, profile_frame
from airflow_mlops.integrations.domain_classifier import tell_apart

RULES = {"tested": DriftPolicy(), "evidently": DriftPolicy(rule="evidently")}
SHUFFLES = 20
#: Windows a shift of each size is looked for in.
TRIALS = 40
WINDOW_ROWS = 2_000


class Stream(NamedTuple):
    """A stream cut into windows."""

    rows: pl.DataFrame
    sizes: list[int]
    reference_rows: int
    numeric: list[str]
    categorical: list[str]
    target: str


def load(folder: Path, name: str) -> Stream:
    """Read a stream; windows are the ones of ``expected.json``, by their numbers of rows."""
    facts = json.loads((folder / "expected.json").read_text())["datasets"][name]
    rows = pl.read_parquet(folder / f"{name}.parquet").drop_nulls([facts["target"]])
    categorical = [column for column in facts["drift_columns"] if column in facts["features_cat"]]
    return Stream(
        rows=rows.with_columns(pl.col(column).cast(pl.String) for column in categorical),
        sizes=[window["n"] for window in facts["windows"]],
        reference_rows=facts["n_reference_rows"],
        numeric=[column for column in facts["drift_columns"] if column not in categorical],
        categorical=categorical,
        target=facts["target"],
    )


def windows(stream: Stream, rows: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Cut shuffled rows as the stream is cut."""
    start = stream.reference_rows
    for size in stream.sizes:
        yield rows[start : start + size]
        start += size


def false_alarms(stream: Stream, cut: int | None = None) -> dict[str, tuple[float, float, int]]:
    """Count windows that are called drifted, and windows in which any column is, per rule.

    :param cut: rows of every window; default as many as it has.
    """
    kinds: dict[str, Any] = {"numeric": stream.numeric, "categorical": stream.categorical}
    found = {rule: np.zeros(2) for rule in RULES}
    count = 0
    for seed in range(SHUFFLES):
        rows = stream.rows.sample(fraction=1.0, shuffle=True, seed=seed)
        reference = profile_frame(rows[: stream.reference_rows], **kinds)
        for window in windows(stream, rows):
            current = profile_frame(window[:cut] if cut else window, **kinds, like=reference)
            count += 1
            for rule, policy in RULES.items():
                report = compare_profiles(reference, current, policy=policy)
                found[rule] += (report.drifted, report.drifted_count > 0)
    return {rule: (*(alarms / count).tolist(), count) for rule, alarms in found.items()}


def shifted(column: str, by: Callable[[pl.Expr], pl.Expr]) -> Callable[[pl.DataFrame, int], pl.DataFrame]:
    """Change a column of a window."""
    return lambda rows, _seed: rows.with_columns(by(pl.col(column)).alias(column))


def mixed(column: str, share: float) -> Callable[[pl.DataFrame, int], pl.DataFrame]:
    """Move a share of the rows of a window into one category."""

    def change(rows: pl.DataFrame, seed: int) -> pl.DataFrame:
        chosen = np.random.default_rng(seed).random(rows.height) < share
        return rows.with_columns(pl.when(pl.Series(chosen)).then(pl.lit("2")).otherwise(column).alias(column))

    return change


def unlinked(column: str, share: float) -> Callable[[pl.DataFrame, int], pl.DataFrame]:
    """Shuffle a column among a share of the rows: it stays as it was, and goes no longer with the others."""

    def change(rows: pl.DataFrame, seed: int) -> pl.DataFrame:
        values = rows[column].to_numpy().copy()
        random = np.random.default_rng(seed)
        chosen = np.flatnonzero(random.random(len(values)) < share)
        values[chosen] = values[random.permutation(chosen)]
        return rows.with_columns(pl.Series(column, values))

    return change


def power(
    stream: Stream, change: Callable[[pl.DataFrame, int], pl.DataFrame], watched: str, *, classifier: bool
) -> dict[str, float]:
    """Give the share of windows in which the change of one column, pair or label is found."""
    names = [*stream.numeric, stream.target]
    pairs = [tuple(watched.split("*"))] if "*" in watched else []
    kinds: dict[str, Any] = {"numeric": names, "categorical": stream.categorical, "pairs": pairs}
    rows = stream.rows.sample(fraction=1.0, shuffle=True, seed=1)
    learned = rows[: stream.reference_rows]
    reference = profile_frame(learned, **kinds)
    found = dict.fromkeys([*RULES, *(["classifier"] if classifier else [])], 0)
    for trial in range(TRIALS):
        start = stream.reference_rows + trial * WINDOW_ROWS
        window = change(rows[start : start + WINDOW_ROWS], trial)
        current = profile_frame(window, **kinds, like=reference)
        for rule, policy in RULES.items():
            found[rule] += _fired(reference, current, policy, watched)
        if classifier:
            inputs = [*stream.numeric, *stream.categorical]
            found["classifier"] += tell_apart(
                learned.select(inputs), window.select(inputs), seed=trial
            ).drifted
    return {rule: hits / TRIALS for rule, hits in found.items()}


def _fired(reference: Profile, current: Profile, policy: DriftPolicy, watched: str) -> bool:
    report = compare_profiles(reference, current, policy=policy)
    return next(item.drifted for item in report.features if item.feature == watched)


def shifts(spread: float) -> Iterator[tuple[str, str, Callable[[pl.DataFrame, int], pl.DataFrame], str]]:
    """Give kind, size, change and the column to watch, from small to large."""
    for size in (0.0, 0.05, 0.1, 0.15, 0.2, 0.4):
        yield (
            "mean",
            f"{size} sd",
            shifted("trip_distance", lambda x, s=size: x + s * spread),
            "trip_distance",
        )
    for size in (1.05, 1.1, 1.2, 1.4, 2.0):
        yield "scale", f"x {size}", shifted("trip_distance", lambda x, s=size: x * s), "trip_distance"
    for size in (0.01, 0.02, 0.05, 0.1, 0.2):
        yield "category mix", f"{size:.0%} moved", mixed("rate_code_id", size), "rate_code_id"
    for size in (0.1, 0.25, 0.5, 0.75, 1.0):
        pair = "pickup_location_id*dropoff_location_id"
        yield "correlation", f"{size:.0%} shuffled", unlinked("dropoff_location_id", size), pair
    for size in (0.05, 0.1, 0.15, 0.2, 0.4):
        yield "label", f"x {1 + size}", shifted("total_ex_tip", lambda x, s=size: x * (1 + s)), "total_ex_tip"


def main() -> None:
    """Print both tables."""
    folder = Path(sys.argv[1])
    print(
        f"{'shuffled stream':<18}{'rows a window':<15}{'rule':<12}{'windows':>8}{'drifted':>10}{'any column':>12}"
    )
    for name in ("elec2", "bike_sharing", "nyc_taxi"):
        stream = load(folder, name)
        for cut in (None, 200):
            for rule, (drifted, some, count) in false_alarms(stream, cut).items():
                size = str(cut or f"{min(stream.sizes)} to {max(stream.sizes)}")
                print(f"{name:<18}{size:<15}{rule:<12}{count:>8}{drifted:>10.2%}{some:>12.2%}", flush=True)
    stream = load(folder, "nyc_taxi")
    spread = float(np.std(stream.rows["trip_distance"].to_numpy()))
    print(f"\n{'shift':<14}{'size':<16}{'found by':<12}{'windows':>9}{'delay':>14}")
    for kind, size, change, watched in shifts(spread):
        for rule, share in power(stream, change, watched, classifier=kind == "correlation").items():
            # Windows are independent here: the first alarm comes after 1 / share of them.
            delay = f"{1 / share:.1f} windows" if share else "never"
            print(f"{kind:<14}{size:<16}{rule:<12}{share:>9.0%}{delay:>14}", flush=True)


if __name__ == "__main__":
    main()

"""The poisoning screen on real streams: how often it holds a partition nobody touched, and which wrong labels it finds.

Run with the folder of the streams: ``python benchmarks/poisoning.py ../shared/data``. Each partition that has enough before it is
screened as it is (whatever is held is a false alarm, true changes of concept included) and with wrong labels put in:

* ``random``: so many labels of random rows become another class, or another row's number;
* ``slice, half``: half of the labels of one slice of the rows, which have a tenth of them;
* ``slice, all``: all of them. A pattern like that can be learned, so nothing tells it from a change of concept but trusted rows;
* ``10 % lowest``, ``10 % highest``: so many of all labels are overwritten with one value (a class, or 0.0 and the largest number);
* ``half lowest``, ``all lowest``: half of them, and all, as by a join that finds no label.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from airflow_mlops.core.checks.poisoning import PoisoningPolicy
from airflow_mlops.integrations.label_consistency import own_answers
from airflow_mlops.steps.validation.screen_partitions import Screened, screen_partitions

POLICY = PoisoningPolicy()
ATTACKS = (
    "none", "random 5 %", "random 10 %", "slice, half", "slice, all",
    "10 % lowest", "10 % highest", "half lowest", "all lowest",
)  # fmt: skip


class Stream(NamedTuple):
    """A stream cut into partitions."""

    name: str
    partitions: list[pl.DataFrame]
    features: list[str]
    target: str
    time: str


def streams(folder: Path) -> Iterator[Stream]:
    """Cut the streams; partitions are small where the stream is, so that there are enough."""
    elec = ["period", "nswprice", "nswdemand", "vicprice", "vicdemand", "transfer", "day_of_week"]
    yield _cut(folder, "elec2", "two weeks", elec, "target", "timestamp", rows=672)
    taxi = [
        "trip_distance", "pickup_location_id", "dropoff_location_id", "hour", "day_of_week", "passenger_count", "rate_code_id",
    ]  # fmt: skip
    yield _cut(folder, "nyc_taxi", "ten days", taxi, "total_ex_tip", "pickup_datetime", rows=3300)
    yield _months(folder, taxi)
    bike = ["hr", "holiday", "weekday", "workingday", "temp", "atemp", "hum", "windspeed", "weathersit"]
    yield _cut(folder, "bike_sharing", "two weeks", bike, "cnt", "timestamp", rows=336)


def _months(folder: Path, features: list[str]) -> Stream:
    at = "pickup_datetime"
    table = pl.read_parquet(folder / "nyc_taxi.parquet").sort(at, maintain_order=True)
    months = table.group_by(pl.col(at).dt.truncate("1mo"), maintain_order=True)
    return Stream("taxi months", [rows for _, rows in months], features, "total_ex_tip", at)


def _cut(
    folder: Path, name: str, length: str, features: list[str], target: str, at: str, *, rows: int
) -> Stream:
    table = pl.read_parquet(folder / f"{name}.parquet").sort(at, maintain_order=True)
    whole = [part for part in table.iter_slices(rows) if part.height == rows]
    return Stream(f"{name}, {length} ({rows} rows)", whole, features, target, at)


def poisoned(part: pl.DataFrame, stream: Stream, attack: str, seed: int) -> pl.DataFrame:
    """Put wrong labels in."""
    random = np.random.default_rng(seed)
    labels = part[stream.target].to_numpy()
    if attack.endswith("est"):
        return _overwritten(part, stream, attack, random)
    if attack.startswith("random"):
        chosen = random.random(len(labels)) < float(attack.split()[1]) / 100
    else:
        # The rows around the median of the first feature: hours of the day, or a length of trips.
        first = part[stream.features[0]].to_numpy()
        order = np.argsort(np.abs(first - np.median(first)), kind="stable")[: len(labels) // 10]
        chosen = np.zeros(len(labels), bool)
        chosen[order] = True
        if attack.endswith("half"):
            chosen &= random.random(len(labels)) < 0.5
    if len(np.unique(labels)) == 2:
        wrong = labels.max() + labels.min() - labels
    elif attack.endswith("all"):
        wrong = labels * 1.5
    else:
        wrong = random.permutation(labels)
    changed = np.where(chosen, wrong, labels)
    return part.with_columns(
        pl.Series(stream.target, changed, dtype=part.schema[stream.target], strict=False)
    )


def _overwritten(
    part: pl.DataFrame, stream: Stream, attack: str, random: np.random.Generator
) -> pl.DataFrame:
    labels = part[stream.target].to_numpy()
    value = labels.max() if attack.endswith("highest") else min(0, labels.min())
    others = np.flatnonzero(labels != value)
    share = {"10 %": 0.1, "half": 0.5, "all": 1.0}[attack.rsplit(" ", 1)[0]]
    chosen = random.choice(others, min(len(others), round(share * len(labels))), replace=False)
    changed = labels.copy()
    changed[chosen] = value
    return part.with_columns(pl.Series(stream.target, changed, dtype=part.schema[stream.target]))


def truth_inside(found: Screened, clean: pl.DataFrame, new: pl.DataFrame, target: str) -> bool:
    """Tell whether the interval holds the share of labels that are wrong."""
    share = (clean[target] != new[target]).mean()
    low, high = found.noise.interval if found.noise else (0.0, 1.0)
    return bool(low <= float(share) <= high)  # type: ignore[arg-type]


def screen(stream: Stream, index: int, attack: str, policy: PoisoningPolicy) -> tuple[Screened, bool]:
    """Screen one partition against those before it, and look whether the interval holds the truth."""
    part = stream.partitions[index]
    new = poisoned(part, stream, attack, index) if attack != "none" else part
    found = screen_partitions(
        new,
        stream.partitions[max(0, index - policy.trusted_partitions) : index],
        features=stream.features,
        target=stream.target,
        time_column=stream.time,
        policy=policy,
        answers_of=remembered,
    )
    return found, truth_inside(found, part, new, stream.target)


_REMEMBERED: dict[str, np.ndarray] = {}


def remembered(
    features: np.ndarray, labels: np.ndarray, compared: np.ndarray, *, classes: int | None
) -> np.ndarray:
    """Answer for a partition that was answered for before from memory: a stream's partitions are trusted again and again."""
    key = sha256(features.tobytes() + labels.tobytes()).hexdigest()
    if key not in _REMEMBERED:
        _REMEMBERED[key] = own_answers(features, labels, compared, classes=classes)
    return _REMEMBERED[key]


def main() -> None:
    """Print a table per stream."""
    every = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    only = sys.argv[3] if len(sys.argv) > 3 else ""
    for stream in streams(Path(sys.argv[1])):
        if not stream.name.startswith(only):
            continue
        count = len(stream.partitions)
        clean = range(
            POLICY.trusted_partitions if count > POLICY.trusted_partitions else POLICY.needed_partitions,
            count,
        )
        started = time.process_time()
        screen_partitions(  # once without anything remembered
            stream.partitions[clean[0]],
            stream.partitions[: clean[0]],
            features=stream.features,
            target=stream.target,
            time_column=stream.time,
            policy=POLICY,
        )
        seconds = time.process_time() - started
        print(
            f"{stream.name}: {len(clean)} partitions, wrong labels in each {every}.; one screen takes {seconds:.1f} CPU s",
            flush=True,
        )
        for attack in ATTACKS:
            places = clean if attack == "none" else clean[::every]
            found, inside = zip(*(screen(stream, index, attack, POLICY) for index in places), strict=True)
            noises = [one.noise for one in found if one.noise]
            shares = [noise.share for noise in noises if noise.share is not None]
            print(
                f"  {attack:12} held {np.mean([one.verdict == 'held' for one in found]):4.0%}"
                f"  undecided {np.mean([one.verdict == 'undecided' for one in found]):4.0%}"
                f"  labels changed {np.mean([bool(one.labels and one.labels.changed) for one in found]):4.0%}"
                f"  relation changed {np.mean([bool(one.relation and one.relation.changed) for one in found]):4.0%}"
                f"  interval holds {np.mean(inside):4.0%}"
                f"  estimate {np.median(shares) if shares else np.nan:5.1%}"
                f"  detectable {np.median([noise.detectable_share for noise in noises]):5.1%}",
                flush=True,
            )
            if attack == "none":
                for index, one in zip(places, found, strict=True):
                    if one.verdict != "enters":
                        first = stream.partitions[index][stream.time].min()
                        print(f"    {first:%Y-%m-%d} {one.verdict}: {one.reason}", flush=True)


if __name__ == "__main__":
    main()

"""Streams on which retraining hurts: eight small worlds, written as Parquet and TOML for ``airflow-mlops replay``.

Every world begins with one large window, on which the first model is trained, and goes on with twenty that are smaller, noisier or
misleading in a way of their own; its docstring says which. Whoever retrains on the newest window is worse off than who never does.
A good policy is not: ``docs/explanation/retraining-policy.md`` has the figures.

    python benchmarks/hurting_streams.py FOLDER --seeds 0 1
    airflow-mlops replay FOLDER/*.toml --policy never --policy always --policy challengers
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

#: Columns of a window by name, the target among them.
Columns = dict[str, np.ndarray]

#: Windows after the reference.
WINDOWS = 20

START, DAYS = datetime(2020, 1, 1), 7

TOML = """\
# {why}
name = "{name}"
data = "{name}.parquet"
time_column = "at"
target = "target"
numeric = [{numeric}]
metric = "{metric}"
window = "{days}d"
reference = 1
estimator = "sklearn.ensemble.HistGradientBoosting{kind}"
estimator_params = {{ early_stopping = false }}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """What a stream is drawn from.

    :param draw: gives the columns of a window from a generator, the window's number (0: the reference) and its rows.
    :param reference_rows: rows of the reference.
    :param rows: rows of every later window.
    :param metric: ``mae`` for numbers, ``accuracy`` for labels.
    """

    draw: Callable[[np.random.Generator, int, int], Columns]
    reference_rows: int
    rows: int
    metric: str

    @property
    def name(self) -> str:
        """Name of the stream."""
        return self.draw.__name__

    @property
    def why(self) -> str:
        """Why retraining hurts, a sentence."""
        return " ".join((self.draw.__doc__ or "").split())


def few_rows(random: np.random.Generator, number: int, rows: int) -> Columns:
    """Nothing ever changes, but a window has 60 rows with errors of heavy tails: recent rows are mostly noise."""
    inputs = _inputs(random, rows, 4)
    return inputs | {"target": _relation(inputs) + 1.2 * random.standard_t(2.5, rows)}


def one_off(random: np.random.Generator, number: int, rows: int) -> Columns:
    """Every seventh window one input works the other way round, and is back the next: what was learned from it is wrong."""
    inputs = _inputs(random, rows, 4)
    sign = -1.0 if number % 7 == 6 else 1.0
    return inputs | {"target": _relation(inputs) + 2.0 * sign * inputs["b"] + random.normal(0.0, 1.0, rows)}


def bad_labels(random: np.random.Generator, number: int, rows: int) -> Columns:
    """In every fourth window four of ten positive labels were not recorded: a model of it misses them ever after."""
    inputs = _inputs(random, rows, 5)
    labels = random.random(rows) < _logistic(2.0 * (_relation(inputs) - 10.0))
    lost = (random.random(rows) < 0.4) & (number % 4 == 3)
    return inputs | {"target": (labels & ~lost).astype(np.int64)}


def seasons(random: np.random.Generator, number: int, rows: int) -> Columns:
    """Two seasons take turns and the reference has both: the newest window teaches the wrong one for the next."""
    inputs = _inputs(random, rows, 4)
    season = random.integers(0, 2, rows) if number == 0 else np.full(rows, number % 2)
    return inputs | {
        "target": _relation(inputs) + (2.0 * season - 1.0) * inputs["c"] + random.normal(0.0, 0.5, rows)
    }


def campaigns(random: np.random.Generator, number: int, rows: int) -> Columns:
    """Campaigns reach other customers each time and the reference has all: the newest window knows little of the next."""
    inputs = _inputs(random, rows, 4)
    if number:
        inputs["a"] = np.abs(inputs["a"]) * (-1.0) ** number
    labels = random.random(rows) < _logistic(2.0 * (_relation(inputs) - 10.0))
    return inputs | {"target": labels.astype(np.int64)}


def heavy_tails(random: np.random.Generator, number: int, rows: int) -> Columns:
    """Targets such as claims, where one of a hundred outweighs the rest: a few hundred new ones tell little of the mean."""
    inputs = _inputs(random, rows, 4)
    return inputs | {"target": np.exp(0.3 * _relation(inputs) + random.normal(0.0, 1.0, rows))}


def accidents(random: np.random.Generator, number: int, rows: int) -> Columns:
    """Forty inputs that mean nothing, and in each window another one happens to go with the label, never again."""
    inputs = _inputs(random, rows, 44)
    names = list(inputs)
    labels = random.random(rows) < _logistic(2.0 * (_relation(inputs) - 10.0))
    if number:
        inputs[names[4 + number * 7 % 40]] += 1.2 * (labels - 0.5)
    return inputs | {"target": labels.astype(np.int64)}


def wrong_units(random: np.random.Generator, number: int, rows: int) -> Columns:
    """In every fifth window one target in twelve is in another unit, ten times too large: means over it are off."""
    inputs = _inputs(random, rows, 4)
    target = _relation(inputs) + random.normal(0.0, 1.0, rows)
    wrong = (random.random(rows) < 1.0 / 12.0) & (number % 5 == 4)
    return inputs | {"target": np.where(wrong, 10.0 * target, target)}


WORLDS = (
    World(draw=few_rows, reference_rows=4_800, rows=60, metric="mae"),
    World(draw=one_off, reference_rows=5_000, rows=2_500, metric="mae"),
    World(draw=bad_labels, reference_rows=4_000, rows=500, metric="accuracy"),
    World(draw=seasons, reference_rows=4_000, rows=500, metric="mae"),
    World(draw=campaigns, reference_rows=4_000, rows=500, metric="accuracy"),
    World(draw=heavy_tails, reference_rows=4_000, rows=300, metric="mae"),
    World(draw=accidents, reference_rows=4_000, rows=150, metric="accuracy"),
    World(draw=wrong_units, reference_rows=4_000, rows=400, metric="mae"),
)


def make_stream(world: World, seed: int, *, windows: int = WINDOWS) -> pl.DataFrame:
    """Draw a stream: the reference and what comes after it, in time order.

    :param seed: of the generator.
    :param windows: number of windows after the reference.
    """
    random = np.random.default_rng(seed)
    frames = []
    for number in range(windows + 1):
        rows = world.rows if number else world.reference_rows
        columns = world.draw(random, number, rows)
        start, step = START + number * timedelta(days=DAYS), timedelta(days=DAYS) / rows
        frames.append(pl.DataFrame({"at": [start + row * step for row in range(rows)], **columns}))
    return pl.concat(frames)


def write_stream(world: World, seed: int, folder: Path, *, windows: int = WINDOWS) -> Path:
    """Write a stream as Parquet, and the TOML that describes it.

    :returns: path of the TOML.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, name = make_stream(world, seed, windows=windows), f"{world.name}_{seed}"
    rows.write_parquet(folder / f"{name}.parquet")
    path = folder / f"{name}.toml"
    path.write_text(
        TOML.format(
            why=world.why,
            name=name,
            numeric=", ".join(f'"{column}"' for column in rows.columns if column not in ("at", "target")),
            metric=world.metric,
            days=DAYS,
            kind="Regressor" if world.metric == "mae" else "Classifier",
        )
    )
    return path


def _inputs(random: np.random.Generator, rows: int, count: int) -> Columns:
    """Draw inputs between -1 and 1, named a, b, c … and beyond z by number."""
    names = [chr(ord("a") + number) if number < 26 else f"x{number}" for number in range(count)]
    return {name: random.uniform(-1.0, 1.0, rows) for name in names}


def _relation(inputs: Columns) -> Any:
    """Give what does not change: a slope, a wave, a corner and an interaction of the first four inputs."""
    return (
        10.0
        + 1.5 * inputs["a"]
        + np.sin(3.0 * inputs["b"])
        + np.abs(inputs["c"])
        - 0.5
        + inputs["a"] * inputs["d"]
    )


def _logistic(values: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-values))


def main() -> None:
    """Write all streams."""
    parser = argparse.ArgumentParser(description="Write streams on which retraining hurts.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    for world in WORLDS:
        for seed in args.seeds:
            print(write_stream(world, seed, args.folder))


if __name__ == "__main__":
    main()

"""Which rows to train on: retraining every window of three real streams on all, recent or weighted rows.

Run with the folder of the streams: ``python benchmarks/training_rows.py ../shared/data [stream ...]``. The pipeline, the folding of
features and the weights are the ones :class:`TrainModelOperator` uses.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from airflow_mlops.core.comparison.metrics import evaluate_metric, resolve_metric
from airflow_mlops.core.model.columns import ColumnRoles
from airflow_mlops.core.model.tuning import Candidate
from airflow_mlops.integrations import sklearn
from airflow_mlops.steps.training.rows import row_weights

#: Rules: the windows back that are used (``None``: all), and the half-life in windows (``None``: equal weights).
RULES = {
    "first model, never again": (0, None),
    "trailing window": (1, None),
    "all history": (None, None),
    "all, half-life 4 windows": (None, 4.0),
    "all, half-life 1 window": (None, 1.0),
    "all, half-life 1/2 window": (None, 0.5),
}


class Stream(NamedTuple):
    """A stream cut into windows."""

    rows: pl.DataFrame
    windows: list[tuple[int, int]]
    reference: int
    window_days: float
    columns: ColumnRoles
    candidate: Candidate
    metric: str


def load(folder: Path, name: str) -> Stream:
    """Read a stream, its rows in time order and ``(first, last + 1)`` row numbers per window."""
    facts = json.loads((folder / "expected.json").read_text())["datasets"][name]
    rows = pl.read_parquet(folder / f"{name}.parquet")
    time_column = "pickup_datetime" if name == "nyc_taxi" else "timestamp"
    rows = rows.drop_nulls([facts["target"]]).sort(time_column, maintain_order=True)
    if name == "elec2":
        rows = rows.with_columns(pl.col("target").cast(pl.String))
        starts = [*range(0, rows.height + 1, 1344)]  # the last block is not whole and left out
    else:
        month = rows[time_column].dt.truncate("1mo")
        starts = [0, *(np.flatnonzero(np.diff(month.to_physical().to_numpy())) + 1).tolist(), rows.height]
    columns = ColumnRoles(
        target=facts["target"],
        time=time_column,
        numeric=tuple(facts["features_num"]),
        categorical=tuple(facts["features_cat"]),
    )
    kind = "Classifier" if facts["task"] == "clf" else "Regressor"
    loss = {"loss": "absolute_error"} if name == "nyc_taxi" else {}
    return Stream(
        rows=rows,
        windows=list(itertools.pairwise(starts)),
        reference=facts["n_reference_windows"],
        window_days=28.0 if name == "elec2" else 30.4375,
        columns=columns,
        candidate=Candidate(
            estimator=f"sklearn.ensemble.HistGradientBoosting{kind}", params={"early_stopping": False, **loss}
        ),
        metric=facts["primary_metric"],
    )


def score(stream: Stream, back: int | None, half_life_windows: float | None) -> float:
    """Retrain before every window and score on it; the mean over all rows."""
    metric, total, count = resolve_metric(stream.metric), 0.0, 0
    pipeline = None
    for number in range(stream.reference, len(stream.windows)):
        start, end = stream.windows[number]
        if pipeline is None or back != 0:
            first = 0 if not back else stream.windows[max(0, number - stream.reference * back)][0]
            learn = stream.rows[first:start]
            half_life = half_life_windows * stream.window_days if half_life_windows else None
            pipeline = sklearn.build_pipeline(stream.candidate, stream.columns, seed=0)
            sklearn.fit(
                pipeline,
                sklearn.to_features(learn, stream.columns),
                learn[stream.columns.target].to_numpy(),
                row_weights(learn, stream.columns, half_life),
            )
        check = stream.rows[start:end]
        prediction = pipeline.predict(sklearn.to_features(check, stream.columns))
        value = evaluate_metric(
            metric, target=check[stream.columns.target].to_numpy(), prediction=prediction
        ).value
        total, count = total + value * (end - start), count + end - start
    return total / count


def main() -> None:
    """Print the table."""
    folder, *names = sys.argv[1:]
    print(f"{'stream':<14}{'rule':<28}{'metric':<10}{'value':>9}{'s':>7}")
    for name in names or ("elec2", "bike_sharing", "nyc_taxi"):
        stream = load(Path(folder), name)
        for rule, (back, half_life) in RULES.items():
            started = time.monotonic()
            value = score(stream, back, half_life)
            print(
                f"{name:<14}{rule:<28}{stream.metric:<10}{value:>9.4g}{time.monotonic() - started:>7.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

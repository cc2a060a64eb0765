"""Estimates without labels: ours beside NannyML's on the same predictions, and both beside what turned out.

NannyML needs an environment of its own (``pip install nannyml==0.13.1``, Python below 3.13)::

    python benchmarks/estimation.py prepare FOLDER       # predictions on elec2, bike_sharing and a made set of three labels
    NANNYML_PYTHON benchmarks/estimation.py nannyml FOLDER
    python benchmarks/estimation.py compare FOLDER       # the figures of tests/unit/nannyml_figures.json, and the differences
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

LABEL_METRICS = ("accuracy", "precision", "recall", "f1", "roc_auc")
DATA = Path(__file__).parent.parent.parent / "shared" / "data"
ELEC2 = ("period", "nswprice", "nswdemand", "vicprice", "vicdemand", "transfer", "day_of_week")
BIKE_SHARING = ("hr", "holiday", "weekday", "workingday", "temp", "atemp", "hum", "windspeed", "weathersit")
CLASSES = ("a", "b", "c")
#: Rows per chunk.
CHUNK = {"elec2": 1344, "three_labels": 2000, "bike_sharing": 700}


def elec2() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Give reference (blocks 4 and 5) and later predictions of a logistic regression on blocks 0-3."""
    import polars as pl
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = pl.read_parquet(DATA / "elec2.parquet")
    inputs = rows.select(ELEC2).to_numpy().astype(float)
    target = rows["target"].to_numpy()
    block = CHUNK["elec2"]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(
        inputs[: 4 * block], target[: 4 * block]
    )
    chance = model.predict_proba(inputs)[:, 1]
    parts = [
        {"truth": target[piece], "p1": chance[piece], "answer": (chance[piece] > 0.5).astype(int)}
        for piece in (slice(4 * block, 6 * block), slice(6 * block, 14 * block))
    ]
    return parts[0], parts[1]


def three_labels(seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Give predictions of three labels by a model that is too sure of itself; later its inputs move."""
    random = np.random.default_rng(seed)

    def part(count: int, shift: float) -> dict[str, np.ndarray]:
        scores = random.standard_normal((count, 3)) + shift * np.linspace(0.0, 1.0, count)[:, None] * [
            1.0,
            0.0,
            -1.0,
        ]
        odds = np.exp(scores)
        true = odds / odds.sum(axis=1, keepdims=True)
        said = np.exp(1.8 * scores)
        said /= said.sum(axis=1, keepdims=True)
        truth = (random.random(count)[:, None] > np.cumsum(true, axis=1)[:, :-1]).sum(axis=1)
        given = {f"p{name}": said[:, place] for place, name in enumerate(CLASSES)}
        return {"truth": truth, "answer": said.argmax(axis=1), **given}

    return part(6000, 0.0), part(10_000, 1.5)


def bike_sharing() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Give reference and later answers of a boosted model, with its inputs."""
    import polars as pl
    from sklearn.ensemble import HistGradientBoostingRegressor

    rows = pl.read_parquet(DATA / "bike_sharing.parquet")
    inputs = rows.select(BIKE_SHARING).to_numpy().astype(float)
    target = rows["cnt"].to_numpy().astype(float)
    model = HistGradientBoostingRegressor(random_state=0).fit(inputs[:4000], target[:4000])
    answer = model.predict(inputs)
    parts = []
    for piece in (slice(4000, 6800), slice(6800, 6800 + 6 * CHUNK["bike_sharing"])):
        named = {f"x{place}": inputs[piece, place] for place in range(inputs.shape[1])}
        parts.append({"truth": target[piece], "answer": answer[piece], **named})
    return parts[0], parts[1]


def prepare(folder: Path) -> None:
    """Write the predictions."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in (("elec2", elec2), ("three_labels", three_labels), ("bike_sharing", bike_sharing)):
        reference, later = make()
        np.savez(folder / f"{name}.npz", **_named("reference", reference), **_named("later", later))


def _named(prefix: str, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}/{name}": values for name, values in columns.items()}


def read(folder: Path, name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Read what :func:`prepare` wrote."""
    with np.load(folder / f"{name}.npz") as file:
        parts = [
            {key.partition("/")[2]: file[key] for key in file.files if key.startswith(f"{part}/")}
            for part in ("reference", "later")
        ]
    return parts[0], parts[1]


def run_nannyml(folder: Path) -> None:
    """Have NannyML estimate; in its own environment."""
    import nannyml
    import pandas as pd

    nannyml.disable_usage_logging()
    found: dict[str, Any] = {"nannyml": nannyml.__version__}
    for name in ("elec2", "three_labels"):
        reference, later = (pd.DataFrame(part) for part in read(folder, name))
        binary = name == "elec2"
        if not binary:
            for part in (reference, later):
                for column in ("truth", "answer"):
                    part[column] = [CLASSES[value] for value in part[column]]
        estimator = nannyml.CBPE(
            problem_type="classification_binary" if binary else "classification_multiclass",
            y_true="truth",
            y_pred="answer",
            y_pred_proba="p1" if binary else {label: f"p{label}" for label in CLASSES},
            metrics=list(LABEL_METRICS),
            chunk_size=CHUNK[name],
        )
        estimator.fit(reference)
        frame = estimator.estimate(later).filter(period="analysis").to_df()
        calibrated = (
            bool(estimator.needs_calibration)
            if binary
            else {label: type(one).__name__ for label, one in estimator._calibrators.items()}
        )
        found[name] = {
            "calibrated": calibrated,
            **{metric: [round(value, 6) for value in frame[(metric, "value")]] for metric in LABEL_METRICS},
        }
    reference, later = (pd.DataFrame(part) for part in read(folder, "bike_sharing"))
    estimator = nannyml.DLE(
        feature_column_names=[column for column in reference if column.startswith("x")],
        y_pred="answer",
        y_true="truth",
        metrics=["mae", "rmse"],
        chunk_size=CHUNK["bike_sharing"],
    )
    estimator.fit(reference)
    frame = estimator.estimate(later).filter(period="analysis").to_df()
    found["bike_sharing"] = {
        metric: [round(value, 4) for value in frame[(metric, "value")]] for metric in ("mae", "rmse")
    }
    (folder / "nannyml.json").write_text(json.dumps(found, indent=1))


def ours(
    reference: dict[str, np.ndarray],
    later: dict[str, np.ndarray],
    chunk: int,
    classes: tuple[str, ...],
    kind: str | None = None,
) -> dict[str, list[dict[str, float]]]:
    """Estimate the metrics of labels with our code, chunk by chunk, beside what turned out."""
    from airflow_mlops.core.comparison.metrics import evaluate_metric, resolve_metric
    from airflow_mlops.core.monitoring.estimation import estimate_labels, learn_labels_estimation

    before, after = predictions(reference, classes), predictions(later, classes)
    truth, turned_out = names_of(reference["truth"], classes), names_of(later["truth"], classes)
    found: dict[str, list[dict[str, float]]] = {}
    for name in LABEL_METRICS:
        metric = resolve_metric(name)
        estimation = learn_labels_estimation(metric, target=truth, answers=before, kind=kind)
        found[name] = []
        for start in range(0, len(after), chunk):
            rows = np.arange(start, min(start + chunk, len(after)))
            estimate = estimate_labels(metric, after.take(rows), estimation)
            realized = evaluate_metric(metric, target=turned_out[rows], prediction=after.take(rows)).value
            found[name].append(
                {"value": estimate.value, "low": estimate.low, "high": estimate.high, "realized": realized}
            )
    return found


def predictions(columns: dict[str, np.ndarray], classes: tuple[str, ...]) -> Any:
    """Give the columns as predictions."""
    from airflow_mlops.core.comparison.predictions import Predictions

    given = (
        np.column_stack([1.0 - columns["p1"], columns["p1"]])
        if "p1" in columns
        else np.column_stack([columns[f"p{name}"] for name in classes])
    )
    return Predictions(values=names_of(columns["answer"], classes), probabilities=given, classes=classes)


def names_of(numbers: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:
    """Give labels for their numbers."""
    return np.array(classes, dtype=object)[numbers]


def errors_ours(
    reference: dict[str, np.ndarray], later: dict[str, np.ndarray], chunk: int, name: str
) -> list[dict[str, float]]:
    """Estimate a metric of numbers with our code, chunk by chunk."""
    import polars as pl

    from airflow_mlops.core.comparison.metrics import evaluate_metric, resolve_metric
    from airflow_mlops.core.comparison.predictions import Graded, Predictions
    from airflow_mlops.core.model.columns import ColumnRoles
    from airflow_mlops.core.monitoring.estimation import estimate_errors
    from airflow_mlops.steps.monitoring.estimation import fit_error_model

    inputs = tuple(column for column in reference if column.startswith("x"))
    columns = ColumnRoles(target="truth", time="time", numeric=inputs)
    metric = resolve_metric(name)
    frame = pl.DataFrame({column: reference[column] for column in inputs}).to_pandas()
    model = fit_error_model(
        metric, Graded(reference["truth"], Predictions(values=reference["answer"])), frame, columns
    )
    found = []
    for start in range(0, len(later["truth"]), chunk):
        rows = slice(start, start + chunk)
        said = model.pipeline.predict(
            pl.DataFrame({column: later[column][rows] for column in inputs})
            .to_pandas()
            .assign(**{model.answer_field: later["answer"][rows]})[list(model.columns.inputs)]
        )
        estimate = estimate_errors(metric, said, model.estimation)
        realized = evaluate_metric(
            metric, target=later["truth"][rows], prediction=later["answer"][rows]
        ).value
        found.append(
            {"value": estimate.value, "low": estimate.low, "high": estimate.high, "realized": realized}
        )
    return found


def compare(folder: Path) -> None:
    """Print the differences."""
    theirs = json.loads((folder / "nannyml.json").read_text())
    for name, classes in (("elec2", ("0", "1")), ("three_labels", CLASSES)):
        reference, later = read(folder, name)
        for kind in ("isotonic", "none", None):
            mine = ours(reference, later, CHUNK[name], classes, kind)
            for metric in LABEL_METRICS:
                values = np.array([item["value"] for item in mine[metric]])
                gap = np.max(np.abs(values - theirs[name][metric]))
                covered = np.mean([item["low"] <= item["realized"] <= item["high"] for item in mine[metric]])
                off = [
                    float(np.mean(np.abs(np.array(estimates) - [item["realized"] for item in mine[metric]])))
                    for estimates in (values, theirs[name][metric])
                ]
                sys.stdout.write(
                    f"{name} {metric} ({kind or 'chosen'}): largest difference {gap:.5f}, mean error {off[0]:.4f} "
                    f"(NannyML {off[1]:.4f}), coverage {covered:.2f}\n"
                )
    reference, later = read(folder, "bike_sharing")
    for metric in ("mae", "rmse"):
        mine_errors = errors_ours(reference, later, CHUNK["bike_sharing"], metric)
        sys.stdout.write(
            f"bike_sharing {metric}: ours {[round(item['value'], 1) for item in mine_errors]}, NannyML "
            f"{theirs['bike_sharing'][metric]}, realized {[round(item['realized'], 1) for item in mine_errors]}, "
            f"intervals {[(round(item['low'], 1), round(item['high'], 1)) for item in mine_errors]}\n"
        )


def main() -> None:
    """Run one of the three parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["prepare", "nannyml", "compare"])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    {"prepare": prepare, "nannyml": run_nannyml, "compare": compare}[options.part](options.folder)


if __name__ == "__main__":
    main()

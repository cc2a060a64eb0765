"""The steps of the loop as its Dags run them, on a stream, with the ledger entries that the operators write."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.core.comparison.metrics import evaluate_metric, resolve_metric
from airflow_mlops.core.windows import Window
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.replay.stream import ID_COLUMN, Stream
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.common import model_columns
from airflow_mlops.steps.registry.packages import load_version

if TYPE_CHECKING:
    import polars as pl

    from airflow_mlops.core.comparison.predictions import Predictions

#: Who did it, in the ledger.
ACTOR = "replay"


@dataclass(kw_only=True)
class LoopSteps:
    """Steps on the rows of a stream.

    :param stream: what is lived through.
    :param services: a MLflow server, and folders for ledger and serving.
    :param folder: for tables.
    """

    stream: Stream
    services: Services
    folder: Path
    #: Trainings so far.
    trainings: int = field(default=0, init=False)
    #: The table as the last ingest left it.
    dataset: dict[str, Any] = field(default_factory=dict, init=False)

    def ingest(self, window: Window) -> dict[str, Any]:
        """Bring the rows of a window into the table."""
        landing = self.folder / "landing"
        landing.mkdir(parents=True, exist_ok=True)
        file = landing / f"{window.start:%Y%m%dT%H%M%S}.parquet"
        self.stream.inside(window).write_parquet(file)
        result = self.step(
            "ingest",
            {
                "source": str(file),
                "table": str(self.folder / "table"),
                "time_column": self.stream.config.time_column,
                "window": to_dict(window),
                "id_column": ID_COLUMN,
            },
        )
        self.dataset = result["dataset"]
        return self.dataset

    def fit(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Train as a plan says; the same training again is not counted."""
        config = self.stream.config
        training = self.step(
            "train",
            {
                "dataset": self.dataset,
                "model_name": config.name,
                "estimator": config.estimator,
                "estimator_params": config.estimator_params,
                "target": config.target,
                "numeric": list(config.numeric),
                "categorical": list(config.categorical),
                "time_column": config.time_column,
                "id_column": ID_COLUMN,
                "metric": config.metric,
                **plan,
            },
        )
        if not training["reused"]:
            self.trainings += 1
            self.record(
                EntryKind.TRAINING,
                from_dict(Window, training["training"]),
                training,
                f"trained on {training['training_rows']} rows",
                key=training["run_id"],
                now=from_dict(Window, plan["window"]).end,
            )
        return training

    def register(self, training: dict[str, Any]) -> str:
        """Register what was trained: its version."""
        name = self.stream.config.name
        registered = self.step(
            "register",
            {
                "model_name": name,
                "run_id": training["run_id"],
                "package_digest": training["package_digest"],
                "model_id": training["model_id"],
                "actor": ACTOR,
            },
        )
        version = str(registered["model_version"])
        self.record(
            EntryKind.REGISTRATION,
            None,
            registered,
            f"registered version {version}",
            key=f"{name}|{version}",
            now=from_dict(Window, training["training"]).end,
        )
        return version

    def promote(
        self, version: str, *, expected: str | None, reason: str, key: str | None, window: Window
    ) -> None:
        """Make a version the champion."""
        self.step(
            "promote",
            {
                "model_name": self.stream.config.name,
                "model_version": version,
                "expected_version": expected,
                "reason": reason,
                "decision_key": key,
                "actor": ACTOR,
                "now": after(window).isoformat(),
            },
        )

    def step(self, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        """Run any step."""
        return run_step(name, spec, self.services)

    def ledger(self) -> Ledger:
        """Open the ledger; to be closed."""
        return Ledger.open(self.services.require("ledger_url"))

    def record(
        self,
        kind: EntryKind,
        window: Window | None,
        payload: dict[str, Any],
        summary: str,
        *,
        key: str | None = None,
        now: datetime,
    ) -> None:
        """Write down what was found."""
        name = self.stream.config.name
        with self.ledger() as ledger:
            ledger.record(
                LedgerEntry(
                    kind=kind,
                    key=key or f"{name}|{window.key if window else ''}",
                    model_name=name,
                    window=window,
                    subject=None,
                    summary=summary,
                    payload=payload,
                    actor=ACTOR,
                    recorded_at=now,
                )
            )

    def record_outcome(self, decision: dict[str, Any], window: Window, outcome: str, reason: str) -> None:
        """Write down how a retraining that was decided has ended."""
        self.record(
            EntryKind.RETRAINING_OUTCOME,
            None,
            {"outcome": outcome, "reason": reason},
            f"the retraining of {self.stream.config.name} ended: {outcome}: {reason}",
            key=decision["decision_key"],
            now=after(window),
        )

    def load(self, version: str) -> Any:
        """Load a version as the service does."""
        registry = Registry.connect(self.services)
        return load_version(registry, registry.version(self.stream.config.name, version), self.services)

    def answers(self, model: Any, rows: pl.DataFrame) -> Predictions:
        """Let a model answer rows."""
        answers: Predictions = model.answer(model_columns(rows, model.manifest.signature))
        return answers

    def value(self, rows: pl.DataFrame, answers: Predictions) -> float:
        """Measure answers by the metric of the stream."""
        metric = resolve_metric(self.stream.config.metric)
        return evaluate_metric(
            metric, target=rows[self.stream.config.target].to_numpy(), prediction=answers
        ).value


def after(window: Window) -> datetime:
    """Give the time of what is done about a window: a day after it, as the labels are there by then."""
    return window.end + timedelta(days=1)

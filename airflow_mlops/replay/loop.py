"""The loop on a stream of the past, window by window: predict, then learn what was right, check, decide, act."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.challengers import ALL, RECENT
from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.core.metrics import evaluate_metric, resolve_metric
from airflow_mlops.core.retraining import TrainingChoice, recipe_rows
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import MLOpsError
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.replay.stream import ID_COLUMN, Stream
from airflow_mlops.services import Services
from airflow_mlops.serving.inference_log import InferenceLog
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.common import model_columns
from airflow_mlops.steps.packages import load_version

if TYPE_CHECKING:
    from collections.abc import Callable

    import polars as pl

    from airflow_mlops.core.predictions import Predictions


log = logging.getLogger(__name__)

_ACTOR = "replay"

#: Share of the newest rows that a model is measured on.
_HELD_OUT = 0.2

#: Row groups of predictions handed to the inference log at once.
_BATCH_ROWS = 50_000


@dataclass(frozen=True, kw_only=True, slots=True)
class LivedWindow:
    """What happened in one window.

    :param window: the window.
    :param row_count: predictions.
    :param model_version: that gave them.
    :param value: metric of its predictions.
    :param first_value: metric of the first model's predictions for the same rows.
    :param outcome: what was decided after it.
    :param reason: why.
    :param promoted: version that was promoted after it; ``None``: none was.
    :param trainings: models trained after it.
    :param seconds: wall time of all of it.
    """

    window: Window
    row_count: int
    model_version: str
    value: float
    first_value: float
    outcome: str
    reason: str
    promoted: str | None
    trainings: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayResult:
    """What a policy did on a stream.

    :param stream: its name.
    :param policy: its name.
    :param metric: what is reported.
    :param windows: what happened, oldest first.
    """

    stream: str
    policy: str
    metric: str
    windows: tuple[LivedWindow, ...]

    @property
    def value(self) -> float:
        """Mean of the metric, a window counting as many times as it has rows."""
        return _mean([(item.value, item.row_count) for item in self.windows])

    @property
    def first_value(self) -> float:
        """The same of the first model, had nobody ever retrained."""
        return _mean([(item.first_value, item.row_count) for item in self.windows])

    @property
    def promotions(self) -> int:
        """Number of promotions after the first model's."""
        return sum(item.promoted is not None for item in self.windows)

    @property
    def trainings(self) -> int:
        """Number of trainings, also of models that were never promoted."""
        return sum(item.trainings for item in self.windows)


@dataclass(kw_only=True)
class Replay:
    """The loop.

    :param stream: what is lived through.
    :param services: a MLflow server, and folders for ledger and serving.
    :param folder: for tables.
    :param policy: import path of the decision.
    :param parameters: the policy's parameters.
    :param check_drift: look at the inputs as well.
    :param compare: train challengers in the shadow and compare them.
    """

    stream: Stream
    services: Services
    folder: Path
    policy: str
    parameters: dict[str, Any] = field(default_factory=dict)
    check_drift: bool = False
    compare: bool = True
    _trainings: int = field(default=0, init=False)
    _dataset: dict[str, Any] = field(default_factory=dict, init=False)

    def run(self, *, name: str, progress: Callable[[str], None] = log.info) -> ReplayResult:
        """Live through all windows.

        :param name: of the policy, for the report.
        :param progress: is told a line per window.
        """
        first = self._first_model()
        lived = []
        for number, window in enumerate(self.stream.later, start=1):
            started = time.monotonic()
            self._trainings = 0
            rows = self.stream.inside(window)
            version, value = self._predict(window, rows)
            first_value = self._value(rows, self._answers(first, rows))
            self._learn(window)
            last = number == len(self.stream.later)
            decision, promoted = ({"reason": "the stream ends"}, None) if last else self._decide(window)
            lived.append(
                LivedWindow(
                    window=window,
                    row_count=rows.height,
                    model_version=version,
                    value=value,
                    first_value=first_value,
                    outcome="retrain" if decision.get("retrain") else "nothing",
                    reason=str(decision["reason"]),
                    promoted=promoted,
                    trainings=self._trainings,
                    seconds=time.monotonic() - started,
                )
            )
            progress(_line(lived[-1], number, len(self.stream.later)))
        return ReplayResult(
            stream=self.stream.config.name,
            policy=name,
            metric=self.stream.config.metric,
            windows=tuple(lived),
        )

    # -- one window ---------------------------------------------------------------------------------------

    def _first_model(self) -> Any:
        """Train both recipes on the reference and promote the one that takes all rows alike."""
        window = self.stream.reference
        dataset = self._ingest(window)
        versions = {
            recipe: self._train_recipe(recipe, self.stream.windows[self.stream.config.reference - 1], dataset)
            for recipe in ((ALL, RECENT) if self.compare else (ALL,))
        }
        self._promote(versions[ALL], expected=None, reason="the first model", key=None, window=window)
        return self._load(versions[ALL])

    def _predict(self, window: Window, rows: pl.DataFrame) -> tuple[str, float]:
        """Answer for the window as the service does: with the champion, into the inference log."""
        registry = Registry.connect(self.services)
        version = registry.version_by_alias(self.stream.config.name, "champion")
        model = load_version(registry, version, self.services)
        answers = self._answers(model, rows)
        inference = InferenceLog(
            Path(self.services.require("serving_dir")) / "inference_log", maximum_rows=rows.height + 1
        )
        signature = model.manifest.signature
        for start in range(0, rows.height, _BATCH_ROWS):
            batch = rows[start : start + _BATCH_ROWS]
            inference.append(
                model_name=self.stream.config.name,
                model_version=version.model_version,
                signature=signature,
                prediction_ids=[str(number) for number in batch[ID_COLUMN]],
                times=batch[self.stream.config.time_column].to_list(),
                columns={name: batch[name].to_list() for name in signature.names},
                predictions=answers.values[start : start + batch.height].tolist(),
                latency_ms=0.0,
            )
        inference.flush()
        if inference.shed_rows:
            raise MLOpsError(
                f"{inference.shed_rows} predictions of {window} could not be logged; see the log"
            )
        return version.model_version, self._value(rows, answers)

    def _learn(self, window: Window) -> None:
        """Take in the labels, check what was predicted, and write down what was found."""
        config, dataset = self.stream.config, self._ingest(window)
        common = {"model_name": config.name, "window": to_dict(window)}
        grade = self._step(
            "performance",
            {
                **common,
                "labels": dataset,
                "id_column": ID_COLUMN,
                "target": config.target,
                "metric": config.metric,
            },
        )
        self._record(EntryKind.PERFORMANCE_CHECK, window, grade, grade["reason"])
        if self.check_drift:
            drift = self._step("drift", {**common, "report": "never"})
            self._record(EntryKind.DRIFT_CHECK, window, drift, drift["headline"])
        if self.compare:
            check = self._step(
                "challengers",
                {**common, "dataset": dataset, "time_column": config.time_column, "metric": config.metric},
            )
            self._record(EntryKind.CHALLENGER_CHECK, window, check, check["reason"])

    def _decide(self, window: Window) -> tuple[dict[str, Any], str | None]:
        """Decide as the Dag does, and carry it out."""
        required = [EntryKind.PERFORMANCE_CHECK]
        required += [EntryKind.DRIFT_CHECK] if self.check_drift else []
        required += [EntryKind.CHALLENGER_CHECK] if self.compare else []
        decision = self._step(
            "retraining",
            {
                "model_name": self.stream.config.name,
                "required_checks": [str(kind) for kind in required],
                "policy": self.parameters,
                "decide": self.policy,
                "actor": _ACTOR,
                "now": _after(window).isoformat(),
            },
        )
        since, earned, why = (
            self._world_since(),
            decision["retrain"],
            "its predecessors were better than the champion",
        )
        if earned and decision["promote_on"] == "held_out":
            earned, why = self._test(decision, window)
            since = _choice(decision).start or since if earned else since
        recipes = {*decision["shadow"], *([decision["recipe"]] if earned and decision["recipe"] else [])}
        made = {
            recipe: self._train_recipe(recipe, window, self._dataset, since) for recipe in sorted(recipes)
        }
        if not earned:
            return decision, None
        version = made.get(decision["recipe"]) or self._train(_choice(decision), self._dataset)
        self._close(decision, window, version, why)
        return decision, version

    def _test(self, decision: dict[str, Any], window: Window) -> tuple[bool, str]:
        """Hold a model of these rows, but for the newest fifth of the window, against the champion on that fifth."""
        choice, columns = _choice(decision), self.stream.config
        start = choice.start or self.stream.windows[0].start
        count = self.stream.inside(Window(start=start, end=choice.end)).height
        share = _HELD_OUT * self.stream.inside(window).height / count
        training = self._fit(choice, self._dataset, holdout_share=share)
        verdict = self._step(
            "evaluate",
            {
                "dataset": self._dataset,
                "model_name": columns.name,
                "run_id": training["run_id"],
                "package_digest": training["package_digest"],
                "window": training["holdout"],
                "time_column": columns.time_column,
                "metric": columns.metric,
                "policy": {"minimum_uplift": 0.0},
            },
        )
        earned = verdict["verdict"] == "promote"
        if not earned:
            self._record_outcome(decision, window, str(verdict["verdict"]), verdict["reason"])
        return earned, str(verdict["reason"])

    # -- steps --------------------------------------------------------------------------------------------

    def _ingest(self, window: Window) -> dict[str, Any]:
        landing = self.folder / "landing"
        landing.mkdir(parents=True, exist_ok=True)
        file = landing / f"{window.start:%Y%m%dT%H%M%S}.parquet"
        self.stream.inside(window).write_parquet(file)
        result = self._step(
            "ingest",
            {
                "source": str(file),
                "table": str(self.folder / "table"),
                "time_column": self.stream.config.time_column,
                "window": to_dict(window),
                "id_column": ID_COLUMN,
            },
        )
        self._dataset = result["dataset"]
        return self._dataset

    def _train_recipe(
        self, recipe: str, window: Window, dataset: dict[str, Any], since: datetime | None = None
    ) -> str:
        return self._train(recipe_rows(recipe, window, since), dataset, recipe=recipe)

    def _train(self, choice: TrainingChoice, dataset: dict[str, Any], *, recipe: str | None = None) -> str:
        return self._register(self._fit(choice, dataset, refit=True, recipe=recipe))

    def _fit(
        self,
        choice: TrainingChoice,
        dataset: dict[str, Any],
        *,
        refit: bool = False,
        recipe: str | None = None,
        holdout_share: float = _HELD_OUT,
    ) -> dict[str, Any]:
        config = self.stream.config
        start = choice.start or self.stream.windows[0].start
        self._trainings += 1
        return self._step(
            "train",
            {
                "dataset": dataset,
                "model_name": config.name,
                "estimator": config.estimator,
                "estimator_params": config.estimator_params,
                "target": config.target,
                "numeric": list(config.numeric),
                "categorical": list(config.categorical),
                "time_column": config.time_column,
                "id_column": ID_COLUMN,
                "window": to_dict(Window(start=max(start, self.stream.windows[0].start), end=choice.end)),
                "half_life_days": choice.half_life_days,
                "metric": config.metric,
                "holdout_share": holdout_share,
                "refit": refit,
                "recipe": recipe,
            },
        )

    def _register(self, training: dict[str, Any]) -> str:
        registered = self._step(
            "register",
            {
                "model_name": self.stream.config.name,
                "run_id": training["run_id"],
                "package_digest": training["package_digest"],
                "model_id": training["model_id"],
                "actor": _ACTOR,
            },
        )
        return str(registered["model_version"])

    def _close(self, decision: dict[str, Any], window: Window, version: str, reason: str) -> None:
        with self._ledger() as ledger:
            champion = ledger.aliases(self.stream.config.name).get("champion")
        self._promote(version, expected=champion, reason=reason, key=decision["decision_key"], window=window)
        self._record_outcome(decision, window, "promoted", reason)

    def _promote(
        self, version: str, *, expected: str | None, reason: str, key: str | None, window: Window
    ) -> None:
        self._step(
            "promote",
            {
                "model_name": self.stream.config.name,
                "model_version": version,
                "expected_version": expected,
                "reason": reason,
                "decision_key": key,
                "actor": _ACTOR,
                "now": _after(window).isoformat(),
            },
        )

    def _step(self, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        return run_step(name, spec, self.services)

    # -- ledger and models ---------------------------------------------------------------------------------

    def _ledger(self) -> Ledger:
        return Ledger.open(self.services.require("ledger_url"))

    def _world_since(self) -> datetime | None:
        with self._ledger() as ledger:
            return ledger.world_since(self.stream.config.name)

    def _record(self, kind: EntryKind, window: Window, payload: dict[str, Any], summary: str) -> None:
        name = self.stream.config.name
        self._write(kind, f"{name}|{window.key}", window, payload, summary)

    def _record_outcome(self, decision: dict[str, Any], window: Window, outcome: str, reason: str) -> None:
        payload = {"outcome": outcome, "reason": reason}
        summary = f"the retraining of {self.stream.config.name} ended: {outcome}: {reason}"
        self._write(
            EntryKind.RETRAINING_OUTCOME, decision["decision_key"], window, payload, summary, windowed=False
        )

    def _write(
        self,
        kind: EntryKind,
        key: str,
        window: Window,
        payload: dict[str, Any],
        summary: str,
        *,
        windowed: bool = True,
    ) -> None:
        with self._ledger() as ledger:
            ledger.record(
                LedgerEntry(
                    kind=kind,
                    key=key,
                    model_name=self.stream.config.name,
                    window=window if windowed else None,
                    subject=None,
                    summary=summary,
                    payload=payload,
                    actor=_ACTOR,
                    recorded_at=_after(window),
                )
            )

    def _load(self, version: str) -> Any:
        registry = Registry.connect(self.services)
        return load_version(registry, registry.version(self.stream.config.name, version), self.services)

    def _answers(self, model: Any, rows: pl.DataFrame) -> Predictions:
        answers: Predictions = model.answer(model_columns(rows, model.manifest.signature))
        return answers

    def _value(self, rows: pl.DataFrame, answers: Predictions) -> float:
        metric = resolve_metric(self.stream.config.metric)
        return evaluate_metric(
            metric, target=rows[self.stream.config.target].to_numpy(), prediction=answers
        ).value


def _choice(decision: dict[str, Any]) -> TrainingChoice:
    window = from_dict(Window, decision["training"])
    return TrainingChoice(
        start=None if decision["rows"] == "all" else window.start,
        end=window.end,
        half_life_days=decision["half_life_days"],
        why=decision["reason"],
    )


def _after(window: Window) -> datetime:
    """Give the time of what is done about a window: a day after it, as the labels are there by then."""
    return window.end + timedelta(days=1)


def _mean(values: list[tuple[float, int]]) -> float:
    return sum(value * rows for value, rows in values) / sum(rows for _, rows in values)


def _line(lived: LivedWindow, number: int, count: int) -> str:
    then = f"; version {lived.promoted} promoted" if lived.promoted else ""
    return (
        f"{number}/{count} {lived.window}: {lived.value:.4g} by version {lived.model_version}, "
        f"{lived.first_value:.4g} by the first model{then} ({lived.trainings} trained, {lived.seconds:.0f} s)"
    )

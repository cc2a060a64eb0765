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
from airflow_mlops.core.performance import PastGrade
from airflow_mlops.core.retraining import TrainingPlan
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import MLOpsError
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.ledger import ACTING, EntryKind, Ledger, LedgerEntry, wanted_challengers
from airflow_mlops.replay.stream import ID_COLUMN, Stream
from airflow_mlops.replay.trial import Promoted, compare, trial_end
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
    :param taken_back: version that was on trial in it and did worse than the one before; ``None``: none.
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
    taken_back: str | None
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
    :param trial: share of the next window in which a version that no window has tested is tried on rows that the one before it
        still answers.
    """

    stream: Stream
    services: Services
    folder: Path
    policy: str
    parameters: dict[str, Any] = field(default_factory=dict)
    check_drift: bool = False
    compare: bool = True
    trial: float = 0.0
    _on_trial: Promoted | None = field(default=None, init=False)
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
            taken_back, tried = self._try(window, rows)
            version, value = self._predict(rows, tried)
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
                    outcome=next((word for word in ACTING if decision.get(word)), "nothing"),
                    reason=str(decision["reason"]),
                    promoted=promoted,
                    taken_back=taken_back,
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
        """Train on the reference and promote the model that takes all rows alike; beside it the recipes' first models."""
        reference = self.stream.reference
        self._ingest(reference)
        versions = {
            recipe: self._register(self._fit(self._first_plan(recipe)))
            for recipe in ((ALL, RECENT) if self.compare else (ALL,))
        }
        self._promote(versions[ALL], expected=None, reason="the first model", key=None, window=reference)
        return self._load(versions[ALL])

    def _first_plan(self, recipe: str) -> dict[str, Any]:
        days = self.stream.windows[self.stream.config.reference - 1].days
        plan = TrainingPlan(
            window=self.stream.reference,
            rows="window",
            half_life_days=days if recipe == RECENT else None,
            mlflow_copy=False,
            recipe=recipe,
        )
        return to_dict(plan)

    def _try(self, window: Window, rows: pl.DataFrame) -> tuple[str | None, Predictions | None]:
        """Let the version before a promoted one answer for a while, as in a rollout in the shadow; what did worse is taken back.

        :returns: the version that was taken back, and the answers of that while.
        """
        promoted, self._on_trial = self._on_trial, None
        times = rows[self.stream.config.time_column]
        end = trial_end(window, times, self.trial) if promoted else None
        if promoted is None or end is None:
            return None, None
        first = rows.filter(times < end)
        answers = self._answer(promoted.before, first)
        target = first[self.stream.config.target].to_numpy()
        found = compare(
            self.stream.config.metric, target, answers, self._answers(self._load(promoted.version), first)
        )
        if found.judgement != "worse":
            return None, answers
        self._step(
            "roll-back",
            {
                "model_name": self.stream.config.name,
                "model_version": promoted.before,
                "expected_version": promoted.version,
                "reason": found.sentence,
                "actor": _ACTOR,
                "now": end.isoformat(),
            },
        )
        return promoted.version, answers

    def _predict(self, rows: pl.DataFrame, tried: Predictions | None) -> tuple[str, float]:
        """Answer for the window as the service does, with the champion.

        :param tried: answers that were given already, to its first rows.
        """
        registry = Registry.connect(self.services)
        champion = registry.version_by_alias(self.stream.config.name, "champion").model_version
        answers = self._answer(champion, rows[len(tried) :] if tried else rows)
        return champion, self._value(rows, tried.followed_by(answers) if tried else answers)

    def _answer(self, version: str, rows: pl.DataFrame) -> Predictions:
        """Answer with a version, into the inference log."""
        model = self._load(version)
        answers = self._answers(model, rows)
        inference = InferenceLog(
            Path(self.services.require("serving_dir")) / "inference_log", maximum_rows=rows.height + 1
        )
        signature = model.manifest.signature
        for start in range(0, rows.height, _BATCH_ROWS):
            batch = rows[start : start + _BATCH_ROWS]
            inference.append(
                model_name=self.stream.config.name,
                model_version=version,
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
                f"{inference.shed_rows} predictions of version {version} could not be logged; see the log"
            )
        return answers

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
                "past": self._past_grades(window),
            },
        )
        self._record(EntryKind.PERFORMANCE_CHECK, window, grade, grade["reason"], now=_after(window))
        if self.check_drift:
            drift = self._step("drift", {**common, "report": "never"})
            self._record(EntryKind.DRIFT_CHECK, window, drift, drift["headline"], now=_after(window))
        if self.compare:
            check = self._step(
                "challengers",
                {
                    **common,
                    "dataset": dataset,
                    "time_column": config.time_column,
                    "metric": config.metric,
                    "earlier": self._former_champions(),
                },
            )
            self._record(EntryKind.CHALLENGER_CHECK, window, check, check["reason"], now=_after(window))

    def _former_champions(self) -> list[str]:
        with self._ledger() as ledger:
            return ledger.former_champions(self.stream.config.name)

    def _past_grades(self, window: Window) -> list[dict[str, Any]]:
        """Give the grades of earlier windows, as the operator does: a slow change shows in several of them together."""
        with self._ledger() as ledger:
            grades = ledger.grades(self.stream.config.name, before=window.start)
        return [
            {name: grade.entry.payload[name] for name in PastGrade.__slots__}
            for grade in grades
            if grade.measured
        ]

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
        promoted = self._retrain(decision, window) if decision["retrain"] else None
        if decision["bring_back"]:
            promoted = self._bring_back(decision, window)
        if self.compare:
            self._train_challengers()
        return decision, promoted

    def _retrain(self, decision: dict[str, Any], window: Window) -> str | None:
        """Train, evaluate, register, promote: the version, if it earned it."""
        training = self._fit(decision["plan"])
        config = self.stream.config
        evaluation = self._step(
            "evaluate",
            {
                "dataset": self._dataset,
                "model_name": config.name,
                "run_id": training["run_id"],
                "package_digest": training["package_digest"],
                "twin_digest": training["twin_digest"],
                "window": training["holdout"],
                "time_column": config.time_column,
                "metric": config.metric,
                "decision_key": decision["decision_key"],
            },
        )
        reason = str(evaluation["reason"])
        if evaluation["verdict"] != "promote":
            self._record_outcome(decision, window, str(evaluation["verdict"]), reason)
            return None
        version = self._register(training)
        self._promote(
            version,
            expected=evaluation["champion_version"],
            reason=reason,
            key=decision["decision_key"],
            window=window,
        )
        self._record_outcome(decision, window, "promoted", reason)
        if training["twin_digest"] and evaluation["champion_version"]:  # it was tested on this window alone
            self._on_trial = Promoted(version, evaluation["champion_version"])
        return version

    def _bring_back(self, decision: dict[str, Any], window: Window) -> str:
        version, reason = str(decision["bring_back"]), str(decision["reason"])
        self._promote(
            version,
            expected=decision["champion_version"],
            reason=reason,
            key=decision["decision_key"],
            window=window,
        )
        self._record_outcome(decision, window, "promoted", reason)
        return version

    def _train_challengers(self) -> None:
        with self._ledger() as ledger:
            wanted = wanted_challengers(ledger, self.stream.config.name)
        for plan in wanted:
            self._register(self._fit(plan))

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

    def _fit(self, plan: dict[str, Any]) -> dict[str, Any]:
        config = self.stream.config
        training = self._step(
            "train",
            {
                "dataset": self._dataset,
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
            self._trainings += 1
            self._record(
                EntryKind.TRAINING,
                from_dict(Window, training["training"]),
                training,
                f"trained on {training['training_rows']} rows",
                key=training["run_id"],
                now=from_dict(Window, plan["window"]).end,
            )
        return training

    def _register(self, training: dict[str, Any]) -> str:
        name = self.stream.config.name
        registered = self._step(
            "register",
            {
                "model_name": name,
                "run_id": training["run_id"],
                "package_digest": training["package_digest"],
                "model_id": training["model_id"],
                "actor": _ACTOR,
            },
        )
        version = str(registered["model_version"])
        self._record(
            EntryKind.REGISTRATION,
            None,
            registered,
            f"registered version {version}",
            key=f"{name}|{version}",
            now=from_dict(Window, training["training"]).end,
        )
        return version

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

    def _record(
        self,
        kind: EntryKind,
        window: Window | None,
        payload: dict[str, Any],
        summary: str,
        *,
        key: str | None = None,
        now: datetime,
    ) -> None:
        name = self.stream.config.name
        with self._ledger() as ledger:
            ledger.record(
                LedgerEntry(
                    kind=kind,
                    key=key or f"{name}|{window.key if window else ''}",
                    model_name=name,
                    window=window,
                    subject=None,
                    summary=summary,
                    payload=payload,
                    actor=_ACTOR,
                    recorded_at=now,
                )
            )

    def _record_outcome(self, decision: dict[str, Any], window: Window, outcome: str, reason: str) -> None:
        self._record(
            EntryKind.RETRAINING_OUTCOME,
            None,
            {"outcome": outcome, "reason": reason},
            f"the retraining of {self.stream.config.name} ended: {outcome}: {reason}",
            key=decision["decision_key"],
            now=_after(window),
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


def _after(window: Window) -> datetime:
    """Give the time of what is done about a window: a day after it, as the labels are there by then."""
    return window.end + timedelta(days=1)


def _mean(values: list[tuple[float, int]]) -> float:
    return sum(value * rows for value, rows in values) / sum(rows for _, rows in values)


def _line(lived: LivedWindow, number: int, count: int) -> str:
    then = f"; version {lived.taken_back} taken back" if lived.taken_back else ""
    then += f"; version {lived.promoted} promoted" if lived.promoted else ""
    return (
        f"{number}/{count} {lived.window}: {lived.value:.4g} by version {lived.model_version}, "
        f"{lived.first_value:.4g} by the first model{then} ({lived.trainings} trained, {lived.seconds:.0f} s)"
    )

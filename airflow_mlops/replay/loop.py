"""The loop on a stream of the past, window by window: predict, then learn what was right, check, decide, act."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.decision.challengers import ALL, RECENT
from airflow_mlops.core.decision.retraining import TrainingPlan
from airflow_mlops.core.monitoring.performance import PastGrade
from airflow_mlops.exceptions import MLOpsError
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.ledger import ACTING, EntryKind, wanted_challengers
from airflow_mlops.replay.result import LivedWindow, ReplayResult
from airflow_mlops.replay.steps import ACTOR, LoopSteps, after
from airflow_mlops.replay.stream import ID_COLUMN
from airflow_mlops.replay.trial import Promoted, compare, trial_end
from airflow_mlops.serving.inference_log import InferenceLog

if TYPE_CHECKING:
    from collections.abc import Callable

    import polars as pl

    from airflow_mlops.core.comparison.predictions import Predictions
    from airflow_mlops.core.windows import Window
    from airflow_mlops.replay.stream import Stream


log = logging.getLogger(__name__)

#: Row groups of predictions handed to the inference log at once.
_BATCH_ROWS = 50_000


@dataclass(kw_only=True)
class Replay:
    """The loop.

    :param steps: on the stream that is lived through.
    :param policy: import path of the decision.
    :param parameters: the policy's parameters.
    :param check_drift: look at the inputs as well.
    :param compare: train challengers in the shadow and compare them.
    :param trial: share of the next window in which a version that no window has tested is tried on rows that the one before it
        still answers.
    """

    steps: LoopSteps
    policy: str
    parameters: dict[str, Any] = field(default_factory=dict)
    check_drift: bool = False
    compare: bool = True
    trial: float = 0.0
    _on_trial: Promoted | None = field(default=None, init=False)

    @property
    def stream(self) -> Stream:
        """What is lived through."""
        return self.steps.stream

    def run(self, *, name: str, progress: Callable[[str], None] = log.info) -> ReplayResult:
        """Live through all windows.

        :param name: of the policy, for the report.
        :param progress: is told a line per window.
        """
        first = self._first_model()
        lived = []
        for number, window in enumerate(self.stream.later, start=1):
            started = time.monotonic()
            before = self.steps.trainings
            rows = self.stream.inside(window)
            taken_back, tried = self._try(window, rows)
            version, value = self._predict(rows, tried)
            first_value = self.steps.value(rows, self.steps.answers(first, rows))
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
                    trainings=self.steps.trainings - before,
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

    def _first_model(self) -> Any:
        """Train on the reference and promote the model that takes all rows alike; beside it the recipes' first models."""
        reference = self.stream.reference
        self.steps.ingest(reference)
        versions = {
            recipe: self.steps.register(self.steps.fit(self._first_plan(recipe)))
            for recipe in ((ALL, RECENT) if self.compare else (ALL,))
        }
        self.steps.promote(versions[ALL], expected=None, reason="the first model", key=None, window=reference)
        return self.steps.load(versions[ALL])

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
            self.stream.config.metric,
            target,
            answers,
            self.steps.answers(self.steps.load(promoted.version), first),
        )
        if found.judgement != "worse":
            return None, answers
        self.steps.step(
            "roll-back",
            {
                "model_name": self.stream.config.name,
                "model_version": promoted.before,
                "expected_version": promoted.version,
                "reason": found.sentence,
                "actor": ACTOR,
                "now": end.isoformat(),
            },
        )
        return promoted.version, answers

    def _predict(self, rows: pl.DataFrame, tried: Predictions | None) -> tuple[str, float]:
        """Answer for the window as the service does, with the champion.

        :param tried: answers that were given already, to its first rows.
        """
        registry = Registry.connect(self.steps.services)
        champion = registry.version_by_alias(self.stream.config.name, "champion").model_version
        answers = self._answer(champion, rows[len(tried) :] if tried else rows)
        return champion, self.steps.value(rows, tried.followed_by(answers) if tried else answers)

    def _answer(self, version: str, rows: pl.DataFrame) -> Predictions:
        """Answer with a version, into the inference log."""
        model = self.steps.load(version)
        answers = self.steps.answers(model, rows)
        inference = InferenceLog(
            Path(self.steps.services.require("serving_dir")) / "inference_log", maximum_rows=rows.height + 1
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
        config, dataset = self.stream.config, self.steps.ingest(window)
        common = {"model_name": config.name, "window": to_dict(window)}
        grade = self.steps.step(
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
        self.steps.record(EntryKind.PERFORMANCE_CHECK, window, grade, grade["reason"], now=after(window))
        if self.check_drift:
            drift = self.steps.step("drift", {**common, "report": "never"})
            self.steps.record(EntryKind.DRIFT_CHECK, window, drift, drift["headline"], now=after(window))
        if self.compare:
            check = self.steps.step(
                "challengers",
                {
                    **common,
                    "dataset": dataset,
                    "time_column": config.time_column,
                    "metric": config.metric,
                    "earlier": self._former_champions(),
                },
            )
            self.steps.record(EntryKind.CHALLENGER_CHECK, window, check, check["reason"], now=after(window))

    def _former_champions(self) -> list[str]:
        with self.steps.ledger() as ledger:
            return ledger.former_champions(self.stream.config.name)

    def _past_grades(self, window: Window) -> list[dict[str, Any]]:
        """Give the grades of earlier windows, as the operator does: a slow change shows in several of them together."""
        with self.steps.ledger() as ledger:
            grades = ledger.grades(self.stream.config.name, before=window.start, measured=True)
        return [{name: grade.entry.payload[name] for name in PastGrade.__slots__} for grade in grades]

    def _decide(self, window: Window) -> tuple[dict[str, Any], str | None]:
        """Decide as the Dag does, and carry it out."""
        required = [EntryKind.PERFORMANCE_CHECK]
        required += [EntryKind.DRIFT_CHECK] if self.check_drift else []
        required += [EntryKind.CHALLENGER_CHECK] if self.compare else []
        decision = self.steps.step(
            "retraining",
            {
                "model_name": self.stream.config.name,
                "required_checks": [str(kind) for kind in required],
                "policy": self.parameters,
                "decide": self.policy,
                "actor": ACTOR,
                "now": after(window).isoformat(),
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
        training = self.steps.fit(decision["plan"])
        config = self.stream.config
        evaluation = self.steps.step(
            "evaluate",
            {
                "dataset": self.steps.dataset,
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
            self.steps.record_outcome(decision, window, str(evaluation["verdict"]), reason)
            return None
        version = self.steps.register(training)
        self.steps.promote(
            version,
            expected=evaluation["champion_version"],
            reason=reason,
            key=decision["decision_key"],
            window=window,
        )
        self.steps.record_outcome(decision, window, "promoted", reason)
        if training["twin_digest"] and evaluation["champion_version"]:  # it was tested on this window alone
            self._on_trial = Promoted(version, evaluation["champion_version"])
        return version

    def _bring_back(self, decision: dict[str, Any], window: Window) -> str:
        version, reason = str(decision["bring_back"]), str(decision["reason"])
        self.steps.promote(
            version,
            expected=decision["champion_version"],
            reason=reason,
            key=decision["decision_key"],
            window=window,
        )
        self.steps.record_outcome(decision, window, "promoted", reason)
        return version

    def _train_challengers(self) -> None:
        with self.steps.ledger() as ledger:
            wanted = wanted_challengers(ledger, self.stream.config.name)
        for plan in wanted:
            self.steps.register(self.steps.fit(plan))


def _line(lived: LivedWindow, number: int, count: int) -> str:
    then = f"; version {lived.taken_back} taken back" if lived.taken_back else ""
    then += f"; version {lived.promoted} promoted" if lived.promoted else ""
    return (
        f"{number}/{count} {lived.window}: {lived.value:.4g} by version {lived.model_version}, "
        f"{lived.first_value:.4g} by the first model{then} ({lived.trainings} trained, {lived.seconds:.0f} s)"
    )

"""Explanations of answers: what each input of a row contributed, worked out on threads of their own so that predictions go on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from airflow_mlops.core.model.background import as_table
from airflow_mlops.core.model.shapley import Contributions, Shapley
from airflow_mlops.serving import arrow
from airflow_mlops.serving.requests import RequestError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from airflow_mlops.core.model.explanation import Score, Table
    from airflow_mlops.serving.model import ServedModel
    from airflow_mlops.serving.reconciler import LiveVersion, Routes
    from airflow_mlops.serving.requests import PredictionRequest
    from airflow_mlops.serving.settings import ServiceSettings

logger = logging.getLogger(__name__)

#: What is shared out: a predicted number, a label's probability, or whether a label is answered.
ExplainedKind = Literal["prediction", "probability", "share"]


class RowExplanation(NamedTuple):
    """One answer and where it comes from: ``score`` is ``base_value`` plus all contributions.

    :param prediction: what the model answers.
    :param label: whose score is explained; ``None`` for a regression.
    :param score: the number that is shared out.
    :param base_value: mean score of the background rows.
    :param contributions: by input.
    :param standard_error: how far a contribution may be off, at most over the inputs; 0: exact; ``None``: not known.
    """

    prediction: float | str
    label: str | None
    score: float
    base_value: float
    contributions: dict[str, float]
    standard_error: float | None


class Explained(NamedTuple):
    """An explained request.

    :param version: whose answers these are.
    :param asked: the request.
    :param rows: one explanation per row.
    :param seconds: that they took.
    """

    version: LiveVersion
    asked: PredictionRequest
    rows: list[RowExplanation]
    seconds: float


class Explanations:
    """Explain requests, few at a time.

    :param settings: how many, of how many rows, and at what cost.
    :param computing: notes that a version is at work, should it take its worker with it.
    """

    def __init__(
        self, settings: ServiceSettings, computing: Callable[[str], AbstractContextManager[None]]
    ) -> None:
        self._settings, self._computing = settings, computing
        self._at_hand = 0
        self._threads = ThreadPoolExecutor(
            settings.explain_concurrency, thread_name_prefix="explanation", initializer=_step_back
        )

    def stop(self) -> None:
        """Take on no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def explain(
        self, routes: Routes, body: bytes, *, is_arrow: bool, label: str | None, caller: bytes | None
    ) -> Explained:
        """Explain what the version that would answer a caller answers to his rows.

        :param label: whose score is explained; ``None``: in each row the label that is answered.
        :raises RequestError: others are at hand, the version can't be explained, or the request does not fit it.
        """
        if self._at_hand >= self._settings.explain_concurrency:
            raise RequestError(
                429, f"{self._at_hand} explanations are at hand, which is what this worker takes; come again"
            )
        self._at_hand += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, self._explain, routes, body, is_arrow, label, caller
            )
        finally:
            self._at_hand -= 1

    def _explain(
        self, routes: Routes, body: bytes, is_arrow: bool, label: str | None, caller: bytes | None
    ) -> Explained:
        version = routes.choose(caller)
        try:
            asked = self._decode(version, body, is_arrow)
        except RequestError:
            if version is routes.stable:
                raise
            version = (
                routes.stable
            )  # as with predictions: the version before answers what a new one's inputs refuse
            asked = self._decode(version, body, is_arrow)
        started = time.perf_counter()
        rows = self._rows(version, routes.state.model_name, asked, label)
        return Explained(version, asked, rows, time.perf_counter() - started)

    def _decode(self, version: LiveVersion, body: bytes, is_arrow: bool) -> PredictionRequest:
        model, maximum_rows = version.model, self._settings.explain_rows
        if is_arrow:
            return arrow.decode_arrow(
                body, model.manifest.signature, maximum_rows, self._settings.maximum_bytes
            )
        return model.decoder.decode(body, maximum_rows)

    def _rows(
        self, version: LiveVersion, model_name: str, asked: PredictionRequest, label: str | None
    ) -> list[RowExplanation]:
        model, name = version.model, version.model_version
        if model.background is None:
            raise RequestError(
                409,
                f"version {name} of {model_name} can't be explained, as its package holds no background rows: "
                "train it with TrainModelOperator(background_rows=50), and deploy that version",
                model_version=name,
            )
        classes = model.manifest.classes
        if label is not None and label not in (classes or ()):
            known = f"labels are {', '.join(classes)}" if classes else "the model answers with numbers"
            raise RequestError(422, f"label: {label!r:.60} is none; {known}")
        shapley = Shapley(model.background, evaluations=self._settings.explain_evaluations)
        try:
            with self._computing(name):
                return explain_columns(
                    model, shapley, asked.columns, label=label, seconds=self._settings.explain_seconds
                )
        except RequestError as err:
            err.model_version = name
            raise
        except Exception as err:
            logger.exception("version %s failed to be explained", name)
            message = f"version {name} failed on these rows; the service's log says why"
            raise RequestError(500, message, model_version=name) from err


def _step_back() -> None:
    """Let this thread have what processor time predictions leave; where threads have a priority of their own, as on Linux."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(
                os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + 10
            )


def explain_columns(
    model: ServedModel,
    shapley: Shapley,
    columns: Mapping[str, Sequence[Any]],
    *,
    label: str | None = None,
    seconds: float,
) -> list[RowExplanation]:
    """Explain rows, each on its own.

    :param shapley: of the model's background rows.
    :param columns: that fit the model.
    :param label: whose score is explained; ``None``: in each row the label that is answered.
    :param seconds: that it may take.
    :raises RequestError: it takes longer, or the model gives no finite number.
    """
    table = as_table(columns, model.manifest.signature)
    until = time.monotonic() + seconds

    def explain(rows: Table, label: str | None) -> Contributions:
        return shapley.explain(_bounded(model.score(label), until, seconds), rows)

    if model.manifest.classes is None:
        found = explain(table, None)
        return _explanations(found, list(table), found.scores.tolist(), None)
    answers = model.predict_columns(columns)
    labels = np.array(answers if label is None else [label] * len(answers), dtype=object)
    made: dict[int, RowExplanation] = {}
    for one in sorted({*labels.tolist()}):
        places = np.flatnonzero(labels == one)
        found = explain({name: column[places] for name, column in table.items()}, one)
        chosen = [answers[place] for place in places]
        made |= zip(places.tolist(), _explanations(found, list(table), chosen, one), strict=True)
    return [made[place] for place in range(len(answers))]


def _bounded(score: Score, until: float, seconds: float) -> Score:
    """See before each call that there is time for it, and after it that the answers are numbers."""

    def bounded(table: Table) -> NDArray[Any]:
        if time.monotonic() > until:
            raise RequestError(
                413,
                f"the explanation takes longer than {seconds:g} seconds, after which it is given up; ask for fewer rows, or let the "
                "service spend more time (EXPLAIN_SECONDS) or less work (EXPLAIN_EVALUATIONS)",
            )
        scores = score(table)
        if not np.isfinite(scores).all():
            raise RequestError(
                422,
                "the model gives no finite number for these rows, or for what they share with background rows; are the values in "
                "range?",
            )
        return scores

    return bounded


def _explanations(
    found: Contributions, names: Sequence[str], predictions: Sequence[float | str], label: str | None
) -> list[RowExplanation]:
    errors = found.standard_errors.max(axis=1).tolist()
    return [
        RowExplanation(
            prediction=prediction,
            label=label,
            score=score,
            base_value=found.base_value,
            contributions=dict(zip(names, values, strict=True)),
            standard_error=error if error == error else None,
        )
        for prediction, score, values, error in zip(
            predictions, found.scores.tolist(), found.values.tolist(), errors, strict=True
        )
    ]


def explained_kind(model: ServedModel) -> ExplainedKind:
    """Say what the explained number is."""
    if model.manifest.classes is None:
        return "prediction"
    return "probability" if model.probabilities is not None else "share"


def encode_explanations(explained: Explained) -> bytes:
    """Write explanations as an Arrow table: a row each, a column ``contribution_<input>`` for each input."""
    ids = explained.asked.prediction_ids
    columns: dict[str, list[Any]] = {arrow.ID_COLUMN: ids} if ids else {}
    for name in ("prediction", "label", "score", "base_value", "standard_error"):
        columns[name] = [getattr(row, name) for row in explained.rows]
    for name in explained.rows[0].contributions:
        columns[f"contribution_{name}"] = [row.contributions[name] for row in explained.rows]
    return arrow.encode_table(columns)

"""What somebody would answer who knows only the target of the training rows: every challenger has to beat it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from airflow_mlops.core.comparison.metrics import measure
from airflow_mlops.core.comparison.predictions import Graded, Predictions, spelled_as, text_codes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from airflow_mlops.core.comparison.metric import Metric
    from airflow_mlops.core.model.package import PackageManifest

#: Rows on which constant answers are measured at most.
_MEASURED_ROWS = 10_000


def best_constant(
    answers: Sequence[Any], target: NDArray[Any], metric: Metric, classes: Sequence[str]
) -> float | str:
    """Give the answer that is best where all rows get the same; the first one where none can be measured.

    :param target: shape ``(n,)``; of very many rows a part is looked at.
    :param classes: labels of the model; empty for numbers.
    """
    some = target
    if len(target) > _MEASURED_ROWS:  # not every so manieth: rows of a day come in a rhythm
        some = target[np.random.default_rng(0).choice(len(target), _MEASURED_ROWS, replace=False)]
    sign = 1.0 if metric.greater_is_better else -1.0

    def gain(answer: Any) -> float:
        given = Predictions(values=np.full(len(some), answer), classes=tuple(classes))
        try:
            return sign * measure(metric, Graded(some, given))
        except Exception:  # noqa: BLE001 - a metric of the user's raises anything where all answers are the same
            return -np.inf

    best: float | str = max(answers, key=gain)
    return best


def as_in(target: NDArray[Any], answer: Any) -> NDArray[Any]:
    """Give an answer as the target spells it, shape ``(1,)``; one that does not occur there stays as it is.

    >>> as_in(np.array([True, False]), "False").tolist(), as_in(np.array([0, 1]), "1.0").tolist()
    ([False], [1])
    """
    if not isinstance(answer, str):
        return np.array([answer])
    texts, places = text_codes(target)
    spelled = spelled_as(texts, (answer,))
    for number, text in enumerate(texts):
        if spelled[text] == answer:
            return np.asarray(target[places == number][:1])
    return np.array([answer], dtype=object)


def simple_guess(manifest: PackageManifest, target: NDArray[Any], metric: Metric) -> Predictions:
    """Answer rows as somebody would who knows only the target of the training rows.

    The training noted the answer that is best by its own metric. By another one the best is taken of the constants that the
    training offers, chosen on these very rows, or 10,000 of them: if anything, that favors the guess.

    :param target: of the rows to answer, shape ``(n,)``.
    """
    trained, classes = manifest.trained_on, manifest.classes or ()
    constant = trained.simple_prediction
    if metric.name != manifest.holdout.metric:
        constant = best_constant([constant, *(classes or trained.constants)], target, metric, classes)
    shares = [trained.class_shares.get(label, 0.0) for label in classes]
    return Predictions(
        values=np.full(len(target), constant),
        probabilities=np.tile(shares, (len(target), 1)) if sum(shares) > 0 else None,
        classes=classes,
    )

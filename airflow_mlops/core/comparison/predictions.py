"""Predictions, and predictions beside what turned out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.profiles.counting import LARGEST

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """What a model answered.

    :param values: numbers, or labels as text, shape ``(n,)``.
    :param probabilities: of the classes, shape ``(n, len(classes))``; ``None`` for numbers and bare labels.
    :param classes: labels in the order of the columns. Of two, the last is the positive one.
    """

    values: Array
    probabilities: Array | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    @property
    def valid(self) -> Array:
        """Which answers are labels or finite numbers, with probabilities that are, shape ``(n,)``."""
        valid = valid_values(self.values)
        return valid if self.probabilities is None else valid & np.isfinite(self.probabilities).all(axis=1)

    def take(self, rows: Array) -> Predictions:
        """Give some rows, by number or mask."""
        chosen = self.probabilities[rows] if self.probabilities is not None else None
        return Predictions(values=self.values[rows], probabilities=chosen, classes=self.classes)

    def followed_by(self, others: Predictions) -> Predictions:
        """Give these and then other answers: those of two models that answered one after the other."""
        classes = tuple(dict.fromkeys((*self.classes, *others.classes)))
        first, last = self.among(classes), others.among(classes)
        both = None
        if first.probabilities is not None and last.probabilities is not None:
            both = np.concatenate((first.probabilities, last.probabilities))
        return Predictions(
            values=np.concatenate((first.values, last.values)), probabilities=both, classes=classes
        )

    def among(self, classes: Sequence[str]) -> Predictions:
        """Give the same answers as those of a model that knows these labels; the ones it does not know it holds impossible.

        :param classes: all of its own, and more; in any order.
        """
        if not self.classes:
            return self
        given = None
        if self.probabilities is not None:
            given = np.zeros((len(self), len(classes)))
            given[:, [list(classes).index(label) for label in self.classes]] = self.probabilities
        return Predictions(values=self.values, probabilities=given, classes=tuple(classes))


class Graded:
    """Predictions beside what turned out; what several metrics need to know of them is worked out once.

    :param target: what turned out, shape ``(n,)``.
    :param answers: what was predicted.
    """

    def __init__(self, target: Array, answers: Predictions) -> None:
        self.target = target
        self.answers = answers

    def __len__(self) -> int:
        return len(self.target)

    def take(self, rows: Array) -> Graded:
        """Give some rows, by number or mask."""
        return Graded(self.target[rows], self.answers.take(rows))

    @cached_property
    def errors(self) -> Array:
        """Prediction less target, shape ``(n,)``.

        :raises ValueError: one of them is text.
        """
        try:
            return np.asarray(self.answers.values.astype(np.float64) - self.target.astype(np.float64))
        except ValueError as err:
            raise ValueError(
                f"labels have no distance to measure ({err}): choose accuracy, log_loss or another metric of labels"
            ) from err

    @property
    def valid(self) -> Array:
        """Which rows can be graded: neither what turned out nor what was predicted is infinite or no number, shape ``(n,)``."""
        return valid_values(self.target) & self.answers.valid

    @cached_property
    def native_answers(self) -> Array:
        """Answers of the target's own kind, for a function of the user: models answer labels as text."""
        values = self.answers.values
        if values.dtype.kind in "biuf" or self.target.dtype.kind not in "biuf":
            return values
        if self.target.dtype.kind == "b":
            return np.asarray(values.astype(str) == "True")
        return values.astype(np.float64).astype(self.target.dtype)

    @property
    def label_count(self) -> int:
        """How many labels there are: the model's own, and what else turned out or was answered."""
        return self._coded[2]

    @property
    def truth(self) -> Array:
        """Number of each row's true label: the model's own come first, in its order."""
        return self._coded[0]

    @property
    def answered(self) -> Array:
        """Number of the label each row was given."""
        return self._coded[1]

    @cached_property
    def probabilities(self) -> Array:
        """Of all labels, shape ``(n, label_count)``; zero for those the model does not know."""
        given = self.answers.probabilities
        if given is None:
            raise ValueError("the model gives no probabilities")
        unknown = self.label_count - given.shape[1]
        return np.pad(given, ((0, 0), (0, unknown))) if unknown else given

    @cached_property
    def ranked(self) -> tuple[Array, Array, Array]:
        """Of two labels: the distinct scores of the positive one, ascending, and the number of each row's score and of its
        rows by label, shape ``(scores, 2)``.
        """
        scores, places = np.unique(self.probabilities[:, 1], return_inverse=True)
        counts = np.bincount(places * 2 + (self.truth == 1), minlength=2 * len(scores))
        return scores, places, counts.reshape(-1, 2).astype(np.float64)

    @cached_property
    def _coded(self) -> tuple[Array, Array, int]:
        labels = {label: number for number, label in enumerate(self.answers.classes)}
        truth, answered = _codes(self.target, labels), _codes(self.answers.values, labels)
        return truth, answered, len(labels)


def valid_values(values: Array) -> Array:
    """Tell which values are no numbers at all, or finite ones whose squares are, shape ``(n,)``.

    >>> valid_values(np.array([1.0, np.inf, np.nan, 1e200])).tolist()
    [True, False, False, False]
    """
    if values.dtype.kind != "f":
        return np.ones(len(values), dtype=bool)
    return np.abs(values) <= LARGEST


def text_codes(values: Array) -> tuple[list[str], Array]:
    """Give the different texts of values, and the number of each value's text.

    :param values: shape ``(n,)``.
    :returns: the different texts, sorted (numbers by size), and the number of each value's text.
    """
    if values.dtype.kind in "biuf":
        distinct, places = np.unique(values, return_inverse=True)
        return distinct.astype(str).tolist(), places
    import polars as pl

    column = pl.Series([str(value) for value in values.tolist()], dtype=pl.String)
    texts = column.unique().sort().to_list()
    return texts, column.replace_strict(texts, range(len(texts)), return_dtype=pl.Int64).to_numpy()


def _codes(values: Array, labels: dict[str, int]) -> Array:
    """Give each value the number of its label; new labels are added, in the order of their texts."""
    texts, places = text_codes(values)
    for text in texts:
        labels.setdefault(text, len(labels))
    return np.array([labels[text] for text in texts], dtype=np.int64)[places]

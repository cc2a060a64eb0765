"""Predictions, and predictions beside what turned out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.data.categories import number_text
from airflow_mlops.core.profiles.counting import LARGEST

Array = NDArray[Any]
T = TypeVar("T")

_TRUTH_VALUES = {"True": "1", "False": "0"}
_WHOLE, _NUMBER = re.compile(r"-?\d+"), re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")


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

        :param classes: all of its own, however they are spelled, and more; in any order.
        """
        if not self.classes or self.classes == tuple(classes):
            return self
        spelled = spelled_as(self.classes, classes)
        values, given = self.values, None
        if any(label != own for own, label in spelled.items()):
            texts, places = text_codes(values)
            values = np.array([spelled.get(text, text) for text in texts], dtype=object)[places]
        if self.probabilities is not None:
            place = {label: number for number, label in enumerate(classes)}
            given = np.zeros((len(self), len(classes)))
            given[:, [place[spelled[label]] for label in self.classes]] = self.probabilities
        return Predictions(values=values, probabilities=given, classes=tuple(classes))


class Graded:
    """Predictions beside what turned out; what several metrics need to know of them is worked out once.

    :param target: what turned out, shape ``(n,)``.
    :param answers: what was predicted.
    """

    def __init__(self, target: Array, answers: Predictions) -> None:
        self.target = target
        self.answers = answers
        self._found: dict[Callable[[Graded], Any], Any] = {}

    def once(self, work: Callable[[Graded], T]) -> T:
        """Give what is worked out from it; that is done once."""
        if work not in self._found:
            self._found[work] = work(self)
        found: T = self._found[work]
        return found

    def __len__(self) -> int:
        return len(self.target)

    def where_all_are(self, label: Any, number: int) -> Graded:
        """Give the same answers beside one label in every row.

        :param label: as the target has it.
        :param number: its number among the classes.
        """
        case = Graded(np.full(len(self), label), self.answers)
        case._coded = (np.full(len(self), number), self.answered, self.label_count)
        return case

    def take(self, rows: Array) -> Graded:
        """Give some rows, by number or mask; labels are not numbered again, where the model knows them all."""
        part = Graded(self.target[rows], self.answers.take(rows))
        if "native_answers" in self.__dict__:
            part.native_answers = self.native_answers[rows]
        if "_coded" in self.__dict__ and self.label_count == len(self.answers.classes):
            part._coded = (self.truth[rows], self.answered[rows], self.label_count)
        return part

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
        texts, places = text_codes(values)
        kind = self.target.dtype.kind
        return np.array([_native(text, kind) for text in texts]).astype(self.target.dtype)[places]

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


def spelled_as(labels: Sequence[str], known: Collection[str]) -> dict[str, str]:
    """Give each label as the known ones spell it: a number or truth value is the same one however a table holds it.

    What no known label means stays as it is. So do labels that mean the same and are different ones all the same, such as texts
    1 and 1.0 side by side.

    >>> spelled_as(("0.0", "1.0", "2.5"), ("0", "1")), spelled_as(("1", "1.0"), ("True",))
    ({'0.0': '0', '1.0': '1', '2.5': '2.5'}, {'1': '1', '1.0': '1.0'})
    """
    exact = frozenset(known)
    strange = [label for label in labels if label not in exact]
    if not strange:
        return {label: label for label in labels}
    own = Counter(map(_meaning, labels))
    means: dict[str, str] = {}
    for label in known:
        means.setdefault(_meaning(label), label)
    spelled = {label: label for label in labels}
    for label in strange:
        if own[_meaning(label)] == 1:
            spelled[label] = means.get(_meaning(label), label)
    return spelled


def _native(label: str, kind: str) -> float | int:
    """Give a label as the number or truth value it is; whole numbers to the last digit, where a column holds those."""
    meant = _meaning(label)
    return int(meant) if kind in "biu" and _WHOLE.fullmatch(meant) else float(meant)


def _meaning(label: str) -> str:
    """Give a number or truth value as one text, and any other label as it is."""
    if label in _TRUTH_VALUES or _WHOLE.fullmatch(label):
        return _TRUTH_VALUES.get(label, label)
    return number_text(float(label)) if _NUMBER.fullmatch(label) else label


def valid_values(values: Array) -> Array:
    """Tell which values are no numbers at all, or finite ones whose squares are, shape ``(n,)``.

    >>> valid_values(np.array([1.0, np.inf, np.nan, 1e200])).tolist()
    [True, False, False, False]
    >>> valid_values(np.array([1.0, np.inf], dtype=np.float32)).tolist()
    [True, False]
    """
    if values.dtype.kind != "f":
        return np.ones(len(values), dtype=bool)
    return np.abs(values.astype(np.float64, copy=False)) <= LARGEST  # which no float32 holds


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
    spelled = spelled_as(texts, labels)
    for text in texts:
        labels.setdefault(spelled[text], len(labels))
    return np.array([labels[spelled[text]] for text in texts], dtype=np.int64)[places]

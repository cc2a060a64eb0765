"""Parity: whether a converted model gives the answers of the one that was trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityLimits:
    """How far apart the two forms may be.

    :param label_flips: share of rows whose label may differ, in ``[0, 1]``.
    :param maximum_difference: of one output; relative to the outputs' spread (standard deviation) for a regression,
        in probability for a classification.
    :param p999_difference: the same for the 99.9th percentile of the differences.
    """

    label_flips: float = 0.0
    maximum_difference: float = 1e-3
    p999_difference: float = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """What a comparison of the two forms found.

    :param row_count: rows compared.
    :param label_flips: rows whose label differs; 0 for a regression.
    :param maximum_difference: the largest difference, in the units of :class:`ParityLimits`.
    :param p999_difference: the 99.9th percentile of the differences.
    :param passed: whether the converted form may be served.
    :param reason: one sentence.
    """

    row_count: int
    label_flips: int
    maximum_difference: float
    p999_difference: float
    passed: bool
    reason: str


def compare_forms(
    *,
    expected: Array,
    got: Array,
    expected_probabilities: Array | None,
    got_probabilities: Array | None,
    limits: ParityLimits,
    real_rows: int | None = None,
) -> Parity:
    """Compare the outputs of both forms on the same rows.

    :param expected: numbers or labels of the trained form, shape ``(n,)``.
    :param got: those of the converted form, shape ``(n,)``.
    :param expected_probabilities: of the trained form, shape ``(n, classes)``; ``None`` for a regression, and for a
        classifier that gives none: then labels alone are compared.
    :param got_probabilities: of the converted form.
    :param limits: how far apart they may be.
    :param real_rows: the first so many rows are real ones, and the spread of numbers is theirs; ``None``: all are.
    """
    regression = expected.dtype.kind == "f" and got.dtype.kind == "f" and expected_probabilities is None
    if regression:
        flips, differences, unit = 0, _relative(expected, got, real_rows), "of the outputs' spread"
    else:
        flips = int(np.sum(got.astype(str) != expected.astype(str)))
        differences = _absolute(expected_probabilities, got_probabilities)
        unit = "in probability"
    # What is no number on one side only differs without limit; no comparison may let it pass.
    largest = float(np.max(differences, initial=0.0))
    p999 = float(np.quantile(differences, 0.999, method="higher")) if differences.size else 0.0
    problems = [
        *(
            [f"{flips} of {len(expected)} labels differ"]
            if flips > limits.label_flips * len(expected)
            else []
        ),
        *(
            [f"one output differs by {largest:.2g} {unit} (limit {limits.maximum_difference:.2g})"]
            if not largest <= limits.maximum_difference
            else []
        ),
        *(
            [f"one in a thousand differs by {p999:.2g} {unit} (limit {limits.p999_difference:.2g})"]
            if not p999 <= limits.p999_difference
            else []
        ),
    ]
    agreed = f"largest difference on {len(expected)} rows is {largest:.2g} {unit}"
    if not regression and expected_probabilities is None:
        agreed = f"{len(expected) - flips} of {len(expected)} labels agree; the model gives no probabilities to compare"
    elif not regression:
        agreed = (
            f"all {len(expected)} labels agree; {agreed}" if not flips else f"{flips} labels differ; {agreed}"
        )
    return Parity(
        row_count=len(expected),
        label_flips=flips,
        maximum_difference=largest,
        p999_difference=p999,
        passed=not problems,
        reason="; ".join(problems) or agreed,
    )


def _relative(expected: Array, got: Array, real_rows: int | None) -> Array:
    real = expected[:real_rows]
    finite = real[np.isfinite(real)]
    spread = float(np.std(finite)) if finite.size else 0.0
    return _absolute(expected, got) / (spread or 1.0)


def _absolute(expected: Array | None, got: Array | None) -> Array:
    if expected is None or got is None:
        return np.zeros(0)
    same = (expected == got) | (np.isnan(expected) & np.isnan(got))
    with np.errstate(invalid="ignore"):
        differences = np.where(same, 0.0, np.abs(np.asarray(got, dtype=np.float64) - expected))
    return np.asarray(np.nan_to_num(differences, nan=np.inf, posinf=np.inf))

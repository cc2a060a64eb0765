"""Grades: what one says of its labels, and whether a later look at the same window says more."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

#: More labels are worth another line in the ledger when their share grew by this, or the verdict turned.
_NEWS = 0.1
#: Relative difference of values that the order of sums explains.
_ROUNDING = 1e-9
#: What is said of a window that is not measured, beside how many labels are here.
_SAID = ("model_version", "awaits_labels", "final", "estimate_degraded", "estimate_trusted")


def labels_given_up(grade: Mapping[str, Any]) -> bool:
    """Tell whether labels that were awaited never came: there were answers, and the time for their labels is over.

    :param grade: payload of a performance check.
    """
    answered = grade.get("answer_count", 1) and grade.get("labels", True) is not None
    share = float(grade.get("labelled_share") or 0.0)
    return bool(not grade.get("measured") and grade.get("final") and answered and share < 1.0)


def is_news(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Tell whether a second look at a window says more than the first.

    A grade does where it rests on more labels, is the last, or labels changed; one that measured nothing beside another such one
    where it has more labels or says something else.
    """
    if not before.get("measured"):
        return bool(after["measured"]) or _says_more(before, after)
    if not after["measured"] or before["model_version"] != after["model_version"]:
        return False
    turned = before["degraded"] != after["degraded"]
    if labels_changed(before, after) and (turned or before.get("final", True)):
        return True
    if before.get("final", True):
        return False
    if after["final"]:
        return True
    return labelled_count(after) > labelled_count(before) and (turned or _grown(before, after))


def _says_more(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Compare two looks that measured nothing."""
    return _grown(before, after) or any(name in before and before[name] != after.get(name) for name in _SAID)


def _grown(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    shares = [float(grade.get("labelled_share") or 0.0) for grade in (before, after)]
    return shares[1] - shares[0] >= _NEWS - _ROUNDING


def labels_changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Tell whether as many labels of a newer table give another value: some were corrected."""
    was, now = (grade.get("labels") or {} for grade in (before, after))
    newer = was.get("uri") == now.get("uri") and now.get("version", 0) > was.get("version", 0)
    comparable = before.get("metric") == after.get("metric") and labelled_count(before) == labelled_count(
        after
    )
    return newer and comparable and not math.isclose(before["value"], after["value"], rel_tol=_ROUNDING)


def labelled_count(grade: Mapping[str, Any]) -> int:
    """Count the rows whose labels had come, also those that can't be graded; earlier releases left none out."""
    return int(grade["row_count"]) + int(grade.get("invalid_count", 0))

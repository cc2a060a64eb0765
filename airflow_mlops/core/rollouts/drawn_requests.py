"""Drawn requests: one of each caller who stays with his version, so that who asks often counts no more than he proves.

Each request gets a random number, and of each caller the request with the smallest one is kept: what several workers drew is merged by
the same rule. Callers are kept by a digest of their key; where there are too many, those with small digests, whichever version answered.

Source: Efraimidis and Spirakis, "Weighted random sampling with a reservoir", Information Processing Letters 97, 2006 (of equal weights);
Flajolet, "On adaptive sampling", Computing 43, 1990 (the callers).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

#: Callers that are kept at most; of more every second one is, every fourth, and so on.
MOST_CALLERS = 16_384

_ROW = np.dtype([("caller", "<u8"), ("draw", "<u8"), ("version", "<u2"), ("time", "<i2"), ("answer", "<i4")])
#: In place of the cells of a request that failed, and of one that was refused.
_FAILED, REFUSED = -1, -2


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnRequests:
    """One request of each caller.

    :param versions: that were asked.
    :param level: one caller in ``2**level`` is kept.
    :param packed: the requests, as text.
    """

    versions: tuple[str, ...]
    level: int = 0
    packed: str = ""

    def of(self, model_version: str) -> tuple[int, Array, Array]:
        """Give what a version did on its callers' requests, those left out that were refused.

        :returns: how many there are, and of those that did not fail the cell of the time and that of the answer.
        """
        rows = self._rows()
        if model_version not in self.versions:
            return 0, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        mine = rows[(rows["version"] == self.versions.index(model_version)) & (rows["time"] != REFUSED)]
        answered = mine[mine["time"] != _FAILED]
        return len(mine), answered["time"].astype(np.int64), answered["answer"].astype(np.int64)

    def refused(self, model_version: str) -> int:
        """Count the callers whose request was drawn for a version, and refused."""
        if model_version not in self.versions:
            return 0
        rows = self._rows()
        mine = rows["version"] == self.versions.index(model_version)
        return int((mine & (rows["time"] == REFUSED)).sum())

    def _rows(self) -> Array:
        return np.frombuffer(base64.b64decode(self.packed), dtype=_ROW)


def draw_requests(
    *,
    versions: tuple[str, ...],
    answered_by: Array,
    callers: Array,
    times: Array,
    answers: Array,
    random: np.random.Generator,
) -> DrawnRequests:
    """Draw one request of each caller.

    :param versions: that may answer.
    :param answered_by: number of the version, by request, shape ``(n,)``.
    :param callers: digests of their keys, unsigned 64 bits, shape ``(n,)``: evenly spread, and not by what chose the version.
    :param times: cells of the times, shape ``(n,)``; -1 where the request failed.
    :param answers: cells of one answer of each request, shape ``(n,)``; -1 where it failed.
    """
    rows = np.empty(len(callers), dtype=_ROW)
    rows["caller"], rows["version"], rows["time"], rows["answer"] = callers, answered_by, times, answers
    rows["draw"] = random.integers(0, 2**64, size=len(callers), dtype=np.uint64)
    return _kept(rows, versions, 0)


def merge_drawn(parts: Iterable[DrawnRequests]) -> DrawnRequests:
    """Draw one request of each caller among those that several drew, under the same desired state.

    :raises ValueError: none is given, or the versions differ.
    """
    first, *rest = parts
    if any(part.versions != first.versions for part in rest):
        raise ValueError("requests that were drawn among answers of other versions can't be merged")
    rows = np.concatenate([part._rows() for part in (first, *rest)])
    return _kept(rows, first.versions, max(part.level for part in (first, *rest)))


def _kept(rows: Array, versions: tuple[str, ...], level: int) -> DrawnRequests:
    rows = rows[np.lexsort((rows["draw"], rows["caller"]))]
    callers = rows["caller"]
    rows = rows[np.concatenate([[True], callers[1:] != callers[:-1]])] if len(rows) else rows
    below = int(np.searchsorted(rows["caller"], np.uint64(_last_kept(level)), side="right"))
    while below > MOST_CALLERS:
        level += 1
        below = int(np.searchsorted(rows["caller"], np.uint64(_last_kept(level)), side="right"))
    packed = base64.b64encode(rows[:below].tobytes()).decode()
    return DrawnRequests(versions=versions, level=level, packed=packed)


def _last_kept(level: int) -> int:
    """Give the largest digest that is kept."""
    return int(2 ** (64 - level) - 1)

"""A bounded memory of answers, for endpoints that are asked the same again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import Any


class AnswerCache:
    """The answers that were used last.

    >>> cache = AnswerCache(1)
    >>> cache.put("a", [1.0]); cache.put("b", [2.0]); cache.get("a"), cache.get("b")
    (None, [2.0])

    :param size: answers; 0: none.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._answers: OrderedDict[Hashable, Sequence[Any]] = OrderedDict()

    def get(self, key: Hashable) -> Sequence[Any] | None:
        """Give an answer, if it is remembered."""
        answer = self._answers.get(key)
        if answer is not None:
            with suppress(
                KeyError
            ):  # large requests are answered on other threads, which may just have forgotten it
                self._answers.move_to_end(key)
        return answer

    def put(self, key: Hashable, answer: Sequence[Any]) -> None:
        """Remember an answer, and forget the one that was not used for the longest time."""
        self._answers[key] = answer
        if len(self._answers) > self.size:
            self._answers.popitem(last=False)

"""How much memory requests take while they wait, by a plain estimate that costs next to nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_mlops.core.model.signature import ModelSignature

#: Of a row itself: its id, its answer, and the places that hold them.
ROW_BYTES = 200
#: Of a value and its place: a number of Python's; a text has its characters on top.
VALUE_BYTES = 40


def text_inputs(signature: ModelSignature) -> tuple[str, ...]:
    """Name the inputs that may be of any length."""
    return tuple(field.name for field in signature.inputs if field.type != "number")


def estimated_bytes(columns: Mapping[str, Sequence[Any]], rows: int, texts: Iterable[str]) -> int:
    """Estimate what a request's inputs and answers take.

    >>> estimated_bytes({"x": [1.0], "kind": ["a" * 1_000]}, 1, ("kind",))
    1280

    :param columns: its inputs.
    :param rows: how many it has.
    :param texts: inputs that are texts.
    """
    size = rows * (ROW_BYTES + VALUE_BYTES * len(columns))
    for name in texts:
        if name in columns:
            size += sum(map(len, filter(None, columns[name])))
    return size

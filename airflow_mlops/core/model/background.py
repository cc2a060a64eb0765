"""Background rows of a package: training rows that stand for "not knowing" when a service explains an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from airflow_mlops.core.codec import canonical_json, from_dict, to_dict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from airflow_mlops.core.model.signature import ModelSignature

#: File of a package that can be explained where it is served.
BACKGROUND_FILE = "background.json"

#: More would cost each explanation time, and say little more.
MAXIMUM_BACKGROUND_ROWS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Background:
    """Rows drawn at random, in the order they were drawn.

    :param columns: the model's inputs; numbers, texts, or ``None`` where a value is missing.
    :param drawn_from: training rows they were drawn from.
    :param seed: of the draw.
    :param format: version of this layout.
    """

    columns: dict[str, tuple[Any, ...]]
    drawn_from: int
    seed: int
    format: Literal[1] = 1

    def to_json(self) -> str:
        """Give the text of the file: canonical, so equal rows have equal digests."""
        return canonical_json(to_dict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Background:
        """Inverse of :meth:`to_json`.

        :raises ValueError: it is no JSON, or naming what does not fit.
        """
        return from_dict(cls, json.loads(text))

    def table(self, signature: ModelSignature) -> dict[str, NDArray[Any]]:
        """Give the rows as the model takes them.

        :raises ValueError: they are not rows of the signature's inputs, or too many.
        """
        if {*self.columns} != {*signature.names}:
            raise ValueError(f"its columns are {sorted(self.columns)}, the inputs {sorted(signature.names)}")
        table = as_table(
            signature.columns_from_columns({name: list(column) for name, column in self.columns.items()}),
            signature,
        )
        rows = len(next(iter(table.values())))
        if rows > MAXIMUM_BACKGROUND_ROWS:
            raise ValueError(f"it has {rows} rows, at most {MAXIMUM_BACKGROUND_ROWS} are taken")
        return table


def as_table(columns: Mapping[str, Sequence[Any]], signature: ModelSignature) -> dict[str, NDArray[Any]]:
    """Turn checked columns into arrays whose cells can be exchanged: numbers as float64, text as objects."""
    return {
        field.name: np.array(columns[field.name], dtype=np.float64 if field.type == "number" else object)
        for field in signature.inputs
    }

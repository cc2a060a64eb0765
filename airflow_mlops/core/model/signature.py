"""Signature of a model: the fields it takes and gives, and how a request is checked against it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from airflow_mlops.core.data.categories import number_text
from airflow_mlops.exceptions import SignatureMismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FieldType = Literal["number", "string"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldSpec:
    """One input field.

    :param name: column name.
    :param type: ``number`` (float64, missing allowed as null) or ``string`` (category; missing allowed).
    :param nullable: whether null is accepted. A missing *field* never is.
    """

    name: str
    type: FieldType
    nullable: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSignature:
    """Input fields in the order the model takes them, and the name of the output."""

    inputs: tuple[FieldSpec, ...]
    output: str

    @property
    def names(self) -> tuple[str, ...]:
        """Input names, in order."""
        return tuple(field.name for field in self.inputs)

    def columns_from_records(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        """Check records against the signature and turn them into columns.

        Extra fields are ignored: a caller may send its whole record.

        :param rows: at least one record.
        :returns: one list per input, numbers as ``float`` (null as NaN), strings as ``str`` or ``None``.
        :raises SignatureMismatchError: naming the row and field and the type that was expected.
        """
        if not rows:
            raise SignatureMismatchError("rows: at least one row is needed")
        columns: dict[str, list[Any]] = {}
        for field in self.inputs:
            values = []
            for index, row in enumerate(rows):
                if field.name not in row:
                    raise SignatureMismatchError(
                        f"rows[{index}].{field.name}: field is missing ({field.type})"
                    )
                values.append(_checked(field, row[field.name], f"rows[{index}].{field.name}"))
            columns[field.name] = values
        return columns

    def columns_from_columns(self, given: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Check columns against the signature.

        Extra columns are ignored.

        :param given: one list per field, all of the same length, which is at least one.
        :returns: as :meth:`columns_from_records`.
        :raises SignatureMismatchError: naming the field and place and the type that was expected.
        """
        columns: dict[str, list[Any]] = {}
        count = None
        for field in self.inputs:
            if field.name not in given:
                raise SignatureMismatchError(f"columns.{field.name}: field is missing ({field.type})")
            values = given[field.name]
            if not isinstance(values, list):
                raise SignatureMismatchError(f"columns.{field.name}: expected a list of {field.type}s")
            count = len(values) if count is None else count
            if len(values) != count or not values:
                raise SignatureMismatchError(
                    f"columns.{field.name}: {len(values)} values; all columns have the same number, and at least one"
                )
            columns[field.name] = [
                _checked(field, value, f"columns.{field.name}[{index}]") for index, value in enumerate(values)
            ]
        return columns


def _checked(field: FieldSpec, value: Any, place: str) -> Any:
    """Convert a value to a field's type."""
    if value is None and not field.nullable:
        raise SignatureMismatchError(f"{place}: null is not allowed")
    try:
        return _to_number(value) if field.type == "number" else _to_string(value)
    except (TypeError, ValueError, OverflowError) as err:
        raise SignatureMismatchError(f"{place}: expected {field.type}, got {value!r:.60}") from err


def _to_number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, int | float):  # bool is an int: True is 1.0, as numpy and sklearn have it
        number = float(value)
        if math.isinf(number):
            raise ValueError("infinite")
        return number
    raise TypeError(type(value).__name__)


def _to_string(value: Any) -> str | None:
    if value is None:
        return value
    if isinstance(value, str):
        value.encode()  # half a character (a lone surrogate) can be sent, and stored nowhere
        return value
    if isinstance(value, bool):  # as the text of a table's true and false, which training learned
        return str(value).lower()
    if isinstance(value, int):  # categories such as rate codes often travel as integers
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return number_text(value)
    raise TypeError(type(value).__name__)

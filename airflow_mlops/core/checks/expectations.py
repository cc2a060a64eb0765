"""The common Great Expectations expectations as polars expressions: counted in one streaming pass instead of in a pandas copy of the rows.

An expectation whose type, arguments or columns are not covered here is judged by Great Expectations itself; a parity suite holds the two
together. Semantics are those of Great Expectations 1.x on pandas: null and NaN are the same and left out, ``mostly`` is a share of
the rows that are left, and where none is left the expectation holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_mlops.core.checks.row_expectations import ROW_EXPECTATIONS
from airflow_mlops.core.checks.table_expectations import TABLE_EXPECTATIONS

if TYPE_CHECKING:
    import polars as pl

    from airflow_mlops.core.checks.expectation_rules import Kwargs, Rule


def compile_expectation(kind: str, kwargs: Kwargs, schema: pl.Schema) -> Rule | None:
    """Give an expectation's rule.

    :param kind: such as ``expect_column_values_to_be_between``.
    :param kwargs: of the expectation.
    :param schema: of the rows.
    :returns: ``None`` where Great Expectations has to judge: an unknown type, an argument that is not covered, a column
        that is not there or of a type that pandas treats in its own way.
    """
    if kind not in _COMPILERS:
        return None
    compiler, known = _COMPILERS[kind]
    asked = {name: value for name, value in kwargs.items() if name not in _SAID}
    given = {name: value for name, value in asked.items() if value is not None}
    if not set(given) <= known or not set(asked) - set(given) <= _MAY_BE_NONE:
        return None
    if not all(isinstance(given.get(name, False), bool) for name in _FLAGS):
        return None  # Great Expectations reads "false" as false
    if any(_is_pattern(name) for name in _columns_named(given)):
        return None  # polars would take other columns
    mostly = given.get("mostly", 1.0)
    if isinstance(mostly, bool) or not isinstance(mostly, int | float) or not 0.0 <= mostly <= 1.0:
        return None  # Great Expectations words what is wrong with it
    return compiler(given, schema)


def _columns_named(kwargs: Kwargs) -> list[str]:
    named = [kwargs.get(name) for name in ("column", "column_A", "column_B")]
    listed = kwargs.get("column_list")
    return [
        name
        for name in [*named, *(listed if isinstance(listed, list | tuple) else ())]
        if isinstance(name, str)
    ]


def _is_pattern(name: str) -> bool:
    return name == "*" or (name.startswith("^") and name.endswith("$"))


#: Arguments that say nothing about the rows.
_SAID = frozenset(
    {"severity", "meta", "notes", "description", "batch_id", "result_format", "catch_exceptions"}
)

#: Arguments for which nothing may be given in so many words.
_MAY_BE_NONE = frozenset({"min_value", "max_value", "row_condition", "condition_parser"})

_FLAGS = ("strict_min", "strict_max", "or_equal")

_COMPILERS = ROW_EXPECTATIONS | TABLE_EXPECTATIONS

#: Types that are covered, with the arguments that are.
COVERED: dict[str, frozenset[str]] = {kind: known for kind, (_, known) in _COMPILERS.items()}

"""The same number is the same category: in training, evaluation, scoring, profiles, and in requests of either form."""

from __future__ import annotations

import io
import json
import re
from datetime import timedelta
from decimal import Decimal
from typing import Any

import polars as pl
import pytest

from airflow_mlops.core.data.categories import category_texts
from airflow_mlops.core.model.columns import ColumnRoles
from airflow_mlops.core.model.signature import FieldSpec, ModelSignature
from airflow_mlops.core.profiles.counting import category_counts
from airflow_mlops.exceptions import SchemaMismatchError, SignatureMismatchError
from airflow_mlops.integrations.domain_classifier import tell_apart
from airflow_mlops.integrations.sklearn import to_features
from airflow_mlops.serving.arrow import decode_arrow
from airflow_mlops.serving.requests import RequestDecoder
from airflow_mlops.steps.common import model_columns
from airflow_mlops.steps.training.rows import class_shares

ROLES = ColumnRoles(target="y", time="t", categorical=("code",))
SIGNATURE = ModelSignature(inputs=(FieldSpec(name="code", type="string"),), output="y")


def in_training(column: pl.Series) -> list[str]:
    return to_features(pl.DataFrame({"code": column}), ROLES)["code"].tolist()


def from_table(column: pl.Series) -> list[str | None]:
    """As evaluation, batch scoring, explanation and challengers read rows."""
    return list(model_columns(pl.DataFrame({"code": column}), SIGNATURE)["code"])


def from_arrow(column: pl.Series) -> list[str | None]:
    stream = io.BytesIO()
    pl.DataFrame({"code": column}).write_ipc_stream(stream)
    return decode_arrow(stream.getvalue(), SIGNATURE, 10, 10_000).columns["code"]


def from_json(values: list[Any]) -> list[str | None]:
    decoder = RequestDecoder(SIGNATURE)
    by_row = decoder.decode(json.dumps({"rows": [{"code": one} for one in values]}).encode(), 10)
    by_column = decoder.decode(json.dumps({"columns": {"code": values}}).encode(), 10)
    assert by_row.columns == by_column.columns
    return by_row.columns["code"]


@pytest.mark.parametrize(
    ("column", "categories"),
    [
        (pl.Series([12, 7, None]), ["12", "7", None]),
        (pl.Series([12.0, 7.0, None]), ["12", "7", None]),  # as pandas has whole numbers beside gaps
        (pl.Series([12.0, 7.0, float("nan")]), ["12", "7", None]),
        (pl.Series([12.0, 0.1, None], dtype=pl.Float32), ["12", "0.1", None]),
        (pl.Series([12.5, -0.0, 1e20]), ["12.5", "0", "100000000000000000000"]),
        (pl.Series([Decimal("12.00"), Decimal("12.50"), None]), ["12", "12.5", None]),
        (pl.Series([True, False, None]), ["true", "false", None]),
        (pl.Series(["12.0", "a", None]), ["12.0", "a", None]),  # text is what it says
        (pl.Series([None, None, None], dtype=pl.Float64), [None, None, None]),
    ],
    ids=str,
)
def test_a_column_has_the_same_categories_everywhere(column: pl.Series, categories: list[str | None]) -> None:
    assert in_training(column) == ["" if one is None else one for one in categories]
    assert from_table(column) == from_arrow(column) == categories
    assert set(category_counts(column)) == {one for one in categories if one is not None}


@pytest.mark.parametrize(
    "learned", [pl.Series([12.0, 7.5, None]), pl.Series([12.0, 7.5, None], dtype=pl.Float32)]
)
def test_a_caller_sends_the_number_however_he_has_it(learned: pl.Series) -> None:
    categories = from_table(learned)
    assert from_json([12, 7.5, None]) == from_json([12.0, 7.5, None]) == categories
    assert from_arrow(pl.Series([12, 7, None]))[0] == from_json([12.0])[0] == "12"
    assert from_json([True, False]) == from_arrow(pl.Series([True, False])) == ["true", "false"]


def test_what_is_no_number_is_no_category() -> None:
    for value in (float("inf"), float("nan"), [12]):
        with pytest.raises(SignatureMismatchError, match=r"rows\[0\]\.code: expected string"):
            SIGNATURE.columns_from_records([{"code": value}])


@pytest.mark.parametrize(
    ("held", "kind"),
    [
        (pl.Series("x", [b"\xff"]), "Binary"),
        (pl.Series("x", [[1]]), "List(Int64)"),
        (pl.Series("x", [timedelta(1)]), "Duration"),
    ],
    ids=["bytes", "lists", "durations"],
)
def test_what_has_no_text_is_refused_by_name_and_type(held: pl.Series, kind: str) -> None:
    with pytest.raises(SchemaMismatchError, match=re.escape(f"column 'x' holds {kind}")):
        category_texts(held)


@pytest.mark.parametrize("name", ["count", "rows", "value", "label"])
def test_columns_that_are_called_as_what_is_counted(name: str) -> None:
    column = pl.Series(name, ["a", "b", "a"])
    assert category_counts(column) == {"a": 2, "b": 1}
    assert class_shares(column) == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    sides = [pl.DataFrame({name: [first, second] * 150}) for first, second in (("a", "b"), ("a", "c"))]
    assert tell_apart(*sides).drifted

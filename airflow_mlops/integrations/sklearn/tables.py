"""Rows as a pipeline takes them: types of inputs, target, and the stage that makes served rows the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from airflow_mlops.core.data.categories import category_texts
from airflow_mlops.exceptions import SchemaMismatchError
from airflow_mlops.integrations.sklearn.pipelines import final_estimator, is_classification, library_of

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    from numpy.typing import NDArray

    from airflow_mlops.core.model.columns import ColumnRoles


def to_features(rows: pl.DataFrame, columns: ColumnRoles) -> pd.DataFrame:
    """Give the model's input exactly as the service will: numbers rounded to float32, text with "" for missing.

    ONNX computes in float32 and knows no missing text, so training sees the same: no split falls between the two.

    :raises SchemaMismatchError: a number is wanted where the table holds something else.
    """
    import polars as pl

    for name in columns.numeric:
        column = rows[name]
        if not (
            column.dtype.is_numeric() or column.dtype == pl.Boolean or column.null_count() == len(column)
        ):
            raise SchemaMismatchError(
                f"column {name!r} holds {column.dtype}, and is declared numeric; make it a number when the data is "
                "ingested, or declare it categorical"
            )
    numbers = [pl.col(name).cast(pl.Float32).cast(pl.Float64) for name in columns.numeric]
    texts = [category_texts(rows[name]).fill_null("") for name in (*columns.categorical, *columns.text)]
    return rows.select(*numbers, *texts).to_pandas()


def with_served_inputs(pipeline: Any, features: pd.DataFrame, columns: ColumnRoles) -> Any:
    """Give a copy of a fitted pipeline that makes of its input what :func:`to_features` and the service do.

    Its first stage rounds numbers to float32 and gives "" for missing text. It consists of scikit-learn's own parts, so that it
    loads where this package is not installed. The stages after it are the fitted ones themselves.

    :param features: rows as the pipeline takes them.
    """
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import Pipeline, make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    # A ufunc, as skops knows these by name; and back to 64 bits, in which the stages behind it learned to compute.
    rounded = make_pipeline(
        *(
            FunctionTransformer(
                np.positive, kw_args={"dtype": kind, "casting": "unsafe"}, feature_names_out="one-to-one"
            )
            for kind in ("float32", "float64")
        )
    )
    filled = make_pipeline(
        *(
            SimpleImputer(missing_values=missing, strategy="constant", fill_value="")
            for missing in (np.nan, None)
        )
    )
    parts = [
        ("numbers", rounded, list(columns.numeric)),
        ("texts", filled, [*columns.categorical, *columns.text]),
    ]
    inputs = ColumnTransformer([part for part in parts if part[2]], verbose_feature_names_out=False)
    inputs.set_output(transform="pandas").fit(features)
    return Pipeline([("inputs", inputs), *pipeline.steps])


def to_target(values: pl.Series, pipeline: Any) -> NDArray[Any]:
    """Give what the pipeline learns to answer: true and false of a classifier as the text they are everywhere else.

    So are labels that are fractions, such as whole numbers that were missing somewhere: ONNX answers whole numbers or text.
    """
    import polars as pl

    plain = np.asarray(values.to_numpy())
    if not is_classification(pipeline):
        return plain
    library = library_of(final_estimator(pipeline)[1])
    if values.dtype == pl.Boolean:
        return plain.astype(str).astype(object)
    if values.dtype.is_float() and library in {
        "sklearn",
        "lightgbm",
        "xgboost",
    }:  # a user's own may compute with them
        labels, places = np.unique(plain, return_inverse=True)
        texts = labels.astype(str)
        # Of two labels the last one is the positive one; it shall stay the same.
        return texts.astype(object)[places] if np.array_equal(texts, np.sort(texts)) else plain
    return plain

"""scikit-learn: build a pipeline from column roles, fit it, save it in skops form."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.extension import load_object

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    import polars as pl
    from numpy.typing import NDArray

ESTIMATOR_STEP = "estimator"


def build_pipeline(
    estimator: str,
    params: Mapping[str, Any],
    *,
    numeric: Sequence[str],
    categorical: Sequence[str],
    seed: int,
) -> Any:
    """Build preprocessing and estimator as one pipeline, so that training and serving can't differ.

    Numeric columns pass through as they are; categories become ordinal codes (unseen: -1), which trees take as
    they are. An estimator that needs more (scaling, one-hot) brings it: ``estimator`` may be a
    factory function that returns any pipeline.

    :param estimator: import path of a class or a factory, ``sklearn.ensemble.HistGradientBoostingRegressor``
        or ``my_module:make_model``.
    :param params: its arguments.
    :param seed: given as ``random_state`` to an estimator that takes one and got none.
    :raises ValueError: naming the path or the argument that is wrong.
    """
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import OrdinalEncoder

    factory: Any = load_object(estimator)
    if not callable(factory):
        raise ValueError(f"estimator {estimator!r} is not a class or function")
    accepted = inspect.signature(factory).parameters
    arguments = {"random_state": seed} | dict(params) if "random_state" in accepted else dict(params)
    try:
        model = factory(**arguments)
    except TypeError as err:
        raise ValueError(f"estimator {estimator!r} does not take these params: {err}") from err
    if not hasattr(model, "fit") or not hasattr(model, "predict"):
        raise ValueError(f"estimator {estimator!r} gave {type(model).__name__}, which has no fit and predict")
    encoder = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    columns = ColumnTransformer(
        [("numeric", "passthrough", list(numeric)), ("categorical", encoder, list(categorical))]
    )
    return Pipeline([("columns", columns), (ESTIMATOR_STEP, model)])


def is_classification(pipeline: Any) -> bool:
    """Tell a classifier from a regressor."""
    from sklearn.base import is_classifier

    return bool(is_classifier(pipeline))


def fit(pipeline: Any, features: pd.DataFrame, target: Any, weights: NDArray[Any] | None) -> Any:
    """Fit, handing row weights to the estimator.

    :raises ValueError: when weights are wanted and the estimator takes none.
    """
    if weights is None:
        return pipeline.fit(features, target)
    estimator = pipeline.named_steps[ESTIMATOR_STEP]
    if "sample_weight" not in inspect.signature(estimator.fit).parameters:
        raise ValueError(
            f"{type(estimator).__name__} takes no row weights: leave half_life_days out or choose another estimator"
        )
    return pipeline.fit(features, target, **{f"{ESTIMATOR_STEP}__sample_weight": weights})


def to_features(rows: pl.DataFrame, *, numeric: Sequence[str], categorical: Sequence[str]) -> pd.DataFrame:
    """Give the model's input exactly as the service will: numbers as float32 values, categories as text or ``None``.

    Serving in ONNX computes in float32, so training sees the same rounding: a split can't fall between the two.
    """
    import polars as pl

    numbers = [pl.col(name).cast(pl.Float32).cast(pl.Float64) for name in numeric]
    texts = [pl.col(name).cast(pl.String) for name in categorical]
    return rows.select(*numbers, *texts).to_pandas()


def save_skops(pipeline: Any, path: Path) -> list[str]:
    """Save without pickle.

    :returns: names of the types in the file that a reader must trust explicitly.
    """
    import skops.io

    skops.io.dump(pipeline, path)
    untrusted: list[str] = skops.io.get_untrusted_types(file=path)
    return untrusted

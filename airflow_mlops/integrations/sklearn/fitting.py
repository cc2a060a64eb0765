"""Fit a pipeline and ask it: labels, weights, inputs that are empty or infinite."""

from __future__ import annotations

import inspect
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from airflow_mlops.core.comparison.predictions import Predictions
from airflow_mlops.integrations.sklearn.pipelines import (
    SELECTION_STEP,
    final_estimator,
    gives_probabilities,
    is_classification,
    library_of,
    takes_sparse,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from numpy.typing import NDArray

#: Bytes of one-hot columns and weights of words from which on they stay sparse, where the estimator takes that.
_SPARSE_FROM = 2**28

#: Bytes of them at most where they have to be dense.
_DENSE_AT_MOST = 2**32


def fit(pipeline: Any, features: pd.DataFrame, target: Any, weights: NDArray[Any] | None) -> Any:
    """Fit, handing row weights to the estimator and what selects its features, and codes of the labels to XGBoost where it takes no others.

    :raises ValueError: weights are wanted and the estimator takes none, or it refuses the rows: naming columns with infinite
        values or with none at all, how many features there are to select from, labels that it does not answer with, or columns that would take gigabytes.
    """
    arguments = {} if weights is None else dict.fromkeys(_weight_arguments(pipeline), weights)
    _fill_empty(pipeline, features)
    _bound_memory(pipeline, features)
    estimator = final_estimator(pipeline)[1]
    _code_labels(pipeline, target)
    try:
        pipeline.fit(features, target, **arguments)
    except TypeError as err:
        if "sample_weight" not in str(err):
            raise
        raise ValueError(_no_weights(estimator)) from err
    except ValueError as err:
        hints = [*_infinite(features), *_empty(features), *_too_few(pipeline)]
        if str(err).startswith("Invalid classes inferred"):
            hints.append(
                "XGBoost in a part of the pipeline takes only labels that are numbered 0, 1, 2 and so on: number them when the data "
                "is ingested, or take another estimator there"
            )
        if not hints:
            raise
        raise ValueError(f"{'; '.join(hints)} ({str(err)[:300]})") from err
    _require_own_labels(pipeline, target)
    return pipeline


def _code_labels(pipeline: Any, target: Any) -> None:
    """Let XGBoost learn codes of labels that it would refuse, or number itself: all but 0, 1, 2 and so on.

    So do scikit-learn's estimators that it is a part of, as they may hand the labels on as they are. A user's own class gets the
    labels: it may go by them, and code them itself.
    """
    from airflow_mlops.integrations.label_codes import LabelCodedClassifier

    path, last = final_estimator(pipeline)
    if not path or not is_classification(last):
        return
    within = _parts(last) if library_of(last) == "sklearn" else [last]
    if not any(library_of(part) == "xgboost" and is_classification(part) for part in within):
        return
    labels = np.unique(np.asarray(target))
    if labels.dtype.kind not in "iu" or labels.tolist() != list(range(len(labels))):
        pipeline.set_params(**{path.removesuffix("__"): LabelCodedClassifier(last)})


def _parts(estimator: Any) -> list[Any]:
    return list(estimator.get_params(deep=True).values()) if hasattr(estimator, "get_params") else []


def _require_own_labels(pipeline: Any, target: Any) -> None:
    """See that a classifier answers with the labels it was given, and not with numbers of its own.

    :raises ValueError: it answers others, which would all be wrong.
    """
    if not is_classification(pipeline) or not hasattr(pipeline, "classes_"):
        return
    given = {str(label) for label in set(np.asarray(target).tolist())}
    answered = {str(label) for label in pipeline.classes_}
    if not given <= answered:
        raise ValueError(
            f"{type(final_estimator(pipeline)[1]).__name__} answers {_some(answered)} where the labels are {_some(given)}: number "
            "them 0, 1, 2 and so on when the data is ingested, or choose another estimator"
        )


def _some(labels: set[str]) -> str:
    return ", ".join(sorted(labels)[:5])


def _fill_empty(pipeline: Any, features: pd.DataFrame) -> None:
    """Let histogram boosting see a constant where a number is missing in all rows, as of an input that is newer than they are.

    It learns from gaps, and fails where there is nothing else.
    """
    from sklearn.impute import SimpleImputer

    columns = getattr(pipeline, "named_steps", {}).get("columns")
    if columns is None or "_hist_gradient_boosting" not in type(final_estimator(pipeline)[1]).__module__:
        return
    parts = []
    for part, how, names in columns.transformers:
        empty = [name for name in names if features[name].isna().all()] if how == "passthrough" else []
        constant = SimpleImputer(strategy="constant", fill_value=0.0, keep_empty_features=True)
        parts.append((part, how, [name for name in names if name not in empty] if empty else names))
        parts += [("empty", constant, empty)] if empty else []
    columns.set_params(transformers=[part for part in parts if len(part[2])])


def _bound_memory(pipeline: Any, features: pd.DataFrame) -> None:
    """Keep one-hot columns and weights of words sparse where they are many and the estimator takes that.

    :raises ValueError: they have to be dense, and would take gigabytes.
    """
    stages = getattr(pipeline, "named_steps", {})
    if "columns" not in stages:
        return
    widths = dict(_widths(stages["columns"], features))
    size = 8 * len(features) * sum(widths.values())
    estimator = final_estimator(pipeline)[1]
    if size > _SPARSE_FROM and SELECTION_STEP not in stages and takes_sparse(estimator):
        stages["columns"].set_params(sparse_threshold=1.0)
    elif size > _DENSE_AT_MOST:
        widest = sorted(widths, key=lambda name: -widths[name])[:5]
        told = ", ".join(f"{name!r} ({widths[name]:,})" for name in widest)
        raise ValueError(
            f"the {sum(widths.values()):,} columns that are made of {told} take {size / 2**30:.1f} GiB in {len(features):,} rows, "
            f"as {type(estimator).__name__}{' behind feature_selection' * (SELECTION_STEP in stages)} needs them all at once: "
            "group rare values when the data is ingested, leave the column out, train on fewer rows, choose preprocessing "
            "'codes' (categories only), or a linear model without feature_selection"
        )


def _widths(columns: Any, features: pd.DataFrame) -> Iterator[tuple[str, int]]:
    """Give how many columns are made of each category and text, at least."""
    from sklearn.base import clone
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import OneHotEncoder

    for _, how, names in columns.transformers:
        if isinstance(how, OneHotEncoder):
            yield from ((name, int(features[name].nunique())) for name in names)
        elif isinstance(how, TfidfVectorizer) and 8 * len(features) * how.max_features > _SPARSE_FROM // 10:
            with suppress(ValueError):  # no words: the fit says so
                some = features[names].iloc[:: max(1, len(features) // 10_000)]
                yield names, len(clone(how).fit(some).vocabulary_)


def _empty(features: pd.DataFrame) -> Iterator[str]:
    """Name what no row has a value of: numbers that are missing, texts without a letter."""
    for name in features:
        column = features[name]
        if column.isna().all() or (column == "").all():
            yield f"column {name!r} is empty in all of {len(features)} rows: leave it out, or train on rows that have it"


def _infinite(features: pd.DataFrame) -> Iterator[str]:
    for name in features.select_dtypes("number"):
        count = int(np.isinf(features[name].to_numpy(dtype=float, na_value=np.nan)).sum())
        if count:
            yield (
                f"column {name!r} is infinite, or too large for 32 bits, in {count} of {len(features)} rows: correct or drop "
                "them when the data is ingested, or choose an estimator that takes them"
            )


def _too_few(pipeline: Any) -> Iterator[str]:
    stage = getattr(pipeline, "named_steps", {}).get(SELECTION_STEP)
    wanted = getattr(
        getattr(stage, "selector", None), "n_features_to_select", None
    )  # the other methods keep all there are
    with suppress(Exception):  # not fitted so far, or a stage without names
        count = len(pipeline[:1].get_feature_names_out())
        if wanted is not None and wanted >= count:
            yield f"feature_selection keeps {wanted} of {count} features: leave it out, or keep fewer"


def predict(pipeline: Any, features: pd.DataFrame) -> Predictions:
    """Answer rows, with probabilities where the pipeline gives them; equal models give equal bits.

    :raises ValueError: it refuses the rows: naming columns with infinite values.
    """
    with in_one_thread():
        try:
            values = np.asarray(pipeline.predict(features))
        except ValueError as err:
            hints = [*_infinite(features)]
            if not hints:
                raise
            raise ValueError(f"{'; '.join(hints)} ({str(err)[:300]})") from err
        if not is_classification(pipeline):
            return Predictions(values=values)
        return Predictions(
            values=values,
            probabilities=pipeline.predict_proba(features) if gives_probabilities(pipeline) else None,
            classes=tuple(str(label) for label in pipeline.classes_),
        )


@contextmanager
def in_one_thread() -> Iterator[None]:
    """Let estimators with ``n_jobs`` compute in one thread: a forest adds its trees in the order in which threads come."""
    import joblib  # type: ignore[import-untyped]

    with joblib.parallel_config(backend="sequential"):
        yield


def _weight_arguments(pipeline: Any) -> list[str]:
    """Name the fit arguments that take row weights: those of the estimator and of our own selection of features."""
    from airflow_mlops.integrations.feature_selector import FeatureSelector

    selection = getattr(pipeline, "named_steps", {}).get(SELECTION_STEP)
    ranking = [f"{SELECTION_STEP}__sample_weight"] if isinstance(selection, FeatureSelector) else []
    return [_weight_argument(pipeline), *ranking]


def _weight_argument(pipeline: Any) -> str:
    """Name the fit argument that reaches the estimator, through pipelines in pipelines."""
    path, estimator = final_estimator(pipeline)
    if not _may_take_weights(estimator):
        raise ValueError(_no_weights(estimator))
    regressor = getattr(estimator, "regressor", None)  # of a transformed target, which hands all arguments on
    return path + (_weight_argument(regressor) if regressor is not None else "sample_weight")


def _may_take_weights(estimator: Any) -> bool:
    """Tell whether ``fit`` takes weights, by name or to hand them on, as votes and stacks of estimators do."""
    parameters = inspect.signature(estimator.fit).parameters
    return "sample_weight" in parameters or any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def _no_weights(estimator: Any) -> str:
    return (
        f"{type(estimator).__name__} takes no row weights: leave half_life_days and weight_column out, or choose another "
        "estimator"
    )

"""scikit-learn: build a pipeline from column roles, fit it, search its parameters, save it in skops form."""

from __future__ import annotations

import hashlib
import inspect
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from airflow_mlops.core.codec import canonical_json
from airflow_mlops.core.comparison.predictions import Predictions
from airflow_mlops.core.data.categories import category_texts
from airflow_mlops.core.extension import load_object
from airflow_mlops.core.model.installed import packages_of
from airflow_mlops.core.model.tuning import Candidate, Range
from airflow_mlops.exceptions import SchemaMismatchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import pandas as pd
    import polars as pl
    from numpy.typing import NDArray

    from airflow_mlops.core.model.columns import ColumnRoles

ESTIMATOR_STEP = "estimator"

#: Libraries of trees beside scikit-learn's, by the first part of their module names.
_TREE_PACKAGES = ("xgboost", "lightgbm", "catboost")

#: Types that fitting puts into the estimators of a module, which skops asks about as well.
_HELD_WHEN_FITTED = {
    "lightgbm.sklearn": ("collections.OrderedDict", "lightgbm.basic.Booster"),
    "xgboost.sklearn": ("xgboost.core.Booster",),
}

#: What fits, converts and stores a model beside the estimator's own package.
_LIBRARIES = ("airflow-mlops", "scikit-learn", "numpy", "scipy", "skl2onnx", "onnxruntime", "skops", "optuna")

#: Words a text column is turned into at most; a factory of your own can do better.
TEXT_FEATURES = 256

#: ``codes``: categories as ordinal codes, missing numbers filled with the median unless the estimator learns from
#: them (histogram boosting); ``scaled``: missing numbers filled with the median and standardized, categories
#: one-hot; ``none``: the estimator gets the table; ``auto``: codes for trees, else scaled.
Preprocessing = Literal["auto", "codes", "scaled", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSelection:
    """A pipeline stage that keeps the most useful features.

    :param method: ``rfe`` (drop the least important fifth again and again), ``l1`` (largest weights of a linear model
        with L1 penalty) or ``importance`` (of 100 extremely randomized trees).
    :param keep: how many to keep, counted after preprocessing.

    Source: Guyon et al., "Gene selection for cancer classification using support vector machines", Machine Learning
    46, 2002 (rfe); Tibshirani, "Regression shrinkage and selection via the lasso", JRSS B 58, 1996 (l1).
    """

    method: Literal["rfe", "l1", "importance"]
    keep: int

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep is {self.keep}; at least one feature is needed")


def code_of(path: str) -> dict[str, str]:
    """Tell by which code an estimator is made: digest of the module the path leads to, and its package's version.

    A module that this one imports is not looked at.

    :raises ValueError: naming the path and the part of it that is not there.
    """
    found = load_object(path)
    module = inspect.getmodule(found)
    package = (module.__name__ if module else path).partition(".")[0]
    code = {"path": path, **_versions(packages_of(package))}
    file = source_file(path)
    if file is not None:
        code["source"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return code


def source_file(path: str) -> Path | None:
    """Give the file of the module an import path leads to; ``None`` for what is made in no file.

    :raises ValueError: naming the path and the part of it that is not there.
    """
    file = getattr(inspect.getmodule(load_object(path)), "__file__", None)
    return None if file is None else Path(file)


def libraries() -> dict[str, str]:
    """Give the versions of what every training here stands on."""
    return _versions(_LIBRARIES)


def _versions(distributions: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in distributions:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def build_pipeline(
    candidate: Candidate,
    columns: ColumnRoles,
    *,
    preprocessing: Preprocessing = "auto",
    selection: FeatureSelection | None = None,
    seed: int,
) -> Any:
    """Build preprocessing, feature selection and estimator as one pipeline, so that training and serving can't differ.

    :param candidate: what to fit, with its arguments; nothing left to search.
    :param columns: which columns are what.
    :param preprocessing: how the columns reach the estimator.
    :param selection: features to keep; ``None`` keeps all.
    :param seed: given as ``random_state`` to the estimator and every part of it that takes one and got none.
    :raises ValueError: naming the path or the argument that is wrong.
    """
    from sklearn.pipeline import Pipeline

    estimator = _estimator(candidate, seed)
    steps: list[tuple[str, Any]] = []
    if preprocessing != "none":
        steps.append(("columns", _preprocessor(columns, preprocessing, estimator)))
    if selection is not None:
        steps.append(("selection", _selector(selection, is_classification(estimator), seed)))
    return Pipeline([*steps, (ESTIMATOR_STEP, estimator)])


def is_classification(estimator: Any) -> bool:
    """Tell a classifier from a regressor."""
    from sklearn.base import is_classifier

    return bool(is_classifier(estimator))


def learns_target(estimator: Any) -> bool:
    """Tell what predicts a target from what groups rows or finds odd ones without any."""
    from sklearn.base import is_clusterer, is_outlier_detector

    return not (is_clusterer(estimator) or is_outlier_detector(estimator))


def gives_probabilities(estimator: Any) -> bool:
    """Tell whether it is a classifier with a probability per class, not only labels or margins."""
    return is_classification(estimator) and hasattr(estimator, "predict_proba")


def fit(pipeline: Any, features: pd.DataFrame, target: Any, weights: NDArray[Any] | None) -> Any:
    """Fit, handing row weights to the estimator, and codes of the labels to XGBoost where it takes no others.

    :raises ValueError: weights are wanted and the estimator takes none, or it refuses the rows: naming columns with infinite
        values or with none at all, how many features there are to select from, or labels that it
        does not answer with.
    """
    arguments = {} if weights is None else {_weight_argument(pipeline): weights}
    _fill_empty(pipeline, features)
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
    within = _parts(last) if _library(last) == "sklearn" else [last]
    if not any(_library(part) == "xgboost" and is_classification(part) for part in within):
        return
    labels = np.unique(np.asarray(target))
    if labels.dtype.kind not in "iu" or labels.tolist() != list(range(len(labels))):
        pipeline.set_params(**{path.removesuffix("__"): LabelCodedClassifier(last)})


def _parts(estimator: Any) -> list[Any]:
    return list(estimator.get_params(deep=True).values()) if hasattr(estimator, "get_params") else []


def _library(part: Any) -> str:
    return type(part).__module__.partition(".")[0]


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
    selector = getattr(pipeline, "named_steps", {}).get("selection")
    wanted = getattr(selector, "n_features_to_select", None)  # the other methods keep all there are
    with suppress(Exception):  # not fitted so far, or a stage without names
        count = len(pipeline[:1].get_feature_names_out())
        if wanted is not None and wanted >= count:
            yield f"feature_selection keeps {wanted} of {count} features: leave it out, or keep fewer"


def predict(pipeline: Any, features: pd.DataFrame) -> Predictions:
    """Answer rows, with probabilities where the pipeline gives them; equal models give equal bits."""
    with in_one_thread():
        values = np.asarray(pipeline.predict(features))
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
    library = _library(final_estimator(pipeline)[1])
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


def draw(candidate: Candidate, count: int, seed: int) -> list[Candidate]:
    """Draw parameter sets from a candidate's space, no two the same; fewer where there are not so many."""
    from sklearn.model_selection import ParameterGrid, ParameterSampler

    space = {name: _distribution(values) for name, values in candidate.space.items()}
    if all(isinstance(values, list) for values in space.values()):
        count = min(count, len(ParameterGrid(space)))
    sets = [
        {name: _plain(value) for name, value in drawn.items()}
        for drawn in ParameterSampler(space, count, random_state=seed)
    ]
    different = {canonical_json(drawn): drawn for drawn in sets}.values()
    return [replace(candidate, params=candidate.params | drawn, space={}) for drawn in different]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def untrusted_types(pipeline: Any) -> list[str]:
    """Name the types that a reader of the skops form must trust, also those that fitting will put into it.

    :param pipeline: fitted or not.
    """
    import skops.io

    found: list[str] = skops.io.get_untrusted_types(data=skops.io.dumps(pipeline))
    later = [more for name in found for more in _HELD_WHEN_FITTED.get(name.rpartition(".")[0], ())]
    return sorted({*found, *later})


def stages(pipeline: Any) -> list[Any]:
    """Give every estimator in a pipeline, through pipelines and column transformers."""
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import Pipeline

    if isinstance(pipeline, Pipeline):
        return [one for _, stage in pipeline.steps for one in stages(stage)]
    if isinstance(pipeline, ColumnTransformer):
        parts = getattr(pipeline, "transformers_", pipeline.transformers)  # fitting makes copies
        return [one for _, stage, _ in parts for one in stages(stage)]
    return [] if pipeline is None or isinstance(pipeline, str) else [pipeline]


def save_skops(pipeline: Any, path: Path) -> list[str]:
    """Save without pickle.

    :returns: names of the types in the file that a reader must trust explicitly.
    """
    import skops.io

    skops.io.dump(pipeline, path)
    untrusted: list[str] = skops.io.get_untrusted_types(file=path)
    return untrusted


def _estimator(candidate: Candidate, seed: int) -> Any:
    factory: Any = load_object(candidate.estimator)
    if not callable(factory):
        raise ValueError(f"estimator {candidate.estimator!r} is not a class or function")
    nested = {name: value for name, value in candidate.params.items() if "__" in name}
    arguments: dict[str, Any] = {
        name: value for name, value in candidate.params.items() if name not in nested
    }
    if "random_state" in inspect.signature(factory).parameters:
        arguments = {"random_state": seed} | arguments
    try:
        estimator = factory(**arguments)
    except TypeError as err:
        raise ValueError(f"estimator {candidate.estimator!r} does not take these params: {err}") from err
    if not hasattr(estimator, "fit") or not hasattr(estimator, "predict"):
        raise ValueError(
            f"estimator {candidate.estimator!r} gave {type(estimator).__name__}, which has no fit and predict"
        )
    if nested:
        estimator.set_params(**nested)
    return _seeded(estimator, seed)


def _seeded(estimator: Any, seed: int) -> Any:
    """Set every random state that is left open, also of what a factory put inside: equal trainings give equal models."""
    if hasattr(estimator, "get_params"):
        parts = estimator.get_params(deep=True).items()
        unset = {
            name: seed for name, value in parts if value is None and name.split("__")[-1] == "random_state"
        }
        if unset:
            estimator.set_params(**unset)
    return estimator


def _preprocessor(columns: ColumnRoles, preprocessing: Preprocessing, estimator: Any) -> Any:
    from sklearn.compose import ColumnTransformer
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

    family = type(estimator).__module__.split(".")
    trees = family[0] in _TREE_PACKAGES or family[:2] in (["sklearn", "ensemble"], ["sklearn", "tree"])
    median = SimpleImputer(strategy="median", keep_empty_features=True)
    if preprocessing == "scaled" or (preprocessing == "auto" and not trees):
        numbers: Any = make_pipeline(median, StandardScaler())
        categories: Any = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    else:
        # Forests take missing values too, but their ONNX form sends them to another branch than scikit-learn's.
        learns_missing = family[0] in _TREE_PACKAGES or "_hist_gradient_boosting" in family
        numbers = "passthrough" if learns_missing else median
        categories = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    parts = [
        ("numeric", numbers, list(columns.numeric)),
        ("categorical", categories, list(columns.categorical)),
    ]
    texts = [(f"text_{name}", TfidfVectorizer(max_features=TEXT_FEATURES), name) for name in columns.text]
    return ColumnTransformer(
        [*(part for part in parts if part[2]), *texts],
        sparse_threshold=0.0,  # trees take dense tables only
    )


def _selector(selection: FeatureSelection, classification: bool, seed: int) -> Any:
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor
    from sklearn.feature_selection import RFE, SelectFromModel
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import Lasso, LogisticRegression
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    if selection.method == "l1":
        # The linear model ranks only; what it needs (no gaps, one scale) stays inside it.
        # So does the unit of the target: rates of a thousandth would leave no weight.
        linear, weights = (
            (LogisticRegression(l1_ratio=1.0, solver="saga", C=0.1, max_iter=500, random_state=seed), "coef_")
            if classification
            else (
                TransformedTargetRegressor(Lasso(alpha=0.01), transformer=StandardScaler()),
                "regressor_.coef_",
            )
        )
        ranker = Pipeline([("fill", SimpleImputer()), ("scale", StandardScaler()), ("linear", linear)])
        return SelectFromModel(
            ranker,
            max_features=selection.keep,
            threshold=1e-10,
            importance_getter=f"named_steps.linear.{weights}",
        )
    trees = (ExtraTreesClassifier if classification else ExtraTreesRegressor)(
        n_estimators=100, random_state=seed
    )
    if selection.method == "rfe":
        return RFE(trees, n_features_to_select=selection.keep, step=0.2)
    return SelectFromModel(trees, max_features=selection.keep, threshold=-float("inf"))


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


def final_estimator(pipeline: Any) -> tuple[str, Any]:
    """Give the last stage of a pipeline, through pipelines in pipelines, and the prefix of its parameters."""
    from sklearn.pipeline import Pipeline

    path, estimator = "", pipeline
    while isinstance(estimator, Pipeline):
        name, estimator = estimator.steps[-1]
        path += f"{name}__"
    return path, estimator


def _distribution(space: Range | Sequence[Any] | Mapping[str, Any]) -> Any:
    from scipy.stats import loguniform, randint, uniform

    if not isinstance(space, Range):
        return list(space)
    if space.low == space.high:
        return [int(space.low) if space.integer else space.low]
    if space.integer and space.log:
        return _LogIntegers(int(space.low), int(space.high))
    if space.integer:
        return randint(int(space.low), int(space.high) + 1)
    return loguniform(space.low, space.high) if space.log else uniform(space.low, space.high - space.low)


class _LogIntegers(NamedTuple):
    """Whole numbers drawn evenly in the logarithm, both ends included; SciPy has no such distribution."""

    low: int
    high: int

    def rvs(self, random_state: Any = None) -> int:
        from scipy.stats import loguniform

        drawn = float(loguniform(self.low, self.high + 1).rvs(random_state=random_state))
        return min(int(drawn), self.high)  # rounding may reach the open end

"""scikit-learn: a pipeline of column roles, preprocessing, selection and an estimator, and what kind it is."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from airflow_mlops.core.extension import load_object

if TYPE_CHECKING:
    from airflow_mlops.core.model.columns import ColumnRoles
    from airflow_mlops.core.model.tuning import Candidate

ESTIMATOR_STEP = "estimator"

#: Libraries of trees beside scikit-learn's, by the first part of their module names.
_TREE_PACKAGES = ("xgboost", "lightgbm", "catboost")

SELECTION_STEP = "selection"

#: Smallest share of the rows in a leaf of the trees that rank features: a thousand leaves at most, however many rows there are.
_RANKING_LEAF = 0.001

#: Words a text column is turned into at most; a factory of your own can do better.
TEXT_FEATURES = 256

#: ``codes``: categories as ordinal codes, missing numbers filled with the median unless the estimator learns from
#: them (histogram boosting) and no selection by L1 stands before it; ``scaled``: missing numbers filled with the median and standardized, categories
#: one-hot; ``none``: the estimator gets the table; ``auto``: codes where only trees see the columns, also within
#: scikit-learn's votes, stacks, bags and the like, else scaled.
Preprocessing = Literal["auto", "codes", "scaled", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSelection:
    """A pipeline stage that keeps the most useful features, by the weights of the rows where these have any.

    :param method: ``rfe`` (drop the least important fifth again and again), ``l1`` (largest weights of a linear model
        with L1 penalty, which knows no missing numbers: they are filled with the median, also for estimators that
        learn from them) or ``importance`` (of 100 extremely randomized trees, with a thousandth of the rows or more in
        each leaf; so are those of ``rfe``).
    :param keep: how many to keep, counted after preprocessing.

    Source: Guyon et al., "Gene selection for cancer classification using support vector machines", Machine Learning
    46, 2002 (rfe); Tibshirani, "Regression shrinkage and selection via the lasso", JRSS B 58, 1996 (l1).
    """

    method: Literal["rfe", "l1", "importance"]
    keep: int

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep is {self.keep}; at least one feature is needed")


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
        fill = selection is not None and selection.method == "l1"
        steps.append(("columns", _preprocessor(columns, preprocessing, estimator, fill=fill)))
    if selection is not None:
        steps.append((SELECTION_STEP, _selector(selection, is_classification(estimator), seed)))
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
    # A stack without a last estimator of its own can predict only once it is fitted; its class says that it will.
    if not hasattr(estimator, "fit") or not (
        hasattr(estimator, "predict") or hasattr(type(estimator), "predict")
    ):
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


def _preprocessor(columns: ColumnRoles, preprocessing: Preprocessing, estimator: Any, *, fill: bool) -> Any:
    """Give the stage that makes numbers of the columns; with ``fill`` no number is missing behind it."""
    from sklearn.compose import ColumnTransformer
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

    median = SimpleImputer(strategy="median", keep_empty_features=True)
    if preprocessing == "scaled" or (preprocessing == "auto" and not _is_of_trees(estimator)):
        numbers: Any = make_pipeline(median, StandardScaler())
        categories: Any = OneHotEncoder(handle_unknown="ignore")
    else:
        # Forests take missing values too, but their ONNX form sends them to another branch than scikit-learn's.
        family = type(estimator).__module__.split(".")
        learns_missing = family[0] in _TREE_PACKAGES or "_hist_gradient_boosting" in family
        numbers = "passthrough" if learns_missing and not fill else median
        categories = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    parts = [
        ("numeric", numbers, list(columns.numeric)),
        ("categorical", categories, list(columns.categorical)),
    ]
    # Numbered, as scikit-learn takes no __ in the name of a part, and a column's name may have it.
    texts = [
        (f"text_{number}", TfidfVectorizer(max_features=TEXT_FEATURES), name)
        for number, name in enumerate(columns.text)
    ]
    return ColumnTransformer(
        [*(part for part in parts if part[2]), *texts],
        sparse_threshold=0.0,  # trees take dense tables only; a fit may raise it for what takes others
    )


def _is_of_trees(estimator: Any) -> bool:
    """Tell whether only trees see the columns, to whom neither scale nor a far-fetched order of codes does harm."""
    family = type(estimator).__module__.split(".")
    if family[0] in _TREE_PACKAGES:
        return getattr(estimator, "booster", None) != "gblinear"
    if inner := _seeing_columns(estimator):
        return all(_is_of_trees(one) for one in inner)
    # Bagging and boosting without an estimator given are of trees.
    return family[:2] in (["sklearn", "ensemble"], ["sklearn", "tree"])


def takes_sparse(estimator: Any) -> bool:
    """Tell whether it learns a weight per column, also from a sparse table.

    Neighbors and kernels do as well, but keep its rows, and have no ONNX form then.
    """
    from sklearn.utils import get_tags

    if inner := _seeing_columns(estimator):
        return all(takes_sparse(one) for one in inner)
    weighing = type(estimator).__module__.startswith(("sklearn.linear_model.", "sklearn.neural_network."))
    return weighing and bool(get_tags(estimator).input_tags.sparse)


def _seeing_columns(estimator: Any) -> list[Any]:
    """Give the estimators that one of scikit-learn's hands its columns on to."""
    from sklearn.linear_model import LinearRegression

    if library_of(estimator) != "sklearn":
        return []
    parts = estimator.get_params(deep=False)
    inner = [parts.get("estimator"), parts.get("regressor")]
    inner += [one for _, one in parts.get("estimators") or ()]
    if parts.get("passthrough") is True:  # of a stack, whose last estimator is a linear one if none is given
        inner.append(parts["final_estimator"] or LinearRegression())
    return [one for one in inner if one is not None and one != "drop"]


def _selector(selection: FeatureSelection, classification: bool, seed: int) -> Any:
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor
    from sklearn.feature_selection import RFE, SelectFromModel
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import Lasso, LogisticRegression
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    from airflow_mlops.integrations.feature_selector import FeatureSelector

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
        largest = SelectFromModel(
            ranker,
            max_features=selection.keep,
            threshold=1e-10,
            importance_getter=f"named_steps.linear.{weights}",
        )
        return FeatureSelector(largest, weights_argument="linear__sample_weight")
    trees = (ExtraTreesClassifier if classification else ExtraTreesRegressor)(
        n_estimators=100, min_samples_leaf=_RANKING_LEAF, random_state=seed
    )
    if selection.method == "rfe":
        return FeatureSelector(RFE(trees, n_features_to_select=selection.keep, step=0.2))
    return FeatureSelector(SelectFromModel(trees, max_features=selection.keep, threshold=-float("inf")))


def final_estimator(pipeline: Any) -> tuple[str, Any]:
    """Give the last stage of a pipeline, through pipelines in pipelines, and the prefix of its parameters."""
    from sklearn.pipeline import Pipeline

    path, estimator = "", pipeline
    while isinstance(estimator, Pipeline):
        name, estimator = estimator.steps[-1]
        path += f"{name}__"
    return path, estimator


def library_of(part: Any) -> str:
    """Name the package that an estimator's class is from."""
    return type(part).__module__.partition(".")[0]

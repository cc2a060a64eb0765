"""A stage that keeps the features another one ranks highest; imported where scikit-learn is in use already."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.feature_selection import SelectorMixin


class FeatureSelector(SelectorMixin, BaseEstimator):  # type: ignore[misc]
    """Keep the features that a selector of scikit-learn chooses, and not what it ranked them with.

    A hundred trees that are needed once would be most of the model. Every fit chooses anew.

    :param selector: the selector; it stays as it is, a copy is fitted and let go.
    :param weights_argument: name of its fit argument that hands row weights to what ranks.
    :ivar support_: whether a feature is kept, per feature.
    """

    def __init__(self, selector: Any, weights_argument: str = "sample_weight") -> None:
        self.selector = selector
        self.weights_argument = weights_argument

    def fit(self, features: Any, target: Any, sample_weight: Any = None) -> FeatureSelector:
        """Choose features.

        :raises ValueError: the selector refuses the rows.
        """
        weights = {} if sample_weight is None else {self.weights_argument: sample_weight}
        fitted = clone(self.selector).fit(features, target, **weights)
        self.support_ = np.asarray(fitted.get_support())
        self.n_features_in_ = len(self.support_)
        if hasattr(fitted, "feature_names_in_"):
            self.feature_names_in_ = fitted.feature_names_in_
        return self

    def _get_support_mask(self) -> Any:
        return self.support_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True  # the selector itself may refuse gaps; choosing columns does not
        return tags

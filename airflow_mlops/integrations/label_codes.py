"""Labels of any kind for classifiers that learn only 0, 1, 2 and so on; imported where scikit-learn is in use already."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets


def _has_probabilities(coded: LabelCodedClassifier) -> bool:
    return hasattr(coded.estimator, "predict_proba")


class LabelCodedClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Let a classifier learn the numbers of its labels, and answer with the labels.

    Labels are numbered anew in every fit, in their sorted order, so that a fold without one of them has no gap.

    :param estimator: the classifier; it stays as it is, a copy is fitted.
    :ivar classes_: the labels, sorted, in the order of the probabilities' columns.
    :ivar estimator_: the fitted copy.
    """

    def __init__(self, estimator: Any) -> None:
        self.estimator = estimator

    def fit(self, features: Any, target: Any, sample_weight: Any = None) -> LabelCodedClassifier:
        """Fit on the numbers of the labels.

        :raises ValueError: the target is a quantity, or the classifier refuses the rows.
        """
        check_classification_targets(target)
        self.classes_, codes = np.unique(np.asarray(target), return_inverse=True)
        weights = {} if sample_weight is None else {"sample_weight": sample_weight}
        self.estimator_ = clone(self.estimator).fit(features, codes, **weights)
        return self

    def predict(self, features: Any) -> Any:
        """Give a label per row."""
        return self.classes_[np.asarray(self.estimator_.predict(features)).astype(np.intp)]

    @available_if(_has_probabilities)  # type: ignore[untyped-decorator]
    def predict_proba(self, features: Any) -> Any:
        """Give a probability per row and label of ``classes_``."""
        return np.asarray(self.estimator_.predict_proba(features))

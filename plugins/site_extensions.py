"""A site's own metric and drift detector, named by import path in a Dag; nothing has to be registered."""

from __future__ import annotations

from typing import TYPE_CHECKING

# [START site_extensions]
import numpy as np

if TYPE_CHECKING:
    from airflow_mlops.core.profiles.profile import NumericProfile


def p90_absolute_error(target: np.ndarray, prediction: np.ndarray) -> float:
    """Error that nine of ten predictions stay below, in the target's unit; smaller is better."""
    return float(np.quantile(np.abs(target - prediction), 0.9))


def mean_shift(reference: NumericProfile, current: NumericProfile) -> float:
    """Shift of the mean in standard deviations of the reference."""
    return abs(current.mean - reference.mean) / max(reference.standard_deviation, 1e-9)


mean_shift.threshold = 0.25  # from here on the feature counts as drifted
# [END site_extensions]

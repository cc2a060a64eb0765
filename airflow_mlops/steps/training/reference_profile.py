"""Reference profile: what a model was trained on and what it answered, as the drift check compares it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlops.core.profiles.profile import Profile, join_profiles, profile_frame
from airflow_mlops.core.profiles.profile_format import PREDICTION

if TYPE_CHECKING:
    from airflow_mlops.core.model.columns import ColumnRoles
    from airflow_mlops.steps.training.rows import Split


def reference_profile(
    split: Split, columns: ColumnRoles, predictions: Any, *, classification: bool
) -> Profile:
    """Profile inputs and target of the training rows, and the predictions for the rows held out.

    Predictions for rows a model has learned are better than any it will make: the held-out ones are what its answers in
    production are compared with.

    :param predictions: for the held-out rows, shape ``(rows,)``.
    """
    import polars as pl

    label, number = ([columns.target], []) if classification else ([], [columns.target])
    trained = profile_frame(
        split.training,
        numeric=[*columns.numeric, *number],
        categorical=[*columns.categorical, *label],
        text=columns.text,
    )
    answers = pl.DataFrame({PREDICTION: predictions})
    kind = {"categorical" if classification else "numeric": [PREDICTION]}
    return join_profiles([trained, profile_frame(answers, **kind)])  # type: ignore[arg-type]

"""Challengers that the newest retraining decision wants trained, for the next window to compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.decision.retraining import TrainingPlan, recipe_rows
from airflow_mlops.ledger.entries import EntryKind

if TYPE_CHECKING:
    from airflow_mlops.core.windows import Window
    from airflow_mlops.ledger.store import Ledger

#: Newest trainings and registrations that are looked at.
_RECENT = 200


def wanted_challengers(ledger: Ledger, model_name: str) -> list[dict[str, Any]]:
    """List the recipes worth a training, each as a plan for ``TrainModelOperator``.

    Asked twice it gives what is still missing: a recipe whose model of these rows has been trained is left out, as is the one
    that was promoted.
    """
    decisions = ledger.entries(kind=EntryKind.RETRAINING_DECISION, model_name=model_name, limit=20)
    decided = [(entry.window, entry.payload.get("shadow", ())) for entry in decisions if entry.window]
    if not decided:
        return []
    window, recipes = max(decided, key=lambda pair: pair[0])
    since, there = ledger.world_since(model_name), _trained(ledger, model_name, window)
    plans = [
        TrainingPlan(
            window=window,
            rows="since_change",
            half_life_days=recipe_rows(recipe, window, since).half_life_days,
            mlflow_copy=False,  # they serve nobody
            recipe=recipe,
        )
        for recipe in recipes
        if recipe not in there
    ]
    return [to_dict(plan) for plan in plans]


def _trained(ledger: Ledger, model_name: str, window: Window) -> set[str]:
    """Name the recipes that have a registered model of all rows up to the window's end."""
    registered = {
        entry.payload["run_id"]
        for entry in ledger.entries(kind=EntryKind.REGISTRATION, model_name=model_name, limit=_RECENT)
    }
    return {
        str(training.payload["recipe"])
        for training in ledger.entries(kind=EntryKind.TRAINING, model_name=model_name, limit=_RECENT)
        if training.payload.get("recipe")
        and training.window
        and training.window.end >= window.end
        and training.payload["run_id"] in registered  # what lost its test was not, and can't be compared
    }

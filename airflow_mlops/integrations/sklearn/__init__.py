"""scikit-learn: build a pipeline from column roles, fit it, draw parameters for a search, save it in skops form."""

from __future__ import annotations

from airflow_mlops.integrations.sklearn.candidates import draw
from airflow_mlops.integrations.sklearn.files import (
    code_of,
    libraries,
    save_skops,
    source_file,
    untrusted_types,
)
from airflow_mlops.integrations.sklearn.fitting import fit, in_one_thread, predict
from airflow_mlops.integrations.sklearn.pipelines import (
    ESTIMATOR_STEP,
    TEXT_FEATURES,
    FeatureSelection,
    Preprocessing,
    build_pipeline,
    final_estimator,
    gives_probabilities,
    is_classification,
    learns_target,
    stages,
)
from airflow_mlops.integrations.sklearn.tables import to_features, to_target, with_served_inputs

__all__ = [
    "ESTIMATOR_STEP",
    "TEXT_FEATURES",
    "FeatureSelection",
    "Preprocessing",
    "build_pipeline",
    "code_of",
    "draw",
    "final_estimator",
    "fit",
    "gives_probabilities",
    "in_one_thread",
    "is_classification",
    "learns_target",
    "libraries",
    "predict",
    "save_skops",
    "source_file",
    "stages",
    "to_features",
    "to_target",
    "untrusted_types",
    "with_served_inputs",
]

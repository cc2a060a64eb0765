"""What a step is: a frozen spec in, a frozen result out, the same wherever it runs."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from airflow_mlops.core.codec import from_dict, to_dict, unknown_fields
from airflow_mlops.integrations import storage
from airflow_mlops.services import Services

#: XCom is no place for data: a result holds names, numbers and URIs. Those of a table of 10,000 columns fit, and into the spec
#: of the next step as well, which is a Kubernetes secret (1 MiB at most).
MAX_RESULT_BYTES = 512 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A unit of work of the loop.

    :param name: as in ``python -m airflow_mlops.steps NAME``.
    :param spec: class of the spec (frozen dataclass).
    :param result: class of the result (frozen dataclass).
    :param run: ``run(spec, services) -> result``.
    """

    name: str
    spec: type[Any]
    result: type[Any]
    run: Callable[[Any, Services], Any]


#: Name of a step to the module that holds ``STEP``; modules are imported when a step runs, not before.
STEP_MODULES = {
    "ingest": "airflow_mlops.steps.ingest",
    "validate": "airflow_mlops.steps.validate",
    "screen": "airflow_mlops.steps.screen",
    "infer-expectations": "airflow_mlops.steps.infer_expectations",
    "train": "airflow_mlops.steps.train",
    "select": "airflow_mlops.steps.select",
    "evaluate": "airflow_mlops.steps.evaluate",
    "explain": "airflow_mlops.steps.explain",
    "register": "airflow_mlops.steps.register",
    "promote": "airflow_mlops.steps.promote",
    "roll-back": "airflow_mlops.steps.roll_back",
    "build": "airflow_mlops.steps.build",
    "deploy": "airflow_mlops.steps.deploy",
    "score": "airflow_mlops.steps.score",
    "skew": "airflow_mlops.steps.skew",
    "drift": "airflow_mlops.steps.drift",
    "performance": "airflow_mlops.steps.performance",
    "new-labels": "airflow_mlops.steps.new_labels",
    "challengers": "airflow_mlops.steps.challengers",
    "retraining": "airflow_mlops.steps.retraining",
    "incidents": "airflow_mlops.steps.incidents",
}


def load_step(name: str) -> Step:
    """Find a step by name.

    :raises ValueError: listing the known names.
    """
    if name not in STEP_MODULES:
        raise ValueError(f"no step named {name!r}; known: {', '.join(sorted(STEP_MODULES))}")
    step: Step = importlib.import_module(STEP_MODULES[name]).STEP
    return step


def run_step(name: str, spec: dict[str, Any], services: Services) -> dict[str, Any]:
    """Run a step on a JSON spec and give its JSON result.

    :raises ValueError: when the spec does not fit, or the result is larger than :data:`MAX_RESULT_BYTES`.
    """
    step = load_step(name)
    unknown = unknown_fields(step.spec, spec)
    if unknown:
        known = ", ".join(field.name for field in fields(step.spec))
        raise ValueError(f"step {name!r} knows no {', '.join(unknown)}; known: {known}")
    storage.remember(services.connections)
    result = to_dict(step.run(from_dict(step.spec, spec), services))
    size = len(json.dumps(result))
    if size > MAX_RESULT_BYTES:
        raise ValueError(f"step {name!r} returned {size} bytes; at most {MAX_RESULT_BYTES} fit into XCom")
    return result

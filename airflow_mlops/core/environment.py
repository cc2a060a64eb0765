"""What a process of ours may see of the environment it was started from."""

from __future__ import annotations

import os

#: A task's environment holds what opens doors: connections, Fernet keys, cloud credentials. A process that loads models and
#: answers requests needs none of it.
_KEPT = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "BENTOML_CONFIG",
    "BENTOML_CONFIG_OPTIONS",
    "AIRFLOW_MLOPS_TRUSTED_TYPES",
    "AIRFLOW_MLOPS_PICKLED_MODELS",
)


def bare_environment() -> dict[str, str]:
    """Give the variables that programs need to start, and no others."""
    return {name: os.environ[name] for name in _KEPT if name in os.environ}

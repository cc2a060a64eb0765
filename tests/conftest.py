"""Settings every test starts from: an Airflow home of its own, and nobody phones home."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

# Before anything imports Airflow: it reads these once.
_HOME = tempfile.mkdtemp(prefix="airflow-mlops-tests-")
os.environ.update(
    {
        "AIRFLOW_HOME": _HOME,
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__UNIT_TEST_MODE": "False",
        "AIRFLOW__API_AUTH__JWT_SECRET": "a-secret-for-tests-only-that-is-long-enough-for-sha-512-signatures-ok",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "BENTOML_DO_NOT_TRACK": "True",
        "DO_NOT_TRACK": "1",
        # Threads of several processes that wait for each other by spinning cost ten times the work on two cores.
        "OMP_NUM_THREADS": "1",
    }
)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real streams, kept beside the checkout; a test that needs them is skipped where they are not."""
    folder = Path(os.environ.get("AIRFLOW_MLOPS_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "nyc_taxi.parquet").is_file():
        pytest.skip(
            f"the real data sets are not at {folder}; set AIRFLOW_MLOPS_SHARED_DATA to where they are"
        )
    return folder

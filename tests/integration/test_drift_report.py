"""The drift report as MLflow hands it to a browser."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest

from airflow_mlops.exceptions import InsufficientDataError
from airflow_mlops.integrations.evidently import write_drift_report
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.services import Services
from airflow_mlops.steps.monitoring.drift_report import REPORT_FILE

pytestmark = pytest.mark.integration

SETTINGS = {"numeric": ["distance", "fare"], "categorical": ["zone"], "share_threshold": 0.3}


def rows(shift: float) -> pd.DataFrame:
    random = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "distance": random.normal(shift, 1.0, 500),
            "fare": random.normal(0.0, 1.0, 500),
            "zone": random.choice(["a", "b", "c"], 500),
        }
    )


def test_the_stored_page_is_whole_and_talks_to_nobody(mlflow_server: str, tmp_path: Path) -> None:
    registry = Registry.connect(Services(tracking_uri=mlflow_server))
    written = write_drift_report(
        reference=rows(0.0), current=rows(1.0), **SETTINGS, path=tmp_path / REPORT_FILE
    )
    with registry.run(registry.experiment_id("drift report"), "window", {}) as run_id:
        registry.upload(run_id, tmp_path, "")
    # What MLflow's viewer fetches, before it puts the page into a frame without an origin of its own.
    answer = httpx.get(
        f"{mlflow_server}/get-artifact", params={"path": REPORT_FILE, "run_uuid": run_id}, timeout=30
    )
    answer.raise_for_status()
    page = answer.text
    assert page == written.read_text()
    assert not re.search(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//""", page)
    # In a narrow frame the scores would be cut off: the style that prevents it names a class that is in the page.
    head, body = page.split("</head>", 1)
    assert head.endswith("<style>.MuiGrid-direction-xs-column { flex-wrap: nowrap !important }</style>")
    assert "direction-xs" in body
    assert "drawDashboard" in body
    # One of three columns drifted: the page judges by our threshold, not by Evidently's 0.5.
    assert "Dataset Drift is detected. Dataset drift detection threshold is 0.3" in page


def test_a_report_needs_rows_on_both_sides(tmp_path: Path) -> None:
    with pytest.raises(InsufficientDataError, match="needs rows in both windows"):
        write_drift_report(
            reference=rows(0.0), current=rows(0.0).head(0), **SETTINGS, path=tmp_path / REPORT_FILE
        )


def test_an_input_that_is_no_longer_sent_does_not_cost_the_page(tmp_path: Path) -> None:
    """That is when it is wanted; Evidently refuses the whole report for one empty column."""
    current = rows(3.0).assign(fare=np.nan)
    page = write_drift_report(
        reference=rows(0.0), current=current, **SETTINGS, path=tmp_path / REPORT_FILE
    ).read_text()
    assert "distance" in page
    empty = {"reference": rows(0.0).assign(fare=np.nan), "current": current}
    with pytest.raises(InsufficientDataError, match="needs a column that has values in both windows"):
        write_drift_report(
            **empty, numeric=["fare"], categorical=[], share_threshold=0.5, path=tmp_path / "none.html"
        )

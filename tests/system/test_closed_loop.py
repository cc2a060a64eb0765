"""The whole loop on a year of trips: a real Airflow, MLflow and BentoML, and nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def story(shared_data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Run the demo on the real stream, or on the simulated one where the real one is not."""
    workspace = tmp_path_factory.mktemp("demo")
    data = shared_data_folder / "nyc_taxi.parquet"
    command = [sys.executable, "-m", "airflow_mlops.cli", "demo", "--exit", "--workspace", str(workspace)]
    done = subprocess.run(
        [*command, *(["--data", str(data)] if data.is_file() else [])],
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    told = json.loads((workspace / "story.json").read_text())
    return told | {"workspace": workspace, "output": done.stdout, "simulated": not data.is_file()}


def by_window(story: dict) -> dict[str, dict]:
    return {item["window"]: item for item in story["windows"]}


def test_the_stream_is_about_a_year_around_the_change(story: dict) -> None:
    assert [item["window"] for item in story["windows"]] == [
        "2018-10", "2018-11", "2018-12", "2019-01", "2019-02", "2019-03", "2019-04", "2019-05",
    ]  # fmt: skip


def test_at_most_one_retraining_before_the_change(story: dict) -> None:
    before = [item for item in story["windows"] if item["window"] < "2019-02"]
    assert sum(item["outcome"] == "retrain" for item in before) <= 1


def test_the_first_window_that_shows_the_change_is_decided_with_its_reason(story: dict) -> None:
    changed = by_window(story)["2019-02"]
    assert changed["outcome"] == "retrain"
    assert "degraded: MAE" in changed["reason"]
    assert changed["promoted_version"] is not None


def test_the_error_comes_down_and_the_first_model_stays_bad(story: dict) -> None:
    after = [item for item in story["windows"] if item["window"] > "2019-02"]
    retrainings = sum(
        item["outcome"] == "retrain" for item in story["windows"] if item["window"] >= "2019-02"
    )
    assert 1 <= retrainings <= 2
    repaired = [item for item in after if item["model_version"] == after[-1]["model_version"]]
    assert len(repaired) >= 2
    assert all(item["live_error"] < 1.8 for item in repaired)
    assert all(item["first_error"] > 2.7 for item in after)


def test_in_the_simulated_city_one_retraining_repairs_all(story: dict) -> None:
    if not story["simulated"]:
        pytest.skip("this is the real stream, which moves more than once")
    assert [item["window"] for item in story["windows"] if item["outcome"] != "nothing"] == ["2019-02"]
    promoted = by_window(story)["2019-02"]["promoted_version"]
    assert [item["model_version"] for item in story["windows"]] == ["1"] * 5 + [promoted] * 3
    for item in story["windows"]:
        assert (item["live_error"] > 2.3) == (item["window"] == "2019-02")  # the surcharge is $2.50


def test_the_new_model_serves_from_the_window_after_its_promotion(story: dict) -> None:
    for this, following in pairwise(story["windows"]):
        assert following["model_version"] == (this["promoted_version"] or this["model_version"])


def test_the_story_is_told_and_drawn(story: dict) -> None:
    assert (story["workspace"] / "error_per_window.png").stat().st_size > 10_000
    for words in ("2019-02", "MAE first model", "drift report", "Every process of the demo is gone."):
        assert words in story["output"]


def test_nothing_is_left_behind(story: dict) -> None:
    workspace = str(story["workspace"])
    left = [
        process.info
        for process in psutil.process_iter(["pid", "cmdline"])
        if workspace in " ".join(process.info["cmdline"] or [])
    ]
    assert left == []

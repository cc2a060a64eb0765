"""Profiles of the inference log: kept beside partitions, made anew when these change, never wrong about a window's edge."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from airflow_mlops.core.model.signature import FieldSpec, ModelSignature
from airflow_mlops.core.profiles.profile import Profile, profile_frame
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import InsufficientDataError
from airflow_mlops.serving.inference_log import InferenceLog, read_inference_log
from airflow_mlops.serving.partition_profiles import profile_window, scan_window

MODEL = "fare"
START = datetime(2024, 5, 1, tzinfo=UTC)
SOURCES = {"(prediction)": "prediction"}
DAY = Window(start=START, end=START + timedelta(days=1))


def signature(*numbers: str) -> ModelSignature:
    fields = (
        *(FieldSpec(name=name, type="number") for name in numbers),
        FieldSpec(name="zone", type="string"),
    )
    return ModelSignature(inputs=fields, output="fare")


def answer(
    log: Path, hour: int, *, first: datetime, count: int = 60, numbers: tuple[str, ...] = ("x", "y")
) -> None:
    """Log a minute's requests each, and put the file where a flush in that hour would have."""
    random = np.random.default_rng(hour)
    writer = InferenceLog(log)
    writer.append(
        model_name=MODEL,
        model_version="1",
        signature=signature(*numbers),
        prediction_ids=[f"{hour}-{number}" for number in range(count)],
        times=[first + timedelta(minutes=number) for number in range(count)],
        columns={name: random.normal(size=count).tolist() for name in numbers}
        | {"zone": random.choice(["a", "b", "c"], count).tolist()},
        predictions=random.normal(10, 2, count).tolist(),
        latency_ms=1.0,
    )
    before = set(log.rglob("*.parquet"))
    writer.flush()
    (made,) = set(log.rglob("*.parquet")) - before
    folder = log / MODEL / f"hour=2024-05-01T{hour:02}"
    folder.mkdir(exist_ok=True)
    shutil.move(made, folder / made.name)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    for hour in range(4):
        answer(tmp_path, hour, first=START + timedelta(hours=hour))
    return tmp_path


@pytest.fixture
def reference() -> Profile:
    random = np.random.default_rng(99)
    rows = pl.DataFrame(
        {
            "x": random.normal(size=500),
            "y": random.normal(size=500),
            "zone": random.choice(["a", "b"], 500),
            "(prediction)": random.normal(10, 2, 500),
        }
    )
    return profile_frame(rows, numeric=["x", "y", "(prediction)"], categorical=["zone"])


def made(log: Path, reference: Profile, window: Window = DAY) -> Profile:
    return profile_window(log, MODEL, window, reference.layout, sources=SOURCES)


def from_rows(log: Path, reference: Profile, window: Window = DAY) -> Profile:
    rows = read_inference_log(log, MODEL, window).rename(
        {"feature_x": "x", "feature_y": "y", "feature_zone": "zone", "prediction": "(prediction)"}
    )
    return profile_frame(rows, numeric=["x", "y", "(prediction)"], categorical=["zone"], like=reference)


def kept(log: Path) -> list[Path]:
    return sorted(log.rglob(".profile-*"))


def test_a_window_is_the_profile_of_its_rows(log: Path, reference: Profile) -> None:
    profile = made(log, reference)
    whole = from_rows(log, reference)
    assert profile.row_count == 240
    assert profile.counts.tolist() == whole.counts.tolist()
    np.testing.assert_allclose(profile.offsets, whole.offsets, atol=1e-9)
    np.testing.assert_allclose(profile.moments, whole.moments, rtol=1e-9)
    assert profile.unseen == whole.unseen
    assert len(kept(log)) == 4


def test_rows_are_not_read_again(log: Path, reference: Profile) -> None:
    first = made(log, reference)
    for file in log.rglob("part-*.parquet"):
        file.write_bytes(b"no Parquet any more")
    assert made(log, reference).counts.tolist() == first.counts.tolist()


def test_a_window_cuts_through_partitions(log: Path, reference: Profile) -> None:
    window = Window(start=START + timedelta(minutes=30), end=START + timedelta(hours=2, minutes=10))
    profile = made(log, reference, window)
    assert profile.row_count == 30 + 60 + 10
    assert profile.counts.tolist() == from_rows(log, reference, window).counts.tolist()
    assert len(kept(log)) == 1  # of the partition that is inside
    instants = scan_window(log, MODEL, window, ["x"], sources=SOURCES).collect()
    assert instants.columns == ["x"]
    assert instants.height == 100


def test_a_partition_that_grew_is_profiled_again(log: Path, reference: Profile) -> None:
    assert made(log, reference).row_count == 240
    answer(log, 3, first=START + timedelta(hours=3), count=7)
    assert made(log, reference).row_count == 247
    assert len(kept(log)) == 4


@pytest.mark.parametrize("damage", [b"", b"AMPROF02", b"something else"])
def test_a_damaged_profile_is_made_again(log: Path, reference: Profile, damage: bytes) -> None:
    first = made(log, reference)
    for file in kept(log):
        file.write_bytes(damage)
    assert made(log, reference).counts.tolist() == first.counts.tolist()
    assert all(len(file.read_bytes()) > 1000 for file in kept(log))


def test_other_cells_have_profiles_of_their_own(log: Path, reference: Profile) -> None:
    made(log, reference)
    other = profile_frame(pl.DataFrame({"x": [0.0, 1.0]}), numeric=["x"])
    assert profile_window(log, MODEL, DAY, other.layout, sources={}).row_count == 240
    assert len(kept(log)) == 8


def test_a_profile_that_cannot_be_kept_is_no_error(log: Path, reference: Profile) -> None:
    for folder in (log / MODEL).iterdir():
        (
            folder / f".profile-{reference.layout.digest[:16]}"
        ).mkdir()  # as good as a read-only disk, also for root
    assert made(log, reference).row_count == 240
    assert not list(log.rglob("*.tmp"))


def test_a_field_one_version_did_not_have_has_no_rows_there(log: Path, reference: Profile) -> None:
    answer(log, 3, first=START + timedelta(hours=3, minutes=5), count=20, numbers=("x",))
    profile = made(log, reference)
    assert profile.row_count == 260
    assert (profile.column("y").null_count, profile.column("y").row_count) == (0, 240)
    assert (profile.column("x").null_count, profile.column("x").row_count) == (0, 260)
    assert made(log, reference).counts.tolist() == profile.counts.tolist()  # also of the kept one
    only = Window(start=START + timedelta(days=2), end=START + timedelta(days=3))
    answer(log, 9, first=only.start, count=5, numbers=("x",))
    missing = made(log, reference, only)
    assert (missing.row_count, missing.column("y").null_count, missing.column("y").row_count) == (5, 0, 0)


def test_a_field_one_version_took_as_another_kind_has_no_rows_there(log: Path, reference: Profile) -> None:
    numbers = profile_frame(pl.DataFrame({"zone": [1.0, 2.0]}), numeric=["zone"])
    profile = profile_window(log, MODEL, DAY, numbers.layout, sources={})
    assert (profile.row_count, profile.column("zone").row_count) == (240, 0)
    rows = scan_window(log, MODEL, DAY, ["zone"], sources={}, layout=numbers.layout).collect()
    assert rows["zone"].null_count() == 240
    texts = profile_frame(pl.DataFrame({"x": ["a", "b"]}), categorical=["x"])
    assert profile_window(log, MODEL, DAY, texts.layout, sources={}).column("x").row_count == 0


def test_nothing_predicted_says_where_it_looked(log: Path, reference: Profile) -> None:
    later = Window(start=START + timedelta(days=9), end=START + timedelta(days=10))
    with pytest.raises(
        InsufficientDataError, match=r"nothing was predicted by fare in \[2024-05-10.*holds 4 files"
    ):
        made(log, reference, later)
    with pytest.raises(InsufficientDataError, match="none of the 4 files"):
        scan_window(log, MODEL, later, ["x"], sources=SOURCES)

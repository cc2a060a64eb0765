"""Sensors and their trigger against real files, a real ledger and a real server."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pytest
from airflow.sdk import DAG, CronPartitionTimetable
from airflow.sdk.exceptions import TaskDeferred

from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import (
    ConnectionConfigError,
    DatasetNotFoundError,
    EndpointUnavailableError,
    RegistryUnavailableError,
    SchemaMismatchError,
    SourceUnavailableError,
    StorageError,
)
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.operators.drift import CheckDriftOperator
from airflow_mlops.sensors import polls
from airflow_mlops.sensors.drift import DriftSensor
from airflow_mlops.sensors.endpoint import EndpointReadySensor
from airflow_mlops.sensors.labels import LabelsArrivedSensor
from airflow_mlops.sensors.model_version import ModelVersionSensor
from airflow_mlops.sensors.new_data import NewDataSensor
from airflow_mlops.triggers.poll import PollTrigger, Waiting

WINDOW = Window.parse("2019-01-01", "2019-02-01")


class Server:
    """Answers what a test puts into it: path to status and body."""

    def __init__(self, port: int = 0) -> None:
        self.answers: dict[str, tuple[int, Any]] = {}
        answers = self.answers

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = answers.get(self.path.split("?")[0], (404, {}))
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def connection(self, conn_type: str) -> str:
        host, port = self.http.server_address
        return json.dumps({"conn_type": conn_type, "host": host, "port": port, "schema": "http"})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", made.connection("mlflow"))
    monkeypatch.setenv("AIRFLOW_CONN_BENTOML_DEFAULT", made.connection("bentoml"))
    yield made
    made.close()


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    monkeypatch.setenv(
        "AIRFLOW_CONN_LEDGER_DEFAULT", json.dumps({"conn_type": "mlops_ledger", "extra": {"url": url}})
    )
    with Ledger.open(url) as made:
        yield made


def waited(sensor: Any, seconds: float = 10.0) -> Any:
    """Defer, run the trigger it hands over as the triggerer would, and come back."""
    with pytest.raises(TaskDeferred) as deferred:
        sensor.execute({})
    path, kwargs = json.loads(json.dumps(deferred.value.trigger.serialize()))
    assert path.endswith("PollTrigger")

    async def first() -> Any:
        return await asyncio.wait_for(anext(PollTrigger(**kwargs).run()), seconds)

    event = asyncio.run(first())
    return getattr(sensor, deferred.value.method_name)({}, json.loads(json.dumps(event.payload)))


def test_new_data_waits_for_all_files(tmp_path: Path) -> None:
    sensor = NewDataSensor(
        task_id="wait", source=f"{tmp_path}/*.csv", min_files="2", deferrable=True, poke_interval=0.1
    )
    (tmp_path / "a.csv").write_text("1")
    assert isinstance(polls.new_data(**sensor.poll_arguments()), Waiting)
    threading.Timer(0.3, (tmp_path / "b.csv").write_text, ["2"]).start()
    assert waited(sensor)["file_count"] == 2


def test_a_file_that_is_still_written_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".b.csv").write_text("hidden: renamed when it is whole")
    (tmp_path / "a.csv").write_text("0")
    rest, waits = ["1", "2", "3"], []

    def settle(seconds: float) -> None:
        waits.append(seconds)
        if rest:
            with (tmp_path / "a.csv").open("a") as file:
                file.write(rest.pop())

    monkeypatch.setattr("time.sleep", settle)
    sensor = NewDataSensor(task_id="wait", source=f"{tmp_path}/*.csv", settle_seconds="2", deferrable=True)
    looks = [polls.new_data(**sensor.poll_arguments()) for _ in range(4)]
    assert looks[:3] == [f"waiting for {tmp_path}/*.csv: it is still being written"] * 3
    assert looks[3] == {"source": f"{tmp_path}/*.csv", "files": [str(tmp_path / "a.csv")], "file_count": 1}
    assert waits == [2.0] * 4


def test_what_is_waited_for_is_said_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(tmp_path / "table")
    tasks = [NewDataSensor(task_id=name, source=source, settle_seconds=0) for name in ("one", "other")]
    told = f"waiting for {source}: there are 0 of 1 files"

    def said(looks: int) -> int:
        for task in tasks * looks:
            assert not task.poke({}).is_done
        return capsys.readouterr().out.count(told)

    assert said(3) == 2  # each task has a log of its own
    assert said(1) == 0
    monkeypatch.setattr("airflow_mlops.triggers.poll._SAY_AGAIN_SECONDS", 0.0)
    assert said(2) == 4


def test_a_trigger_says_what_it_waits_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a.csv"
    sensor = NewDataSensor(
        task_id="wait", source=str(file), settle_seconds=0, deferrable=True, poke_interval=0.05
    )
    threading.Timer(0.4, file.write_text, ["1"]).start()
    with caplog.at_level("INFO"):
        assert waited(sensor)["file_count"] == 1
    assert caplog.text.count(f"waiting for {file}: there are 0 of 1 files") == 1


def test_a_table_counts_once_it_has_rows(tmp_path: Path) -> None:
    table = str(tmp_path / "table")

    def look(min_files: int = 1) -> Any:
        return polls.new_data(source=table, min_files=min_files, settle_seconds=0)

    (tmp_path / "table").mkdir()  # a folder is no table
    assert isinstance(look(), Waiting)
    pl.DataFrame({"x": [1]}).clear().write_delta(table)
    assert isinstance(look(), Waiting)
    pl.DataFrame({"x": [1]}).write_delta(table, mode="append")
    assert look() == {"source": table, "files": [table], "file_count": 1}
    with pytest.raises(ValueError, match="is one Delta table"):
        look(min_files=2)


def test_a_store_that_delta_does_not_know(tmp_path: Path) -> None:
    source = f"memory:///{tmp_path.name}/_SUCCESS"
    assert isinstance(polls.new_data(source=source, min_files=1), Waiting)
    with fsspec.open(source, "w") as file:
        file.write("")
    assert polls.new_data(source=source, min_files=1, settle_seconds=0) == {
        "source": source, "files": [source], "file_count": 1,
    }  # fmt: skip


def test_a_file_of_a_web_server(server: Server) -> None:
    address = "http://{}:{}".format(*server.http.server_address)
    url = f"{address}/a.csv?signature=secret"
    sensor = NewDataSensor(task_id="wait", source=url, settle_seconds=0, deferrable=True, poke_interval=0.1)
    server.answers["/a.csv"] = (404, {})
    assert isinstance(polls.new_data(**sensor.poll_arguments()), Waiting)
    threading.Timer(0.3, server.answers.__setitem__, ["/a.csv", (200, {})]).start()
    plain = f"{address}/a.csv"
    assert waited(sensor) == {"source": plain, "files": [plain], "file_count": 1}

    for status, error, remedy in (
        (401, ConnectionConfigError, "needs no login"),
        (403, ConnectionConfigError, "s3://conn_id@bucket/key"),
        (410, DatasetNotFoundError, r"gone for good \(410\)"),
        (418, ValueError, "answers 418, no file"),
        (503, SourceUnavailableError, "the server answers 503"),
    ):
        server.answers["/a.csv"] = (status, {})
        with pytest.raises(error, match=remedy) as refused:
            polls.new_data(**sensor.poll_arguments())
        assert "secret" not in str(refused.value)
    with pytest.raises(SourceUnavailableError, match=r"does not answer: .*Check the address"):
        polls.new_data(source="http://127.0.0.1:1/a.csv", min_files=1)
    with pytest.raises(ValueError, match="is one file"):
        polls.new_data(source=url, min_files=2)
    with pytest.raises(ValueError, match=r"out/\*\.csv is a pattern"):
        polls.new_data(source=f"{address}/out/*.csv?signature=secret", min_files=1)


def test_a_worker_may_wait_as_well(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1")
    sensor = NewDataSensor(task_id="wait", source=f"{tmp_path}/*.csv", deferrable=False, poke_interval=0.1)
    assert sensor.execute({"ti": None})["file_count"] == 1


def test_an_alias_that_moves(server: Server) -> None:
    path = "/api/2.0/mlflow/registered-models/alias"
    sensor = ModelVersionSensor(
        task_id="wait", model_name="m", not_version="1", deferrable=True, poke_interval=0.1
    )
    arguments = sensor.poll_arguments()
    server.answers[path] = (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such model"})
    assert polls.model_version(**arguments) is None
    server.answers[path] = (400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "alias not found"})
    assert polls.model_version(**arguments) is None
    server.answers[path] = (200, {"model_version": {"version": "1"}})
    assert polls.model_version(**arguments) is None  # the one already known
    server.answers[path] = (503, {})  # a server that fails is waited for
    threading.Timer(
        0.4, server.answers.__setitem__, [path, (200, {"model_version": {"version": "2"}})]
    ).start()
    assert waited(sensor)["model_version"] == "2"


def test_a_refused_login_ends_the_wait(server: Server) -> None:
    server.answers["/api/2.0/mlflow/registered-models/alias"] = (401, {})
    sensor = ModelVersionSensor(task_id="wait", model_name="m", deferrable=True, poke_interval=0.1)
    with pytest.raises(ConnectionConfigError, match=r"MLflow refuses connection 'mlflow_default' \(401\)"):
        waited(sensor)


def locked(**arguments: Any) -> None:
    raise StorageError("no space in /data")


def garbled(**arguments: Any) -> None:
    json.loads("{")


@pytest.mark.parametrize(("poll", "error"), [(locked, StorageError), (garbled, ValueError)])
def test_an_error_is_the_same_wherever_the_wait_was(
    monkeypatch: pytest.MonkeyPatch, poll: Any, error: type[Exception]
) -> None:
    from airflow_mlops.policies import MLOPS_RETRY_POLICY

    actions = []
    for deferrable in (True, False):
        sensor = NewDataSensor(task_id="wait", source="*", deferrable=deferrable, poke_interval=0.1)
        monkeypatch.setattr(NewDataSensor, "poll", f"{__name__}:{poll.__name__}")
        with pytest.raises(error) as raised:
            waited(sensor) if deferrable else sensor.execute({"ti": None})
        actions.append(_action(MLOPS_RETRY_POLICY, raised.value))
    assert actions[0] == actions[1] == ("RETRY" if poll is locked else "FAIL")


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (404, {}, ConnectionConfigError),  # something else answers there, or the path is wrong
        (405, {}, ConnectionConfigError),
        (301, {}, ConnectionConfigError),
        (200, "<html>", ConnectionConfigError),
        (200, {"model_version": {}}, ConnectionConfigError),
        (400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "Invalid alias name"}, ValueError),
        (429, {}, RegistryUnavailableError),
        (503, {}, RegistryUnavailableError),
    ],
)
def test_an_answer_that_is_not_mlflows_is_no_not_yet(
    server: Server, status: int, body: Any, error: type[Exception]
) -> None:
    server.answers["/api/2.0/mlflow/registered-models/alias"] = (status, body)
    with pytest.raises(error) as raised:
        polls.model_version(
            model_name="m", alias="champion", not_version=None, mlflow_conn_id="mlflow_default"
        )
    assert type(raised.value) is error
    if error is ConnectionConfigError:
        assert f"answered {status}" in str(raised.value)
        assert "'mlflow_default'" in str(raised.value)


def test_an_endpoint_with_the_right_version(server: Server) -> None:
    status = {"ready": True, "model_name": "m", "model_version": "1"}
    server.answers["/status"] = (200, status)
    sensor = EndpointReadySensor(
        task_id="wait", model_name="m", model_version="2", deferrable=True, poke_interval=0.1
    )
    assert polls.endpoint_ready(**sensor.poll_arguments()) is None
    registered = {"model_name": "m", "model_version": "2"}  # what a register task returns
    whole = EndpointReadySensor(task_id="whole", model_name="m", model_version=registered)
    assert whole.poll_arguments() == sensor.poll_arguments()
    threading.Timer(
        0.3, server.answers.__setitem__, ["/status", (200, status | {"model_version": "2"})]
    ).start()
    assert waited(sensor)["model_version"] == "2"


def test_a_service_that_is_not_up_yet_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = Server()
    monkeypatch.setenv("AIRFLOW_CONN_BENTOML_DEFAULT", made.connection("bentoml"))
    host, port = made.http.server_address
    made.close()
    sensor = EndpointReadySensor(task_id="wait", model_name="m", deferrable=True, poke_interval=0.1)
    with pytest.raises(EndpointUnavailableError, match=f"{host}:{port}"):
        polls.endpoint_ready(**sensor.poll_arguments())
    later: list[Server] = []

    def start() -> None:
        later.append(Server(port))
        later[0].answers["/status"] = (200, {"ready": True, "model_name": "m", "model_version": "1"})

    threading.Timer(0.5, start).start()
    assert waited(sensor)["model_version"] == "1"
    later[0].close()
    assert caplog.text.count("waiting on:") == 1  # said once, not at every look


def test_a_check_that_found_something(ledger: Ledger) -> None:
    sensor = DriftSensor(
        task_id="wait", model_name="m", window_start="2019-01-01", window_end="2019-02-01", check="performance_check",
        only_if_found=True, deferrable=True, poke_interval=0.1,
    )  # fmt: skip

    def record(suffix: str = "", **payload: bool) -> None:
        ledger.record(
            LedgerEntry(
                kind=EntryKind.PERFORMANCE_CHECK, key=f"m|{WINDOW.key}{suffix}", model_name="m", window=WINDOW, subject=None,
                summary="graded", payload=payload, actor="a", recorded_at=datetime(2019, 2, 1, tzinfo=UTC),
            )
        )  # fmt: skip

    def looked() -> dict[str, Any] | None:
        return polls.check_recorded(**sensor.poll_arguments())

    assert looked() is None
    record("|version 1|0 labelled", measured=False, degraded=False, awaits_labels=True, final=False)
    assert looked() is None
    record(measured=True, degraded=False, final=False)
    assert looked() is None
    record("|800 labelled", measured=True, degraded=True, final=False)  # more labels, another verdict
    assert waited(sensor)["found"] is True
    record("|1000 labelled", measured=True, degraded=False, final=True)
    assert looked() is None


def test_without_labels_the_estimate_is_what_was_found(ledger: Ledger) -> None:
    estimate = {
        "measured": False, "degraded": False, "awaits_labels": False, "final": True, "estimate_degraded": True,
    }  # fmt: skip
    ledger.record(
        LedgerEntry(
            kind=EntryKind.PERFORMANCE_CHECK, key=f"m|{WINDOW.key}|version 1|0 labelled|final", model_name="m", window=WINDOW,
            subject=None, summary="estimated", payload=estimate, actor="a", recorded_at=datetime(2019, 2, 1, tzinfo=UTC),
        )
    )  # fmt: skip
    sensor = DriftSensor(
        task_id="wait", model_name="m", window_start="2019-01-01", window_end="2019-02-01", check="performance_check",
        only_if_found=True, deferrable=True, poke_interval=0.1,
    )  # fmt: skip
    assert waited(sensor)["found"] is True


def test_labels_nobody_has_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import polars as pl

    from airflow_mlops.integrations import delta
    from airflow_mlops.serving.inference_log import InferenceLog
    from tests.packages import SIGNATURE

    connection = {
        "conn_type": "bentoml",
        "host": "127.0.0.1",
        "port": 1,
        "extra": {"serving_dir": str(tmp_path)},
    }
    monkeypatch.setenv("AIRFLOW_CONN_BENTOML_DEFAULT", json.dumps(connection))
    url = f"sqlite:///{tmp_path}/ledger.db"
    monkeypatch.setenv(
        "AIRFLOW_CONN_LEDGER_DEFAULT", json.dumps({"conn_type": "mlops_ledger", "extra": {"url": url}})
    )
    table = str(tmp_path / "labels")
    sensor = LabelsArrivedSensor(
        task_id="wait", model_name="m", labels=table, id_column="id", target="y", window_start="2019-01-01",
        window_end="2019-02-01", minimum_labelled_share="0.5", deferrable=True, poke_interval=0.1,
    )  # fmt: skip
    assert polls.labels_arrived(**sensor.poll_arguments()) is None  # nothing predicted
    log = InferenceLog(tmp_path / "inference_log")
    log.append(
        model_name="m", model_version="1", signature=SIGNATURE, prediction_ids=["a", "b"],
        times=[datetime(2019, 1, 5, tzinfo=UTC)] * 2, columns={"x": [1.0, 2.0], "kind": ["a", "b"]},
        predictions=[1.0, 2.0], latency_ms=1.0,
    )  # fmt: skip
    log.flush()
    with caplog.at_level(logging.INFO):
        assert polls.labels_arrived(**sensor.poll_arguments()) is None  # no labels
    assert f"no Delta table at {table}" in caplog.text  # so that a mistyped path is seen
    delta.replace_window(table, pl.DataFrame({"id": ["a"], "y": [1.0]}), time_column=None, window=None)
    assert waited(sensor)["labelled_share"] == 0.5
    with Ledger.open(url) as ledger:  # version 2 was champion; of its answers none has a label
        promotion = LedgerEntry(
            kind=EntryKind.PROMOTION, key="p", model_name="m", window=None, subject="2", summary="",
            payload={"alias": "champion", "model_version": "2"}, actor="test", recorded_at=datetime(2019, 1, 1, tzinfo=UTC),
        )  # fmt: skip
        ledger.move_alias(
            model_name="m", alias="champion", model_version="2", expected_version=None, entry=promotion
        )
    assert polls.labels_arrived(**sensor.poll_arguments())["labelled_share"] == 0.5  # it gave no answer yet
    log.append(
        model_name="m", model_version="2", signature=SIGNATURE, prediction_ids=["c"],
        times=[datetime(2019, 1, 6, tzinfo=UTC)], columns={"x": [1.0], "kind": ["a"]}, predictions=[1.0], latency_ms=1.0,
    )  # fmt: skip
    log.flush()
    assert polls.labels_arrived(**sensor.poll_arguments()) is None
    delta.replace_window(
        table, pl.DataFrame({"id": ["a", "c"], "y": [1.0, 1.0]}), time_column=None, window=None
    )
    assert polls.labels_arrived(**sensor.poll_arguments())["labelled_share"] == 1.0
    for wrong in ({"target": "yy"}, {"id_column": "idd"}):
        with pytest.raises(SchemaMismatchError, match="has no column"):
            polls.labels_arrived(**sensor.poll_arguments() | wrong)


class TestWindowOfTheRun:
    """Rendered by Airflow's own templates, in a run of a partition, in one with a data interval, and in one with neither."""

    SENSORS = (
        DriftSensor(task_id="drift", model_name="m"),
        LabelsArrivedSensor(task_id="labels", model_name="m", labels="t", id_column="id", target="y"),
    )

    @staticmethod
    def window(sensor: Any, **context: Any) -> str:
        """What the triggerer would ask about."""
        task = copy.copy(sensor)
        task.deferrable = True
        task.render_template_fields(context)
        with pytest.raises(TaskDeferred) as deferred:
            task.execute(context)
        arguments = deferred.value.trigger.arguments
        return Window.parse(arguments["window_start"], arguments["window_end"]).key

    @pytest.mark.parametrize("sensor", SENSORS, ids=lambda sensor: sensor.task_id)
    def test_it_is_what_a_check_of_the_same_run_has(self, sensor: Any) -> None:
        may = "2018-05-01T00:00:00Z/2018-06-01T00:00:00Z"
        dag = DAG("monthly", schedule=CronPartitionTimetable("0 0 1 * *", timezone="UTC", key_format="%Y-%m"))
        assert self.window(sensor, partition_key="2018-05", dag=dag) == may
        assert self.window(sensor, partition_key="2018-05") == may
        interval = {"data_interval_start": WINDOW.start, "data_interval_end": WINDOW.end}
        assert self.window(sensor, **interval) == WINDOW.key
        check = CheckDriftOperator(task_id="check", model_name="m")
        run = {"partition_key": "2018-05", "dag": dag}
        check.render_template_fields(run)
        spec = check.build_spec(run)["window"]
        assert Window.parse(spec["start"], spec["end"]).key == may

    @pytest.mark.parametrize("sensor", SENSORS, ids=lambda sensor: sensor.task_id)
    def test_a_run_with_neither_is_told_what_to_give(self, sensor: Any) -> None:
        with pytest.raises(
            ValueError, match="neither a data interval nor a partition key: give window_start"
        ):
            self.window(sensor)
        with pytest.raises(ValueError, match="is no time such as"):
            self.window(sensor, partition_key="eu")

    def test_a_worker_asks_about_the_partition_too(self, ledger: Ledger) -> None:
        ledger.record(
            LedgerEntry(
                kind=EntryKind.DRIFT_CHECK, key=f"m|{WINDOW.key}", model_name="m", window=WINDOW, subject=None,
                summary="checked", payload={}, actor="a", recorded_at=datetime(2019, 2, 1, tzinfo=UTC),
            )
        )  # fmt: skip
        sensor, context = copy.copy(self.SENSORS[0]), {"partition_key": "2019-01"}
        sensor.render_template_fields(context)
        assert sensor.execute(context)["window"] == WINDOW.key


class TestConnections:
    def test_one_that_is_not_there_is_named_with_the_remedy(self) -> None:
        from airflow_mlops.hooks.mlflow import MLflowHook

        with pytest.raises(
            ConnectionConfigError,
            match=r"'nowhere' is not defined.*airflow connections add nowhere --conn-type mlflow",
        ):
            MLflowHook(mlflow_conn_id="nowhere").services()

    def test_all_that_is_missing_is_said_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from airflow_mlops.hooks.bentoml import BentoMLHook

        monkeypatch.setenv(
            "AIRFLOW_CONN_BENTOML_DEFAULT", json.dumps({"conn_type": "bentoml", "schema": "ftp"})
        )
        with pytest.raises(ConnectionConfigError, match=r"Host is empty; Port is empty; Schema is 'ftp'"):
            BentoMLHook().services()

    @pytest.mark.parametrize(
        ("extra", "words"),
        [
            ("{bad", "Extra is not a JSON object"),
            ("[1]", "Extra is not a JSON object"),
            ('"x"', "Extra is not a JSON object"),
            ('{"tracking_uri": 5000}', "Extra field tracking_uri must be a text in quotes"),
            ('{"tracking_uri": "http://mlflow:port"}', "'http://mlflow:port' is no address such as"),
            ('{"tracking_uri": "mlflow:5000"}', "'mlflow:5000' is no address such as"),
            (
                '{"tracking_uri": "http://me:secret@mlflow:port"}',
                r"'http://\*\*\*@mlflow:port' is no address",
            ),
        ],
    )
    def test_an_extra_that_is_wrong(self, monkeypatch: pytest.MonkeyPatch, extra: str, words: str) -> None:
        from airflow_mlops.hooks.mlflow import MLflowHook

        fields = {"conn_type": "mlflow", "host": "mlflow", "port": 5000, "extra": extra}
        monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", json.dumps(fields))
        with pytest.raises(ConnectionConfigError, match=f"connection 'mlflow_default'.*{words}"):
            MLflowHook().services()
        assert MLflowHook().test_connection()[0] is False

    @pytest.mark.parametrize("hook", ["mlflow.MLflowHook", "bentoml.BentoMLHook", "ledger.LedgerHook"])
    @pytest.mark.parametrize("value", ["{not json", "mlflow://host:port"])
    def test_a_variable_that_airflow_cannot_read_is_not_called_missing(
        self, monkeypatch: pytest.MonkeyPatch, hook: str, value: str
    ) -> None:
        from airflow_mlops.core.extension import load_object

        made = load_object(f"airflow_mlops.hooks.{hook.replace('.', ':')}")()
        variable = f"AIRFLOW_CONN_{made.default_conn_name.upper()}"
        monkeypatch.setenv(variable, value)
        with pytest.raises(
            ConnectionConfigError, match=f"{variable} is set, but holds neither a JSON object"
        ):
            made.services()

    @pytest.mark.parametrize("host", ["http://localhost", "local host", "[::1"])
    def test_a_host_that_is_none(self, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
        from airflow_mlops.hooks.bentoml import BentoMLHook

        fields = {"conn_type": "bentoml", "host": host, "port": 3000}
        monkeypatch.setenv("AIRFLOW_CONN_BENTOML_DEFAULT", json.dumps(fields))
        with pytest.raises(
            ConnectionConfigError, match=r"connection 'bentoml_default': .* is no address such as"
        ):
            BentoMLHook().services()

    def test_a_ledger_url_that_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from airflow_mlops.hooks.ledger import LedgerHook

        fields = {"conn_type": "mlops_ledger", "extra": {"url": "ledger.db"}}
        monkeypatch.setenv("AIRFLOW_CONN_LEDGER_DEFAULT", json.dumps(fields))
        with pytest.raises(ConnectionConfigError):
            LedgerHook().get_conn()

    def test_the_default_ledger_needs_no_connection(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        from airflow_mlops.hooks.ledger import LedgerHook

        monkeypatch.delenv("AIRFLOW_CONN_LEDGER_DEFAULT", raising=False)
        monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
        assert LedgerHook().services().ledger_url == f"sqlite:///{tmp_path}/airflow_mlops_ledger.db"
        assert LedgerHook().test_connection() == (True, "the ledger is empty")
        with pytest.raises(ConnectionConfigError, match="'elsewhere' is not defined"):
            LedgerHook(ledger_conn_id="elsewhere").services()

    def test_passwords_with_odd_signs_survive(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from airflow_mlops.hooks.ledger import LedgerHook

        fields = {
            "conn_type": "mlops_ledger",
            "host": "db",
            "schema": "mlops",
            "login": "me",
            "password": "p@ss/word",
            "port": 5432,
        }
        monkeypatch.setenv("AIRFLOW_CONN_LEDGER_DEFAULT", json.dumps(fields))
        assert LedgerHook().services().ledger_url == "postgresql+psycopg2://me:p%40ss%2Fword@db:5432/mlops"


@pytest.mark.parametrize(
    ("error", "action"),
    [
        ("RegistryUnavailableError", "RETRY"),
        ("StorageError", "RETRY"),
        ("ConnectionConfigError", "FAIL"),
        ("SchemaMismatchError", "FAIL"),
        ("RolloutError", "FAIL"),
        ("RolloutInterruptedError", "RETRY"),
        ("VersionRefusedError", "FAIL"),
    ],
)
def test_the_retry_policy_knows_verdicts_from_accidents(error: str, action: str) -> None:
    from airflow_mlops import exceptions
    from airflow_mlops.policies import MLOPS_RETRY_POLICY

    assert _action(MLOPS_RETRY_POLICY, getattr(exceptions, error)("x")) == action


def test_a_gate_that_said_no_is_not_retried() -> None:
    from airflow_mlops.exceptions import DataQualityError
    from airflow_mlops.policies import MLOPS_RETRY_POLICY

    assert _action(MLOPS_RETRY_POLICY, DataQualityError("no", evidence={})) == "FAIL"


def _action(policy: Any, error: Exception) -> str:
    return policy.evaluate(error, try_number=1, max_tries=3).action.name

"""Requests for explanations, to the service's application: of real packages of both kinds and forms."""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from airflow_mlops.core.model.background import BACKGROUND_FILE, Background
from airflow_mlops.core.model.package import PackageManifest, file_digest
from airflow_mlops.core.rollouts.desired_state import DesiredState, ServedVersion, serve_alone
from airflow_mlops.exceptions import ArtifactIntegrityError
from airflow_mlops.serving import arrow
from airflow_mlops.serving.app import EndpointApp
from airflow_mlops.serving.model import load_model
from airflow_mlops.serving.package import write_manifest
from airflow_mlops.serving.reconciler import LiveVersion, Routes
from airflow_mlops.serving.settings import ServiceSettings
from airflow_mlops.steps.training.spec import TrainSpec
from tests.packages import ROWS, build_package

TOKEN = {"authorization": "Bearer right"}
PATH = "/predict/explain"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("packages")
    build_package(root / "numbers", background_rows=40)
    build_package(root / "skops", background_rows=40, form="sklearn")
    build_package(root / "labels", background_rows=40, labels=True)
    build_package(root / "wide", background_rows=40, idle=12)
    build_package(root / "plain")
    return {path.name: path for path in root.iterdir()}


class Service:
    """The application with versions of packages, and what it would log."""

    def __init__(self, folder: Path, packages: list[Path], **settings: Any) -> None:
        self.app = EndpointApp(ServiceSettings(serving_dir=folder, tokens=("right",), **settings))
        versions = {
            str(number): LiveVersion(
                model_version=str(number), package_digest=f"sha256:{number}", model=load_model(package)
            )
            for number, package in enumerate(packages, start=1)
        }
        state = serve_alone(None, model_name="m", model_version="1", package_digest="sha256:1")
        self.app.reconciler.routes = Routes(state, versions)
        self.versions = versions

    def serve(self, version: LiveVersion) -> None:
        """Let another model be the first version."""
        self.versions["1"] = version
        self.app.reconciler.routes = Routes(self.app.reconciler.routes.state, self.versions)

    def share(self, second: float) -> None:
        """Let the second version answer so many of the requests."""
        versions = (
            ServedVersion(model_version="1", package_digest="sha256:1", share=1.0 - second),
            ServedVersion(model_version="2", package_digest="sha256:2", share=second),
        )
        state = DesiredState(model_name="m", revision=2, versions=versions, leased=True, previous_version="1")
        self.app.reconciler.routes = Routes(state, self.versions)

    async def answer(
        self, body: Any, *, path: str = PATH, query: str = "", method: str = "POST", **headers: str
    ) -> tuple[int, bytes, dict[bytes, bytes]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent: list[dict] = []

        async def receive() -> dict:
            return {"type": "http.request", "body": data, "more_body": False}

        async def send(message: dict) -> None:
            sent.append(message)

        given = {**TOKEN, **{name.replace("_", "-"): value for name, value in headers.items()}}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        }
        await self.app(scope, receive, send)
        return sent[0]["status"], sent[1]["body"], dict(sent[0]["headers"])

    def ask(self, body: Any, **more: Any) -> tuple[int, dict]:
        status, data, _ = asyncio.run(self.answer(body, **more))
        return status, json.loads(data)


@pytest.fixture
def service(packages: dict[str, Path], tmp_path: Path) -> Service:
    return Service(tmp_path, [packages["numbers"]])


def wide(**more: Any) -> dict[str, Any]:
    """A row with many inputs."""
    return {"x": 1.0, "kind": "a", **{f"idle_{number}": 0.5 for number in range(12)}, **more}


def of_table(answer: bytes) -> pl.DataFrame:
    return pl.read_ipc_stream(io.BytesIO(answer), use_pyarrow=False)


def table_of(rows: list[dict], **more: list) -> bytes:
    stream = io.BytesIO()
    pl.DataFrame(rows).with_columns(
        pl.Series(name, values) for name, values in more.items()
    ).write_ipc_stream(stream, compat_level=pl.CompatLevel.oldest())
    return stream.getvalue()


class TestAnswers:
    @pytest.mark.parametrize("name", ["numbers", "skops"])
    def test_contributions_lead_from_the_base_value_to_the_prediction(
        self, packages: dict[str, Path], tmp_path: Path, name: str
    ) -> None:
        service = Service(tmp_path, [packages[name]])
        status, answer = service.ask({"rows": ROWS, "prediction_ids": ["p", 2, "r"]})
        assert status == 200
        assert [answer[key] for key in ("model_name", "model_version", "explained")] == [
            "m",
            "1",
            "prediction",
        ]
        assert answer["prediction_ids"] == ["p", "2", "r"]
        told = service.ask({"rows": ROWS}, path="/predict")[1]["predictions"]
        for row, predicted in zip(answer["explanations"], told, strict=True):
            assert row["score"] == row["prediction"] == predicted
            assert row["base_value"] + sum(row["contributions"].values()) == pytest.approx(row["score"])
            assert (row["label"], row["standard_error"]) == (None, 0.0)
        # y is 2 x, and x was from 0 to 10: 1 is far below the usual, and kind says nothing.
        first = answer["explanations"][0]["contributions"]
        assert first["x"] == pytest.approx(2.0 - 10.0, abs=2.5)
        assert first["kind"] == pytest.approx(0.0, abs=0.2)

    def test_in_each_row_the_label_that_is_answered(self, packages: dict[str, Path], tmp_path: Path) -> None:
        service = Service(tmp_path, [packages["labels"]])
        rows = [{"x": 9.0, "kind": "a"}, {"x": 1.0, "kind": "b"}, {"x": 8.0, "kind": "b"}]
        status, answer = service.ask({"rows": rows})
        assert (status, answer["explained"], answer["prediction_ids"]) == (200, "probability", None)
        found = answer["explanations"]
        assert (
            [row["label"] for row in found] == [row["prediction"] for row in found] == ["high", "low", "high"]
        )
        assert all(row["score"] > 0.9 and row["contributions"]["x"] > 0.3 for row in found)
        # The two labels share what there is: the same contributions, the other way round.
        low = service.ask({"rows": rows}, query="label=low")[1]["explanations"]
        assert [row["label"] for row in low] == ["low"] * 3
        assert [row["prediction"] for row in low] == ["high", "low", "high"]
        assert low[0]["contributions"]["x"] == pytest.approx(-found[0]["contributions"]["x"], abs=1e-5)
        assert low[1] == found[1]

    def test_without_probabilities_it_is_whether_the_label_is_answered(
        self, packages: dict[str, Path], tmp_path: Path
    ) -> None:
        service = Service(tmp_path, [packages["labels"]])
        live = service.versions["1"]
        service.serve(replace(live, model=replace(live.model, probabilities=None)))
        answer = service.ask({"row": {"x": 9.0, "kind": "a"}})[1]
        assert answer["explained"] == "share"
        (row,) = answer["explanations"]
        assert row["score"] == 1.0
        assert 0.2 < row["base_value"] < 0.8

    def test_forms_of_a_request_are_those_of_predictions(self, service: Service) -> None:
        records = service.ask({"rows": ROWS})[1]["explanations"]
        columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
        assert service.ask({"columns": columns})[1]["explanations"] == records
        assert service.ask({"row": ROWS[1]})[1]["explanations"] == records[1:2]
        status, data, headers = asyncio.run(
            service.answer(
                table_of(ROWS, prediction_id=["p", "q", "r"]), content_type=arrow.CONTENT_TYPE.decode()
            )
        )
        assert (status, headers[b"x-model-name"], headers[b"x-model-version"]) == (200, b"m", b"1")
        table = of_table(data)
        assert table["prediction_id"].to_list() == ["p", "q", "r"]
        assert table["contribution_x"].to_list() == [row["contributions"]["x"] for row in records]
        assert table["score"].to_list() == [row["score"] for row in records]
        assert table["label"].to_list() == [None] * 3
        accepted = asyncio.run(service.answer({"rows": ROWS}, accept=arrow.CONTENT_TYPE.decode()))[1]
        assert of_table(accepted).equals(table.drop("prediction_id"))

    def test_many_inputs_are_drawn_and_say_how_near_they_are(
        self, packages: dict[str, Path], tmp_path: Path
    ) -> None:
        def together(columns: Any) -> Any:
            return np.prod([columns["x"], columns["idle_0"], columns["idle_1"]], axis=0)

        found = []
        for evaluations in (50_000, 2_500):
            service = Service(tmp_path, [packages["wide"]], explain_evaluations=evaluations)
            live = service.versions["1"]
            service.serve(replace(live, model=replace(live.model, predictor=together)))
            found += service.ask({"row": wide(x=9.0)})[1]["explanations"]
        near, far = found
        assert 0.0 < near["standard_error"] < far["standard_error"] < 0.2
        assert near["contributions"]["x"] == pytest.approx(
            far["contributions"]["x"], abs=4 * far["standard_error"]
        )
        assert near["base_value"] + sum(near["contributions"].values()) == pytest.approx(near["score"])


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "query", "status", "words"),
        [
            ({"rows": [{"x": 1.0}]}, "", 422, "rows[0].kind: field is missing"),
            ({"rows": [{"x": "far", "kind": "a"}]}, "", 422, "rows[0].x: expected number, got 'far'"),
            (b"{", "", 422, "not JSON"),
            ({"rows": [ROWS[0]] * 11}, "", 413, "11 rows; at most 10 in one request"),
            ({"rows": ROWS}, "label=high", 422, "label: 'high' is none; the model answers with numbers"),
            ({"rows": ROWS}, "label=a&label=b", 422, "several are given"),
            ({"rows": ROWS}, "label=%ff", 422, "the query can't be read"),
        ],
    )
    def test_what_does_not_fit_is_named(
        self, service: Service, body: Any, query: str, status: int, words: str
    ) -> None:
        answered, answer = service.ask(body, query=query)
        assert (answered, words in answer["error"]) == (status, True), answer

    def test_an_unknown_label_is_told_the_known_ones(self, packages: dict[str, Path], tmp_path: Path) -> None:
        service = Service(tmp_path, [packages["labels"]])
        for label in ("none", "", "h%C3%B6her"):
            status, answer = service.ask({"rows": ROWS}, query=f"label={label}")
            assert (status, "labels are high, low" in answer["error"]) == (422, True)

    def test_a_token_is_asked_for(self, service: Service) -> None:
        assert service.ask({"rows": ROWS}, authorization="Bearer wrong")[0] == 401

    def test_a_package_without_background_rows_says_what_to_set(
        self, packages: dict[str, Path], tmp_path: Path
    ) -> None:
        service = Service(tmp_path, [packages["plain"]])
        status, answer = service.ask({"rows": ROWS})
        assert status == 409
        assert "version 1 of m can't be explained" in answer["error"]
        assert "TrainModelOperator(background_rows=50)" in answer["error"]
        assert service.ask({"rows": ROWS}, path="/predict")[0] == 200

    def test_without_a_version_it_says_so(self, tmp_path: Path, service: Service) -> None:
        service.app.reconciler.routes = None
        assert service.ask({"rows": ROWS}) == (503, {"error": "no model version is live yet"})

    def test_what_takes_too_long_is_given_up(self, packages: dict[str, Path], tmp_path: Path) -> None:
        slow = {"explain_evaluations": 5_000_000, "explain_seconds": 0.05}
        service = Service(tmp_path, [packages["wide"]], **slow)
        status, answer = service.ask({"row": wide()})
        assert (status, "takes longer than 0.05 seconds" in answer["error"]) == (413, True), answer

    def test_a_model_that_fails_is_named(self, service: Service, caplog: pytest.LogCaptureFixture) -> None:
        def fails(columns: Any) -> Any:
            raise RuntimeError("of the model")

        live = service.versions["1"]
        service.serve(replace(live, model=replace(live.model, predictor=fails)))
        status, answer = service.ask({"rows": ROWS})
        assert (status, answer["error"]) == (
            500,
            "version 1 failed on these rows; the service's log says why",
        )
        assert "of the model" in caplog.text
        endless = replace(live.model, predictor=lambda columns: np.full(len(columns["x"]), np.inf))
        service.serve(replace(live, model=endless))
        status, answer = service.ask({"rows": ROWS})
        assert (status, "no finite number" in answer["error"]) == (422, True)


class TestBesidePredictions:
    def test_it_is_the_version_that_would_answer(self, packages: dict[str, Path], tmp_path: Path) -> None:
        service = Service(tmp_path, [packages["numbers"], packages["skops"]])
        for second, version in ((1.0, "2"), (0.0, "1")):
            service.share(second)
            assert service.ask({"rows": ROWS})[1]["model_version"] == version

    def test_what_a_new_versions_inputs_refuse_the_version_before_explains(
        self, packages: dict[str, Path], tmp_path: Path
    ) -> None:
        service = Service(tmp_path, [packages["numbers"], packages["wide"]])
        service.share(1.0)
        for path in (PATH, "/predict"):
            assert service.ask({"rows": ROWS}, path=path)[1]["model_version"] == "1"

    def test_it_is_no_prediction(self, packages: dict[str, Path], tmp_path: Path) -> None:
        service = Service(tmp_path, [packages["numbers"], packages["skops"]])
        service.share(0.5)
        service.app.observer.begin(service.app.reconciler.routes)
        for _ in range(20):
            assert service.ask({"rows": ROWS})[0] == 200
        assert service.app.log.queued_rows == 0
        service.app.observer.flush()
        seen = service.app.observer.read()
        assert [seen.of(version).requests for version in ("1", "2")] == [0, 0]
        # A prediction is, or else the test would see nothing either way.
        service.ask({"rows": ROWS}, path="/predict")
        service.app.observer.flush()
        seen = service.app.observer.read()
        assert sum(seen.of(version).requests for version in ("1", "2")) == 1
        assert service.app.log.queued_rows == len(ROWS)

    def test_one_at_a_time_while_predictions_go_on(self, packages: dict[str, Path], tmp_path: Path) -> None:
        service = Service(tmp_path, [packages["wide"]], explain_evaluations=300_000)

        async def scenario() -> tuple[tuple[int, bytes, dict], tuple[int, bytes, dict], list[int]]:
            first = asyncio.create_task(service.answer({"row": wide()}))
            await asyncio.sleep(0)  # it begins
            second = await service.answer({"row": wide()})
            predicted = []
            while not first.done():
                predicted.append((await service.answer({"row": wide()}, path="/predict"))[0])
                await asyncio.sleep(0)
            return await first, second, predicted

        first, second, predicted = asyncio.run(scenario())
        assert first[0] == 200
        assert (second[0], second[2][b"retry-after"]) == (429, b"1")
        assert b"1 explanations are at hand" in second[1]
        assert len(predicted) > 20
        assert {*predicted} == {200}
        assert service.ask({"row": wide()})[0] == 200

    @pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
    def test_it_takes_the_processor_time_that_predictions_leave(self, service: Service) -> None:
        live, seen = service.versions["1"], []

        def noting(columns: Any) -> Any:
            seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            return live.model.predictor(columns)

        service.serve(replace(live, model=replace(live.model, predictor=noting)))
        for path in (PATH, "/predict"):
            assert service.ask({"rows": ROWS}, path=path)[0] == 200
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert {*seen[:-1]} == {min(own + 10, 19)}
        assert seen[-1] == own


class TestOpenApi:
    def test_it_tells_of_explanations_only_where_there_are_some(
        self, packages: dict[str, Path], tmp_path: Path
    ) -> None:
        plain, labels = Service(tmp_path, [packages["plain"]]), Service(tmp_path, [packages["labels"]])
        ask = {"path": "/openapi.json", "method": "GET"}
        assert PATH not in plain.ask({}, **ask)[1]["paths"]
        operation = labels.ask({}, **ask)[1]["paths"][PATH]["post"]
        (label,) = [one for one in operation["parameters"] if one["in"] == "query"]
        assert label["schema"]["enum"] == ["high", "low"]
        assert {"409", "413", "422", "429"} <= {*operation["responses"]}
        row = operation["responses"]["200"]["content"]["application/json"]["schema"]["properties"][
            "explanations"
        ]["items"]
        answer = labels.ask(operation["requestBody"]["content"]["application/json"]["example"])[1]
        assert {*answer["explanations"][0]} == {*row["required"]} == {*row["properties"]}
        assert {*answer["explanations"][0]["contributions"]} == {
            *row["properties"]["contributions"]["properties"]
        }


class TestBackground:
    def write(self, folder: Path, text: str) -> None:
        """Put another file in, with a manifest that agrees."""
        (folder / BACKGROUND_FILE).write_text(text)
        manifest = PackageManifest.from_bytes((folder / "package.json").read_bytes())
        files = manifest.files | {BACKGROUND_FILE: file_digest(text.encode())}
        write_manifest(folder, replace(manifest, files=files))

    @pytest.mark.parametrize(
        ("columns", "words"),
        [
            ({"x": (1.0,)}, "its columns are"),
            ({"x": (1.0,), "kind": ("a",), "more": (1,)}, "its columns are"),
            ({"x": ("far",), "kind": ("a",)}, "expected number, got 'far'"),
            ({"x": (1.0, 2.0), "kind": ("a",)}, "all columns have the same number"),
            ({"x": (), "kind": ()}, "at least one"),
            ({"x": (1.0,) * 101, "kind": ("a",) * 101}, "it has 101 rows, at most 100"),
        ],
    )
    def test_rows_of_another_model_are_not_loaded(
        self, tmp_path: Path, columns: dict[str, tuple], words: str
    ) -> None:
        build_package(tmp_path / "package")
        self.write(tmp_path / "package", Background(columns=columns, drawn_from=9, seed=0).to_json())
        with pytest.raises(
            ArtifactIntegrityError, match=rf"background\.json holds no rows of this model.*{words}"
        ):
            load_model(tmp_path / "package")

    @pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"format": 2}'])
    def test_what_is_no_background_is_not_loaded(self, tmp_path: Path, text: str) -> None:
        build_package(tmp_path / "package")
        self.write(tmp_path / "package", text)
        with pytest.raises(ArtifactIntegrityError, match=r"background\.json holds no rows"):
            load_model(tmp_path / "package")

    def test_a_changed_row_is_found(self, packages: dict[str, Path], tmp_path: Path) -> None:
        folder = tmp_path / "package"
        build_package(folder, background_rows=5)
        text = (folder / BACKGROUND_FILE).read_text()
        (folder / BACKGROUND_FILE).write_text(text.replace('"a"', '"b"', 1))
        with pytest.raises(ArtifactIntegrityError, match=r"background\.json was changed after packaging"):
            load_model(folder)

    def test_it_comes_back_as_it_was(self) -> None:
        rows = Background(columns={"x": (1.5, float("nan")), "kind": ("ä", None)}, drawn_from=2, seed=3)
        again = Background.from_json(rows.to_json())
        assert again == replace(rows, columns={"x": (1.5, None), "kind": ("ä", None)})

    @pytest.mark.parametrize("rows", [-1, 101])
    def test_no_more_than_a_hundred(self, rows: int) -> None:
        with pytest.raises(ValueError, match=rf"background_rows is {rows}; it must be from 0 to 100"):
            TrainSpec(dataset="t", model_name="m", target="y", time_column="t", background_rows=rows)

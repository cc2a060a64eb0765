from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import math
import threading
import time
import tracemalloc
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from airflow_mlops.core.model.signature import FieldSpec, ModelSignature
from airflow_mlops.core.rollouts.desired_state import DesiredState, ServedVersion, serve_alone
from airflow_mlops.core.tokens import AcceptedTokens
from airflow_mlops.integrations.bentoml import LocalServer
from airflow_mlops.serving.app import EndpointApp
from airflow_mlops.serving.arrow import decode_arrow
from airflow_mlops.serving.cache import AnswerCache
from airflow_mlops.serving.files import write_whole
from airflow_mlops.serving.inflate import inflate
from airflow_mlops.serving.log_rows import pseudonym
from airflow_mlops.serving.mirror import Answered, Mirror
from airflow_mlops.serving.model import ServedModel, load_model
from airflow_mlops.serving.observer import Observer
from airflow_mlops.serving.reconciler import LiveVersion, Routes
from airflow_mlops.serving.requests import IdMaker, PredictionRequest, RequestDecoder, RequestError
from airflow_mlops.serving.settings import ServiceSettings
from tests.packages import ROWS, SIGNATURE, build_package

NAMED = ModelSignature(
    inputs=(
        FieldSpec(name="a b", type="number"),
        FieldSpec(name="class", type="string", nullable=False),
        FieldSpec(name="é", type="number", nullable=False),
    ),
    output="y",
)
ARROW = b"application/vnd.apache.arrow.stream"

numbers = st.sampled_from([0, 1, -2.5, 1e300, 2**70, None])
texts = st.sampled_from(["", "a", "é", 3, 12.0, -0.0, 0.1, 1e20, 2**70, None])
values = st.sampled_from([None, True, 0, 1.5, 10**400, "", "a", "2024-01-01", "9999", [], {}])
row = st.one_of(
    st.fixed_dictionaries({"a b": numbers, "class": texts, "é": numbers}, optional={"more": values}),
    st.fixed_dictionaries({}, optional=dict.fromkeys(NAMED.names, values)),
)
listed = st.lists(numbers, max_size=3)
body = st.fixed_dictionaries(
    {},
    optional={
        "rows": st.one_of(st.lists(row, max_size=3), values),
        "row": st.one_of(row, values),
        "columns": st.one_of(
            st.fixed_dictionaries({"a b": listed, "class": st.lists(texts, max_size=3), "é": listed}), values
        ),
        "prediction_ids": st.one_of(st.lists(values, max_size=3), values),
        "times": st.one_of(st.lists(values, max_size=3), values),
    },
)


def comparable(decode: Any, data: bytes) -> Any:
    try:
        request: PredictionRequest = decode(data, 2)
    except RequestError as err:
        return err.status, str(err)
    columns = {name: [repr(value) for value in column] for name, column in request.columns.items()}
    return columns, *request[1:]


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(body)
def test_the_fast_way_answers_as_the_slow_one(asked: dict) -> None:
    decoder = RequestDecoder(NAMED)
    data = json.dumps(asked).encode()
    assert comparable(decoder.decode, data) == comparable(decoder._decode_slowly, data)


def test_a_body_that_is_not_in_utf_8_is_the_callers_mistake() -> None:
    with pytest.raises(RequestError, match="not JSON: 'utf-8' codec") as refused:
        RequestDecoder(SIGNATURE).decode('{"row": {"x": 1, "kind": "é"}}'.encode("latin-1"), 10)
    assert refused.value.status == 422


def test_good_requests_go_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = RequestDecoder(NAMED)
    monkeypatch.setattr(decoder, "_decode_slowly", None)
    good = {"a b": None, "class": 3, "é": 1, "more": [1, {}]}
    for asked in (
        {"rows": [{**good, "class": 3.0}]},
        {"rows": [good]},
        {"row": good},
        {
            "columns": {name: [value] for name, value in good.items()},
            "prediction_ids": [1],
            "times": ["2024-01-01"],
        },
    ):
        request = decoder.decode(json.dumps(asked).encode(), 10)
        assert math.isnan(request.columns["a b"][0])
        assert (request.columns["class"], request.columns["é"]) == (["3"], [1.0])


def test_a_category_is_no_infinite_number() -> None:
    with pytest.raises(RequestError, match="kind: expected string, got inf"):
        RequestDecoder(SIGNATURE).decode(b'{"row": {"x": 1, "kind": 1e400}}', 10)


def test_ids_are_unique_and_all_alike() -> None:
    ids = [IdMaker(), IdMaker()]
    made = [one for maker in ids for one in (maker.one(), *maker.many(10_000), *maker.many(1))]
    assert len(set(made)) == len(made) == 20_004
    assert {len(one) for one in made} == {32}


class TestSettings:
    def test_they_come_from_the_environment(self) -> None:
        settings = ServiceSettings.from_environment(
            {
                "AIRFLOW_MLOPS_SERVING_DIR": "/srv/fare",
                "AIRFLOW_MLOPS_ENDPOINT_TOKEN": "new old",
                "AIRFLOW_MLOPS_STEERING_TOKEN": "steers steered",
                "AIRFLOW_MLOPS_SERVICE_WORKERS": "4",
            }
        )
        assert settings.steering_tokens == ("steers", "steered")
        assert (settings.serving_dir, settings.tokens, settings.workers) == (
            Path("/srv/fare"),
            ("new", "old"),
            4,
        )
        assert settings.maximum_rows == 10_000

    @pytest.mark.parametrize("text", ["many", "0", "1.5", "-1"])
    def test_what_makes_no_sense_is_named(self, text: str) -> None:
        with pytest.raises(
            ValueError, match=f"AIRFLOW_MLOPS_SERVICE_WORKERS='{text}': a whole number from 1 on"
        ):
            ServiceSettings.from_environment({"AIRFLOW_MLOPS_SERVICE_WORKERS": text})

    def test_a_service_with_other_settings_is_another_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = LocalServer(tmp_path, port=3000)
        before = server.settings
        monkeypatch.setenv("AIRFLOW_MLOPS_SERVICE_WORKERS", "2")
        assert server.settings != before
        before = server.settings
        monkeypatch.setenv("AIRFLOW_MLOPS_TRUSTED_TYPES", "my_models.Clip")
        assert server.settings != before


class Caller:
    """Asks an application in this process."""

    def __init__(self, folder: Path, package: Path, **settings: Any) -> None:
        self.app = EndpointApp(ServiceSettings(serving_dir=folder, **settings))
        state = serve_alone(None, model_name="m", model_version="1", package_digest="sha256:0")
        live = LiveVersion(model_version="1", package_digest="sha256:0", model=load_model(package))
        self.app.reconciler.routes = Routes(state, {"1": live})

    def ask(self, path: str, body: object = None, **headers: str) -> tuple[int, Any, dict[bytes, bytes]]:
        return asyncio.run(self.asked(path, body, **headers))

    async def asked(
        self, path: str, body: object = None, *, stalls: bool = False, **headers: str
    ) -> tuple[int, Any, dict[bytes, bytes]]:
        pieces = iter([True] if stalls else [False])
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent: list[dict] = []

        async def receive() -> dict:
            await asyncio.sleep(0)
            more = next(pieces, None)
            if more is None:
                await asyncio.Event().wait()  # until whoever asked gives up
            return {"type": "http.request", "body": data, "more_body": more}

        async def send(message: dict) -> None:
            sent.append(message)

        given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        method = "GET" if body is None else "POST"
        await self.app({"type": "http", "method": method, "path": path, "headers": given}, receive, send)
        about = dict(sent[0]["headers"])
        content = sent[1]["body"]
        return sent[0]["status"], json.loads(content) if about[b"content-type"] != ARROW else content, about


def packed(columns: dict[str, list[Any]], compression: Any) -> bytes:
    """Give a table as an Arrow stream."""
    stream = io.BytesIO()
    pl.DataFrame(columns).write_ipc_stream(stream, compression=compression)
    return stream.getvalue()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages") / "one"
    build_package(folder)
    return folder


class TestApp:
    def test_records_columns_and_arrow_are_answered_alike(self, package: Path, tmp_path: Path) -> None:
        caller = Caller(tmp_path, package)
        _, records, _ = caller.ask("/predict", {"rows": ROWS})
        columns = {name: [row[name] for row in ROWS] for name in ("x", "kind")}
        _, by_column, _ = caller.ask("/predict", {"columns": columns})
        assert by_column["predictions"] == records["predictions"]
        _, single, _ = caller.ask("/predict", {"row": ROWS[0]})
        assert single["predictions"] == records["predictions"][:1]
        stream = io.BytesIO()
        pl.DataFrame({**columns, "prediction_id": ["a", "b", "c"]}).write_ipc_stream(stream)
        status, table, about = caller.ask("/predict", stream.getvalue(), content_type=ARROW.decode())
        assert status == 200
        answered = pl.read_ipc_stream(table)
        assert answered.to_dict(as_series=False) == {
            "prediction_id": ["a", "b", "c"],
            "prediction": records["predictions"],
        }
        assert about[b"x-model-version"] == b"1"

    @pytest.mark.parametrize(
        ("table", "status", "words"),
        [
            ({"x": ["far"], "kind": ["a"]}, 422, "x: expected number, got String"),
            ({"x": [1.0]}, 422, "kind: column is missing (string)"),
            ({"x": [math.inf], "kind": ["a"]}, 422, "x: expected number, got an infinite number"),
            ({"x": [1.0], "kind": [-math.inf]}, 422, "kind: expected string, got an infinite number"),
            ({"x": [], "kind": []}, 422, "at least one row"),
            ({"x": [1.0] * 5, "kind": ["a"] * 5}, 413, "5 rows; at most 4"),
            ({"x": [1.0], "kind": ["a"], "prediction_id": [""]}, 422, "prediction_id: texts of 1 to 256"),
            (
                {"x": [1.0], "kind": ["a"], "time": ["now"]},
                422,
                "time: times without gaps are needed, got String",
            ),
            (b"nothing of the kind", 422, "not an Arrow stream"),
        ],
    )
    def test_tables_that_do_not_fit(
        self, package: Path, tmp_path: Path, table: Any, status: int, words: str
    ) -> None:
        if isinstance(table, dict):
            stream = io.BytesIO()
            pl.DataFrame(table).write_ipc_stream(stream)
            table = stream.getvalue()
        caller = Caller(tmp_path, package, maximum_rows=4)
        answered, answer, _ = caller.ask("/predict", table, content_type=ARROW.decode())
        assert (answered, words in answer["error"]) == (status, True), answer

    def test_nan_is_null_in_a_table(self) -> None:
        good = {"a b": [math.nan], "class": [1.0], "é": [1.0]}
        read = decode_arrow(packed(good, "uncompressed"), NAMED, 10, 10_000)
        assert (repr(read.columns["a b"]), read.columns["class"]) == ("[nan]", ["1"])
        for name in ("class", "é"):
            with pytest.raises(RequestError, match=f"{name}: null is not allowed"):
                decode_arrow(packed({**good, name: [math.nan]}, "uncompressed"), NAMED, 10, 10_000)

    @pytest.mark.parametrize("compression", ["lz4", "zstd"])
    def test_a_small_table_that_would_unpack_to_a_large_one_is_not_unpacked(
        self, package: Path, tmp_path: Path, compression: Any
    ) -> None:
        caller = Caller(tmp_path, package, maximum_bytes=100_000)
        long = packed({"x": [1.0] * 300_000, "kind": ["a"] * 300_000}, compression)
        status, answer, _ = caller.ask("/predict", long, content_type=ARROW.decode())
        assert (len(long) < 100_000, status) == (True, 413)
        assert "300000 rows; at most 10000" in answer["error"]
        wide = packed({"x": [1.0] * 9, "kind": ["a"] * 9, "more": ["b" * 50_000] * 9}, compression)
        status, answer, _ = caller.ask("/predict", wide, content_type=ARROW.decode())
        assert (len(wide) < 100_000, status) == (True, 413)
        assert "bytes when unpacked; at most 100000" in answer["error"]
        status, answer, _ = caller.ask(
            "/predict", packed({"x": [1.0] * 9, "kind": ["a"] * 9}, compression), content_type=ARROW.decode()
        )
        assert status == 200

    def test_a_table_that_polars_panics_on_is_the_callers_mistake(
        self, package: Path, tmp_path: Path
    ) -> None:
        stream = io.BytesIO()
        table = pl.DataFrame({"x": [1.0], "kind": pl.Series(["a"], dtype=pl.Enum(["a", "b"]))})
        table.write_ipc_stream(stream, compat_level=pl.CompatLevel.oldest())
        damaged = stream.getvalue().replace(b"1;a1;b", b"?;a1;b")
        assert damaged != stream.getvalue()
        status, answer, _ = Caller(tmp_path, package).ask("/predict", damaged, content_type=ARROW.decode())
        assert (status, "not an Arrow stream" in answer["error"]) == (422, True)

    @pytest.mark.parametrize(
        ("ids", "words"),
        [
            (["a", "b", "a"], "[2]: 'a' is the id of another row"),
            ([1, "1", "b"], "[1]: '1' is the id of another row"),
            ([True, "b", "c"], "[0]: a text of 1 to 256 characters is needed, got True"),
        ],
    )
    def test_rows_with_no_id_of_their_own_are_refused(
        self, package: Path, tmp_path: Path, ids: list[Any], words: str
    ) -> None:
        status, answer, _ = Caller(tmp_path, package).ask("/predict", {"rows": ROWS, "prediction_ids": ids})
        assert (status, f"prediction_ids{words}" in answer["error"]) == (422, True), answer

    def test_ids_of_a_table_may_be_numbers_or_categories_and_are_unique(
        self, package: Path, tmp_path: Path
    ) -> None:
        caller = Caller(tmp_path, package)

        def ask(ids: pl.Series) -> tuple[int, Any]:
            stream = io.BytesIO()
            pl.DataFrame({"x": [1.0, 2.0], "kind": ["a", "b"], "prediction_id": ids}).write_ipc_stream(stream)
            return caller.ask("/predict", stream.getvalue(), content_type=ARROW.decode())[:2]

        for ids in (pl.Series([7, 8]), pl.Series(["7", "8"], dtype=pl.Categorical)):
            status, table = ask(ids)
            assert (status, pl.read_ipc_stream(table)["prediction_id"].to_list()) == (200, ["7", "8"])
        status, answer = ask(pl.Series(["a", "a"]))
        assert (status, "prediction_id[1]: 'a' is the id of another row" in answer["error"]) == (422, True)

    def test_what_is_neither_json_nor_a_stream_is_named(self, package: Path, tmp_path: Path) -> None:
        caller = Caller(tmp_path, package)
        _, answer, _ = caller.ask("/predict", b"x,kind", content_type="text/csv")
        assert "Its Content-Type is 'text/csv': send JSON, or a table as" in answer["error"]
        for kind in ("application/json; charset=utf-8", "text/plain"):  # what is JSON is taken as such
            assert caller.ask("/predict", {"rows": ROWS}, content_type=kind)[0] == 200
        _, answer, _ = caller.ask("/predict", b"x,kind", content_type="application/json")
        assert "Content-Type" not in answer["error"]

    def test_true_is_no_number_of_a_revision(self, package: Path, tmp_path: Path) -> None:
        caller = Caller(tmp_path, package, steering_tokens=("steers",))
        for body in ({"revision": True, "seconds": 5}, {"revision": 1, "seconds": True}):
            assert caller.ask("/rollout/lease", body, authorization="Bearer steers")[0] == 422

    @pytest.mark.parametrize("path", ["/predict", "/predict/explain"])
    def test_a_packed_body_is_answered_as_the_plain_one(self, tmp_path: Path, path: str) -> None:
        package = tmp_path / "package"
        build_package(package, background_rows=5)
        caller = Caller(tmp_path, package)
        about = {"prediction_ids": ["a", "b", "c"]}
        _, plain, _ = caller.ask(path, {"rows": ROWS, **about})
        data = gzip.compress(json.dumps({"rows": ROWS, **about}).encode())
        for name in ("gzip", "X-GZIP"):
            assert caller.ask(path, data, content_encoding=name)[:2] == (200, plain)
        assert caller.ask(path, {"rows": ROWS, **about}, content_encoding="identity")[:2] == (200, plain)
        table = packed({"x": [1.0], "kind": ["a"]}, "uncompressed")
        status, _, _ = caller.ask(
            path, gzip.compress(table), content_encoding="gzip", content_type=ARROW.decode()
        )
        assert status == 200
        assert caller.app._inflater._held == 0

    @pytest.mark.parametrize(
        ("data", "encoding", "status", "words"),
        [
            (b"{}", "br", 415, "Content-Encoding 'br' is not understood: send the body packed with gzip"),
            (b"{}", "gzip", 422, "not packed with gzip, as its Content-Encoding says"),
            (gzip.compress(b"{}" * 99)[:-9], "gzip", 422, "not one whole gzip stream"),
            (gzip.compress(b"{}") + b"more", "gzip", 422, "not one whole gzip stream"),
            (gzip.compress(b"{}") + gzip.compress(b"{}"), "gzip", 422, "send one member"),
            (gzip.compress(b" " * 99)[:-4] + b"\x02\0\0\0", "gzip", 422, "larger than it says at its end"),
            (gzip.compress(b" " * 100_001), "gzip", 413, "more than 100000 bytes when unpacked"),
            (gzip.compress(b"[]"), "gzip", 422, "the body must be"),
        ],
    )
    def test_a_packed_body_that_does_not_fit(
        self, package: Path, tmp_path: Path, data: bytes, encoding: str, status: int, words: str
    ) -> None:
        caller = Caller(tmp_path, package, maximum_bytes=100_000)
        answered, answer, about = caller.ask("/predict", data, content_encoding=encoding)
        assert (answered, words in answer["error"]) == (status, True), answer
        assert (about.get(b"accept-encoding") == b"gzip") is (status == 415)

    def test_a_bomb_is_never_unpacked_as_a_whole(self) -> None:
        bomb = gzip.compress(b" " * 50_000_000)
        tracemalloc.start()
        try:
            with pytest.raises(RequestError, match="more than 100000 bytes when unpacked"):
                inflate(bomb, 100_000)
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()

    def test_many_packed_bodies_at_once_are_bounded(self, package: Path, tmp_path: Path) -> None:
        """Each of them may become as large as a body can be; only so many as there is room for are unpacked at once."""
        caller = Caller(tmp_path, package, maximum_bytes=100_000)
        data = gzip.compress(b" " * 99_000)

        async def ask_all() -> list[int]:
            asked = [caller.asked("/predict", data, content_encoding="gzip") for _ in range(20)]
            return [status for status, *_ in await asyncio.gather(*asked)]

        assert Counter(asyncio.run(ask_all())) == {422: 16, 429: 4}
        assert caller.app._inflater._held == 0

    def test_packed_bodies_have_room_by_what_is_in_them(self, package: Path, tmp_path: Path) -> None:
        caller = Caller(tmp_path, package, maximum_bytes=100_000)
        data = gzip.compress(json.dumps({"rows": ROWS * 100}).encode())

        async def ask_all() -> set[int]:
            asked = [caller.asked("/predict", data, content_encoding="gzip") for _ in range(60)]
            return {status for status, *_ in await asyncio.gather(*asked)}

        assert asyncio.run(ask_all()) == {200}
        assert caller.app._inflater._held == 0

    def test_rows_that_share_a_long_text_count_it_each(self, package: Path, tmp_path: Path) -> None:
        caller = Caller(tmp_path, package, maximum_bytes=100_000)
        shared = pl.DataFrame({"x": [1.0] * 9, "kind": ["a" * 20_000] * 9}).with_columns(
            pl.col("kind").cast(pl.Categorical)
        )
        stream = io.BytesIO()
        shared.write_ipc_stream(stream, compat_level=pl.CompatLevel.oldest())
        status, answer, _ = caller.ask("/predict", stream.getvalue(), content_type=ARROW.decode())
        assert (status, "100000 bytes of text" in answer["error"]) == (413, True), answer

    def test_true_and_false_are_the_categories_they_were_in_training(
        self, package: Path, tmp_path: Path
    ) -> None:
        """A table's column of true and false becomes text as polars writes it, in training and in batch scoring."""
        trained = pl.Series([True, False]).cast(pl.String).to_list()
        read = RequestDecoder(SIGNATURE).decode(
            b'{"rows": [{"x": 1, "kind": true}, {"x": 1, "kind": false}]}', 10
        )
        assert read.columns["kind"] == trained
        table = packed({"x": [1.0, 1.0], "kind": [True, False]}, "uncompressed")
        assert decode_arrow(table, SIGNATURE, 10, 10_000).columns["kind"] == trained

    @pytest.mark.parametrize("name", ["Application/Vnd.Apache.Arrow.Stream", f"{ARROW.decode()}; q=1"])
    def test_arrow_is_asked_for_in_any_way_http_allows(
        self, package: Path, tmp_path: Path, name: str
    ) -> None:
        caller = Caller(tmp_path, package)
        table = packed({"x": [1.0], "kind": ["a"]}, "uncompressed")
        _, _, about = caller.ask("/predict", table, content_type=name)
        assert about[b"content-type"] == ARROW
        _, _, about = caller.ask("/predict", {"rows": ROWS}, accept=f"{name}, application/json;q=0.5")
        assert about[b"content-type"] == ARROW

    def test_an_unseen_category_and_a_missing_value_are_answered_as_the_estimator_does(
        self, package: Path, tmp_path: Path
    ) -> None:
        odd = [{"x": 1.0, "kind": "never seen"}, {"x": None, "kind": None}]
        _, answer, _ = Caller(tmp_path, package).ask("/predict", {"rows": odd})
        other = build_package(tmp_path / "sklearn", form="sklearn")
        estimator = load_model(tmp_path / "sklearn", expected_digest=other)
        assert answer["predictions"] == pytest.approx(estimator.predict_records(odd), rel=1e-5)

    def test_large_bodies_are_answered_off_the_loop(self, package: Path, tmp_path: Path) -> None:
        status, answer, _ = Caller(tmp_path, package).ask("/predict", {"rows": ROWS * 1_000})
        assert (status, len(set(answer["prediction_ids"]))) == (200, 3_000)

    def test_tokens_rotate(self, package: Path, tmp_path: Path) -> None:
        caller = Caller(tmp_path, package, tokens=("new", "old"))
        asked = [
            caller.ask("/predict", {"rows": ROWS}, authorization=f"Bearer {token}")[0]
            for token in ("new", "old", "older", "new old")
        ]
        assert asked == [200, 200, 401, 401]
        assert caller.ask("/readyz")[0] == 200

    def test_tokens_of_a_file_are_taken_when_it_changes(
        self, package: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "tokens.json"
        with pytest.raises(ValueError, match="can't be read"):  # without it everybody would come in
            Caller(tmp_path, package, token_file=path)

        def hold(*tokens: str) -> None:
            write_whole(path, AcceptedTokens.of(tokens, ["steers"]).to_bytes())
            assert not any(token.encode() in path.read_bytes() for token in tokens)

        hold("old")
        caller = Caller(tmp_path, package, token_file=path)

        def asked() -> list[int]:
            caller.app.reconciler.reconcile()
            return [
                caller.ask("/status", authorization=f"Bearer {token}")[0]
                for token in ("old", "new", "steers")
            ]

        assert asked() == [200, 401, 401]
        hold("new", "old")
        assert asked() == [200, 200, 401]
        hold("new")
        assert asked() == [401, 200, 401]
        for spoiled in (b"", b'{"key": "00", "callers": []}'):
            write_whole(path, spoiled)
            assert asked() == [401, 200, 401]
        path.unlink()
        assert asked() == [401, 200, 401]
        assert caplog.text.count("can't be read: those of before") == 1  # and not at every look

    def test_who_may_ask_may_not_steer(self, package: Path, tmp_path: Path) -> None:
        caller = Caller(tmp_path, package, tokens=("asks",), steering_tokens=("new", "old"))
        lease = {"revision": 1, "seconds": 60}
        for path, body, steered in (("/rollout", None, 200), ("/rollout/lease", lease, 409)):
            tried = {
                token: caller.ask(path, body, authorization=f"Bearer {token}")
                for token in ("new", "old", "asks", "none")
            }
            assert [status for status, _, _ in tried.values()] == [steered, steered, 403, 401]
            assert "a rollout is steered with a steering token" in tried["asks"][1]["error"]
            assert caller.ask(path, body)[0] == 401
        assert caller.ask("/predict", {"rows": ROWS}, authorization="Bearer new")[0] == 401
        assert caller.ask("/rollout/lease")[0] == 405

    def test_without_steering_tokens_nobody_steers(self, package: Path, tmp_path: Path) -> None:
        status, answer, _ = Caller(tmp_path, package).ask("/rollout", authorization="Bearer ")
        assert (status, "AIRFLOW_MLOPS_STEERING_TOKEN" in answer["error"]) == (403, True)

    def test_more_at_once_than_allowed_come_again(self, package: Path, tmp_path: Path) -> None:
        caller = Caller(tmp_path, package, maximum_concurrency=2)

        async def three() -> list[tuple[int, Any, dict[bytes, bytes]]]:
            large = {"rows": ROWS * 1_000}  # answered outside of the loop
            return await asyncio.gather(*(caller.asked("/predict", large) for _ in range(3)))

        answers = asyncio.run(three())
        assert [status for status, _, _ in answers] == [200, 200, 429]
        assert answers[2][2][b"retry-after"] == b"1"
        assert caller.ask("/predict", {"rows": ROWS})[0] == 200

    def test_bodies_that_never_end_shut_nobody_out(self, package: Path, tmp_path: Path) -> None:
        caller = Caller(tmp_path, package, maximum_concurrency=2, body_seconds=0.5)

        async def ask() -> list[tuple[int, Any, dict[bytes, bytes]]]:
            slow = [asyncio.create_task(caller.asked("/predict", b"{", stalls=True)) for _ in range(5)]
            await asyncio.sleep(0.1)
            meanwhile = await caller.asked("/predict", {"rows": ROWS})
            return [meanwhile, *await asyncio.wait_for(asyncio.gather(*slow), timeout=10)]

        (meanwhile, _, _), *slow = asyncio.run(ask())
        assert meanwhile == 200
        assert [status for status, _, _ in slow] == [408] * 5
        assert "was not there within 0.5 seconds" in slow[0][1]["error"]
        assert slow[0][2][b"connection"] == b"close"

    def test_bodies_on_their_way_have_room_together(self, package: Path, tmp_path: Path) -> None:
        data = json.dumps({"rows": ROWS}).encode()
        caller = Caller(tmp_path, package, maximum_bytes=len(data), body_seconds=0.5)

        async def ask() -> list[tuple[int, Any, dict[bytes, bytes]]]:
            stalled = (caller.asked("/predict", data, stalls=True) for _ in range(18))
            slow = [asyncio.create_task(one) for one in stalled]
            await asyncio.sleep(0.1)
            meanwhile = await caller.asked("/predict", data)
            answers = [meanwhile, *await asyncio.gather(*slow)]
            return [*answers, await caller.asked("/predict", data)]

        answers = [status for status, _, _ in asyncio.run(ask())]
        assert (answers[0], answers[-1]) == (200, 200)
        assert sorted(answers[1:-1]) == [408] * 16 + [429] * 2

    def test_what_it_says_of_itself(self, package: Path, tmp_path: Path) -> None:
        caller = Caller(tmp_path, package)
        status, ready, _ = caller.ask("/readyz")
        assert (status, ready["versions"][0]["model_version"]) == (200, "1")
        _, document, _ = caller.ask("/openapi.json")
        content = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]
        assert content["schema"]["oneOf"][0]["properties"]["rows"]["items"]["properties"] == {
            "x": {"type": ["number", "null"]},
            "kind": {"type": ["string", "number", "boolean", "null"]},
        }
        assert caller.ask("/predict", content["example"])[0] == 200
        assert caller.ask("/predict")[0] == 405
        caller.app.draining = True
        status, _, about = caller.ask("/readyz")
        assert (status, about[b"connection"]) == (503, b"close")

    def test_repeated_rows_are_answered_from_memory(self, package: Path, tmp_path: Path) -> None:
        caller = Caller(tmp_path, package, cache_rows=2)
        rows = [{"x": None, "kind": "a"}, {"x": 1, "kind": "a"}, {"x": 2, "kind": "a"}]
        first = [caller.ask("/predict", {"row": row})[1]["predictions"] for row in rows]
        assert len(caller.app._cache._answers) == 2
        again = [caller.ask("/predict", {"row": row})[1]["predictions"] for row in rows]
        assert again == first


def test_what_another_thread_just_forgot_is_answered_all_the_same() -> None:
    class Forgetful(OrderedDict[Any, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            return self.pop(key, default)

    cache = AnswerCache(2)
    cache._answers = Forgetful()
    cache.put("a", [1.0])
    assert (cache.get("a"), cache.get("a")) == ([1.0], None)


class TestTwoVersions:
    """What a new version's own inputs refuse is its failure, not the caller's, as long as the version before takes it."""

    @pytest.fixture
    def caller(self, package: Path, tmp_path: Path) -> Caller:
        caller = Caller(tmp_path, package)
        old = load_model(package)
        strict = ModelSignature(
            inputs=(FieldSpec(name="x", type="number", nullable=False), *old.manifest.signature.inputs[1:]),
            output="y",
        )
        new = ServedModel(manifest=replace(old.manifest, signature=strict), predictor=old.predictor)
        state = DesiredState(
            model_name="m",
            versions=(
                ServedVersion(model_version="1", package_digest="sha256:0", share=0.0),
                ServedVersion(model_version="2", package_digest="sha256:1", share=1.0),
            ),
            mirror="1",
            leased=True,
            previous_version=None,
            revision=2,
        )
        versions = {
            name: LiveVersion(model_version=name, package_digest=f"sha256:{name}", model=model)
            for name, model in (("1", old), ("2", new))
        }
        caller.app.reconciler.routes = Routes(state, versions)
        caller.app.observer.begin(caller.app.reconciler.routes)
        return caller

    def test_the_one_before_answers_and_it_counts(self, caller: Caller) -> None:
        fine, refused = {"row": {"x": 1.0, "kind": "a"}}, {"row": {"x": None, "kind": "a"}}
        assert [caller.ask("/predict", body)[1]["model_version"] for body in (fine, refused, fine)] == [
            "2",
            "1",
            "2",
        ]
        seen = caller.app.observer.read()
        assert (seen.of("2").requests, seen.of("2").failed) == (3, 1)
        assert seen.of("1").requests == 0  # it stood in: the lot did not draw it

    def test_what_nobody_takes_is_the_callers(self, caller: Caller) -> None:
        status, answer, _ = caller.ask("/predict", {"row": {"kind": "a"}})
        assert (status, "x: field is missing" in answer["error"]) == (422, True)
        assert caller.app.observer.read().of("2").requests == 0

    @pytest.mark.parametrize(("x", "kind"), [("number", "number"), ("string", "number")])
    def test_a_mirror_whose_inputs_are_of_other_types_is_no_callers_concern(
        self, caller: Caller, package: Path, x: Any, kind: Any
    ) -> None:
        routes = caller.app.reconciler.routes
        assert routes is not None
        model = routes.versions["2"].model
        fields = (FieldSpec(name="x", type=x), FieldSpec(name="kind", type=kind))
        other = replace(model.manifest, signature=ModelSignature(inputs=fields, output="y"))
        mirror = replace(routes.versions["2"], model=ServedModel(manifest=other, predictor=model.predictor))
        state = replace(
            routes.state, versions=(replace(routes.state.stable, share=1.0), replace(routes.state.versions[1], share=0.0)),
            mirror="2", revision=3,
        )  # fmt: skip
        caller.app.reconciler.routes = Routes(state, {"1": routes.versions["1"], "2": mirror})
        caller.app.observer.begin(caller.app.reconciler.routes)
        caller.app.mirror.start()
        status, answer, _ = caller.ask("/predict", {"rows": ROWS})
        caller.app.mirror.stop()
        assert (status, answer.get("model_version")) == (200, "1"), answer
        assert caller.app.observer.read().of("2").failed == 1

    def test_a_mirror_reads_a_request_by_its_own_inputs(self, caller: Caller, tmp_path: Path) -> None:
        """It takes one input more, which callers may send already."""
        routes = caller.app.reconciler.routes
        assert routes is not None
        build_package(tmp_path / "wide", idle=1)
        wide = replace(routes.versions["2"], model=load_model(tmp_path / "wide"))
        versions = (replace(routes.state.stable, share=1.0), replace(routes.state.versions[1], share=0.0))
        state = replace(routes.state, versions=versions, mirror="2", revision=3)
        caller.app.reconciler.routes = Routes(state, {"1": routes.versions["1"], "2": wide})
        caller.app.observer.begin(caller.app.reconciler.routes)
        caller.app.mirror.start()
        body = {"rows": [{"x": 1.0, "kind": "a", "idle_0": 0.5}]}
        for asked in (body, {"columns": {"x": [1.0], "kind": ["a"], "idle_0": [0.5]}}, {"rows": ROWS}):
            status, answer, _ = caller.ask("/predict", asked)
            assert (status, answer["model_version"]) == (200, "1")
        caller.app.mirror.stop()
        seen = caller.app.observer.read().of("2")
        assert (seen.requests, seen.failed, seen.pairs) == (3, 1, 2)


class TestMirror:
    @pytest.fixture
    def version(self, package: Path) -> LiveVersion:
        return LiveVersion(model_version="2", package_digest="sha256:0", model=load_model(package))

    @staticmethod
    def answered(rows: int, done: Callable[[], None] = lambda: None) -> Answered:
        def log(version: LiveVersion, answers: Sequence[Any], seconds: float, **more: Any) -> bool:
            done()
            return True

        return Answered(1, {"x": [1.0] * rows, "kind": ["a"] * rows}, [2.0] * rows, log)

    def test_it_has_room_for_rows_not_only_for_requests(self, version: LiveVersion, tmp_path: Path) -> None:
        observer = Observer(tmp_path)
        mirror = Mirror(observer)
        for rows, shed in ((20_001, 1), (10_000, 1), (9_999, 1), (2, 2), (1, 2), (1, 3)):
            mirror.offer(version, self.answered(rows))
            assert observer._shed == shed

    def test_it_has_room_for_bytes_not_only_for_rows(self, version: LiveVersion, tmp_path: Path) -> None:
        observer = Observer(tmp_path)
        mirror = Mirror(observer)
        for length, shed in ((40_000_000, 0), (40_000_000, 1), (20_000_000, 1), (10_000_000, 2)):
            columns = {"x": [1.0], "kind": ["a" * length]}
            mirror.offer(version, self.answered(1)._replace(columns=columns))
            assert observer._shed == shed

    def test_what_is_answered_makes_room_again(self, version: LiveVersion, tmp_path: Path) -> None:
        observer, done = Observer(tmp_path), threading.Semaphore(0)
        mirror = Mirror(observer)
        mirror.start()
        for _ in range(3):
            mirror.offer(version, self.answered(20_000, done.release))
            assert done.acquire(timeout=30)
            deadline = time.monotonic() + 30
            while mirror._done_rows < mirror._taken_rows and time.monotonic() < deadline:
                time.sleep(0.001)
        mirror.stop()
        assert observer._shed == 0
        assert mirror._done_bytes == mirror._taken_bytes


def test_the_observer_has_room_for_bytes_not_only_for_requests(package: Path, tmp_path: Path) -> None:
    caller = Caller(tmp_path, package)
    caller.app.observer.begin(routes_of(caller.app.reconciler.routes))
    observer, many = caller.app.observer, [1.0] * 1_000_000
    for _ in range(5):  # about 40 MB each
        observer.answered("1", 2, 0.001, many)
    observer.answered("1", 2, 0.001, [1.0])
    assert len(observer._events) == 4
    assert observer.read().of("1").rows == 4_000_000
    observer.answered("1", 2, 0.001, [1.0])
    assert observer.read().of("1").rows == 4_000_001


def routes_of(live: Routes | None) -> Routes:
    assert live is not None
    return Routes(replace(live.state, leased=True, revision=2), live.versions)


class TestStickyKeys:
    """Who asks is named nowhere, and told apart by workers alike."""

    def logged(
        self, folder: Path, package: Path, *, revision: int = 2, key: str | None = "customer-17"
    ) -> str | None:
        worker = Caller(folder, package)
        live = worker.app.reconciler.routes
        assert live is not None
        state = replace(live.state, sticky=True, leased=True, revision=revision)
        worker.app.reconciler.routes = Routes(state, live.versions)
        worker.app.observer.begin(worker.app.reconciler.routes)
        worker.ask("/predict", {"row": ROWS[0]}, **({"x_sticky_key": key} if key else {}))
        worker.app.log.flush()
        worker.app.observer.flush()
        newest = max(folder.rglob("part-*.parquet"), key=lambda path: path.stat().st_mtime_ns)
        return pl.read_parquet(newest)["caller"].item()

    def test_workers_log_the_same_that_nobody_can_find_out_later(self, package: Path, tmp_path: Path) -> None:
        first = self.logged(tmp_path, package)
        assert first is not None
        assert first == self.logged(tmp_path, package) != self.logged(tmp_path, package, key="customer-18")
        (secret,) = (tmp_path / "observed").glob("*.key")
        assert first == hashlib.blake2b(b"customer-17", key=secret.read_bytes(), digest_size=16).hexdigest()
        assert self.logged(tmp_path, package, key=None) is None
        assert self.logged(tmp_path, package, revision=3) != first
        assert not secret.exists()
        kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        assert b"customer-17" not in kept

    def test_with_a_key_it_is_the_pseudonym_of_all_columns(
        self, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AIRFLOW_MLOPS_LOG_KEY", "a secret of some length")
        expected = pseudonym("customer-17", b"a secret of some length")
        assert [self.logged(tmp_path, package, revision=revision) for revision in (2, 3)] == [expected] * 2


def test_the_log_gets_every_answer(package: Path, tmp_path: Path) -> None:
    caller = Caller(tmp_path, package)
    _, answer, about = caller.ask("/predict", {"row": ROWS[0]}, x_request_id="mine")
    assert about[b"x-request-id"] == b"mine"
    caller.app.log.flush()
    (file,) = tmp_path.rglob("part-*.parquet")
    logged = pl.read_parquet(file)
    assert logged["prediction_id"].to_list() == answer["prediction_ids"]
    assert set(logged.columns) >= {f"feature_{name}" for name in SIGNATURE.names}

"""What the service costs beside the model: requests per second and p99 of five servers that answer with one model, by wrk.

* `bare`: an ASGI callable that reads JSON and calls ONNX Runtime, under uvicorn: no validation, no log, nothing. The limit.
* `ours`: the service as `DeployModelOperator` starts it, with one worker, validation, token, metrics and inference log.
* `naive`: a BentoML service with one `@bentoml.api`, as BentoML's tutorials have it.
* `mlflow`: `mlflow models serve` of the scikit-learn pipeline that the ONNX model was made of, which is what MLflow serves by itself.
* `mlflow-onnx`: the same of a `PythonModel` that calls ONNX Runtime.

All run beside each other on the loopback address and are asked in turn, in several rounds. wrk and the servers share the machine. `--swaps` swaps
versions, steps a canary, takes it back and ends workers under 16 connections until 100,000 requests were answered instead; `--kills` kills
workers with SIGKILL under 16 of our own clients, which ask again where a connection broke, until 100,000 were; `--soak 500000` asks so many requests, and looks at memory and at
whether the inference log has every row; `--explain` asks for predictions while somebody else asks for explanations all the time.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import psutil

if TYPE_CHECKING:
    from airflow_mlops.integrations.bentoml import LocalServer
    from airflow_mlops.serving.local import LocalEndpoint

ROUNDS = 3
SECONDS = 3
CONNECTIONS = (1, 16, 64)
BATCH = 1_000
SWAPPED_REQUESTS = 100_000
ESTIMATORS: dict[str, dict[str, Any]] = {
    "HistGradientBoostingRegressor": {},
    "RandomForestRegressor": {"n_estimators": 100, "max_depth": 8},
}
TOKEN = "benchmark"  # noqa: S105 - opens nothing but the server that is measured

NUMERIC = (
    "trip_distance",
    "pickup_location_id",
    "dropoff_location_id",
    "hour",
    "day_of_week",
    "passenger_count",
)
CATEGORICAL = ("rate_code_id",)

BARE = """
import json
import numpy as np
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
output = session.get_outputs()[0].name
kinds = {item.name: object if item.type == "tensor(string)" else np.float32 for item in session.get_inputs()}


def predict(rows):
    feed = {name: np.array([[row[name]] for row in rows], dtype=kind) for name, kind in kinds.items()}
    return session.run([output], feed)[0].reshape(-1).tolist()
"""

ASGI = (
    BARE
    + """

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    data = json.dumps({"predictions": predict(json.loads(body)["rows"])}).encode() if body else b"{}"
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": data})
"""
)

NAIVE = (
    BARE
    + """

import bentoml


@bentoml.service(workers=1)
class Naive:
    @bentoml.api(route="/predict")
    def predict(self, rows: list[dict]) -> list[float]:
        return predict(rows)
"""
)

PYFUNC = """
import mlflow


class Model(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        import numpy as np
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            context.artifacts["model"], options, providers=["CPUExecutionProvider"]
        )
        self.kinds = {
            item.name: object if item.type == "tensor(string)" else np.float32 for item in self.session.get_inputs()
        }

    def predict(self, context, model_input, params=None):
        feed = {name: model_input[[name]].to_numpy(dtype=kind) for name, kind in self.kinds.items()}
        return self.session.run([self.session.get_outputs()[0].name], feed)[0].reshape(-1)


mlflow.models.set_model(Model())
"""

LUA = """
wrk.method = "POST"
wrk.body = [==[%s]==]
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer %s"
function done(summary, latency, requests)
  io.write(string.format("MEASURED %%d %%d %%d %%d %%f\\n", summary.requests, summary.duration,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout, summary.errors.status,
    latency:percentile(99.0) / 1000))
end
"""


class Measured(NamedTuple):
    """What wrk saw of one server.

    :param rate: requests per second.
    :param p99: milliseconds.
    :param failed: requests without a good answer.
    :param answered: all others.
    """

    rate: float
    p99: float
    failed: int
    answered: int


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--swaps",
        action="store_true",
        help="swap versions, step a canary, take it back and end workers under 16 connections instead",
    )
    parser.add_argument("--kills", action="store_true", help="kill workers under 16 of our clients instead")
    parser.add_argument("--soak", type=int, metavar="REQUESTS", help="ask so many requests instead")
    parser.add_argument("--explain", action="store_true", help="explain answers beside predictions instead")
    parser.add_argument(
        "--forest", action="store_true", help="100 trees of a random forest instead of boosted ones"
    )
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--without", nargs="*", default=[], help="servers to leave out: bare, naive, mlflow, mlflow-onnx"
    )
    given = parser.parse_args()
    if shutil.which("wrk") is None:
        print("skipped: wrk is not installed (apt-get install wrk)")
        return
    os.environ.update(
        {"OMP_NUM_THREADS": "1", "BENTOML_DO_NOT_TRACK": "True", "MLFLOW_DISABLE_TELEMETRY": "true"}
    )
    with tempfile.TemporaryDirectory() as name, ExitStack() as servers:
        folder = Path(name)
        rows = make_rows(BATCH)
        estimator = "RandomForestRegressor" if given.forest else "HistGradientBoostingRegressor"
        package, digest = make_package(folder / "package", rows, estimator=estimator)
        if given.swaps:
            swap_under_load(folder, package, digest, rows, servers)
            return
        if given.kills:
            killed_workers(folder, package, digest, rows, servers)
            return
        if given.soak:
            soak(folder, package, digest, rows, given.soak, servers)
            return
        if given.explain:
            explain_beside(folder, package, digest, rows, given.rounds, given.seconds, servers)
            return
        starts = {
            "bare": start_bare,
            "ours": start_ours,
            "naive": start_naive,
            "mlflow": start_mlflow,
            "mlflow-onnx": start_mlflow_onnx,
        }
        urls = {
            label: servers.enter_context(start(folder, package, digest))
            for label, start in starts.items()
            if label not in given.without
        }
        one_row(urls, folder, rows, given.rounds, given.seconds)
        batches(urls, folder, package, rows, given.rounds, given.seconds)


def one_row(
    urls: dict[str, str], folder: Path, rows: list[dict[str, Any]], rounds: int, seconds: int
) -> None:
    """Measure requests of one row."""
    print(f"one row, JSON; median of {rounds} rounds of {seconds} s; requests/s (p99 in ms)")
    print(
        f"{'':<14}"
        + "".join(f"{label:>20}" for label in urls)
        + f"{'ours/bare':>11}{'/naive':>8}{'/mlflow':>9}"
    )
    for connections in CONNECTIONS:
        seen: dict[str, list[Measured]] = {label: [] for label in urls}
        for _ in range(rounds):
            for label, url in urls.items():
                seen[label].append(measure(url, body_of(label, rows[:1]), connections, seconds, folder))
        rates = {label: statistics.median(one.rate for one in many) for label, many in seen.items()}
        tails = {label: statistics.median(one.p99 for one in many) for label, many in seen.items()}
        failed = {
            label: sum(one.failed for one in many)
            for label, many in seen.items()
            if any(one.failed for one in many)
        }
        print(
            f"{connections:>3} at once   "
            + "".join(f"{rates[label]:>10,.0f} ({tails[label]:>6.1f})".rjust(20) for label in urls)
            + "".join(
                f"{rates['ours'] / rates[label]:>{width}.2f}" if label in rates else " " * width
                for label, width in (("bare", 11), ("naive", 8), ("mlflow", 9))
            )
            + (f"  failed: {failed}" if failed else ""),
            flush=True,
        )


def batches(
    urls: dict[str, str], folder: Path, package: Path, rows: list[dict[str, Any]], rounds: int, seconds: int
) -> None:
    """Measure requests of many rows beside ONNX Runtime alone."""
    raw, seen = [], []
    for _ in range(rounds):
        raw.append(raw_rows_per_second(package, rows, seconds))
        seen.append(measure(urls["ours"], body_of("ours", rows), 2, seconds, folder).rate * len(rows))
    ours, limit = statistics.median(seen), statistics.median(raw)
    print(
        f"{len(rows):,} rows a request: {ours:,.0f} rows/s; ONNX Runtime alone {limit:,.0f}; {ours / limit:.2f} of it"
    )


def swap_under_load(
    folder: Path, package: Path, digest: str, rows: list[dict[str, Any]], servers: ExitStack
) -> None:
    """Swap between two versions, step a canary, take it back and end workers under 16 connections until 100,000 requests were answered."""
    from airflow_mlops.serving.local import LocalEndpoint

    os.environ["AIRFLOW_MLOPS_SERVICE_WORKERS"] = "2"  # when one ends, the other goes on
    url = servers.enter_context(start_ours(folder, package, digest))
    server = our_server(folder, int(url.rpartition(":")[2]))
    endpoint = LocalEndpoint(server, timeout_seconds=60)
    steady = measure(url, body_of("ours", rows[:1]), 16, 5, folder)
    other, other_digest = make_package(folder / "other", rows, seed=1)
    seen: list[Measured] = []

    def ask() -> None:
        while sum(one.answered for one in seen) < SWAPPED_REQUESTS:
            seen.append(measure(url, body_of("ours", rows[:1]), 16, 5, folder))

    steps: dict[str, Callable[[], None]] = {
        "swap": lambda: deploy(server, other, other_digest, "2"),
        "swap back": lambda: deploy(server, package, digest, "1"),
        "canary of 10 %": lambda: canary(endpoint, digest, other_digest, 0.1),
        "canary of 50 %": lambda: canary(endpoint, digest, other_digest, 0.5),
        "rollback": lambda: take_back(endpoint),
        "worker ended": lambda: end_worker(server),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    asking = threading.Thread(target=ask)
    asking.start()
    for name in cycle(steps):
        started = time.monotonic()
        steps[name]()
        seconds[name].append(time.monotonic() - started)
        asking.join(timeout=0.5)
        if not asking.is_alive():
            break
    print(
        f"{sum(one.failed for one in seen)} failed of {sum(one.answered for one in seen):,} under 16 connections, 2 workers; "
        f"p99 {statistics.median(one.p99 for one in seen):.1f} ms, steady {steady.p99:.1f}"
    )
    for name, taken in seconds.items():
        if taken:
            print(
                f"{name:16} {len(taken):>3} times, done after {statistics.median(taken):.2f} s, at most {max(taken):.2f}"
            )


def canary(endpoint: LocalEndpoint, digest: str, other_digest: str, share: float) -> None:
    """Let version 2 answer a share of the requests, as a step of a rollout does."""
    from airflow_mlops.core.rollouts.desired_state import ServedVersion

    current = endpoint.desired()
    if current is None:
        raise RuntimeError("nothing is deployed")
    stable = ServedVersion(model_version="1", package_digest=digest, share=1.0 - share)
    new = ServedVersion(model_version="2", package_digest=other_digest, share=share)
    state = replace(
        current, versions=(stable, new), leased=True, rollout="benchmark", revision=current.revision + 1
    )
    endpoint.serve(state, lease_seconds=60.0)


def take_back(endpoint: LocalEndpoint) -> None:
    """Let the stable version answer alone, as a rollback does."""
    current = endpoint.desired()
    if current is None:
        raise RuntimeError("nothing is deployed")
    endpoint.take_back(replace(current.fallback, rollout=None, revision=current.revision + 1))


def killed_workers(
    folder: Path, package: Path, digest: str, rows: list[dict[str, Any]], servers: ExitStack
) -> None:
    """Kill one worker after another, each time when there are two, under 16 clients until 100,000 requests were answered."""
    from airflow_mlops.exceptions import EndpointUnavailableError
    from airflow_mlops.integrations.bentoml import EndpointClient

    os.environ["AIRFLOW_MLOPS_SERVICE_WORKERS"] = "2"
    url = servers.enter_context(start_ours(folder, package, digest))
    server = our_server(folder, int(url.rpartition(":")[2]))
    answered, failed, killed = [0] * 16, [0] * 16, 0

    def ask(caller: int) -> None:
        with EndpointClient(url, TOKEN) as client:
            while sum(answered) < SWAPPED_REQUESTS:
                try:
                    client.predict(rows[:1])
                except EndpointUnavailableError:
                    failed[caller] += 1
                answered[caller] += 1

    callers = [threading.Thread(target=ask, args=(number,)) for number in range(len(answered))]
    for caller in callers:
        caller.start()
    while any(caller.is_alive() for caller in callers):
        time.sleep(1.0)
        if len(listening := workers(server)) == 2:
            listening[0].kill()
            killed += 1
    print(
        f"{sum(failed)} failed of {sum(answered):,} under 16 clients, 2 workers of which {killed} were killed"
    )


def end_worker(server: LocalServer) -> None:
    """Ask one of the workers to end, as a node that is drained does, and wait until there are two again."""
    from airflow_mlops.integrations.bentoml import wait_until

    old = workers(server)[0]
    old.send_signal(signal.SIGTERM)
    old.wait(timeout=30)
    wait_until(lambda: len(workers(server)) == 2, timeout_seconds=30)


def workers(server: LocalServer) -> list[psutil.Process]:
    """Give the processes that listen."""
    running = server.running()
    if running is None:
        raise RuntimeError(server.log_tail())
    return [one for one in psutil.Process(running.pid).children() if _listens(one)]


def _listens(process: psutil.Process) -> bool:
    try:
        is_worker = any("_bentoml_impl.worker" in word for word in process.cmdline())
        return is_worker and any(one.status == psutil.CONN_LISTEN for one in process.net_connections("tcp"))
    except psutil.Error:  # gone, or a zombie
        return False


def soak(
    folder: Path,
    package: Path,
    digest: str,
    rows: list[dict[str, Any]],
    requests: int,
    servers: ExitStack,
) -> None:
    """Ask for long under 16 connections; print the service's memory, and what it counted beside what its log holds."""
    import psutil

    from airflow_mlops.core.windows import Window
    from airflow_mlops.serving.inference_log import read_inference_log

    url = servers.enter_context(start_ours(folder, package, digest))
    server = our_server(folder, int(url.rpartition(":")[2]))
    if (running := server.running()) is None:
        raise RuntimeError(server.log_tail())
    began, answered, failed, sizes = datetime.now(UTC), 0, 0, []
    while answered < requests:
        seen = measure(url, body_of("ours", rows[:1]), 16, 10, folder)
        answered, failed = answered + seen.answered, failed + seen.failed
        family = psutil.Process(running.pid).children(recursive=True)
        sizes.append(max(process.memory_info().rss for process in family) / 1e6)
        print(
            f"{answered:>9,} requests: {seen.rate:,.0f}/s, p99 {seen.p99:.1f} ms, {sizes[-1]:.0f} MB",
            flush=True,
        )
    exposed = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()  # noqa: S310 - our own service
    counted = sum(
        float(line.rpartition(" ")[2])
        for line in exposed.splitlines()
        if line.startswith("airflow_mlops_predictions_total")
    )
    server.stop()
    window = Window(start=began - timedelta(minutes=1), end=datetime.now(UTC) + timedelta(minutes=1))
    logged = read_inference_log(server.serving_dir / "inference_log", "fare", window).height
    print(
        f"{failed} failed; {counted:,.0f} rows answered and {logged:,} in the log: {counted - logged:+,.0f}; "
        f"memory {sizes[0]:.0f} MB at first, {max(sizes):.0f} at most, {sizes[-1]:.0f} at the end"
    )


def explain_beside(
    folder: Path,
    package: Path,
    digest: str,
    rows: list[dict[str, Any]],
    rounds: int,
    seconds: int,
    servers: ExitStack,
) -> None:
    """Measure predictions alone, and while explanations of ten rows are asked for one after the other."""
    from airflow_mlops.integrations.bentoml import EndpointClient

    url = servers.enter_context(start_ours(folder, package, digest))
    times: list[float] = []
    stopped = threading.Event()

    def explain() -> None:
        with EndpointClient(url, TOKEN) as client:
            while not stopped.is_set():
                started = time.perf_counter()
                client.explain(rows[:10])
                times.append(time.perf_counter() - started)

    with EndpointClient(url, TOKEN) as client:
        client.explain(rows[:10])
        for _ in range(5):
            started = time.perf_counter()
            client.explain(rows[:10])
            times.append(time.perf_counter() - started)
    print(f"ten rows explained in {1e3 * statistics.median(times):.0f} ms while nothing else is asked")
    for connections in CONNECTIONS[:2]:
        alone, beside = [], []
        times.clear()
        for _ in range(rounds):
            alone.append(measure(url, body_of("ours", rows[:1]), connections, seconds, folder))
            stopped.clear()
            asking = threading.Thread(target=explain)
            asking.start()
            beside.append(measure(url, body_of("ours", rows[:1]), connections, seconds, folder))
            stopped.set()
            asking.join()
        told = [
            f"{statistics.median(one.rate for one in many):,.0f} requests/s (p99 {statistics.median(one.p99 for one in many):.1f} ms)"
            for many in (alone, beside)
        ]
        print(
            f"{connections:>3} at once: {told[0]} alone, {told[1]} beside explanations, of which ten rows took "
            f"{1e3 * statistics.median(times):.0f} ms; failed: {sum(one.failed for one in (*alone, *beside))}",
            flush=True,
        )


def make_rows(count: int) -> list[dict[str, Any]]:
    """Make rows that look like taxi trips."""
    rng = np.random.default_rng(0)
    columns = {
        "trip_distance": rng.gamma(2.0, 1.5, count).round(2),
        "pickup_location_id": rng.integers(1, 264, count),
        "dropoff_location_id": rng.integers(1, 264, count),
        "hour": rng.integers(0, 24, count),
        "day_of_week": rng.integers(0, 7, count),
        "passenger_count": rng.integers(1, 6, count),
        "rate_code_id": rng.choice(["1", "2", "5"], count),
    }
    return pd.DataFrame(columns).to_dict("records")


def make_package(
    folder: Path, rows: list[dict[str, Any]], seed: int = 0, estimator: str = "HistGradientBoostingRegressor"
) -> tuple[Path, str]:
    """Train on made rows and package the model as training does."""
    from airflow_mlops.core.model.background import BACKGROUND_FILE, Background
    from airflow_mlops.core.model.columns import ColumnRoles
    from airflow_mlops.core.model.package import Holdout, PackageManifest, TrainedOn
    from airflow_mlops.core.model.signature import FieldSpec, ModelSignature
    from airflow_mlops.core.model.tuning import Candidate
    from airflow_mlops.integrations import onnx, sklearn
    from airflow_mlops.serving.package import hash_files, write_manifest

    folder.mkdir()
    frame = pd.DataFrame(make_rows(20_000))
    fare = 3.0 + 2.5 * frame["trip_distance"] + np.random.default_rng(seed).normal(0.0, 1.0, len(frame))
    pipeline = sklearn.build_pipeline(
        Candidate(estimator=f"sklearn.ensemble.{estimator}", params=ESTIMATORS[estimator]),
        ColumnRoles(target="fare", time="t", numeric=NUMERIC, categorical=CATEGORICAL),
        seed=seed,
    ).fit(frame[[*NUMERIC, *CATEGORICAL]], fare)
    (folder.parent / "pipeline.pkl").write_bytes(pickle.dumps(pipeline))
    inputs = [FieldSpec(name=name, type="number") for name in NUMERIC]
    inputs += [FieldSpec(name=name, type="string") for name in CATEGORICAL]
    signature = ModelSignature(inputs=tuple(inputs), output="fare")
    (folder / "model.onnx").write_bytes(onnx.convert(pipeline, signature))
    drawn = frame.sample(50, random_state=seed)
    columns = {name: tuple(drawn[name].tolist()) for name in (*NUMERIC, *CATEGORICAL)}
    (folder / BACKGROUND_FILE).write_text(
        Background(columns=columns, drawn_from=len(frame), seed=seed).to_json()
    )
    known = rows[:3]
    manifest = PackageManifest(
        task="regression",
        signature=signature,
        serving_form="onnx",
        serving_reason="for a measurement",
        model_file="model.onnx",
        files=hash_files(folder),
        target="fare",
        known_rows=tuple(known),
        known_predictions=tuple(pipeline.predict(pd.DataFrame(known)[[*NUMERIC, *CATEGORICAL]]).tolist()),
        trained_on=TrainedOn(
            dataset_digest="sha256:0",
            dataset_uri="memory",
            dataset_version=0,
            rows=len(frame),
            simple_prediction=1.0,
        ),
        holdout=Holdout(metric="mae", value=0.1, row_count=10),
    )
    return folder, write_manifest(folder, manifest)


def raw_rows_per_second(package: Path, rows: list[dict[str, Any]], seconds: float) -> float:
    """Give the rows per second of ONNX Runtime alone, with inputs that are there already."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        package / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    feed = {name: np.array([[row[name]] for row in rows], dtype=np.float32) for name in NUMERIC}
    feed |= {name: np.array([[row[name]] for row in rows], dtype=object) for name in CATEGORICAL}
    output = session.get_outputs()[0].name
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        session.run([output], feed)
        count += len(rows)
    return count / (time.perf_counter() - started)


def body_of(label: str, rows: list[dict[str, Any]]) -> str:
    """Write a request the way a server wants it."""
    return json.dumps({"dataframe_records" if label.startswith("mlflow") else "rows": rows})


def measure(url: str, body: str, connections: int, seconds: int, folder: Path) -> Measured:
    """Ask a server for some seconds, after a short warm-up."""
    script = folder / "request.lua"
    script.write_text(LUA % (body, TOKEN))
    path = url + ("/invocations" if url.endswith("#mlflow") else "/predict")
    path = path.replace("#mlflow", "")
    command = ["wrk", "-t1", f"-c{connections}", "--timeout", "10", "-s", str(script), path]
    subprocess.run([*command, "-d1"], check=True, capture_output=True)
    output = subprocess.run([*command, f"-d{seconds}"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"MEASURED (\d+) (\d+) (\d+) (\d+) ([\d.]+)", output)
    if found is None:
        raise RuntimeError(output)
    requests, microseconds, broken, refused = (int(found[i]) for i in range(1, 5))
    return Measured(1e6 * requests / microseconds, float(found[5]), broken + refused, requests - refused)


@contextmanager
def start_bare(folder: Path, package: Path, digest: str) -> Iterator[str]:
    """Start uvicorn with an ASGI callable."""
    here = _copy(folder / "bare", package, "bare.py", ASGI)
    with _running(
        here, ["uvicorn", "bare:app", "--no-access-log", "--log-level", "warning", "--port"], "/"
    ) as url:
        yield url


@contextmanager
def start_naive(folder: Path, package: Path, digest: str) -> Iterator[str]:
    """Start a plain BentoML service."""
    here = _copy(folder / "naive", package, "naive.py", NAIVE)
    os.environ["BENTOML_HOME"] = str(here / "home")
    with _running(
        here, ["bentoml", "serve", "naive:Naive", "--host", "127.0.0.1", "--port"], "/readyz"
    ) as url:
        yield url


@contextmanager
def start_mlflow(folder: Path, package: Path, digest: str) -> Iterator[str]:
    """Start `mlflow models serve` of the pipeline."""
    import mlflow

    pipeline = pickle.loads((folder / "pipeline.pkl").read_bytes())  # noqa: S301 - written a moment ago
    mlflow.sklearn.save_model(
        pipeline, folder / "sklearn", serialization_format="cloudpickle", pip_requirements=[]
    )
    with _mlflow_serving(folder, folder / "sklearn") as url:
        yield url


@contextmanager
def start_mlflow_onnx(folder: Path, package: Path, digest: str) -> Iterator[str]:
    """Start `mlflow models serve` of the ONNX model."""
    import mlflow

    here = _copy(folder / "mlflow", package, "model.py", PYFUNC)
    artifacts = {"model": str(here / "model.onnx")}
    mlflow.pyfunc.save_model(
        here / "saved", python_model=str(here / "model.py"), artifacts=artifacts, pip_requirements=[]
    )
    with _mlflow_serving(here, here / "saved") as url:
        yield url


@contextmanager
def _mlflow_serving(folder: Path, model: Path) -> Iterator[str]:
    command = ["mlflow", "models", "serve", "--env-manager", "local", "--model-uri", str(model), "--port"]
    with _running(folder, command, "/ping") as url:
        yield url + "#mlflow"


@contextmanager
def start_ours(folder: Path, package: Path, digest: str) -> Iterator[str]:
    """Start the service as a deployment does."""
    server = our_server(folder, _free_port())
    try:
        deploy(server, package, digest, "1")
        yield server.url
    finally:
        server.stop()


def our_server(folder: Path, port: int) -> LocalServer:
    """Give the service that is measured."""
    from airflow_mlops.integrations.bentoml import LocalServer

    return LocalServer(folder / "serving", port=port, token=TOKEN)


def deploy(server: LocalServer, package: Path, digest: str, version: str) -> None:
    """Let the service answer with a version."""
    from airflow_mlops.core.rollouts.desired_state import ServedVersion
    from airflow_mlops.serving.local import LocalEndpoint, deploy_package

    served = ServedVersion(model_version=version, package_digest=digest)
    deploy_package(LocalEndpoint(server, timeout_seconds=60), package, "fare", served)


def _copy(folder: Path, package: Path, name: str, text: str) -> Path:
    folder.mkdir()
    (folder / "model.onnx").write_bytes((package / "model.onnx").read_bytes())
    (folder / name).write_text(text)
    return folder


@contextmanager
def _running(folder: Path, command: list[str], ready: str) -> Iterator[str]:
    port = _free_port()
    environment = (
        os.environ
        | {
            "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # MLflow starts uvicorn by name
        }
    )
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, str(port)],
            cwd=folder,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(url + ready, process, folder / "server.log")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()  # noqa: S310 - our own server
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(f"{url} does not answer:\n{log.read_text()[-2000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()

"""What ScoreBatchOperator's step costs beside raw onnxruntime over the same Parquet files, in the same run: rows/s, CPU seconds, memory.

Raw is what one would write by hand: read batches of 50,000 rows, predict, keep nothing. It runs on one thread, and with onnxruntime's own
threads. The step also resolves the version at a real MLflow server, verifies the package, and writes predictions to a Delta table in
one commit, or in one per day. Each measurement is a process of its own. ``--rows 1000000 10000000`` are the defaults.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

NUMBERS = [f"x{i}" for i in range(10)]
CATEGORIES = ["kind", "zone"]
CHUNK = 1_000_000
START = datetime(2024, 1, 1, tzinfo=UTC)
DAYS = 30


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many is told")
    parser.add_argument("--one", help="measure one thing, in this process")
    parser.add_argument("--argument", type=json.loads)
    given = parser.parse_args()
    if given.one:
        measure_one(given.one, given.argument)
        return
    os.environ.update({"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server, uri = start_mlflow(folder)
        try:
            version = make_model(folder, uri)
            print(
                f"{'rows':>10}  {'what':<26}{'seconds':>9}{'rows/s':>12}{'of best raw':>13}{'CPU s':>8}{'peak MB':>9}"
            )
            for rows in given.rows:
                table = make_table(folder / f"rows-{rows}", rows)
                compare(folder, uri, version, table, rows, given.rounds)
        finally:
            server.terminate()
            server.wait()


def compare(folder: Path, uri: str, version: str, table: str, rows: int, rounds: int) -> None:
    """Measure everything on one table, in turns, and print the medians."""
    raw = {"table": table, "model": str(folder / "model.onnx")}
    spec = {
        "dataset": table,
        "model_name": "bench",
        "model_version": version,
        "id_column": "id",
        "time_column": "time",
    }
    whole = {"uri": uri, "spec": spec}
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        "raw, 1 thread": ("raw", raw | {"threads": 1}),
        "raw, onnxruntime's threads": ("raw", raw | {"threads": 0}),
        "step, one commit": ("step", whole),
        "step, a commit per day": ("step", whole | {"partition": "day"}),
    }
    found: dict[str, list[dict[str, float]]] = {label: [] for label in asked}
    for number in range(rounds):
        for label, (what, argument) in asked.items():
            found[label].append(
                child(what, argument | {"out": str(folder / f"out-{rows}-{what}-{number}-{len(label)}")})
            )
    middle = {
        label: sorted(items, key=lambda item: item["seconds"])[rounds // 2] for label, items in found.items()
    }
    best = min(item["seconds"] for label, item in middle.items() if label.startswith("raw"))
    for label, item in middle.items():
        print(
            f"{rows:>10}  {label:<26}{item['seconds']:>9.2f}{rows / item['seconds']:>12,.0f}{best / item['seconds']:>12.0%} "
            f"{item['cpu']:>8.1f}{item['megabytes']:>9.0f}",
            flush=True,
        )


def child(what: str, argument: dict[str, Any]) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", what, "--argument", json.dumps(argument)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure_one(what: str, argument: dict[str, Any]) -> None:
    """Run it, and print what it took; imports are not counted."""
    work = raw if what == "raw" else step
    prepared = work(argument)
    cpu, started = time.process_time(), time.monotonic()
    rows = prepared()
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    # The high-water mark of this very program; what getrusage tells is that of its parent, if that had more.
    (high,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    peak = int(high) / 1024
    print(json.dumps({"rows": rows, "seconds": seconds, "cpu": cpu, "megabytes": peak}))


def raw(argument: dict[str, Any]) -> Any:
    """Predict with nothing but pyarrow and onnxruntime."""
    import onnxruntime
    import pyarrow.parquet as pq

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = argument["threads"]

    def work() -> int:
        session = onnxruntime.InferenceSession(argument["model"], options, providers=["CPUExecutionProvider"])
        output, count = session.get_outputs()[0].name, 0
        for path in sorted(Path(argument["table"]).glob("*.parquet")):
            for batch in pq.ParquetFile(path).iter_batches(50_000, columns=NUMBERS + CATEGORIES):
                feed = {
                    name: batch[name].to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, 1)
                    for name in NUMBERS
                }
                feed |= {
                    name: batch[name].to_numpy(zero_copy_only=False).reshape(-1, 1) for name in CATEGORIES
                }
                count += len(session.run([output], feed)[0])
        return count

    return work


def step(argument: dict[str, Any]) -> Any:
    """Run the step as its operator does."""
    for name in ("deltalake", "mlflow", "onnxruntime", "polars", "airflow_mlops.steps.score"):
        importlib.import_module(name)

    from airflow_mlops.services import Services
    from airflow_mlops.steps.base import run_step

    spec = argument["spec"] | {"table": argument["out"], "partition": argument.get("partition")}
    return lambda: run_step("score", spec, Services(tracking_uri=argument["uri"]))["row_count"]


def make_table(folder: Path, rows: int) -> str:
    """Write a table in the order of time, a million rows per file."""
    from deltalake import write_deltalake

    for first in range(0, rows, CHUNK):
        count = min(CHUNK, rows - first)
        write_deltalake(str(folder), make_rows(first, count, rows).to_arrow(), mode="append")
    return str(folder)


def make_rows(first: int, count: int, rows: int) -> Any:
    """Make rows whose times are spread over a month."""
    import polars as pl

    random = np.random.default_rng(first)
    step_us = timedelta(days=DAYS) // timedelta(microseconds=1) // rows
    numbers = {name: random.normal(size=count) for name in NUMBERS}
    return pl.DataFrame(
        {
            "id": np.arange(first, first + count),
            "time": (np.arange(first, first + count) * step_us),
            **numbers,
            "kind": random.choice(["a", "b", "c", "d"], count),
            "zone": random.choice([f"zone {number}" for number in range(60)], count),
            "y": 3.0 * numbers["x0"] + numbers["x1"] * numbers["x2"],
        }
    ).with_columns((pl.lit(START) + pl.duration(microseconds="time")).alias("time"))


def make_model(folder: Path, uri: str) -> str:
    """Train and register 100 trees; gives the version, and leaves its ONNX file in the folder."""
    from airflow_mlops.integrations.mlflow import Registry
    from airflow_mlops.services import Services
    from airflow_mlops.steps.base import run_step

    services = Services(tracking_uri=uri)
    window = {"start": START.isoformat(), "end": (START + timedelta(days=DAYS)).isoformat()}
    trained = run_step(
        "train",
        {
            "dataset": make_table(folder / "training", 20_000),
            "model_name": "bench",
            "estimator": "sklearn.ensemble.HistGradientBoostingRegressor",
            "estimator_params": {"max_iter": 100},
            "target": "y",
            "numeric": NUMBERS,
            "categorical": CATEGORIES,
            "time_column": "time",
            "window": window,
        },
        services,
    )
    spec = {"model_name": "bench", "run_id": trained["run_id"], "package_digest": trained["package_digest"]}
    version = str(run_step("register", spec, services)["model_version"])
    registry = Registry.connect(services)
    package = registry.download_version(registry.version("bench", version), folder / "download")
    (Path(package) / "model.onnx").rename(folder / "model.onnx")
    return version


def start_mlflow(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server on a free port and wait for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", f"{folder}/artifacts"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return server, f"http://127.0.0.1:{port}"
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"MLflow did not start: {(folder / 'log').read_text()}")


if __name__ == "__main__":
    main()

"""What TrainModelOperator costs over the bare fit and MLflow calls by hand: 1,000,000 rows of 20 columns.

By hand: read Parquet, fit the same estimator, score the newest fifth, log parameters, metric and the model to the same MLflow server
with its requirements given. Three ways, each in a fresh process, in turn: by hand in a plain script, by hand in a task, the operator in
a task; tasks run by ``dag.test()`` in an Airflow home of their own. 1,000 rows give what is fixed. Wall and CPU seconds and peak memory
(VmHWM: the peak that getrusage gives may be that of the process it was started from) of the whole process, and wall seconds of the task.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZES, COLUMNS, ROUNDS = (1_000, 1_000_000), 20, 3

DATA = f"""
import sys
from datetime import UTC, datetime, timedelta
import numpy as np, polars as pl
from airflow_mlops.integrations import delta
folder, rows = sys.argv[1], int(sys.argv[2])
rng = np.random.default_rng(0)
x = rng.normal(size=(rows, {COLUMNS})).astype("float32")
start = datetime(2024, 1, 1, tzinfo=UTC)
frame = pl.DataFrame({{f"x{{i}}": x[:, i] for i in range({COLUMNS})}}).with_columns(
    y=pl.Series(x[:, 0] * 2 + np.sin(x[:, 1]) + rng.normal(scale=0.1, size=rows)),
    t=pl.datetime_range(start, start + timedelta(seconds=rows - 1), "1s", eager=True),
)
frame.write_parquet(folder + "/rows.parquet")
delta.replace_window(folder + "/table", frame, time_column="t", window=None)
"""

BY_HAND = """
def by_hand(folder, uri, seed):
    import time
    import mlflow, pandas as pd
    from mlflow.models import infer_signature
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.metrics import mean_absolute_error
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("by_hand")
    frame = pd.read_parquet(folder + "/rows.parquet").sort_values("t")
    cut = int(len(frame) * 0.8)
    features = [name for name in frame if name.startswith("x")]
    with mlflow.start_run():
        model = HistGradientBoostingRegressor(max_iter=100, random_state=seed)
        begun = time.monotonic()
        model.fit(frame[features][:cut], frame["y"][:cut])
        mlflow.log_metric("fit_seconds", time.monotonic() - begun)
        predicted = model.predict(frame[features][cut:])
        mlflow.log_params(model.get_params())
        mlflow.log_metric("mae", mean_absolute_error(frame["y"][cut:], predicted))
        trusted = ["sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor", "numpy.dtype"]
        mlflow.sklearn.log_model(model, name="model", signature=infer_signature(frame[features][:100], predicted[:100]),
            pip_requirements=["scikit-learn"], skops_trusted_types=trusted)
"""

#: Imported by Airflow from the Dag folder.
DAGS = f"""
import os
from datetime import UTC, datetime
from airflow.sdk import DAG, task
from airflow_mlops.operators.train import TrainModelOperator
{BY_HAND}
FOLDER, URI = os.environ["BENCHMARK_FOLDER"], os.environ["BENCHMARK_URI"]
with DAG("hand", schedule=None, start_date=datetime(2024, 1, 1, tzinfo=UTC)):
    @task
    def train(dag_run=None):
        by_hand(FOLDER, URI, int(dag_run.conf["seed"]))
    train()
with DAG("operator", schedule=None, start_date=datetime(2024, 1, 1, tzinfo=UTC)):
    TrainModelOperator(
        task_id="train", dataset=FOLDER + "/table", model_name="benchmark",
        estimator="sklearn.ensemble.HistGradientBoostingRegressor", estimator_params={{"max_iter": 100}},
        seed="{{{{ dag_run.conf.seed }}}}", target="y", time_column="t", window_start=None, window_end=None,
        numeric=[f"x{{i}}" for i in range({COLUMNS})],
    )
"""

SCRIPT = f"""
import os, sys, time
started = time.monotonic()
{BY_HAND}
by_hand(os.environ["BENCHMARK_FOLDER"], os.environ["BENCHMARK_URI"], int(sys.argv[1]))
task_seconds = time.monotonic() - started
"""

IN_A_TASK = """
import os, sys, time
started = time.monotonic()
from datetime import UTC, datetime
from airflow.dag_processing.dagbag import DagBag
dag = DagBag(os.environ["AIRFLOW__CORE__DAGS_FOLDER"]).dags["{dag}"]
run = dag.test(logical_date=datetime.now(UTC), run_conf={{"seed": int(sys.argv[1])}})
(ended,) = run.get_task_instances()
assert str(ended.state) == "success", ended.state
task_seconds = ended.duration
"""

COST = """
import json, resource
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
cpu = sum(usage.ru_utime + usage.ru_stime for usage in usages)
print("\\n" + json.dumps([time.monotonic() - started, task_seconds, cpu, int(status["VmHWM"].split()[0]) / 1024]))
"""

WAYS = {
    "script, by hand": SCRIPT,
    "task, by hand": IN_A_TASK.format(dag="hand"),
    "task, operator": IN_A_TASK.format(dag="operator"),
}


class Cost(NamedTuple):
    """What one process took."""

    wall_seconds: float
    task_seconds: float
    cpu_seconds: float
    peak_mb: float


def main() -> None:
    """Print a table for each size."""
    with tempfile.TemporaryDirectory() as home, mlflow_server(Path(home)) as uri:
        environment = airflow_home(Path(home), uri)
        for rows in SIZES:
            with tempfile.TemporaryDirectory() as folder:
                environment["BENCHMARK_FOLDER"] = folder
                run([sys.executable, "-c", DATA, folder, str(rows)], environment)
                rounds = [
                    {name: measure(code, rows + number, environment) for name, code in WAYS.items()}
                    for number in range(ROUNDS)
                ]
            report(rows, rounds)


def report(rows: int, rounds: list[dict[str, Cost]]) -> None:
    """Print medians, and of the differences inside a round the median and the range."""
    print(f"\n{rows:,} rows x {COLUMNS} columns, median of {len(rounds)}")
    print(f"{'':<18}{'wall s':>9}{'task s':>9}{'CPU s':>9}{'peak MB':>9}")
    for name in WAYS:
        medians = [statistics.median(values) for values in zip(*(one[name] for one in rounds), strict=True)]
        print(f"{name:<18}" + "".join(f"{value:>9.1f}" for value in medians))
    for other, field in (
        ("script, by hand", "task_seconds"),
        ("script, by hand", "cpu_seconds"),
        ("task, by hand", "task_seconds"),
        ("task, by hand", "cpu_seconds"),
    ):
        pairs = [(getattr(one["task, operator"], field), getattr(one[other], field)) for one in rounds]
        more = sorted(ours - theirs for ours, theirs in pairs)
        ratios = sorted(ours / theirs - 1.0 for ours, theirs in pairs)
        print(
            f"operator over {other}, {field}: {statistics.median(more):+.1f} s ({more[0]:+.1f} to {more[-1]:+.1f}), "
            f"{statistics.median(ratios):+.0%} ({ratios[0]:+.0%} to {ratios[-1]:+.0%})"
        )


def measure(code: str, seed: int, environment: dict[str, str]) -> Cost:
    """Run in a fresh process; it prints its own cost last."""
    told = run([sys.executable, "-W", "ignore", "-c", code + COST, str(seed)], environment)
    return Cost(*json.loads(told.splitlines()[-1]))


def run(command: list[str], environment: dict[str, str]) -> str:
    """Run to the end; what a command that failed said is shown."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-3000:])
    return done.stdout


def airflow_home(home: Path, uri: str) -> dict[str, str]:
    """Make an Airflow with both Dags; give the variables to run in it."""
    (home / "dags").mkdir()
    (home / "dags" / "training.py").write_text(DAGS)
    mlflow = {"conn_type": "mlflow", "extra": {"tracking_uri": uri}}
    ledger = {"conn_type": "mlops_ledger", "extra": {"url": f"sqlite:///{home}/ledger.db"}}
    environment = {
        **os.environ,
        "AIRFLOW_HOME": str(home / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(home / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW_CONN_MLFLOW_DEFAULT": json.dumps(mlflow),
        "AIRFLOW_CONN_LEDGER_DEFAULT": json.dumps(ledger),
        "BENCHMARK_FOLDER": str(home),
        "BENCHMARK_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }
    for command in (["db", "migrate"], ["dags", "reserialize"]):
        run([sys.executable, "-m", "airflow", *command], environment)
    return environment


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Start MLflow on SQLite and give its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--workers",
        "1",
    ]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", f"{folder}/artifacts"]
    with (folder / "mlflow.log").open("w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=2).close()  # noqa: S310 - our own server
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(url)


if __name__ == "__main__":
    main()

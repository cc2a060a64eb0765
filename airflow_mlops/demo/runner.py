"""The demo: a whole loop on this machine, told while it happens."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.windows import Window
from airflow_mlops.demo import airflow, story, stream
from airflow_mlops.demo.console import Console
from airflow_mlops.demo.processes import MemoryWatch, ProcessFailedError, ProcessGroup
from airflow_mlops.exceptions import MLOpsError
from airflow_mlops.integrations.bentoml import EndpointClient, LocalServer
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODEL = "trip_fare"
ROWS_PER_REQUEST = 500
RUN_TIMEOUT_SECONDS = 600


class Interrupted(Exception):  # noqa: N818 - not an error: somebody asked the demo to end
    """SIGTERM or SIGHUP arrived."""


def run(
    *, data: Path | None, workspace: Path, keep_up: bool, seed: int = 0, console: Console | None = None
) -> int:
    """Tell the story from an empty workspace to the last window.

    :param data: a real file of trips; ``None``: the simulator.
    :param workspace: folder for everything; what a former run left there is removed.
    :param keep_up: leave everything running until Ctrl-C.
    :param seed: of the simulator.
    :returns: exit code: 0, 1 when something failed, 130 when interrupted.
    """
    console = console or Console()
    workspace = workspace.resolve()
    try:
        rows, windows = (stream.simulate(seed), stream.months()) if data is None else stream.load_stream(data)
    except (MLOpsError, ValueError) as err:
        console.bad(str(err))
        return 1
    months = list(stream.split_by_month(rows, windows))
    try:
        with _ending_on_signals(), ProcessGroup(workspace / "logs") as group:
            _clean(workspace)
            stack = airflow.Stack.choose(workspace)
            server = LocalServer(stack.serving, port=stack.endpoint_port, token=stack.endpoint_token)
            with (
                contextlib.closing(_Service(server)),
                MemoryWatch(lambda: [*group.family(), *_family(server)]) as memory,
            ):
                demo = Demo(stack, group, console, months)
                demo.tell(simulated=data is None)
                demo.finish(memory.peak_mb)
                if keep_up:
                    demo.stay_up()
    except (KeyboardInterrupt, Interrupted):
        console.plain("\nEnded; every process of the demo is gone.")
        return 130
    except (ProcessFailedError, MLOpsError, RuntimeError, TimeoutError, OSError) as err:
        console.bad(f"\nThe demo failed: {err}\nLogs: {workspace / 'logs'}")
        return 1
    console.plain("Every process of the demo is gone.")
    return 0


class Demo:
    """The story, chapter by chapter.

    :param stack: where everything runs.
    :param group: the processes of Airflow and MLflow.
    :param console: who listens.
    :param months: the stream.
    """

    def __init__(
        self, stack: airflow.Stack, group: ProcessGroup, console: Console, months: list[stream.Month]
    ) -> None:
        self.stack = stack
        self.group = group
        self.console = console
        self.reference, self.later = months[: stream.REFERENCE_MONTHS], months[stream.REFERENCE_MONTHS :]
        self.seconds: dict[str, float] = {}
        self.links: dict[str, str] = {}
        self.windows: list[story.WindowStory] = []
        self.first_model: Any = None

    def tell(self, *, simulated: bool) -> None:
        """Everything up to the last window."""
        source = "simulated city taxi trips" if simulated else "your file of taxi trips"
        self.console.title("airflow-mlops: one model, from its first training to its repair")
        self.console.say(
            f"The data: {source}, {self.reference[0].name} to {self.later[-1].name}, a month at a time. "
            + (
                f"From {stream.SURCHARGE_FROM:%Y-%m-%d} on every trip costs ${stream.SURCHARGE:.2f} more."
                if simulated
                else ""
            )
        )
        with self._timed("start"):
            self.client = airflow.start(self.stack, self.group, self.console.say)
        self.console.good(f"Airflow is up: {self.stack.airflow_url}   MLflow: {self.stack.mlflow_url}")
        self.ledger = Ledger.open(self.stack.ledger_url)
        try:
            self.console.title(f"1. A first model from {len(self.reference)} months")
            with self._timed("first model"):
                self.first_deployment()
            self.console.title("2. Months go by")
            for month in self.later:
                with self._timed(f"window {month.name}"):
                    self.windows.append(self.live_through(month))
        finally:
            self.ledger.close()

    def first_deployment(self) -> None:
        """Let the training Dag make the first model of the reference months."""
        from airflow_mlops.serving.model import load_model

        for month in self.reference:
            self._land(month)
        window = Window(start=self.reference[0].window.start, end=self.reference[-1].window.end)
        self._run_dag("train_and_deploy", window)
        deployed = self._newest(EntryKind.DEPLOYMENT)
        trained = self._newest(EntryKind.TRAINING)
        self.links["MLflow run of the first model"] = trained.payload["run_url"]
        self.links["endpoint"] = self.stack.endpoint_url
        self.console.good(f"{trained.summary}.")
        self.console.good(f"{deployed.summary}.")
        # Kept for the comparison at the end: what if nobody had ever retrained?
        kept = self.stack.workspace / "first_model"
        shutil.copytree(self.stack.serving / "models" / MODEL / deployed.payload["model_version"], kept)
        self.first_model = load_model(kept)
        self.endpoint = EndpointClient(self.stack.endpoint_url, self.stack.endpoint_token)
        example = self.reference[-1].rows.select(stream.FEATURES).head(1).to_dicts()
        answer = self.endpoint.predict(example)
        self.console.say(
            f"It answers: a trip of {example[0]['trip_distance']} miles costs about ${answer['predictions'][0]:.2f}."
        )

    def live_through(self, month: stream.Month) -> story.WindowStory:
        """One month: people ask, the bills arrive, the model is checked, a decision is taken and carried out."""
        version = str(self.endpoint.ready()["model_version"])
        self._send_traffic(month)
        self._land(month)
        self._run_dag("monitor", month.window)
        decision = self._await_decision(month.window)
        check = self._check(EntryKind.PERFORMANCE_CHECK, month.window)
        promoted = self._outcome(decision)
        told = story.WindowStory(
            window=month.name,
            rows=int(check["row_count"]),
            model_version=version,
            live_error=float(check["value"]),
            first_error=self._first_error(month),
            outcome=str(decision.payload["outcome"]),
            reason=str(decision.payload["reason"]),
            promoted_version=promoted,
        )
        report = self._check(EntryKind.DRIFT_CHECK, month.window).get("report_url")
        line = f"{month.name}: {told.rows} trips, version {version}, error ${told.live_error:.2f} a trip. Decision: {told.outcome}."
        if told.outcome == "nothing":
            self.console.say(line)
            return told
        self.console.say(f"{line} Why: {told.reason}.")
        if report:
            self.links[f"drift report {month.name}"] = report
            self.console.say(f"Drift report: {report}")
        if promoted:
            self.links[f"MLflow run of version {promoted}"] = self._newest(EntryKind.TRAINING).payload[
                "run_url"
            ]
            self.console.good(
                f"{self._newest(EntryKind.PROMOTION).summary}. {self._newest(EntryKind.DEPLOYMENT).summary}."
            )
        return told

    def finish(self, peak_memory_mb: float) -> None:
        """Table, picture, links and figures."""
        picture = self.stack.workspace / "error_per_window.png"
        story.draw(self.windows, picture)
        whole = story.Story(
            windows=tuple(self.windows),
            links=self.links,
            seconds=self.seconds,
            peak_memory_mb=round(peak_memory_mb),
        )
        (self.stack.workspace / "story.json").write_text(json.dumps(to_dict(whole), indent=2))
        self.console.title("3. What happened")
        self.console.plain(story.table(self.windows, width=self.console.width))
        self.console.plain()
        for name, link in self.links.items():
            self.console.plain(f"  {name + ':':<34} {link}")
        self.console.plain(f"  {'picture:':<34} {picture}")
        total = sum(self.seconds.values())
        slowest = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        self.console.plain(f"\n{total:.0f} s in all ({slowest}); at most {peak_memory_mb:.0f} MB of memory.")

    def stay_up(self) -> None:
        """Leave everything running until somebody presses Ctrl-C."""
        self.console.title(
            f"Look around: {self.stack.airflow_url} (Dags, runs, ledger entries in the task logs). Ctrl-C ends everything."
        )
        while True:
            self.group.check()
            time.sleep(1.0)

    # -- what a chapter needs -----------------------------------------------------------------------------

    def _land(self, month: stream.Month) -> None:
        """Put a month's finished trips where the ingest looks, whole or not at all."""
        landing = self.stack.data / "landing"
        landing.mkdir(parents=True, exist_ok=True)
        temporary = landing / f".{month.name}.tmp"
        month.rows.write_parquet(temporary)
        temporary.rename(landing / f"{month.name}.parquet")

    def _send_traffic(self, month: stream.Month) -> None:
        """Ask the service for the price of every trip of the month, before its bill is known."""
        for start in range(0, month.rows.height, ROWS_PER_REQUEST):
            part = month.rows.slice(start, ROWS_PER_REQUEST)
            self.endpoint.predict(
                part.select(stream.FEATURES).to_dicts(),
                prediction_ids=part[stream.ID].to_list(),
                times=stream.iso_times(part),
            )
            self.console.progress(f"{month.name}: {start + part.height} of {month.rows.height} trips asked")
        # The service writes its log once a second.
        time.sleep(1.5)

    def _run_dag(self, dag_id: str, window: Window) -> None:
        """Run a Dag for a window and show its tasks as they go.

        :raises RuntimeError: it failed; with the task and the end of its log.
        """
        dag_run_id = self.client.trigger(dag_id, window)
        self._follow(dag_id, dag_run_id)
        if dag_id == "train_and_deploy":
            self.links["Airflow run of the first model"] = self.client.run_url(dag_id, dag_run_id)
            times = [
                f"{task['task_id']} {airflow.task_seconds(task):.1f} s"
                for task in self.client.tasks(dag_id, dag_run_id)
            ]
            self.console.say(f"Dag {dag_id}: {', '.join(times)}.")
            self.console.say(self.client.run_url(dag_id, dag_run_id))

    def _follow(self, dag_id: str, dag_run_id: str) -> None:
        deadline = time.monotonic() + RUN_TIMEOUT_SECONDS
        while (state := self.client.run_state(dag_id, dag_run_id)) not in airflow.FINAL_STATES:
            self.group.check()
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"run {dag_run_id} of {dag_id} is still {state} after {RUN_TIMEOUT_SECONDS} s"
                )
            running = [
                task["task_id"]
                for task in self.client.tasks(dag_id, dag_run_id)
                if task["state"] == "running"
            ]
            self.console.progress(f"{dag_id}: {', '.join(running) or state}")
            airflow.pause()
        if state == "failed":
            raise RuntimeError(self.client.failure(dag_id, dag_run_id))

    def _await_decision(self, window: Window) -> LedgerEntry:
        """Wait until the window is decided and, if that means a retraining, until it is carried out."""
        key = f"{MODEL}|{window.key}"
        deadline = time.monotonic() + RUN_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            self.group.check()
            runs = self.client.runs("retrain_on_drift")
            for run in runs:
                if run["state"] == "failed":
                    raise RuntimeError(self.client.failure("retrain_on_drift", run["dag_run_id"]))
            decision = self.ledger.find(EntryKind.RETRAINING_DECISION, key)
            idle = all(run["state"] in airflow.FINAL_STATES for run in runs)
            if decision is not None and idle and self.ledger.open_retraining(MODEL) is None:
                return decision
            self.console.progress(
                f"retrain_on_drift: {'deciding' if decision is None else decision.payload['outcome']}"
            )
            airflow.pause()
        raise TimeoutError(f"window {window} was not decided within {RUN_TIMEOUT_SECONDS} s")

    def _outcome(self, decision: LedgerEntry) -> str | None:
        outcome = self.ledger.find(EntryKind.RETRAINING_OUTCOME, decision.key)
        if outcome is None or outcome.payload["outcome"] != "promoted":
            return None
        return str(outcome.payload["model_version"])

    def _check(self, kind: EntryKind, window: Window) -> dict[str, Any]:
        entry = self.ledger.find(kind, f"{MODEL}|{window.key}")
        if entry is None:
            raise RuntimeError(f"the ledger has no {kind} for {window}")
        return entry.payload

    def _newest(self, kind: EntryKind) -> LedgerEntry:
        return self.ledger.entries(kind=kind, model_name=MODEL, limit=1)[0]

    def _first_error(self, month: stream.Month) -> float:
        """Score the first model on the month's rows."""
        import numpy as np

        predicted = self.first_model.predict_records(month.rows.select(stream.FEATURES).to_dicts())
        return float(np.mean(np.abs(np.asarray(predicted) - month.rows[stream.TARGET].to_numpy())))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)


class _Service:
    """Ends the model service, which a task started and which outlives tasks."""

    def __init__(self, server: LocalServer) -> None:
        self._server = server

    def close(self) -> None:
        self._server.stop()


def _family(server: LocalServer) -> list[psutil.Process]:
    running = server.running()
    if running is None:
        return []
    try:
        process = psutil.Process(running.pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _clean(workspace: Path) -> None:
    """Remove what a former run left, and end its model service if that still runs."""
    LocalServer(workspace / "serving", port=0).stop()
    for name in ("airflow", "artifacts", "data", "serving", "first_model"):
        shutil.rmtree(workspace / name, ignore_errors=True)
    for pattern in ("*.db", "*.db-*", "error_per_window.png", "story.json"):
        for path in workspace.glob(pattern):
            path.unlink()


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the demo as Ctrl-C does: in order, with nothing left behind."""

    def end(number: int, frame: object) -> None:
        raise Interrupted(signal.Signals(number).name)

    previous = {sign: signal.signal(sign, end) for sign in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for sign, handler in previous.items():
            signal.signal(sign, handler)

"""The demo: a whole loop on this machine, told while it happens."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.codec import to_dict
from airflow_mlops.demo import story, stream
from airflow_mlops.demo.console import Console
from airflow_mlops.demo.errors import DemoError, RunFailedError
from airflow_mlops.demo.interrupts import Interrupted, Interrupts
from airflow_mlops.demo.memory import MemoryWatch
from airflow_mlops.demo.processes import Children, in_sessions
from airflow_mlops.demo.stack import Stack, start
from airflow_mlops.demo.workspace import NOTE, claimed
from airflow_mlops.exceptions import MLOpsError
from airflow_mlops.integrations.bentoml import EndpointClient
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from airflow_mlops.core.windows import Window
    from airflow_mlops.demo.airflow_client import AirflowClient, DagRun, TaskRun

MODEL = "trip_fare"
PICTURE, STORY_FILE = "error_per_window.png", "story.json"

_ROWS_PER_REQUEST = 500
_RUN_SECONDS = 600.0

#: Airflow may deliver an asset event late, or lose it; then the clock wakes the Dag, for which nobody waits in a demo.
_EVENT_SECONDS = 15.0

#: Longest time until the service has written what it predicted; it does so once a second.
_LOG_SECONDS = 20.0


def run(
    *,
    data: Path | None,
    workspace: Path,
    keep_up: bool,
    seed: int = 0,
    windows: int | None = None,
    console: Console | None = None,
) -> int:
    """Tell the story from an empty workspace to the last window.

    :param data: a real file of trips; ``None``: the simulator.
    :param workspace: folder for everything; what a former demo left there is removed.
    :param keep_up: leave everything running until Ctrl-C.
    :param seed: of the simulator.
    :param windows: how many months to live through; ``None``: all there are.
    :returns: exit code: 0, 1 when something failed, 130 after Ctrl-C (128 + signal).
    """
    console = console or Console()
    with Interrupts() as interrupts:
        try:
            _tell(data, workspace, console, interrupts, keep_up=keep_up, seed=seed, windows=windows)
        except Interrupted as err:
            console.plain("\nEnded. Every process of the demo is gone.")
            return err.exit_code
        except (MLOpsError, OSError) as err:
            logs = workspace.resolve() / "logs"
            where = f"\nThe logs of all programs are in {logs}" if logs.is_dir() else ""
            console.bad(f"\nThe demo failed: {err}{where}")
            return 1
    return 0


def _tell(
    data: Path | None,
    workspace: Path,
    console: Console,
    interrupts: Interrupts,
    *,
    keep_up: bool,
    seed: int,
    windows: int | None,
) -> None:
    trips = stream.simulated_stream(seed) if data is None else stream.load_stream(data)
    with claimed(workspace) as folder:
        stack = Stack.choose(folder)
        with (
            Children(folder / NOTE, logs=folder / "logs", interrupts=interrupts) as children,
            _service_ended(stack, interrupts),
            MemoryWatch(lambda: in_sessions(_sessions(stack, children))) as memory,
        ):
            demo = Demo(stack, children, console, trips, windows=windows)
            demo.tell()
            demo.finish(memory.peak_mb)
            if keep_up:
                demo.stay_up()
            console.progress("ending everything")
    console.plain("Every process of the demo is gone.")


class Demo:
    """The story, chapter by chapter.

    :param stack: where everything runs.
    :param children: the programs that are started.
    :param console: who listens.
    :param trips: the stream.
    :param windows: how many months to live through; ``None``: all there are.
    """

    client: AirflowClient
    ledger: Ledger
    endpoint: EndpointClient

    def __init__(
        self,
        stack: Stack,
        children: Children,
        console: Console,
        trips: stream.Stream,
        *,
        windows: int | None = None,
    ) -> None:
        self.stack = stack
        self.children = children
        self.console = console
        self.trips = trips
        self.later = trips.later(windows)
        self.seconds: dict[str, float] = {}
        self.links: dict[str, str] = {}
        self.windows: list[story.WindowStory] = []
        self.first_model: Any = None

    def tell(self) -> None:
        """Everything up to the last window."""
        self.console.title("airflow-mlops: one model, from its first training to its repair")
        self.console.say(self._data_in_words())
        self.console.say("Starting MLflow and Airflow on 127.0.0.1 ...")
        with self._timed("start"):
            self.client = start(
                self.stack, self.children, lambda what: self.console.progress(f"waiting for {what}")
            )
        self.console.good(f"Airflow is up: {self.stack.airflow_url}   MLflow: {self.stack.mlflow_url}")
        with (
            contextlib.closing(self.client),
            Ledger.open(self.stack.ledger_url) as self.ledger,
            EndpointClient(self.stack.endpoint_url, self.stack.endpoint_token) as self.endpoint,
        ):
            self.console.title(f"1. A first model from {len(self.trips.reference)} months")
            with self._timed("first model"):
                self.first_deployment()
            self.console.title("2. Months go by")
            self.console.say(
                "Each month people ask for prices, then the bills arrive: the answers are graded, inputs are compared with the "
                "training data, and challengers trained in the shadow are held against the champion. Then it is decided."
            )
            for month in self.later:
                with self._timed(f"window {month.name}"):
                    self.windows.append(self.live_through(month))

    def first_deployment(self) -> None:
        """Let the training Dag make the first model of the reference months, and ask it something."""
        for month in self.trips.reference:
            self._land(month)
        run, tasks = self._run_dag("train_and_deploy", self.trips.reference_window)
        self.links["Airflow run of the first model"] = run.url
        self.console.say(
            f"{run.dag_id}: {', '.join(f'{task.task_id} {task.seconds:.1f} s' for task in tasks)}"
        )
        trained, deployed = self._newest(EntryKind.TRAINING), self._newest(EntryKind.DEPLOYMENT)
        self.links["MLflow run of the first model"] = trained.payload["run_url"]
        self.links["endpoint"] = f"{self.stack.endpoint_url}/predict"
        self.console.good(f"{trained.summary}.")
        self.console.good(f"{deployed.summary}.")
        self._keep_first_model(str(deployed.payload["model_version"]))
        example = self.trips.reference[-1].inputs().head(1).to_dicts()
        price = self.endpoint.predict(example)["predictions"][0]
        self.console.say(
            f"It answers over HTTP: a trip of {example[0]['trip_distance']} miles costs about ${price:.2f}."
        )

    def live_through(self, month: stream.Month) -> story.WindowStory:
        """One month: people ask, the bills arrive, the model is checked, a decision is taken and carried out."""
        version = str(self.endpoint.ready()["model_version"])
        self._send_traffic(month)
        self._land(month)
        before = {run.dag_run_id for run in self.client.runs("retrain_on_drift")}
        run, _ = self._run_dag("monitor", month.window)
        self.links[f"Airflow run {month.name}"] = run.url
        performance = self._check(EntryKind.PERFORMANCE_CHECK, month.window)
        decision = self._await_decision(month.window, before)
        told = story.WindowStory(
            window=month.name,
            rows=int(performance["row_count"]),
            model_version=version,
            live_error=float(performance["value"]),
            first_error=self._first_error(month),
            outcome=str(decision.payload["outcome"]),
            reason=str(decision.payload["reason"]),
            promoted_version=self._promoted(decision),
        )
        self._report(told, self._drift_report(month.window))
        return told

    def finish(self, peak_memory_mb: float) -> None:
        """Table, picture, links and figures."""
        picture = self.stack.workspace / PICTURE
        if self.windows:
            changed = (f"{stream.SURCHARGE_FROM:%Y-%m}", f"every trip +${stream.SURCHARGE:.2f}")
            change = changed if self.trips.origin == "simulated" else None
            story.draw(self.windows, picture, change=change)
            self.links["picture"] = str(picture)
        whole = story.Story(
            windows=tuple(self.windows),
            links=self.links,
            seconds=self.seconds,
            peak_memory_mb=round(peak_memory_mb),
        )
        (self.stack.workspace / STORY_FILE).write_text(json.dumps(to_dict(whole), indent=2))
        self.console.title("3. What happened")
        self.console.plain(story.table(self.windows, width=self.console.width))
        self.console.plain()
        for name, link in self.links.items():
            self.console.plain(f"  {name + ':':<34} {link}")
        stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        self.console.plain()
        self.console.say(f"{sum(self.seconds.values()):.0f} s in all ({stages}).")
        self.console.say(f"At most {peak_memory_mb:.0f} MB of memory in all processes together.")

    def stay_up(self) -> None:
        """Leave everything running until somebody presses Ctrl-C."""
        self.console.title(f"Look around: {self.stack.airflow_url}. Ctrl-C ends everything.")
        while True:
            self.children.check()
            time.sleep(1.0)

    def _data_in_words(self) -> str:
        first, last = self.trips.months[0], self.later[-1] if self.later else self.trips.reference[-1]
        if self.trips.origin != "simulated":
            return f"The data: {self.trips.origin}, {first.name} to {last.name}, a month at a time."
        return (
            f"The data: simulated city taxi trips, {first.name} to {last.name}, a month at a time. From "
            f"{stream.SURCHARGE_FROM:%Y-%m-%d} on every trip costs ${stream.SURCHARGE:.2f} more; nothing else changes."
        )

    def _keep_first_model(self, version: str) -> None:
        """Put the first model aside, to tell at the end what if nobody had ever retrained."""
        from airflow_mlops.serving.model import load_model

        kept = self.stack.workspace / "first_model"
        shutil.copytree(self.stack.serving / "models" / MODEL / version, kept)
        self.first_model = load_model(kept)

    def _land(self, month: stream.Month) -> None:
        """Put a month's finished trips where the ingest looks, whole or not at all."""
        landing = self.stack.data / "landing"
        landing.mkdir(parents=True, exist_ok=True)
        temporary = landing / f".{month.name}.tmp"
        month.rows.write_parquet(temporary)
        temporary.rename(landing / f"{month.name}.parquet")

    def _send_traffic(self, month: stream.Month) -> None:
        """Ask the service for the price of every trip of the month, before its bill is known."""
        for start_row in range(0, month.rows.height, _ROWS_PER_REQUEST):
            part = month.rows.slice(start_row, _ROWS_PER_REQUEST)
            self.endpoint.predict(
                part.select(stream.FEATURES).to_dicts(),
                prediction_ids=part[stream.ID].to_list(),
                times=stream.iso_times(part),
            )
            self.console.progress(
                f"{month.name}: {start_row + part.height} of {month.rows.height} trips asked for"
            )
        self._await_log(month)

    def _await_log(self, month: stream.Month) -> None:
        """Wait until the service has written down what it predicted.

        :raises DemoError: it did not.
        """
        from airflow_mlops.exceptions import InsufficientDataError
        from airflow_mlops.serving.inference_log import read_inference_log

        logged, log = 0, self.stack.serving / "inference_log"
        deadline = time.monotonic() + _LOG_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(InsufficientDataError):
                logged = read_inference_log(log, MODEL, month.window).height
            if logged >= month.rows.height:
                return
            time.sleep(0.2)
        raise DemoError(
            f"the service predicted {month.rows.height} trips of {month.name}, but its inference log {log} holds {logged}; "
            f"see {self.stack.serving / 'service.log'}"
        )

    def _run_dag(self, dag_id: str, window: Window) -> tuple[DagRun, list[TaskRun]]:
        """Run a Dag for a window and show its tasks as they go."""
        return self._follow(self.client.trigger(dag_id, window=window))

    def _follow(self, run: DagRun) -> tuple[DagRun, list[TaskRun]]:
        def show(tasks: Sequence[TaskRun]) -> None:
            running = [f"{task.task_id} {task.seconds:.0f} s" for task in tasks if task.state == "running"]
            self.console.progress(f"{run.dag_id}: {', '.join(running) or 'between tasks'}")

        return self.client.wait(run, timeout_seconds=_RUN_SECONDS, progress=show, check=self.children.check)

    def _await_decision(self, window: Window, before: set[str]) -> LedgerEntry:
        """Wait until the window is decided and, if that means a retraining, until it is carried out.

        An asset event is a wake-up call and may come late or never. Waking the Dag again is harmless: it decides what
        the ledger says is undecided.

        :param before: runs of the deciding Dag that this window did not wake.
        """
        key = f"{MODEL}|{window.key}"
        deadline = time.monotonic() + _RUN_SECONDS
        quiet_since = time.monotonic()
        while (decision := self._settled(key, runs := self._new_runs(before))) is None:
            self.children.check()
            self.console.progress("waiting for retrain_on_drift")
            now = time.monotonic()
            if any(not run.over for run in runs):
                quiet_since = now
            elif now - quiet_since > _EVENT_SECONDS:
                self.console.say(f"No asset event for {_EVENT_SECONDS:g} s: waking retrain_on_drift by hand.")
                self.client.trigger("retrain_on_drift")
                quiet_since = now
            if now > deadline:
                raise RunFailedError(
                    f"{window} was not decided within {_RUN_SECONDS:g} s; see {self.stack.airflow_url}"
                )
            time.sleep(0.3)
        return decision

    def _new_runs(self, before: set[str]) -> list[DagRun]:
        return [run for run in self.client.runs("retrain_on_drift") if run.dag_run_id not in before]

    def _settled(self, key: str, runs: Sequence[DagRun]) -> LedgerEntry | None:
        """Give the decision once it stands, its retraining is closed and nobody works on it any more.

        :raises RunFailedError: a run failed.
        """
        failed = next((run for run in runs if run.state == "failed"), None)
        if failed is not None:
            raise self.client.failure(failed)
        if self.ledger.open_retraining(MODEL) is not None or any(not run.over for run in runs):
            return None
        return self.ledger.find(EntryKind.RETRAINING_DECISION, key)

    def _promoted(self, decision: LedgerEntry) -> str | None:
        outcome = self.ledger.find(EntryKind.RETRAINING_OUTCOME, decision.key)
        if outcome is None or outcome.payload["outcome"] != "promoted":
            return None
        return str(outcome.payload["model_version"])

    def _report(self, told: story.WindowStory, report_url: str | None) -> None:
        """Tell a month in a line; more when something was decided."""
        line = (
            f"{told.window}: {told.rows} trips, version {told.model_version}, error ${told.live_error:.2f} a trip. "
            f"Decision: {told.outcome}."
        )
        if told.outcome == "nothing":
            self.console.say(line)
            return
        self.console.say(f"{line} Why: {told.reason}.")
        if report_url:
            self.links[f"drift report {told.window}"] = report_url
            self.console.say(f"Drift report: {report_url}")
        if told.promoted_version:
            if told.outcome == "retrain":
                trained = self._newest(EntryKind.TRAINING)
                self.links[f"MLflow run of version {told.promoted_version}"] = trained.payload["run_url"]
            self.console.good(f"{self._newest(EntryKind.PROMOTION).summary}.")
            self.console.good(f"{self._newest(EntryKind.DEPLOYMENT).summary}.")

    def _check(self, kind: EntryKind, window: Window) -> dict[str, Any]:
        """Read what a check found.

        :raises DemoError: it found nothing to judge.
        """
        entry = self.ledger.find(kind, f"{MODEL}|{window.key}")
        if entry is None:
            raise DemoError(
                f"the ledger has no {kind} for {window}: the month could not be judged; see {self.stack.airflow_url}"
            )
        return entry.payload

    def _drift_report(self, window: Window) -> str | None:
        """Find the window's report, if one was drawn: with the verdict, or after it."""
        checks = self.ledger.entries(kind=EntryKind.DRIFT_CHECK, model_name=MODEL, window=window)
        return next((check.payload["report_url"] for check in checks if check.payload["report_url"]), None)

    def _newest(self, kind: EntryKind) -> LedgerEntry:
        return self.ledger.entries(kind=kind, model_name=MODEL, limit=1)[0]

    def _first_error(self, month: stream.Month) -> float:
        """Score the first model on the month's rows."""
        import numpy as np

        predicted = self.first_model.predict_records(month.inputs().to_dicts())
        return float(np.mean(np.abs(np.asarray(predicted) - month.rows[stream.TARGET].to_numpy())))

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)


@contextlib.contextmanager
def _service_ended(stack: Stack, interrupts: Interrupts) -> Iterator[None]:
    """End the model service afterwards: a task started it, and it outlives tasks."""
    try:
        yield
    finally:
        with interrupts.closing():
            stack.server().stop()


def _sessions(stack: Stack, children: Children) -> set[int]:
    """Give the sessions of everything that runs, for the memory."""
    service = stack.server().running()
    return children.sessions() | ({service.pid} if service else set())

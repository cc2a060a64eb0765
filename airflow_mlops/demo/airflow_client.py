"""What the demo asks of Airflow, over its REST API."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import httpx

from airflow_mlops.demo.errors import DemoError, RunFailedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from airflow_mlops.core.windows import Window

#: States in which a run is over.
_OVER = frozenset({"success", "failed"})

#: Parts of Airflow that report their health.
_PARTS = ("metadatabase", "scheduler", "triggerer", "dag_processor")

#: Lines of a failed task's log that an error shows.
_LOG_LINES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRun:
    """One task of a run.

    :param state: Airflow's word for it; ``None``: not scheduled yet.
    :param seconds: how long it ran, or has been running.
    """

    task_id: str
    state: str | None
    seconds: float
    try_number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DagRun:
    """One run of a Dag.

    :param url: its page in Airflow's UI.
    """

    dag_id: str
    dag_run_id: str
    state: str
    url: str

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.state in _OVER


class AirflowClient:
    """A client of one Airflow.

    :param url: address of its API server.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        # No proxy stands between us and the loopback address.
        self._client = httpx.Client(base_url=url, timeout=30, trust_env=False)

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()

    def log_in(self) -> None:
        """Take a token; an Airflow whose users are all admins gives one to everybody.

        :raises DemoError: it did not.
        """
        token = self._request("GET", "/auth/token")["access_token"]
        self._client.headers["Authorization"] = f"Bearer {token}"

    def health(self) -> dict[str, str]:
        """Give the health of each part: ``healthy``, ``unhealthy`` or ``unknown``; all unknown before it answers."""
        try:
            report = self._client.get("/api/v2/monitor/health", timeout=5).json()
        except (httpx.HTTPError, ValueError):
            report = {}
        return {part: (report.get(part) or {}).get("status") or "unknown" for part in _PARTS}

    def healthy(self) -> bool:
        """Whether all parts are."""
        return set(self.health().values()) == {"healthy"}

    def knows(self, dag_ids: Sequence[str]) -> bool:
        """Whether these Dags are ready to run.

        :raises DemoError: a Dag file can't be imported.
        """
        errors = self._request("GET", "/api/v2/importErrors")["import_errors"]
        if errors:
            told = "\n".join(f"{error['filename']}: {error['stack_trace'].strip()}" for error in errors)
            raise DemoError(f"Airflow can't import the Dags:\n{told[-3000:]}")
        known = {dag["dag_id"] for dag in self._request("GET", "/api/v2/dags")["dags"]}
        return known.issuperset(dag_ids)

    def trigger(
        self, dag_id: str, *, window: Window | None = None, conf: Mapping[str, Any] | None = None
    ) -> DagRun:
        """Start a run, for the data interval of a window if one is given.

        :raises DemoError: Airflow refused, with its reason.
        """
        body: dict[str, Any] = {"logical_date": None, "conf": dict(conf or {})}
        if window is not None:
            body |= {
                "logical_date": window.end.isoformat(),
                "data_interval_start": window.start.isoformat(),
                "data_interval_end": window.end.isoformat(),
                "dag_run_id": f"window_{window.start:%Y-%m-%d}_{window.end:%Y-%m-%d}",
            }
        return self._run(self._request("POST", f"/api/v2/dags/{dag_id}/dagRuns", json=body))

    def run(self, dag_id: str, dag_run_id: str) -> DagRun:
        """Look at a run."""
        return self._run(self._request("GET", f"/api/v2/dags/{dag_id}/dagRuns/{dag_run_id}"))

    def runs(self, dag_id: str) -> list[DagRun]:
        """List the newest runs of a Dag, newest first."""
        path = f"/api/v2/dags/{dag_id}/dagRuns"
        listed = self._request("GET", path, params={"order_by": "-id", "limit": 100})["dag_runs"]
        return [self._run(item) for item in listed]

    def tasks(self, run: DagRun) -> list[TaskRun]:
        """List the tasks of a run, in the order they started."""
        path = f"/api/v2/dags/{run.dag_id}/dagRuns/{run.dag_run_id}/taskInstances"
        listed = self._request("GET", path, params={"limit": 100})["task_instances"]
        return [_task(item) for item in sorted(listed, key=lambda item: item["start_date"] or "9999")]

    def wait(
        self,
        run: DagRun,
        *,
        timeout_seconds: float,
        progress: Callable[[Sequence[TaskRun]], None],
        check: Callable[[], None],
    ) -> tuple[DagRun, list[TaskRun]]:
        """Follow a run to its end.

        :param progress: is shown the tasks at every look.
        :param check: raises when waiting has become pointless.
        :returns: the run and its tasks, as they ended.
        :raises RunFailedError: it failed, or took too long.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            check()
            current = self.run(run.dag_id, run.dag_run_id)
            tasks = self.tasks(current)
            progress(tasks)
            if current.state == "failed":
                raise self.failure(current)
            if current.over:
                return current, tasks
            if time.monotonic() > deadline:
                waiting = ", ".join(f"{task.task_id} is {task.state}" for task in tasks)
                raise RunFailedError(
                    f"{run.dag_id} is not done after {timeout_seconds:g} s ({waiting}); see {run.url}"
                )
            time.sleep(0.3)

    def failure(self, run: DagRun) -> RunFailedError:
        """Build the error of a failed run: which task, and the end of its log."""
        failed = next((task for task in self.tasks(run) if task.state == "failed"), None)
        if failed is None:
            return RunFailedError(f"{run.dag_id} failed; see {run.url}")
        return RunFailedError(
            f"task {failed.task_id} of {run.dag_id} failed; see {run.url}\n"
            f"The end of its log:\n{self._log_end(run, failed)}"
        )

    def _log_end(self, run: DagRun, task: TaskRun) -> str:
        path = f"/api/v2/dags/{run.dag_id}/dagRuns/{run.dag_run_id}/taskInstances/{task.task_id}/logs/{task.try_number}"
        try:
            content = self._request("GET", path, params={"full_content": True})["content"]
        except DemoError as err:
            return f"  | (could not be read: {err})"
        lines = [line for item in content for line in _log_lines(item)]
        return "\n".join(f"  | {line[:500]}" for line in lines[-_LOG_LINES:]) or "  | (empty)"

    def _run(self, item: Mapping[str, Any]) -> DagRun:
        dag_id, dag_run_id = item["dag_id"], item["dag_run_id"]
        return DagRun(
            dag_id=dag_id,
            dag_run_id=dag_run_id,
            state=item["state"],
            url=f"{self.url}/dags/{dag_id}/runs/{dag_run_id}",
        )

    def _request(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        try:
            answer = self._client.request(method, path, **kwargs)
            for pause in (1.0, 3.0):
                # SQLite has one writer, and a busy machine may let another one wait too long; nothing was done then.
                if answer.status_code != 500 or "Database error" not in answer.text:
                    break
                time.sleep(pause)
                answer = self._client.request(method, path, **kwargs)
            if answer.is_error:
                raise DemoError(
                    f"Airflow refused {method} {path} with {answer.status_code}: {answer.text[:1000]}"
                )
            body: dict[str, Any] = answer.json()
        except (httpx.HTTPError, ValueError) as err:
            raise DemoError(f"Airflow at {self.url} does not answer {method} {path}: {err!r}") from err
        return body


def _task(item: Mapping[str, Any]) -> TaskRun:
    return TaskRun(
        task_id=item["task_id"],
        state=item["state"],
        seconds=_seconds(item["start_date"], item["end_date"]),
        try_number=item["try_number"],
    )


def _seconds(start: str | None, end: str | None) -> float:
    if start is None:
        return 0.0
    began = datetime.fromisoformat(start)
    ended = datetime.fromisoformat(end) if end else datetime.now(tz=began.tzinfo)
    return max(0.0, (ended - began).total_seconds())


def _log_lines(item: Any) -> list[str]:
    """Turn one structured log message into the lines a person wants to see."""
    if not isinstance(item, dict):
        return [str(item)]
    lines = str(item.get("event", "")).splitlines()
    if not item.get("timestamp"):  # the log's own headings, such as the name of its file
        lines = []
    for error in item.get("error_detail") or []:
        lines.append(f"{error.get('exc_type')}: {error.get('exc_value')}")
    return lines

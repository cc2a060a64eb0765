"""The demo's child processes: started in groups of their own, logged to files, and gone when the demo is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Self

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType


class ProcessFailedError(RuntimeError):
    """A child ended or did not come up; the message holds the end of its log."""


def free_port() -> int:
    """Find a port nobody listens on, on the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ProcessGroup:
    """Start children, and end all of them whatever happens.

    Each child leads a process group of its own, so that its descendants end with it and a Ctrl-C in the terminal reaches only the demo. What
    runs is noted in a file: a run after a crash ends what the crashed one left, and nothing else.

    :param folder: where logs and the note go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._note = folder / "processes.json"

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._end_leftovers()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, command: Sequence[str], *, env: Mapping[str, str]) -> None:
        """Start a child; its output goes to ``<name>.log``."""
        with self.log_file(name).open("wb") as log:
            self._children[name] = subprocess.Popen(
                list(command),
                env=dict(env),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._write_note()

    def run(
        self, name: str, command: Sequence[str], *, env: Mapping[str, str], timeout_seconds: float
    ) -> None:
        """Run a child to its end.

        :raises ProcessFailedError: it failed or took too long.
        """
        self.start(name, command, env=env)
        try:
            code = self._children[name].wait(timeout=timeout_seconds)
        except subprocess.TimeoutExpired as err:
            raise ProcessFailedError(
                f"{name} took more than {timeout_seconds:g} s\n{self.log_tail(name)}"
            ) from err
        del self._children[name]
        if code != 0:
            raise ProcessFailedError(f"{name} ended with {code}\n{self.log_tail(name)}")

    def wait_for(self, name: str, ready: Callable[[], bool], *, timeout_seconds: float) -> None:
        """Wait until a child is ready.

        :raises ProcessFailedError: it ended, or took too long.
        """
        deadline = time.monotonic() + timeout_seconds
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise ProcessFailedError(
                    f"{name} is not up after {timeout_seconds:g} s\n{self.log_tail(name)}"
                )
            time.sleep(0.2)

    def check(self) -> None:
        """See that every child still runs.

        :raises ProcessFailedError: naming the one that ended.
        """
        for name, child in self._children.items():
            if child.poll() is not None:
                raise ProcessFailedError(f"{name} ended with {child.returncode}\n{self.log_tail(name)}")

    def stop(self, *, timeout_seconds: float = 15.0) -> None:
        """Ask all children to end, then insist; a second Ctrl-C meanwhile changes nothing."""
        with _signals_held():
            family = self.family()
            for sign, wait in ((signal.SIGTERM, timeout_seconds), (signal.SIGKILL, 5.0)):
                for child in self._children.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child.pid, sign)
                _, family = psutil.wait_procs(family, timeout=wait)
                if not family:
                    break
            for process in family:  # a descendant that made a group of its own
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            for child in self._children.values():
                child.wait()
            self._children.clear()
            self._note.unlink(missing_ok=True)

    def family(self) -> list[psutil.Process]:
        """List the children and all their descendants."""
        found = []
        for child in self._children.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(child.pid)
                found += [process, *process.children(recursive=True)]
        return found

    def log_file(self, name: str) -> Path:
        """Where a child's output goes."""
        return self.folder / f"{name}.log"

    def log_tail(self, name: str, lines: int = 15) -> str:
        """Give the end of a child's output."""
        try:
            text = self.log_file(name).read_text(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def _write_note(self) -> None:
        running = []
        for child in self._children.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                running.append([child.pid, psutil.Process(child.pid).create_time()])
        self._note.write_text(json.dumps(running))

    def _end_leftovers(self) -> None:
        """End what a crashed run of this workspace left; pid and start time together name a process."""
        try:
            noted = json.loads(self._note.read_text())
        except (FileNotFoundError, ValueError):
            return
        for pid, started in noted:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if abs(psutil.Process(pid).create_time() - started) < 1.0:
                    os.killpg(pid, signal.SIGKILL)
        self._note.unlink(missing_ok=True)


class MemoryWatch:
    """Note the largest memory that a set of processes held together, about once a second.

    :param processes: gives the processes to look at.
    """

    def __init__(self, processes: Callable[[], list[psutil.Process]]) -> None:
        self.peak_mb = 0.0
        self._processes = processes
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        while not self._stopped.wait(1.0):
            total = 0
            for process in [psutil.Process(), *self._processes()]:
                with contextlib.suppress(psutil.Error):
                    # Shared pages count once: the proportional size where the system knows it.
                    info = process.memory_full_info()
                    total += getattr(info, "pss", 0) or info.rss
            self.peak_mb = max(self.peak_mb, total / 1e6)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Ignore Ctrl-C while children are being ended: half an end leaves orphans."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = {sign: signal.signal(sign, signal.SIG_IGN) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sign, handler in held.items():
            signal.signal(sign, handler)

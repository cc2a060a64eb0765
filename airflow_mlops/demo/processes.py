"""The demo's child processes: started in sessions of their own, logged to files, and gone when the demo is."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import psutil

from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.demo.errors import ProcessFailedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from airflow_mlops.demo.interrupts import Interrupts

#: Inherited by everything the demo starts, also by what makes a session of its own, such as the model service.
MARK = "AIRFLOW_MLOPS_DEMO_RUN"

#: Where ports are looked for: below those the system gives to outgoing connections, so that a port which is chosen now
#: is still free when its program starts a minute later.
_PORTS = range(20_000, 30_000)

#: Start times are compared with this tolerance, in seconds: the system counts them in hundredths.
_SAME_START = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Leader:
    """A child as it is noted: pid and start time together name a process, also after pids were reused."""

    name: str
    pid: int
    started: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """What a run leaves behind for the next one, should it not come to clean up itself.

    :param mark: value of :data:`MARK` in the environment of all its processes.
    :param leaders: its children, each the leader of a session.
    """

    mark: str
    leaders: tuple[Leader, ...] = field(default=())

    @classmethod
    def read(cls, path: Path) -> Note | None:
        """Read a note; ``None`` when there is none that makes sense."""
        try:
            return from_dict(cls, json.loads(path.read_text()))
        except (FileNotFoundError, ValueError):
            return None

    def write(self, path: Path) -> None:
        """Write it whole or not at all."""
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(to_dict(self)))
        os.replace(temporary, path)

    def family(self) -> list[psutil.Process]:
        """Find everything alive that descends from the noted children, and nothing else.

        A process belongs here by its session, by its ancestors, or by the mark in its environment.
        """
        leaders = [leader for leader in self.leaders if _is_there(leader)]
        found = {process.pid: process for leader in leaders for process in _descendants(leader.pid)}
        sessions = {leader.pid for leader in leaders}
        for process in psutil.process_iter():
            if process.pid != os.getpid() and (_session(process) in sessions or self._marks(process)):
                found[process.pid] = process
        return [process for process in found.values() if _alive(process)]

    def _marks(self, process: psutil.Process) -> bool:
        try:
            return bool(process.environ().get(MARK) == self.mark)
        except (psutil.Error, OSError):  # somebody else's process, or gone by now
            return False


class Children:
    """Start children, and end all of them whatever happens.

    A Ctrl-C in the terminal reaches only the demo, because every child leads a session of its own. What runs is
    noted in a file, so that a run after a crash ends what the crashed one left.

    :param note: file of the note.
    :param logs: folder of the children's output, one file each.
    :param interrupts: what to hold while a child is started, and what may ask to hurry at the end.
    """

    def __init__(self, note: Path, *, logs: Path, interrupts: Interrupts) -> None:
        self.logs = logs
        self._path = note
        self._interrupts = interrupts
        self._note = Note(mark=secrets.token_hex(16))
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        end_leftovers(self._path)
        self.logs.mkdir(parents=True, exist_ok=True)
        self._note.write(self._path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, command: Sequence[str], *, environment: Mapping[str, str]) -> None:
        """Start a child; its output goes to ``<name>.log``."""
        with self._interrupts.held(), self.log_file(name).open("wb") as log:
            child = subprocess.Popen(
                list(command),
                env={**environment, MARK: self._note.mark},
                cwd=self.logs,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._children[name] = child
            started = psutil.Process(child.pid).create_time()
            leader = Leader(name=name, pid=child.pid, started=started)
            self._note = Note(mark=self._note.mark, leaders=(*self._note.leaders, leader))
            self._note.write(self._path)

    def run(
        self, name: str, command: Sequence[str], *, environment: Mapping[str, str], timeout_seconds: float
    ) -> None:
        """Run a child to its end.

        :raises ProcessFailedError: it failed or took too long.
        """
        self.start(name, command, environment=environment)
        child = self._children[name]
        try:
            code = child.wait(timeout=timeout_seconds)
        except subprocess.TimeoutExpired as err:
            raise self._failure(name, f"is not done after {timeout_seconds:g} s") from err
        self._forget(name)
        if code != 0:
            raise self._failure(name, f"ended with exit code {code}")

    def wait_for(self, name: str, ready: Callable[[], bool], *, timeout_seconds: float) -> None:
        """Wait until a child is ready, as long as all children live.

        :raises ProcessFailedError: one of them ended, or this one took too long.
        """
        deadline = time.monotonic() + timeout_seconds
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise self._failure(name, f"is not up after {timeout_seconds:g} s")
            time.sleep(0.2)

    def check(self) -> None:
        """See that every child still runs.

        :raises ProcessFailedError: naming one that ended.
        """
        for name, child in self._children.items():
            if not _alive(child.pid):
                raise self._failure(name, f"ended by itself with exit code {child.wait()}")

    def sessions(self) -> set[int]:
        """Give the sessions of the children."""
        return {child.pid for child in self._children.values()}

    def stop(self, *, patience_seconds: float = 15.0) -> None:
        """Ask the children to end, the last one first, then insist; nothing of theirs is left when this returns.

        A child that ends now is not reaped before its descendants are gone: so long its pid, which is the name of
        its session, can't become somebody else's.
        """
        with self._interrupts.closing():
            asked = [leader for leader in reversed(self._note.leaders) if _is_there(leader)]
            for leader in asked:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(leader.pid, signal.SIGTERM)
            deadline = time.monotonic() + patience_seconds
            while any(_alive(leader.pid) for leader in asked) and time.monotonic() < deadline:
                if self._interrupts.hurry.wait(0.05):
                    break
            _kill_all(self._note)
            for child in self._children.values():
                child.wait()
            self._children.clear()
            self._note = Note(mark=self._note.mark)
            self._path.unlink(missing_ok=True)

    def log_file(self, name: str) -> Path:
        """Where a child's output goes."""
        return self.logs / f"{name}.log"

    def _forget(self, name: str) -> None:
        child = self._children.pop(name)
        leaders = tuple(leader for leader in self._note.leaders if leader.pid != child.pid)
        self._note = Note(mark=self._note.mark, leaders=leaders)
        self._note.write(self._path)

    def _failure(self, name: str, what: str) -> ProcessFailedError:
        path = self.log_file(name)
        return ProcessFailedError(f"{name} {what}. The end of its log ({path}):\n{log_tail(path)}")


def end_leftovers(note: Path) -> int:
    """End what an earlier run left that was itself killed, and nothing else.

    :returns: how many processes were ended.
    """
    left = Note.read(note)
    count = _kill_all(left) if left else 0
    note.unlink(missing_ok=True)
    return count


def _kill_all(note: Note) -> int:
    """Kill a family until nobody of it is found any more: who is not yet dead may still have children."""
    count = 0
    deadline = time.monotonic() + 10.0
    while (family := note.family()) and time.monotonic() < deadline:
        count += len(family)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _wait_until_gone(family, timeout_seconds=2.0)
    return count


def _wait_until_gone(processes: Iterable[psutil.Process], *, timeout_seconds: float) -> None:
    """Wait without reaping, which ``psutil.wait_procs`` would do."""
    deadline = time.monotonic() + timeout_seconds
    while any(_alive(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)


def _is_there(leader: Leader) -> bool:
    """Whether the noted process exists, be it as a zombie that keeps its pid from being reused."""
    try:
        return bool(abs(psutil.Process(leader.pid).create_time() - leader.started) < _SAME_START)
    except psutil.Error:
        return False


def _alive(process: psutil.Process | int) -> bool:
    try:
        found = psutil.Process(process) if isinstance(process, int) else process
        alive: bool = found.is_running() and found.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
    return alive


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _session(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except OSError:
        return -1


def in_sessions(sessions: set[int]) -> list[psutil.Process]:
    """List the processes of some sessions."""
    return [process for process in psutil.process_iter() if _session(process) in sessions]


def free_ports(count: int) -> list[int]:
    """Find different ports on the loopback address that nobody uses."""
    found: list[int] = []
    with contextlib.ExitStack() as opened:
        while len(found) < count:
            probe = opened.enter_context(socket.socket())
            port = secrets.choice(_PORTS)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
    return found


def log_tail(path: Path, lines: int = 15) -> str:
    """Give the end of a log, indented, to be shown in an error."""
    try:
        end = path.read_text(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        end = []
    return "\n".join(f"  | {line[:500]}" for line in end) or "  | (empty)"

"""Real children and grandchildren: what is started is ended, whatever happens to whoever started it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from airflow_mlops.demo.errors import DemoError, ProcessFailedError
from airflow_mlops.demo.interrupts import Interrupted, Interrupts
from airflow_mlops.demo.memory import MemoryWatch
from airflow_mlops.demo.processes import Children, Leader, Note, end_leftovers, free_ports, in_sessions
from airflow_mlops.demo.workspace import MARKER, NOTE, claimed

SLEEP = "import time; time.sleep(60)"

#: A child with a child in its own session and one in another; writes their pids, then sleeps.
FAMILY = f"""
import os, subprocess, sys, time
near = subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
far = subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=True)
with open(sys.argv[1] + ".tmp", "w") as out:
    out.write(f"{{os.getpid()}} {{near.pid}} {{far.pid}}")
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
time.sleep(60)
"""

DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); {SLEEP}"


def python(code: str, *args: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), *args]


def wait_for(done: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def pids_in(path: Path) -> list[int]:
    wait_for(path.exists)
    return [int(pid) for pid in path.read_text().split()]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    # Whoever runs the tests may have ignored the end of the terminal (nohup), which is then ignored here too.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with Interrupts() as installed:
            yield installed
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def children(tmp_path: Path, interrupts: Interrupts) -> Iterator[Children]:
    with Children(tmp_path / "note.json", logs=tmp_path / "logs", interrupts=interrupts) as started:
        yield started


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, **more}


class TestChildren:
    def test_a_child_leads_its_own_session_and_writes_to_its_log(self, children: Children) -> None:
        children.start(
            "talker", python(f"print('hello'); {SLEEP}"), environment=environment(PYTHONUNBUFFERED="1")
        )
        (session,) = children.sessions()
        assert os.getsid(session) == session != os.getsid(0)
        wait_for(lambda: children.log_file("talker").read_text() == "hello\n")

    def test_stop_ends_children_grandchildren_and_those_of_other_sessions(
        self, children: Children, tmp_path: Path
    ) -> None:
        children.start("family", python(FAMILY, str(tmp_path / "pids")), environment=environment())
        pids = pids_in(tmp_path / "pids")
        assert all(alive(pid) for pid in pids)
        children.stop()
        assert not any(alive(pid) for pid in pids)
        assert not (tmp_path / "note.json").exists()

    def test_stop_finds_what_lost_its_parent(self, children: Children, tmp_path: Path) -> None:
        children.start("family", python(FAMILY, str(tmp_path / "pids")), environment=environment())
        parent, near, far = pids_in(tmp_path / "pids")
        os.kill(parent, signal.SIGKILL)
        wait_for(lambda: not alive(parent))
        with pytest.raises(ProcessFailedError, match="family ended by itself with exit code -9"):
            children.check()
        children.stop()
        assert not alive(near)
        assert not alive(far)

    def test_a_child_that_does_not_listen_is_killed_when_patience_ends(self, children: Children) -> None:
        children.start("deaf", python(DEAF), environment=environment())
        wait_for(lambda: children.log_file("deaf").read_text())
        (pid,) = children.sessions()
        children.stop(patience_seconds=0.3)
        assert not alive(pid)

    def test_an_interrupt_while_ending_ends_the_patience(self, children: Children) -> None:
        children.start("deaf", python(DEAF), environment=environment())
        wait_for(lambda: children.log_file("deaf").read_text())
        started = time.monotonic()
        presser = subprocess.Popen(python(f"import os, time; time.sleep(0.5); os.kill({os.getpid()}, 2)"))
        children.stop(patience_seconds=60)
        presser.wait(timeout=10)
        assert time.monotonic() - started < 30

    def test_all_are_gone_after_an_error(self, tmp_path: Path, interrupts: Interrupts) -> None:
        def fail_with_children() -> None:
            with Children(tmp_path / "note.json", logs=tmp_path / "logs", interrupts=interrupts) as started:
                started.start("family", python(FAMILY, str(tmp_path / "pids")), environment=environment())
                pids_in(tmp_path / "pids")
                raise RuntimeError("oops")

        with pytest.raises(RuntimeError, match="oops"):
            fail_with_children()
        assert not any(alive(pid) for pid in pids_in(tmp_path / "pids"))

    def test_a_child_that_does_not_come_up_is_shown_with_its_log(self, children: Children) -> None:
        children.start(
            "slow", python(f"print('loading'); {SLEEP}"), environment=environment(PYTHONUNBUFFERED="1")
        )
        with pytest.raises(ProcessFailedError, match=r"(?s)slow is not up after 1 s.*slow\.log.*\| loading"):
            children.wait_for("slow", lambda: False, timeout_seconds=1)

    def test_a_child_that_ends_while_another_is_awaited_is_named(self, children: Children) -> None:
        children.start("fine", python(SLEEP), environment=environment())
        children.start("broken", python("raise SystemExit('no database')"), environment=environment())
        with pytest.raises(
            ProcessFailedError, match=r"(?s)broken ended by itself with exit code 1.*no database"
        ):
            children.wait_for("fine", lambda: False, timeout_seconds=15)

    def test_run_waits_and_tells_success_failure_and_slowness_apart(self, children: Children) -> None:
        children.run("good", python("print(1)"), environment=environment(), timeout_seconds=15)
        with pytest.raises(ProcessFailedError, match=r"(?s)bad ended with exit code 3.*\(empty\)"):
            children.run("bad", python("raise SystemExit(3)"), environment=environment(), timeout_seconds=15)
        with pytest.raises(ProcessFailedError, match=r"long is not done after 0\.2 s"):
            children.run("long", python(SLEEP), environment=environment(), timeout_seconds=0.2)


class TestLeftovers:
    def crash(self, tmp_path: Path) -> list[int]:
        """Start a family from a process that is killed, and give the pids of the family."""
        code = f"""
        import os, signal, sys, time
        from pathlib import Path
        from airflow_mlops.demo.interrupts import Interrupts
        from airflow_mlops.demo.processes import Children
        folder = Path({str(tmp_path)!r})
        with Interrupts() as interrupts, Children(folder / "note.json", logs=folder, interrupts=interrupts) as children:
            children.start("family", [sys.executable, "-c", {FAMILY!r}, str(folder / "pids")], environment=os.environ)
            while not (folder / "pids").exists():
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)
        """
        assert subprocess.run(python(code), timeout=60).returncode == -signal.SIGKILL
        return pids_in(tmp_path / "pids")

    def test_a_run_ends_what_a_killed_one_left_and_nothing_else(self, tmp_path: Path) -> None:
        bystander = subprocess.Popen(python(SLEEP), start_new_session=True)
        try:
            pids = self.crash(tmp_path)
            assert all(alive(pid) for pid in pids)
            assert end_leftovers(tmp_path / "note.json") == 3
            wait_for(lambda: not any(alive(pid) for pid in pids))
            assert not (tmp_path / "note.json").exists()
            assert alive(bystander.pid)
        finally:
            bystander.kill()
            bystander.wait()

    def test_a_pid_that_became_somebody_elses_is_left_alone(self, tmp_path: Path) -> None:
        stranger = subprocess.Popen(python(SLEEP), start_new_session=True)
        try:
            started = psutil.Process(stranger.pid).create_time() - 3600
            leader = Leader(name="scheduler", pid=stranger.pid, started=started)
            Note(mark="0" * 32, leaders=(leader,)).write(tmp_path / "note.json")
            assert end_leftovers(tmp_path / "note.json") == 0
            assert alive(stranger.pid)
        finally:
            stranger.kill()
            stranger.wait()

    def test_a_damaged_note_is_no_obstacle(self, tmp_path: Path) -> None:
        (tmp_path / "note.json").write_text("[[12, ")
        assert end_leftovers(tmp_path / "note.json") == 0
        assert end_leftovers(tmp_path / "note.json") == 0


class TestInterrupts:
    @pytest.mark.parametrize(
        ("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
    )
    def test_the_first_signal_is_raised_and_tells_the_exit_code(
        self, interrupts: Interrupts, sign: signal.Signals, code: int
    ) -> None:
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), sign)
        assert caught.value.exit_code == code
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.hurry.is_set()

    def test_a_held_interrupt_comes_when_the_block_is_done(self, interrupts: Interrupts) -> None:
        done = []

        def work() -> None:
            with interrupts.held():
                os.kill(os.getpid(), signal.SIGINT)
                done.append("noted")

        with pytest.raises(Interrupted):
            work()
        assert done == ["noted"]

    def test_under_nohup_the_end_of_the_terminal_is_ignored(self) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with Interrupts():
                os.kill(os.getpid(), signal.SIGHUP)
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_the_handlers_before_are_put_back(self) -> None:
        before = signal.getsignal(signal.SIGINT)
        with Interrupts():
            assert signal.getsignal(signal.SIGINT) != before
        assert signal.getsignal(signal.SIGINT) == before

    def test_ctrl_c_in_the_middle_leaves_nothing(self, tmp_path: Path) -> None:
        code = f"""
        import os, sys, time
        from pathlib import Path
        from airflow_mlops.demo.interrupts import Interrupted, Interrupts
        from airflow_mlops.demo.processes import Children
        folder = Path({str(tmp_path)!r})
        with Interrupts() as interrupts:
            try:
                with Children(folder / "note.json", logs=folder, interrupts=interrupts) as children:
                    children.start("family", [sys.executable, "-c", {FAMILY!r}, str(folder / "pids")], environment=os.environ)
                    time.sleep(60)
            except Interrupted as err:
                sys.exit(err.exit_code)
        """
        parent = subprocess.Popen(python(code))
        try:
            pids = pids_in(tmp_path / "pids")
            parent.send_signal(signal.SIGINT)
            parent.send_signal(signal.SIGINT)  # people press twice
            assert parent.wait(timeout=30) == 130
        finally:
            parent.kill()
            parent.wait()
        assert not any(alive(pid) for pid in pids)


class TestWorkspace:
    def test_a_new_folder_is_made_and_marked(self, tmp_path: Path) -> None:
        with claimed(tmp_path / "a" / "demo") as folder:
            assert (folder / MARKER).is_file()

    def test_the_folder_of_an_earlier_demo_is_cleared(self, tmp_path: Path) -> None:
        outside = tmp_path / "outside.txt"
        outside.write_text("mine")
        with claimed(tmp_path / "demo") as folder:
            (folder / "data" / "landing").mkdir(parents=True)
            (folder / "ledger.db").write_text("old")
            (folder / "link").symlink_to(outside)
        with claimed(tmp_path / "demo") as folder:
            assert [path.name for path in folder.iterdir()] == [MARKER]
        assert outside.read_text() == "mine"

    def test_a_folder_with_somebodys_files_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(DemoError, match="is not empty and no folder of this demo"), claimed(tmp_path):
            pass
        assert (tmp_path / "thesis.txt").read_text() == "mine"

    def test_two_demos_in_one_folder_are_refused(self, tmp_path: Path) -> None:
        with (
            claimed(tmp_path / "demo"),
            pytest.raises(DemoError, match="another demo runs in"),
            claimed(tmp_path / "demo"),
        ):
            pass

    def test_a_workspace_that_is_a_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(OSError, match=r"the workspace .*file can't be written"),
            claimed(tmp_path / "file"),
        ):
            pass

    def test_the_note_of_a_killed_demo_is_honored_before_the_folder_is_cleared(self, tmp_path: Path) -> None:
        with claimed(tmp_path) as folder:
            pass
        orphan = subprocess.Popen(python(SLEEP), start_new_session=True)
        started = psutil.Process(orphan.pid).create_time()
        Note(mark="0" * 32, leaders=(Leader(name="mlflow", pid=orphan.pid, started=started),)).write(
            folder / NOTE
        )
        with claimed(tmp_path):
            assert orphan.wait(timeout=10) == -signal.SIGKILL


def test_ports_are_different_and_free() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_memory_of_all_processes_is_added_up(children: Children) -> None:
    children.start("large", python(f"block = bytearray(80_000_000); {SLEEP}"), environment=environment())
    with MemoryWatch(lambda: in_sessions(children.sessions()), interval_seconds=0.05) as memory:
        wait_for(lambda: memory.peak_mb > 80)
    assert memory.peak_mb < 300

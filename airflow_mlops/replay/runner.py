"""The command ``airflow-mlops replay``: a MLflow server of its own, and one replay per policy."""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from airflow_mlops.core.extension import load_object
from airflow_mlops.demo.errors import DemoError
from airflow_mlops.demo.interrupts import Interrupted, Interrupts
from airflow_mlops.demo.processes import Children
from airflow_mlops.demo.stack import Stack, start_mlflow
from airflow_mlops.demo.workspace import NOTE, claimed
from airflow_mlops.exceptions import MLOpsError
from airflow_mlops.replay.loop import Replay
from airflow_mlops.replay.policies import NAMED
from airflow_mlops.replay.report import table, write_report
from airflow_mlops.replay.steps import LoopSteps
from airflow_mlops.replay.stream import Stream, StreamConfig
from airflow_mlops.services import Services

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from airflow_mlops.replay.result import ReplayResult

#: Policies that look at no challengers; those that look at the inputs. One of the user's may look at both.
_ALONE = tuple(name for name in NAMED if name != "challengers")
_DRIFT = ("on_drift", "gated")


def run(
    paths: Sequence[Path],
    *,
    policies: Sequence[str],
    workspace: Path,
    data: Path | None = None,
    shuffle: int | None = None,
    windows: int | None = None,
    trial: float = 0.0,
) -> int:
    """Replay each stream with each policy and write the report.

    :param paths: TOML files that describe the streams.
    :param policies: names, or import paths.
    :param workspace: folder for everything; what a former replay left there is removed.
    :param data: folder of the streams' data; default that of each TOML file.
    :param shuffle: seed; replays streams in which nothing changes instead.
    :param windows: at most so many.
    :param trial: share of the next window in which a version that no window has tested is tried on rows that the one before it
        still answers.
    :returns: exit code: 0, 1 when something failed, 130 after Ctrl-C.
    """
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    with Interrupts() as interrupts, _quiet():
        try:
            for name in policies:
                load_object(NAMED.get(name, name))  # a mistyped one is told before models are trained for it
            streams = [_load(path, data, shuffle, windows) for path in paths]
            _require_names(streams)
            with claimed(workspace) as folder:
                results = _replay_all(streams, policies, folder, interrupts, trial)
                write_report(results, folder / "report")
        except Interrupted as err:
            _say("Ended.")
            return err.exit_code
        except (MLOpsError, DemoError, ValueError, OSError) as err:
            _say(f"The replay failed: {err}")
            return 1
    _say(f"\n{table(results)}\nTable, pictures and JSON are in {folder / 'report'}")
    return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the steps' own log to what is wrong: one line per window is enough."""
    logger = logging.getLogger("airflow_mlops")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _load(path: Path, data: Path | None, shuffle: int | None, windows: int | None) -> Stream:
    config = StreamConfig.read(path)
    if windows:
        config = replace(config, windows=windows)
    stream = Stream.load(config, data or path.parent, shuffle=shuffle)
    if shuffle is None:
        return stream
    return Stream(replace(config, name=f"{config.name}_shuffled"), stream.rows, stream.windows)


def _replay_all(
    streams: Sequence[Stream], policies: Sequence[str], folder: Path, interrupts: Interrupts, trial: float
) -> list[ReplayResult]:
    stack = Stack.choose(folder)
    results = []
    with Children(folder / NOTE, logs=folder / "logs", interrupts=interrupts) as children:
        start_mlflow(stack, children)
        for stream, name in itertools.product(streams, dict.fromkeys(policies)):
            _say(f"{stream.config.name}, policy {name}:")
            tables = folder / f"{stream.config.name}_{_plain(name)}"
            results.append(replay_one(stream, name, tables, stack.mlflow_url, trial=trial))
            shutil.rmtree(tables, ignore_errors=True)
    return results


def replay_one(
    stream: Stream, policy: str, folder: Path, tracking_uri: str, *, trial: float = 0.0
) -> ReplayResult:
    """Replay with one policy.

    :param folder: for tables, ledger and inference log; created.
    :param tracking_uri: of a MLflow server that holds nothing of this stream and policy.
    :param trial: share of the next window in which a version that no window has tested is tried on rows that the one before it
        still answers.
    """
    folder.mkdir(parents=True)
    services = Services(
        tracking_uri=tracking_uri,
        ledger_url=f"sqlite:///{folder / 'ledger.db'}",
        serving_dir=str(folder / "serving"),
    )
    own = Stream(
        replace(stream.config, name=f"{stream.config.name}_{_plain(policy)}"),
        stream.rows,
        stream.windows,
    )
    result = Replay(
        steps=LoopSteps(stream=own, services=services, folder=folder),
        policy=NAMED.get(policy, policy),
        parameters={"trailing_days": stream.reference.days},
        check_drift=policy in _DRIFT or policy not in NAMED,
        compare=policy not in _ALONE,
        trial=trial,
    ).run(name=policy, progress=_say)
    return replace(result, stream=stream.config.name)


def _require_names(streams: Sequence[Stream]) -> None:
    """See that no two streams have one name, as they would be one model."""
    names = [stream.config.name for stream in streams]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"two streams have the name {', '.join(twice)}: give each a name of its own in its file"
        )


def _plain(policy: str) -> str:
    """Make of an import path what may be part of a model's name, and of a file's."""
    return re.sub(r"[^\w-]", "-", policy)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()

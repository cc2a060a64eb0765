"""The lease of a rollout: while it runs, somebody steers. When nobody renews it, the stable version answers everything."""

from __future__ import annotations

import fcntl
import json
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from airflow_mlops.exceptions import RolloutError
from airflow_mlops.serving.files import storage_errors, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LEASE_FILE = "lease.json"

#: Longest lease of a rollout, in seconds.
MAXIMUM_LEASE = 3_600


class Lease(NamedTuple):
    """Until when a desired state may be served.

    :param revision: of the desired state.
    :param until: seconds since 1970, by the clock of the machine that serves.
    """

    revision: int
    until: float

    @property
    def valid(self) -> bool:
        """Whether it has not run out."""
        return time.time() < self.until

    def covers(self, revision: int) -> bool:
        """Whether somebody steers a desired state: this one's lease runs, or already that of the one which comes next.

        The next one's begins before it is served, as it would not be otherwise.
        """
        return self.valid and self.revision >= revision


def read_lease(serving_dir: Path) -> Lease | None:
    """Read the lease; ``None`` where there is none, or none that can be read: then nobody steers."""
    try:
        return Lease(**json.loads((serving_dir / LEASE_FILE).read_text()))
    except (OSError, TypeError, ValueError):
        return None


def grant_lease(serving_dir: Path, revision: int, seconds: float) -> None:
    """Begin the lease of a desired state that is about to be served."""
    with _locked(serving_dir):
        _write(serving_dir, Lease(revision, time.time() + seconds))


def renew_lease(serving_dir: Path, revision: int, seconds: float) -> None:
    """Say that somebody still steers. A lease that ran out stays so: some worker may have seen it.

    :raises RolloutError: it ran out, or is of another revision.
    """
    with _locked(serving_dir):
        lease = read_lease(serving_dir)
        if lease is None or lease.revision != revision:
            raise RolloutError(
                f"revision {revision} is not being rolled out any more: there is another one, or none"
            )
        if not lease.valid:
            raise RolloutError(
                f"the lease of revision {revision} ran out {time.time() - lease.until:.1f} s ago: the stable version answers"
            )
        _write(serving_dir, Lease(revision, time.time() + seconds))


def end_lease(serving_dir: Path, revision: int) -> None:
    """Let the stable version answer everything from now on, as if nobody steered."""
    with _locked(serving_dir):
        lease = read_lease(serving_dir)
        if lease is not None and lease.revision == revision:
            _write(serving_dir, Lease(revision, 0.0))


@contextmanager
def _locked(serving_dir: Path) -> Iterator[None]:
    with storage_errors(f"lock {serving_dir}"), (serving_dir / ".lease.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(serving_dir: Path, lease: Lease) -> None:
    write_whole(serving_dir / LEASE_FILE, json.dumps(lease._asdict()).encode())

"""Which versions a worker is computing answers with, in a file: who dies in the middle of it has said so before."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import threading
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_ENDING = "asked"


class InFlight:
    """Answers that are being computed, of each version of a rollout.

    What a process wrote into a mapped file is in it also when the process was killed.

    :param folder: of all workers.
    :param rollout: its name.
    :param versions: of the rollout, the same ones in the same order in all of its phases.
    """

    def __init__(self, folder: Path, rollout: str, versions: Sequence[str]) -> None:
        self.folder, self.rollout, self.versions = folder, rollout, tuple(versions)
        name = _name(rollout, versions)
        self._pattern = f"{name}-*.{_ENDING}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}-{os.getpid()}.{_ENDING}"
        path.unlink(
            missing_ok=True
        )  # of a process that had this number; emptied, it could not be mapped by anybody else
        path.write_bytes(bytes(len(self.versions)))
        with path.open("r+b") as file:
            self._counts = mmap.mmap(file.fileno(), 0)
        self._changing = threading.Lock()

    def is_of(self, rollout: str, versions: Sequence[str]) -> bool:
        """Tell whether it is of these versions of this rollout."""
        return (self.rollout, self.versions) == (rollout, tuple(versions))

    @contextlib.contextmanager
    def computing(self, version: str) -> Iterator[None]:
        """Note that an answer is being computed, for as long as it is."""
        if version not in self.versions:
            yield
            return
        place = self.versions.index(version)
        self._change(place, 1)
        try:
            yield
        finally:
            self._change(place, -1)

    def _change(self, place: int, by: int) -> None:
        with self._changing:
            self._counts[place] = min(max(self._counts[place] + by, 0), 255)

    def died(self) -> list[tuple[str, ...]]:
        """List the workers that died while they computed answers, each by the versions whose answers these were."""
        return died_in(self.folder, self.rollout, self.versions)

    def forget_others(self) -> None:
        """Remove what other rollouts left behind."""
        kept = set(self.folder.glob(self._pattern))
        for path in self.folder.glob(f"*.{_ENDING}"):
            if path not in kept:
                path.unlink(missing_ok=True)


def forget_all(folder: Path) -> None:
    """Remove what rollouts left behind."""
    for path in folder.glob(f"*.{_ENDING}"):
        path.unlink(missing_ok=True)


def died_in(folder: Path, rollout: str, versions: Sequence[str]) -> list[tuple[str, ...]]:
    """List the workers of a rollout that died while they computed answers, each by the versions whose answers these were.

    It takes no service to tell: who asks may find none, as all of its workers are dead.
    """
    found = []
    for path in sorted(folder.glob(f"{_name(rollout, versions)}-*.{_ENDING}")):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            if not _is_alive(path):
                counts = zip(versions, path.read_bytes(), strict=False)
                found.append(tuple(version for version, count in counts if count))
    return [versions for versions in found if versions]


def _name(rollout: str, versions: Sequence[str]) -> str:
    return hashlib.blake2b("|".join([rollout, *versions]).encode(), digest_size=8).hexdigest()


def _is_alive(path: Path) -> bool:
    """Tell whether the worker of a file runs: not one that nobody has buried yet, nor another one of its number, which is younger."""
    try:
        process = psutil.Process(int(path.stem.rpartition("-")[2]))
        mine = process.create_time() <= path.stat().st_mtime + 1.0
        return bool(mine and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False

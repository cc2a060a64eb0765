"""Which versions a worker is computing answers with, in a file: who dies in the middle of it has said so before."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import threading
from collections import Counter
from typing import TYPE_CHECKING

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
        name = hashlib.blake2b("|".join([rollout, *versions]).encode(), digest_size=8).hexdigest()
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

    def died(self) -> dict[str, int]:
        """Count the answers that dead workers were in the middle of, by version."""
        found: Counter[str] = Counter()
        for path in self.folder.glob(self._pattern):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                if not _is_alive(int(path.stem.rpartition("-")[2])):
                    found.update(dict(zip(self.versions, path.read_bytes(), strict=False)))
        return {version: count for version, count in found.items() if count}

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


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

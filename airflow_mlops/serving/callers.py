"""Callers by digest: who stays with a version is told apart from others, and named neither in the log nor in what is observed."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

_KEY_BYTES = 32


class Callers:
    """Give digests of sticky keys, under a random key that all workers share and that goes with its desired state: keyed BLAKE2.

    :param folder: holds the key, which only this user can read.
    :param log_key: key of the pseudonyms in the inference log, where there is one: then a caller has the same pseudonym there in every
        rollout, and as an input that is pseudonymized (HMAC-SHA-256).
    """

    def __init__(self, folder: Path, *, log_key: bytes | None = None) -> None:
        self.folder = folder
        self._log_key = log_key
        self._known: tuple[int, bytes] | None = None

    def pseudonym(self, revision: int, sticky_key: bytes) -> str:
        """Give what stands for a caller in the inference log.

        :param revision: of the desired state.
        """
        if self._log_key is not None:
            return hmac.digest(self._log_key, sticky_key, "sha256").hex()[:32]
        return hashlib.blake2b(sticky_key, key=self._key(revision), digest_size=16).hexdigest()

    def number(self, revision: int, sticky_key: bytes) -> int:
        """Give what stands for a caller among drawn requests: in ``[0, 2**64)``, evenly spread.

        :param revision: of the desired state.
        """
        return int.from_bytes(hashlib.blake2b(sticky_key, key=self._key(revision), digest_size=8).digest())

    def forget(self, revision: int) -> None:
        """Remove the keys of older desired states: without them nobody finds out who a digest was."""
        for path in self.folder.glob("*.key"):
            if path.stem.isdigit() and int(path.stem) < revision:
                path.unlink(missing_ok=True)

    def _key(self, revision: int) -> bytes:
        known = self._known
        if known is None or known[0] != revision:
            known = self._known = (revision, self._shared_key(revision))
        return known[1]

    def _shared_key(self, revision: int) -> bytes:
        path = self.folder / f"{revision}.key"
        try:
            with contextlib.suppress(FileNotFoundError):
                return path.read_bytes()
            self.folder.mkdir(exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".key.")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(secrets.token_bytes(_KEY_BYTES))
                with contextlib.suppress(FileExistsError):  # another worker was faster
                    os.link(temporary, path)
            finally:
                Path(temporary).unlink()
            return path.read_bytes()
        except (
            OSError
        ):  # serving goes on; this worker's callers pass for others than those of the other workers
            logger.exception("the key of callers can't be shared")
            return secrets.token_bytes(_KEY_BYTES)

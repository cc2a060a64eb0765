"""Bearer tokens: several are accepted at once, so that one can replace another without a caller being turned away."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from airflow_mlops.core.tokens import AcceptedTokens
from airflow_mlops.serving.files import FileState, file_state
from airflow_mlops.serving.requests import RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_mlops.serving.settings import ServiceSettings

logger = logging.getLogger(__name__)


class Authorization:
    """Lets those in who bring a token: one to ask, another one to steer.

    :param accepted: tokens, where no file holds them.
    :param path: file that holds them, and is looked at again and again.
    :raises ValueError: the file can't be read: without it everybody would come in.
    """

    def __init__(self, accepted: AcceptedTokens, *, path: Path | None = None) -> None:
        self._accepted, self._path = accepted, path
        # What came in last, and by which tokens: a digest of each request would cost more than looking at its body does.
        self._last = (accepted, b"")
        #: State of the file that was read last.
        self.read: FileState | None = None
        self._failing = False
        if path is not None:
            try:
                self._read(path)
            except (OSError, ValueError) as err:
                raise ValueError(f"the tokens in {path} can't be read: {err}") from err

    @classmethod
    def of(cls, settings: ServiceSettings) -> Authorization:
        """Accept what the settings say."""
        return cls(AcceptedTokens.of(settings.tokens, settings.steering_tokens), path=settings.token_file)

    @property
    def asks_callers(self) -> bool:
        """Whether callers have to bring a token."""
        return bool(self._accepted.callers)

    def refresh(self) -> bool:
        """Take what is new in the file; what can't be read leaves everything as it was.

        :returns: whether there was something new.
        """
        if self._path is None:
            return False
        try:
            if file_state(self._path) == self.read:
                self._failing = False
                return False
            self._read(self._path)
        except (OSError, ValueError):
            if not self._failing:  # once, and not at every look
                logger.exception("the tokens in %s can't be read: those of before stay accepted", self._path)
            self._failing = True
            return False
        self._failing = False
        logger.info("other tokens are accepted from now on")
        return True

    def _read(self, path: Path) -> None:
        there = file_state(path)  # before the content: what is written in between is read again
        self._accepted, self.read = AcceptedTokens.from_bytes(path.read_bytes()), there

    def require(self, headers: Mapping[bytes, bytes]) -> None:
        """Look at the token of a request of a caller.

        :raises RequestError: it brings none, or one that is not accepted.
        """
        accepted, given = self._accepted, headers.get(b"authorization", b"")
        by, last = self._last
        if by is accepted and last and hmac.compare_digest(last, given):
            return
        if not accepted.asks(given):
            raise RequestError(401, "the bearer token is missing or wrong")
        self._last = (accepted, given)

    def require_steering(self, headers: Mapping[bytes, bytes]) -> None:
        """Look at the token of a request that steers a rollout.

        :raises RequestError: it brings none, one that is not accepted, or one that callers have.
        """
        accepted, given = self._accepted, headers.get(b"authorization", b"")
        if accepted.steers(given):
            return
        if not accepted.steering:
            raise RequestError(
                403, "nobody steers this service: it was started without AIRFLOW_MLOPS_STEERING_TOKEN"
            )
        if accepted.is_callers(given):
            raise RequestError(
                403, "this token asks for predictions; a rollout is steered with a steering token"
            )
        raise RequestError(401, "the steering token is missing or wrong")

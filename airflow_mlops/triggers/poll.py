"""The trigger behind every sensor: run a poll in a thread until it has something to say."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_mlops.core.errors import describe_error
from airflow_mlops.core.extension import load_object
from airflow_mlops.exceptions import TransientError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

logger = logging.getLogger(__name__)

_SAY_AGAIN_SECONDS = 600.0


class Waiting(str):
    """What a poll is still waiting for, for the log; a poll may say ``None`` instead."""

    __slots__ = ()


class WaitLog:
    """Say what one task waits for: when it changes, else every ten minutes, as a mistyped address looks the same."""

    def __init__(self) -> None:
        self._said: tuple[str, float] | None = None

    def say(self, log: Any, why: Waiting | TransientError) -> None:
        """Log it, if it is not known; a service that does not answer is a warning."""
        text, now = str(why), time.monotonic()
        if self._said and self._said[0] == text and now - self._said[1] < _SAY_AGAIN_SECONDS:
            return
        self._said = (text, now)
        if isinstance(why, TransientError):
            log.warning("waiting on: %s", text)
        else:
            log.info("%s", text)


class PollTrigger(BaseTrigger):
    """Call a poll again and again, off the triggerer's event loop.

    A service that does not answer is waited for; any other error ends the wait, and the task raises it.

    :param poll: import path of the poll.
    :param arguments: its arguments, JSON; no credentials.
    :param poke_interval: seconds between two looks.
    """

    def __init__(self, *, poll: str, arguments: Mapping[str, Any], poke_interval: float = 60.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.poll = poll
        self.arguments = dict(arguments)
        self.poke_interval = poke_interval

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Say how to build this trigger again."""
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {"poll": self.poll, "arguments": self.arguments, "poke_interval": self.poke_interval},
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Wait, then say what was found or what went wrong."""
        waits = WaitLog()
        while True:
            try:
                found = await asyncio.to_thread(load_object(self.poll), **self.arguments)
            except TransientError as err:
                found = None
                waits.say(logger, err)
            except Exception as err:
                logger.exception("the wait can't go on")
                yield TriggerEvent({"error": describe_error(err)})
                return
            if isinstance(found, Waiting):
                waits.say(logger, found)
            elif found is not None:
                yield TriggerEvent({"found": found})
                return
            await asyncio.sleep(self.poke_interval)

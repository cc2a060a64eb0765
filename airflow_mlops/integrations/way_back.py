"""What every target does when a new version does not serve, or its task ends early: ask for what served before again."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Protocol

from airflow_mlops.exceptions import RolloutError, TransientError

log = logging.getLogger(__name__)

#: How long a target that fails for a moment is asked to put back what served.
UNDO_SECONDS = 60.0
_UNDO_PAUSE_SECONDS = 1.0


class NotReadyError(Exception):
    """What was asked for does not come to serve; says why."""


class Rollout(Protocol):
    """One attempt to let a target serve a version."""

    #: The version and its model, and the place, for messages.
    what: str
    where: str

    def ask(self) -> None:
        """Ask the target for the version."""

    def wait(self) -> None:
        """Wait until what was asked for last serves.

        :raises NotReadyError: it does not.
        """

    def settle(self) -> None:
        """Do what is left when the version serves."""

    def undo(self) -> str | None:
        """Ask for what was there before, if this attempt has asked for anything else; a second time changes nothing.

        :returns: the version that is asked for now; ``None`` where none is known to have served.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class TakenBack:
    """What serves in place of the new version.

    :param version: that serves again.
    :param seconds: from the decision until it was seen to serve.
    :param reason: why the new version was taken back.
    """

    version: str
    seconds: float
    reason: str


def carry_out(rollout: Rollout) -> TakenBack | None:
    """Let the version serve; when it does not come to it, see what served before serve again.

    However this ends, the target is not left asked for a version that failed, if there was another one.

    :returns: ``None`` when the version serves.
    :raises RolloutError: nothing is known to have served before, or it does not come to serve again.
    """
    try:
        try:
            rollout.ask()
            rollout.wait()
        except NotReadyError as err:
            return _take_back(rollout, str(err))
        rollout.settle()
    except BaseException:
        # The task ends: there is no time to look, but what served need only be asked for again.
        try:
            version = _undo(rollout, RolloutError)  # being killed once more does not end it
        except Exception:
            log.exception("%s could not be taken back in %s: look at it", rollout.what, rollout.where)
        else:
            served = f"version {version} is asked for" if version is not None else "it was left as it is"
            log.warning("%s ended early in %s: %s", rollout.what, rollout.where, served)
        raise
    return None


def _take_back(rollout: Rollout, why: str) -> TakenBack:
    begun = time.monotonic()
    what = f"{rollout.what} did not become ready in {rollout.where}: {why}"
    version = _undo(rollout)
    if version is None:
        raise RolloutError(
            f"{what}. Nothing else is known to have served before; it was left as it is, to be looked at"
        )
    try:
        rollout.wait()
    except NotReadyError as err:
        raise RolloutError(
            f"{what}. Version {version} was asked for again, and is not wholly ready either: {err}"
        ) from err
    return TakenBack(version=version, seconds=time.monotonic() - begun, reason=what)


def _undo(rollout: Rollout, through: type[Exception] = TransientError) -> str | None:
    deadline = time.monotonic() + UNDO_SECONDS
    while True:
        try:
            return rollout.undo()
        except (TransientError, through) as err:
            if time.monotonic() > deadline:
                raise
            log.warning("%s; trying again to put back what served", err)
        time.sleep(_UNDO_PAUSE_SECONDS)

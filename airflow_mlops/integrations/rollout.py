"""What every target does with a new version: wait until it serves, or ask for what served before again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from airflow_mlops.exceptions import RolloutError, TransientError

log = logging.getLogger(__name__)

#: How long a target that fails for a moment is asked to put back what served.
UNDO_SECONDS = 60.0
_UNDO_PAUSE_SECONDS = 1.0


class NotReadyError(Exception):
    """What was asked for does not come to serve; says why."""


class Rollout(Protocol):
    """One attempt to let a target serve a version."""

    #: The version; it and its model, and the place, for messages.
    version: str
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
class Outcome:
    """How an attempt ended.

    :param state: ``serving``: the new version. ``rolled_back``: the one before it, as the new one did not become ready.
    :param serving_version: that answers.
    :param restore_seconds: from the decision to take the new version back until the former one was seen to serve again.
    :param reason: why the new version was taken back.
    """

    state: Literal["serving", "rolled_back"]
    serving_version: str
    restore_seconds: float | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolledOut(Outcome):
    """What serves now.

    :param previous_version: the version before the one that answers; ``None`` at the first deployment, and where that is not
        known any more.
    :param deployment_uid: the target's name for the deployment: one that was deleted and made again has another.
    :param revision: the target's name for this state of the deployment.
    :param seconds: that all of it took.
    :param started: whether there was no such deployment.
    """

    previous_version: str | None
    deployment_uid: str
    revision: int | str
    seconds: float
    started: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a rollout is.

    :param status: ``done``, ``waiting`` or ``failed``.
    :param reason: a sentence.
    """

    status: Literal["done", "waiting", "failed"]
    reason: str


def watch(look: Callable[[], Progress], where: str, *, seconds: float, poll_seconds: float) -> Progress:
    """Look until a rollout is done or has failed, and for no longer than some seconds; what is new goes to the log.

    :param look: where it fails for a moment, it is asked again.
    :returns: what the last look has seen; still ``waiting`` when the time is over.
    """
    deadline = time.monotonic() + seconds
    said = ""
    while True:
        try:
            progress = look()
        except TransientError as err:
            log.warning("%s; looking again", err)
            progress = Progress(status="waiting", reason=str(err))
        if progress.status != "waiting":
            return progress
        if progress.reason != said:
            log.info("%s: %s", where, progress.reason)
            said = progress.reason
        if time.monotonic() > deadline:
            return progress
        time.sleep(poll_seconds)


def carry_out(rollout: Rollout) -> Outcome:
    """Let the version serve; when it does not come to it, see what served before serve again.

    However this ends, the target is not left asked for a version that failed, if there was another one.

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
    return Outcome(state="serving", serving_version=rollout.version)


def _take_back(rollout: Rollout, why: str) -> Outcome:
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
    return Outcome(
        state="rolled_back", serving_version=version, restore_seconds=time.monotonic() - begun, reason=what
    )


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

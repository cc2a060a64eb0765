"""The reconciler: it loads what the serving folder asks for beside what answers now, and swaps one reference."""

from __future__ import annotations

import errno
import json
import logging
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import psutil

from airflow_mlops.core.model.signing import Trust
from airflow_mlops.core.rollouts.desired_state import DesiredState, ServedVersion, share_point
from airflow_mlops.core.tokens import TOKENS_FILE
from airflow_mlops.exceptions import ArtifactIntegrityError
from airflow_mlops.serving.files import FileState, file_state, write_whole
from airflow_mlops.serving.lease import read_lease
from airflow_mlops.serving.model import ServedModel, load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from airflow_mlops.serving.authorization import Authorization

logger = logging.getLogger(__name__)

DESIRED_FILE = "desired.json"

#: Holds a file per worker that says what it serves.
WORKERS_FOLDER = "workers"

#: Seconds until what could not be loaded is tried again, at most.
LONGEST_PAUSE = 30.0

#: What the system says of a package that is not as it was.
_NO_PLAIN_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveVersion:
    """A version that is loaded.

    :param model_version: its version.
    :param package_digest: digest of the package that it was loaded from.
    :param model: the model, ready to predict.
    """

    model_version: str
    package_digest: str
    model: ServedModel


class Routes:
    """Which loaded version answers which request; never changed, only replaced.

    :param state: what is in force.
    :param versions: what is loaded, by version.
    :param fell_back: why this is not what was asked for, where it is not.
    """

    def __init__(
        self, state: DesiredState, versions: Mapping[str, LiveVersion], *, fell_back: str | None = None
    ) -> None:
        self.state = state
        self.versions = versions
        self.fell_back = fell_back
        self.stable = versions[state.stable.model_version]
        self.mirror = versions[state.mirror] if state.mirror else None
        answering = [one for one in (*state.versions[1:], state.stable) if one.share > 0.0]
        self._only = versions[answering[0].model_version] if len(answering) == 1 else None
        # Others first: a share that grows takes keys from the stable version, and moves none between the others.
        ends = accumulate(one.share for one in answering)
        self._ends = [(end, versions[one.model_version]) for end, one in zip(ends, answering, strict=True)]
        self._salt = "/".join([state.model_name, *(one.model_version for one in state.versions[1:])]).encode()

    def choose(self, sticky_key: bytes | None = None) -> LiveVersion:
        """Choose the version that answers a request.

        :param sticky_key: whoever asks with the same one is answered by the same version, if the rollout is sticky.
        """
        if self._only is not None:
            return self._only
        if self.state.sticky and sticky_key:
            point = share_point(self._salt + b"/" + sticky_key)
        else:
            point = random.random()  # noqa: S311 - which version answers is no secret
        return next((version for end, version in self._ends if point < end), self.stable)


class Reconciler:
    """Keep what answers equal to what the serving folder's desired state names.

    :param serving_dir: serving folder.
    :param on_change: called with the new routes after every swap.
    :param poll_seconds: how often the desired state is looked at.
    :param public_keys: keys a package must be signed with before it is loaded; ``None`` checks digests only.
    :param workers: how many workers the service has.
    :param authorization: told to look at its file, as often as the desired state is looked at.
    """

    def __init__(
        self,
        serving_dir: Path,
        *,
        on_change: Callable[[Routes], None] | None = None,
        poll_seconds: float = 0.2,
        public_keys: str | None = None,
        workers: int = 1,
        authorization: Authorization | None = None,
    ) -> None:
        self.serving_dir = serving_dir
        self.workers = workers
        self.poll_seconds = poll_seconds
        self.public_keys = public_keys
        self.routes: Routes | None = None
        self._on_change = on_change
        self._authorization = authorization
        self._refusal: str | None = None
        self._seen: FileState | None = None
        self._tried: FileState | None = None
        self._problem: str | None = None
        self._tries = 0
        self._try_again_at = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._reconcile_regularly, name="reconciler", daemon=True)

    def start(self) -> None:
        """Load what is desired, then watch for changes."""
        self.reconcile()
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()

    @property
    def error(self) -> str | None:
        """Why not all is served that was asked for, if so."""
        return self._problem or (self.routes.fell_back if self.routes else None)

    def reconcile(self) -> None:
        """Look once: whether other tokens are accepted, somebody steers what is served, and something else is desired."""
        if self.routes is not None:
            self._swap(self._steered(self.routes))
        if self._authorization is not None and self._authorization.refresh():
            self._tell(self._refusal)
        try:
            routes = self._desired()
            if routes is not None:
                self._swap(self._steered(routes))
        except Exception as err:
            self._tries += 1
            self._try_again_at = time.monotonic() + min(LONGEST_PAUSE, 2.0 ** min(self._tries, 10) / 4.0)
            self._problem = f"{type(err).__name__}: {err}"
            logger.exception("what is desired can't be served")
            self._tell(self._problem if _lasts(err) else None)

    def _desired(self) -> Routes | None:
        """Load the desired versions beside the live ones, if they have changed; one that fails leaves all as it was."""
        path = self.serving_dir / DESIRED_FILE
        there = file_state(path)
        if there is None or there == self._seen:
            return None
        if there != self._tried:  # something new is tried at once
            self._tried, self._tries = there, 0
        elif time.monotonic() < self._try_again_at:
            return None
        desired = DesiredState.from_bytes(path.read_bytes())
        try:
            loaded = {one.model_version: self._load(desired, one) for one in desired.versions}
        except Exception as err:
            if self.routes is None and len(desired.versions) > 1:
                # A worker that starts has nothing it could leave as it was: better the stable version than none.
                why = f"{type(err).__name__}: {err}; version {desired.stable.model_version} answers"
                stable = self._load(desired, desired.stable)
                self._swap(Routes(desired.fallback, {stable.model_version: stable}, fell_back=why))
            raise
        self._seen, self._tried, self._problem = there, None, None
        return Routes(desired, loaded)

    def _steered(self, routes: Routes) -> Routes:
        """Let the stable version answer everything when nobody steers any more."""
        if not routes.state.leased:
            return routes
        lease = read_lease(self.serving_dir)
        if lease is not None and lease.covers(routes.state.revision):
            return routes
        why = f"nobody steers the rollout any more; version {routes.stable.model_version} answers"
        return Routes(routes.state.fallback, routes.versions, fell_back=why)

    def _load(self, desired: DesiredState, version: ServedVersion) -> LiveVersion:
        there = self.routes.versions.get(version.model_version) if self.routes else None
        if there is not None and there.package_digest == version.package_digest:
            return there
        model = load_model(
            self.serving_dir / desired.folder(version),
            expected_digest=version.package_digest,
            trust=Trust.of(self.public_keys, desired.model_name),
        )
        return LiveVersion(
            model_version=version.model_version, package_digest=version.package_digest, model=model
        )

    def _swap(self, routes: Routes) -> None:
        if routes is self.routes:
            return
        self.routes = routes
        self._tell()
        try:
            if self._on_change is not None:
                self._on_change(routes)
        except Exception:  # what is served is served; who counts must not end it
            logger.exception("what is served since now can't be counted")
        shares = ", ".join(
            f"version {one.model_version} ({one.share:.0%})"
            if one.share < 1.0
            else f"version {one.model_version}"
            for one in routes.state.versions
        )
        logger.info("serving %s: %s", routes.state.model_name, routes.fell_back or shares)

    def _tell(self, refusal: str | None = None) -> None:
        """Write what this worker serves, for whoever waits until all do.

        :param refusal: why it will never serve what is desired now.
        """
        routes, process = self.routes, psutil.Process()
        self._refusal = refusal
        known = {
            "started": process.create_time(),
            "revision": None if routes is None or routes.fell_back else routes.state.revision,
            "workers": self.workers,
            "refused": self._tried if refusal else None,
            "refusal": refusal,
            "tokens": self._authorization.read if self._authorization is not None else None,
        }
        try:
            folder = self.serving_dir / WORKERS_FOLDER
            folder.mkdir(exist_ok=True)
            write_whole(folder / f"{process.pid}.json", json.dumps(known).encode())
        except Exception:  # what is served is served; whoever waits for it waits until he has no more time
            logger.exception("what is served since now can't be told")

    def _reconcile_regularly(self) -> None:
        while not self._stopped.wait(self.poll_seconds):
            try:
                self.reconcile()
            except Exception:  # this thread takes versions back: it must not end
                logger.exception("looking at what is desired failed")


def _lasts(err: Exception) -> bool:
    """Tell whether trying again does not help, as long as nobody changes the process or the package."""
    cause = err.__cause__
    # Memory, file handles and disks come back.
    passes = isinstance(cause, MemoryError) or (
        isinstance(cause, OSError) and cause.errno not in _NO_PLAIN_FILE
    )
    return isinstance(err, ArtifactIntegrityError | ImportError) and not passes


def workers_behind(serving_dir: Path, revision: int) -> str | None:
    """Say which workers do not serve a revision yet; ``None`` when all do that the service has."""
    workers = dict(_living_workers(serving_dir))
    lagging = [pid for pid, known in workers.items() if known["revision"] != revision]
    if lagging:
        return f"workers {', '.join(lagging)} do not serve it yet"
    wanted = _wanted(workers)
    return f"{len(workers)} of {wanted} workers have started" if len(workers) < wanted else None


def workers_with_old_tokens(serving_dir: Path) -> str | None:
    """Say which workers have not read the tokens yet that are accepted from now on; ``None`` when all have that read them at all."""
    there = file_state(serving_dir / TOKENS_FILE)
    lagging = [
        pid
        for pid, known in _living_workers(serving_dir)
        if known.get("tokens") is not None and tuple(known["tokens"]) != there
    ]
    return f"workers {', '.join(lagging)} accept the tokens of before" if lagging else None


def why_refused(serving_dir: Path, revision: int) -> str | None:
    """Say why what is desired will not be served, once each worker either serves it or has said that it can't.

    :returns: what the first of them said that can't; ``None`` while there is hope.
    """
    workers = dict(_living_workers(serving_dir))
    desired = file_state(serving_dir / DESIRED_FILE)
    # By the file, not by its revision: one that was put right may come back under the same number.
    refusals = {
        pid: known["refusal"]
        for pid, known in workers.items()
        if known.get("refused") is not None and tuple(known["refused"]) == desired
    }
    decided = all(pid in refusals or known["revision"] == revision for pid, known in workers.items())
    if not refusals or not decided or len(workers) < _wanted(workers):
        return None
    return str(next(iter(refusals.values())))


def _living_workers(serving_dir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give what the workers that run told, by process id."""
    for path in sorted((serving_dir / WORKERS_FOLDER).glob("*.json")):
        known = json.loads(path.read_text())
        if _lives(int(path.stem), known["started"]):
            yield path.stem, known
        else:
            path.unlink(missing_ok=True)


def _wanted(workers: Mapping[str, Mapping[str, Any]]) -> int:
    return max([1, *(int(known["workers"]) for known in workers.values())])


def _lives(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < 1.0
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False

"""The reconciler: it loads what the serving folder asks for beside what answers now, and swaps one reference."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from airflow_mlops.core.desired_state import DesiredState, ServedVersion, share_point
from airflow_mlops.core.signing import Trust
from airflow_mlops.serving.lease import read_lease
from airflow_mlops.serving.model import ServedModel, load_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

DESIRED_FILE = "desired.json"


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
    """

    def __init__(
        self,
        serving_dir: Path,
        *,
        on_change: Callable[[Routes], None] | None = None,
        poll_seconds: float = 0.2,
        public_keys: str | None = None,
    ) -> None:
        self.serving_dir = serving_dir
        self.poll_seconds = poll_seconds
        self.public_keys = public_keys
        self.routes: Routes | None = None
        self.error: str | None = None
        self._on_change = on_change
        self._seen: tuple[int, int] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._reconcile_regularly, name="reconciler", daemon=True)

    def start(self) -> None:
        """Load what is desired, then watch for changes."""
        self.reconcile()
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()

    def reconcile(self) -> None:
        """Load the desired versions beside the live ones and swap one reference; one that fails leaves all as it was."""
        routes = self.routes
        try:
            routes = self._desired() or routes
            self.error = routes.fell_back if routes else None
        except Exception as err:
            self.error = f"{type(err).__name__}: {err}"
            logger.exception("what is desired can't be served")
        if routes is not None:
            routes = self._steered(routes)
        if routes is not None and routes is not self.routes:
            self._swap(routes)

    def _desired(self) -> Routes | None:
        """Load what is desired, if that has changed."""
        path = self.serving_dir / DESIRED_FILE
        try:
            stat = path.stat()
        except FileNotFoundError:
            return None
        if (stat.st_mtime_ns, stat.st_ino) == self._seen:
            return None
        self._seen = (stat.st_mtime_ns, stat.st_ino)
        desired = DesiredState.from_bytes(path.read_bytes())
        try:
            loaded = {one.model_version: self._load(desired, one) for one in desired.versions}
        except Exception as err:
            if self.routes is not None or len(desired.versions) == 1:
                raise
            # A worker that starts has nothing it could leave as it was: better the stable version than none.
            logger.exception("not all that is desired can be served")
            why = f"{type(err).__name__}: {err}; version {desired.stable.model_version} answers"
            stable = self._load(desired, desired.stable)
            return Routes(desired.fallback, {stable.model_version: stable}, fell_back=why)
        return Routes(desired, loaded)

    def _steered(self, routes: Routes) -> Routes:
        """Let the stable version answer everything when nobody steers any more."""
        if not routes.state.leased:
            return routes
        lease = read_lease(self.serving_dir)
        if lease is not None and lease.revision == routes.state.revision and lease.valid:
            return routes
        why = f"nobody steers the rollout any more; version {routes.stable.model_version} answers"
        self.error = why
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
        if self._on_change is not None:
            self._on_change(routes)
        self.routes = routes
        shares = ", ".join(
            f"version {one.model_version} ({one.share:.0%})"
            if one.share < 1.0
            else f"version {one.model_version}"
            for one in routes.state.versions
        )
        logger.info("serving %s: %s", routes.state.model_name, routes.fell_back or shares)

    def _reconcile_regularly(self) -> None:
        while not self._stopped.wait(self.poll_seconds):
            self.reconcile()

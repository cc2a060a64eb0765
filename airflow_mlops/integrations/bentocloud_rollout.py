"""Roll a model's service out to BentoCloud: push, deploy, see it answer, or put back what served before."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import EndpointUnavailableError, RolloutError
from airflow_mlops.integrations.bentocloud import config_of, started_for
from airflow_mlops.integrations.bentoml import EndpointClient
from airflow_mlops.integrations.bentoml_build import bento_name
from airflow_mlops.integrations.rollout import NotReadyError, Progress, RolledOut, carry_out, watch

if TYPE_CHECKING:
    from bentoml._internal.cloud.deployment import Deployment

    from airflow_mlops.integrations.bentocloud import BentoCloud, CloudEndpoint

log = logging.getLogger(__name__)

#: BentoCloud's words for a deployment that answers, or would when somebody asks; and for one that will not.
_RUNNING = frozenset({"running", "scaled-to-zero"})
_FAILED = frozenset({"failed", "image-build-failed", "terminated", "terminating", "unhealthy"})

#: How often in a row BentoCloud or the service has to say what may still be about the deployment before.
_LOOKS = 2

#: A deployment that sleeps takes its time to answer its first request.
_ANSWER_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudRolledOut(RolledOut):
    """What serves now on BentoCloud.

    :param endpoint_url: where it answers.
    :param console_url: where BentoCloud shows it.
    """

    endpoint_url: str
    console_url: str


def roll_out(
    cloud: BentoCloud,
    endpoint: CloudEndpoint,
    bento: Path,
    *,
    variables: Mapping[str, str],
    poll_seconds: float = 10.0,
) -> CloudRolledOut:
    """Push, deploy and wait until the service itself says that it serves the version; the former one answers until then.

    What is there already stays, so a retry goes on where a killed task was.

    :param bento: its folder.
    :param variables: of the service, for the secret that the endpoint names.
    :returns: which version serves: the new one, or the former one when the new one did not become ready.
    :raises RolloutError: it did not, and there is no former one; or a deployment of this name serves something else.
    :raises ConnectionConfigError: BentoCloud does not know us, or does not let us do what this takes.
    """
    started = time.monotonic()
    cloud.require_access()
    before = cloud.find(endpoint.deployment)
    served = before.get_bento(refetch=False) if before is not None else ""
    if before is not None and served.partition(":")[0] != bento_name(endpoint.model_name):
        raise RolloutError(
            f"deployment {endpoint.deployment} is there and serves {served or 'nothing'}, which is no Bento of model "
            f"{endpoint.model_name!r}: delete it, or give another name in settings. Nothing was changed"
        )
    service = cloud.push(bento)
    if endpoint.secret is not None:
        cloud.keep_secret(endpoint.secret, variables)
    token = variables.get("AIRFLOW_MLOPS_ENDPOINT_TOKEN")
    rollout = _Rollout(cloud, endpoint, service, before, token, poll_seconds)
    outcome = carry_out(rollout)
    now = rollout.now or rollout.found()
    return CloudRolledOut(
        state=outcome.state,
        endpoint_url=_url_of(now),
        console_url=now.admin_console,
        serving_version=outcome.serving_version,
        previous_version=_version_in(served) if rollout.former and outcome.state == "serving" else None,
        deployment_uid=str(now._schema.uid),
        revision=_revision_of(now),
        seconds=time.monotonic() - started,
        started=before is None,
        restore_seconds=outcome.restore_seconds,
        reason=outcome.reason,
    )


class _Rollout:
    """One attempt: what it found, what it asked for, and the way back.

    :param service: name of the service in the Bento.
    :param before: the deployment as it was found.
    """

    def __init__(
        self,
        cloud: BentoCloud,
        endpoint: CloudEndpoint,
        service: str,
        before: Deployment | None,
        token: str | None,
        poll_seconds: float,
    ) -> None:
        self.cloud, self.endpoint, self.before = cloud, endpoint, before
        self.token, self.poll_seconds = token, poll_seconds
        self.version, self.where = endpoint.model_version, endpoint.deployment
        self.what = f"version {endpoint.model_version} of {endpoint.model_name}"
        #: What served before, as it can be asked for again; empty where that is nothing, or not known any more.
        self.former: dict[str, Any] = {}
        #: The deployment when it was seen to serve.
        self.now: Deployment | None = None
        self._wanted = endpoint.config(service)
        #: What the service has to say of itself: its version, and which deployment it was started for.
        self._awaited = (endpoint.model_version, started_for(self._wanted))
        #: What the last look has seen, and how many in a row.
        self._seen, self._looks = "", 0
        self._asking = False
        self._asked: str | None = None
        self._undone: str | None = None

    def ask(self) -> None:
        """Ask for the version, unless an attempt before has."""
        before = self.before
        asked_before = before is not None and _says(before, self._wanted)
        if before is not None and not asked_before:
            self.former = config_of(before)
        if before is not None and asked_before and before.get_status(refetch=False).status not in _FAILED:
            log.info("%s was asked for already", self.endpoint.tag)
            self._asked = _revision_of(before)
            return
        self._asking = True  # the answer may get lost
        self._asked = _revision_of(self.cloud.apply(self._wanted, before))

    def settle(self) -> None:
        """Do nothing: BentoCloud has all of it."""

    def found(self) -> Deployment:
        """Read the deployment again."""
        found = self.cloud.find(self.endpoint.deployment)
        if found is None:
            raise RolloutError(f"deployment {self.endpoint.deployment} was deleted meanwhile")
        return found

    def wait(self) -> None:
        """Wait until the service says that it serves what was asked for last.

        :raises NotReadyError: it does not; says what is known.
        :raises RolloutError: the deployment is not asked to be this any more.
        """
        seconds = self.endpoint.ready_seconds
        self._seen = ""
        progress = watch(self._progress, self.where, seconds=seconds, poll_seconds=self.poll_seconds)
        if progress.status != "done":
            late = f"after {seconds:.0f} s (ready_seconds) " if progress.status == "waiting" else ""
            raise NotReadyError(self._explained(f"{late}BentoCloud says {progress.reason}"))

    def undo(self) -> str | None:
        """Ask for what was there before again, unless somebody else has deployed since.

        :returns: the version that is asked for now; ``None`` where none is known to have served.
        """
        if not self._asking:
            return None
        if self._undone is not None:
            return self._undone
        found = self.cloud.find(self.endpoint.deployment)
        if found is None:
            return None
        if not self._is_asked_for(found):
            return self._accept(found)  # theirs, not asked for, or put back already
        if not self.former:
            return None
        return self._accept(self.cloud.apply(self.former, found))

    def _is_asked_for(self, found: Deployment) -> bool:
        if self._asked is not None:
            return _revision_of(found) == self._asked
        news = self.before is None or _revision_of(found) != _revision_of(self.before)
        return news and _says(found, self._wanted)

    def _accept(self, found: Deployment) -> str | None:
        """Wait for what a deployment is asked to be from here on."""
        self._asked = _revision_of(found)
        version = _version_in(found.get_bento(refetch=False))
        self._awaited = (version or "", started_for(config_of(found)))
        self._undone = version
        return version

    def _progress(self) -> Progress:
        """Say how far it is; what may still be about the deployment before has to be seen again to count."""
        before, self._seen = self._seen, ""
        status, reason = self._look()
        self._seen = "failed" if status in _FAILED else status
        self._looks = self._looks + 1 if self._seen == before else 1
        if status == "ready" or (status == "answers" and self._looks >= _LOOKS):
            return Progress(status="done", reason=reason)
        failed = self._seen == "failed" and self._looks >= _LOOKS
        return Progress(status="failed" if failed else "waiting", reason=reason)

    def _look(self) -> tuple[str, str]:
        """Say how far it is, and a sentence.

        :returns: ``ready``; ``answers`` where the service can't tell which deployment it was started for; or BentoCloud's word.
        """
        found = self.found()
        if self._asked and _revision_of(found) != self._asked:
            raise RolloutError(
                f"{self.what} does not serve in {self.where}: meanwhile {found.get_bento(refetch=False)} was asked for, not by "
                "this task. It was left as it is"
            )
        status = found.get_status(refetch=False).status
        if status not in _RUNNING:
            return status, repr(status)
        url = _url_of(found)
        if not url:
            return status, f"{status!r}, and no address yet"
        try:
            with EndpointClient(url, self.token, timeout_seconds=_ANSWER_SECONDS, trust_env=True) as client:
                told = client.ready()
        except (EndpointUnavailableError, ValueError) as err:
            return status, f"{status!r}, but {err}"
        version, started_for = self._awaited
        if str(told.get("model_version")) != version:
            return status, f"{status!r}, but version {told.get('model_version')} answers"
        if started_for is None or "deployment" not in told:
            self.now = found
            return "answers", f"version {version} answers, of this deployment or the one before"
        if told["deployment"] != started_for:
            return status, f"{status!r}, but what answers was started for the deployment before"
        self.now = found
        return "ready", f"version {version} answers"

    def _explained(self, reason: str) -> str:
        troubles = self.cloud.why_not_ready(self.endpoint.deployment)
        return f"{reason} ({troubles})" if troubles else reason


def _says(found: Deployment, wanted: Mapping[str, Any]) -> bool:
    """Tell whether a deployment is asked to be this."""
    config = config_of(found)
    services = config.get("services") or {}
    return (
        config.get("bento") == wanted["bento"]
        and sorted(config.get("secrets") or ()) == sorted(wanted["secrets"])
        and sorted(config.get("envs") or (), key=str) == sorted(wanted["envs"], key=str)
        and all(
            (services.get(name) or {}).get(key) == value
            for name, service in wanted["services"].items()
            for key, value in service.items()
        )
    )


def _url_of(found: Deployment) -> str:
    from bentoml.exceptions import BentoMLException

    try:
        return str(found.get_endpoint_urls(refetch=False)[0])
    except BentoMLException:
        return ""


def _revision_of(found: Deployment) -> str:
    revision = found._schema.latest_revision
    return str(revision.uid) if revision is not None else ""


def _version_in(tag: str) -> str | None:
    """Read the model's version from a Bento's tag: ``name:version-digest``."""
    return tag.partition(":")[2].rpartition("-")[0] or None

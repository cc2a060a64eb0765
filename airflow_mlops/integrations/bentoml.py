"""BentoML: the local service as a process of its own, and a client of its endpoint."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import uuid
from typing import TYPE_CHECKING, Any, Self

import httpx

from airflow_mlops.core.codec import canonical_json, to_dict
from airflow_mlops.core.environment import bare_environment
from airflow_mlops.core.tokens import TOKENS_FILE, AcceptedTokens
from airflow_mlops.exceptions import (
    ConnectionConfigError,
    EndpointUnavailableError,
    RolloutError,
    SignatureMismatchError,
)
from airflow_mlops.integrations.service_process import (
    LAUNCH_VARIABLE,
    STOP_SECONDS,
    Launch,
    RunningServer,
    end_server,
    one_at_a_time,
    running_server,
    write_private,
)
from airflow_mlops.integrations.signals import deferred_signals

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

LOG_FILE = "service.log"
#: Settings of the inference log, as :mod:`airflow_mlops.serving.log_settings` reads them.
LOG_SETTINGS_FILE = "inference_log/settings.json"
#: Holds the token that rollouts are steered with, where nobody gave one; for the user who owns the folder only.
STEERING_FILE = "steering.token"

#: How long a process may take to become the service; it has to end its predecessor first.
_LAUNCH_SECONDS = 60.0

#: Variables of ours that are settings of the service: whoever starts it hands them on.
_HANDED_ON = ("AIRFLOW_MLOPS_SERVICE_", "AIRFLOW_MLOPS_LOG_")


class LocalServer:
    """The BentoML process of one serving folder; it outlives whoever started it.

    :param serving_dir: serving folder.
    :param host: address to listen on.
    :param port: port to listen on.
    :param token: bearer token requests must bring; several, apart by spaces, are all accepted.
    :param steering_token: bearer token rollouts are steered with, or several; default one that is made, and kept in the folder.
    :param public_keys: keys a package must be signed with before the service loads it.
    """

    def __init__(
        self,
        serving_dir: Path,
        *,
        host: str = "127.0.0.1",
        port: int,
        token: str | None = None,
        steering_token: str | None = None,
        public_keys: str | None = None,
    ) -> None:
        self.serving_dir = serving_dir
        self.host = host
        self.port = port
        self.token = token
        self.steering_token = steering_token
        self.public_keys = public_keys

    @property
    def url(self) -> str:
        """Address of the endpoint."""
        return f"http://{self.host}:{self.port}"

    @property
    def settings(self) -> str:
        """Digest of address, keys, trusted types, accepted pickles and settings; a service that runs with others has to be started again.

        Tokens are none of them: see :meth:`hand_tokens`.
        """
        vouched = [
            os.environ.get(name, "")
            for name in ("AIRFLOW_MLOPS_PICKLED_MODELS", "AIRFLOW_MLOPS_TRUSTED_TYPES")
        ]
        # The service reads them when it starts, and whoever reads the log each time.
        path = self.serving_dir / LOG_SETTINGS_FILE
        log_settings = path.read_text() if path.is_file() else ""
        known = [self.url, self.public_keys, *vouched, str(self.serving_dir), _handed_on(), log_settings]
        text = canonical_json(known)
        # Slow on purpose: the key of pseudonyms is among them, and what people chose could be guessed from a plain digest.
        return hashlib.scrypt(
            text.encode(), salt=b"airflow-mlops endpoint", n=2**14, r=8, p=1, dklen=16
        ).hex()

    def current_steering_token(self) -> str | None:
        """Give what rollouts are steered with; ``None`` before the service was ever started."""
        return self.steering_token or steering_token_of(self.serving_dir)

    def hand_tokens(self) -> None:
        """Let the service accept the tokens of now, and no others; one that runs takes them without being started again.

        Written are keyed digests, for the user who owns the folder only.
        """
        steering = self.current_steering_token() or _make_steering_token(self.serving_dir)
        accepted = (self.token or "").split(), steering.split()
        path = self.serving_dir / TOKENS_FILE
        with contextlib.suppress(FileNotFoundError, ValueError):
            if AcceptedTokens.from_bytes(path.read_bytes()).are(*accepted):
                return
        write_private(path, AcceptedTokens.of(*accepted).to_bytes())

    def running(self) -> RunningServer | None:
        """Find the process this folder's service runs in, if it still does."""
        return running_server(self.serving_dir)

    def start(self) -> RunningServer:
        """Start the service; it is up when the endpoint answers.

        :raises RolloutError: the port is taken by somebody else.
        """
        self.require_free_port()
        return self._launch(None)

    def restart(self, running: RunningServer) -> RunningServer:
        """Start it again with what is set now; requests are refused from the end of the old process to the new one's first answer.

        The new process ends the old one and takes its place: it is done also when whoever asked for it is killed meanwhile.

        :raises RolloutError: another port was asked for, and is taken.
        """
        if running.url != self.url:
            self.require_free_port()
        return self._launch(running)

    def stop(self, *, timeout_seconds: float = STOP_SECONDS) -> None:
        """End the service: ask its process group, then insist. Does nothing when it does not run.

        :param timeout_seconds: longer than ``AIRFLOW_MLOPS_SERVICE_DRAIN_SECONDS``, during which it still answers.
        """
        if not self.serving_dir.exists():
            return
        with one_at_a_time(self.serving_dir):
            server = self.running()
            if server is not None:
                end_server(self.serving_dir, server, timeout_seconds=timeout_seconds)

    def _launch(self, replaces: RunningServer | None) -> RunningServer:
        self.hand_tokens()
        environment = self._environment()
        launch = Launch(
            host=self.host, port=self.port, url=self.url, settings=self.settings, replaces=replaces
        )
        environment[LAUNCH_VARIABLE] = json.dumps(to_dict(launch))
        command = [sys.executable, "-m", "airflow_mlops.integrations.service_process"]
        process: subprocess.Popen[bytes] | None = None
        try:
            with deferred_signals(), (self.serving_dir / LOG_FILE).open("ab") as log:
                process = subprocess.Popen(  # noqa: S603 - our own interpreter and service
                    command,
                    cwd=self.serving_dir,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            return self._launched(process, launch)
        except BaseException:
            if process is not None and replaces is None:
                _kill_group(process)
            raise

    def _launched(self, process: subprocess.Popen[bytes], launch: Launch) -> RunningServer:
        """Wait until the process has written down that it is the service."""
        deadline = time.monotonic() + _LAUNCH_SECONDS
        while time.monotonic() < deadline:
            ended, running = process.poll() is not None, self.running()
            if running is not None and running.pid == process.pid:
                return running
            if ended and running is not None and running.settings == launch.settings:
                return running  # started by somebody who was killed before he knew it
            if ended:
                raise RolloutError(f"the service did not start; its log ends with\n{self.log_tail()}")
            time.sleep(0.01)
        raise RolloutError(
            f"the service of {self.serving_dir} did not start within {_LAUNCH_SECONDS:g} s; its log ends with\n{self.log_tail()}"
        )

    def _environment(self) -> dict[str, str]:
        """Give the service's environment: its settings, and nothing of the task's secrets."""
        environment = bare_environment() | _handed_on()
        environment |= {
            "AIRFLOW_MLOPS_SERVING_DIR": str(self.serving_dir),
            "AIRFLOW_MLOPS_TOKEN_FILE": str(self.serving_dir / TOKENS_FILE),
            "BENTOML_DO_NOT_TRACK": "True",
            # Every start of BentoML empties its metrics folder: each service needs a home of its own.
            "BENTOML_HOME": str(self.serving_dir / ".bentoml"),
        }
        if self.public_keys:
            environment["AIRFLOW_MLOPS_SIGNING_PUBLIC_KEYS"] = self.public_keys
        return environment

    def log_tail(self, lines: int = 15) -> str:
        """Give the end of the service's log, for an error message."""
        try:
            return "\n".join((self.serving_dir / LOG_FILE).read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return "(no log)"

    def require_free_port(self) -> None:
        """See that the service could listen.

        :raises RolloutError: it could not; says why.
        """
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as err:
                raise RolloutError(
                    f"{_why_not_bound(err, self.host, self.port)}. Nothing was changed"
                ) from err


class EndpointClient:
    """Ask an endpoint for predictions; a context manager, as its connections stay open until it is closed.

    :param url: address, ``http(s)://host:port``.
    :param token: bearer token; of several, apart by spaces, the first is sent.
    :param steering_token: sent instead where a rollout is steered; likewise.
    :param timeout_seconds: per request.
    :param trust_env: whether the way there is by the proxy that the environment names; it is not for a service of this network.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        steering_token: str | None = None,
        timeout_seconds: float = 30.0,
        trust_env: bool = False,
    ) -> None:
        self.url = url.rstrip("/")
        self._steering = _bearer(steering_token)
        self._client = httpx.Client(
            base_url=self.url, headers=_bearer(token), timeout=timeout_seconds, trust_env=trust_env
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def ready(self) -> dict[str, Any]:
        """Tell what the endpoint serves.

        :raises EndpointUnavailableError: it does not answer.
        """
        return self._request("GET", "/status")

    def predict(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        prediction_ids: Sequence[str] | None = None,
        times: Sequence[str] | None = None,
        sticky_key: str | None = None,
    ) -> dict[str, Any]:
        """Ask for predictions; where the connection breaks before the answer is there, ask again, twice at most.

        A worker that is killed takes what it had at hand along. Asked again under the same ids, another one answers, and
        whoever reads the inference log sees each prediction once.

        :param rows: at most 10,000 records.
        :param prediction_ids: one per row, to join labels by; default made here.
        :param times: event times, one per row, ISO 8601; default now.
        :param sticky_key: who asks; in an A/B test he is always answered by the same version.
        :raises SignatureMismatchError: the service named a field that does not fit.
        :raises EndpointUnavailableError: it does not answer, or failed.
        """
        body: dict[str, Any] = {"rows": list(rows)}
        body["prediction_ids"] = (
            list(prediction_ids) if prediction_ids is not None else [uuid.uuid4().hex for _ in body["rows"]]
        )
        if times is not None:
            body["times"] = list(times)
        headers = {"x-sticky-key": sticky_key} if sticky_key else None
        return self._request("POST", "/predict", tries=3, json=body, headers=headers)

    def explain(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        label: str | None = None,
        prediction_ids: Sequence[str] | None = None,
        sticky_key: str | None = None,
    ) -> dict[str, Any]:
        """Ask what each input contributed to the predictions; asked again like :meth:`predict`.

        :param rows: at most 10 records, unless the service is set to take more.
        :param label: of a classification the label whose probability is explained; default in each row the one that is answered.
        :param prediction_ids: one per row, which come back.
        :param sticky_key: who asks.
        :returns: ``model_name``, ``model_version``, and ``explanations``, one per row: ``score`` is ``base_value`` plus
            all ``contributions``.
        :raises SignatureMismatchError: the service named a field that does not fit, or does not know the label.
        :raises ValueError: the version can't be explained, or the service is explaining already.
        :raises EndpointUnavailableError: it does not answer, or failed.
        """
        body: dict[str, Any] = {"rows": list(rows)}
        if prediction_ids is not None:
            body["prediction_ids"] = list(prediction_ids)
        headers = {"x-sticky-key": sticky_key} if sticky_key else None
        params = {"label": label} if label is not None else None
        return self._request("POST", "/predict/explain", tries=3, json=body, headers=headers, params=params)

    def rollout(self) -> dict[str, Any]:
        """Tell what each version did since the present state is served: :class:`~airflow_mlops.core.rollouts.observations.Observations`.

        :raises EndpointUnavailableError: it does not answer.
        :raises ConnectionConfigError: it does not take the steering token.
        """
        return self._request("GET", "/rollout", headers=self._steering)

    def renew_lease(self, revision: int, seconds: float) -> None:
        """Say that somebody steers the rollout for so long; 0 seconds: nobody does any more.

        :raises EndpointUnavailableError: it does not answer.
        :raises ConnectionConfigError: it does not take the steering token.
        :raises ValueError: the lease ran out, or another state is served.
        """
        asked = {"revision": revision, "seconds": seconds}
        self._request("POST", "/rollout/lease", json=asked, headers=self._steering)

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()

    def _request(self, method: str, path: str, *, tries: int = 1, **kwargs: Any) -> dict[str, Any]:
        try:
            answer = self._client.request(method, path, **kwargs)
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as err:
            if tries == 1:
                raise self._silent(err) from err
            return self._request(method, path, tries=tries - 1, **kwargs)
        except httpx.HTTPError as err:
            raise self._silent(err) from err
        if answer.status_code == 200:
            body: dict[str, Any] = answer.json()
            return body
        message = _error_of(answer)
        if answer.status_code == 422:
            raise SignatureMismatchError(message)
        if path.startswith("/rollout") and answer.status_code in (401, 403):
            raise ConnectionConfigError(
                f"the service at {self.url} does not let this rollout be steered ({answer.status_code}): {message}. Give the BentoML "
                f"connection's Extra the steering_token the service was started with, or let whoever steers read {STEERING_FILE} in "
                "its serving_dir; the service takes one that was changed since with the next deploy"
            )
        if answer.status_code >= 500:
            raise EndpointUnavailableError(f"the service at {self.url} failed: {message}")
        raise ValueError(f"the service at {self.url} refused the request ({answer.status_code}): {message}")

    def _silent(self, err: httpx.HTTPError) -> EndpointUnavailableError:
        return EndpointUnavailableError(f"the service at {self.url} does not answer: {err}")


def steering_token_of(serving_dir: Path) -> str | None:
    """Read the token that was made for the service of a folder; ``None`` where there is none, or none for this user."""
    try:
        return (serving_dir / STEERING_FILE).read_text().strip() or None
    except OSError:
        return None


def _make_steering_token(serving_dir: Path) -> str:
    token = secrets.token_urlsafe(32)
    write_private(serving_dir / STEERING_FILE, token.encode())
    return token


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with deferred_signals():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)


def _bearer(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token.split()[0]}"} if token and token.strip() else {}


def wait_until(condition: Any, *, timeout_seconds: float, interval_seconds: float = 0.1) -> bool:
    """Poll a condition until it holds or time is up."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(interval_seconds)
    return bool(condition())


def _handed_on() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_HANDED_ON)}


def _why_not_bound(err: OSError, host: str, port: int) -> str:
    if err.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use by another program; give the BentoML connection another port, or end that program"
    if err.errno in {errno.EACCES, errno.EPERM}:
        return f"this user may not listen on port {port} of {host}; give the BentoML connection a port above 1023"
    return (
        f"{host} is no address of this machine ({err.strerror or err}); a service of the local kind runs where the task runs: "
        "give the BentoML connection this machine's address, such as 127.0.0.1"
    )


def _error_of(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:300]

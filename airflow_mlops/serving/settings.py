"""Settings of the service: read once from the environment of its process, and never changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Prefix of the variables that set what a service takes and how it runs; a deployment hands them on to the service it starts.
SERVICE_PREFIX = "AIRFLOW_MLOPS_SERVICE_"

#: The numbers among them, each with the least that makes sense.
_LEAST = {
    "poll_seconds": 0.01,
    "workers": 1,
    "maximum_rows": 1,
    "maximum_bytes": 1,
    "maximum_concurrency": 1,
    "body_seconds": 0.01,
    "cache_rows": 0,
    "drain_seconds": 0,
    "explain_rows": 1,
    "explain_evaluations": 100,
    "explain_concurrency": 1,
    "explain_seconds": 0.01,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSettings:
    """What one worker of the service runs with.

    :param serving_dir: serving folder.
    :param tokens: bearer tokens, each of which opens the endpoint; none: no authentication.
    :param steering_tokens: bearer tokens, each of which steers rollouts; none: nobody does.
    :param token_file: holds digests of both kinds of tokens instead, and is read again whenever it changes.
    :param public_keys: keys a package must be signed with before it is loaded; ``None`` checks digests only.
    :param deployment: what a target tells the replicas of one deployment from those of the one before by; ``/status`` says it.
    :param poll_seconds: how often the desired state is looked at.
    :param workers: processes that answer.
    :param maximum_rows: rows in one request.
    :param maximum_bytes: bytes of one request's body.
    :param maximum_concurrency: requests for predictions, read as a whole, that one worker has at hand at once; more are told to come again.
    :param body_seconds: until a body must be there as a whole.
    :param cache_rows: answers to single rows that a worker remembers; 0: none.
    :param drain_seconds: how long a worker that was asked to end goes on answering, telling every caller to leave.
    :param explain_rows: rows in one request for explanations.
    :param explain_evaluations: rows made up to explain one, at most; more cost time and bring accuracy.
    :param explain_concurrency: requests for explanations that one worker has at hand at once.
    :param explain_seconds: after which an explanation is given up.
    """

    serving_dir: Path = Path()
    tokens: tuple[str, ...] = ()
    steering_tokens: tuple[str, ...] = ()
    token_file: Path | None = None
    public_keys: str | None = None
    deployment: str | None = None
    poll_seconds: float = 0.2
    workers: int = 1
    maximum_rows: int = 10_000
    maximum_bytes: int = 16 * 1024 * 1024
    maximum_concurrency: int = 256
    body_seconds: float = 30.0
    cache_rows: int = 0
    drain_seconds: float = 1.0
    explain_rows: int = 10
    explain_evaluations: int = 20_000
    explain_concurrency: int = 1
    explain_seconds: float = 10.0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> ServiceSettings:
        """Read the settings.

        :raises ValueError: a variable holds no number, or one that makes no sense; names it.
        """
        plain = cls()

        def number(name: str, least: float) -> Any:
            default = getattr(plain, name)
            variable = SERVICE_PREFIX + name.upper()
            text = environment.get(variable, "").strip()
            try:
                value = type(default)(text) if text else default
                if not least <= value < float("inf"):
                    raise ValueError(value)
            except ValueError:
                what = "whole number" if isinstance(default, int) else "number"
                raise ValueError(
                    f"{variable}={text!r}: a {what} from {least:g} on is needed; unset it for {default:g}"
                ) from None
            return value

        return cls(
            serving_dir=Path(environment.get("AIRFLOW_MLOPS_SERVING_DIR", ".")),
            tokens=tuple(environment.get("AIRFLOW_MLOPS_ENDPOINT_TOKEN", "").split()),
            steering_tokens=tuple(environment.get("AIRFLOW_MLOPS_STEERING_TOKEN", "").split()),
            token_file=Path(held) if (held := environment.get("AIRFLOW_MLOPS_TOKEN_FILE")) else None,
            public_keys=environment.get("AIRFLOW_MLOPS_SIGNING_PUBLIC_KEYS") or None,
            deployment=environment.get("AIRFLOW_MLOPS_DEPLOYMENT") or None,
            **{name: number(name, least) for name, least in _LEAST.items()},
        )

"""Bearer tokens: several are accepted at once, so that one can replace another without a caller being turned away."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence

from airflow_mlops.serving.requests import RequestError


class Authorization:
    """Lets those in who bring a token: one to ask, another one to steer.

    :param tokens: each of which opens what callers ask for; none: everybody comes in.
    :param steering: each of which steers rollouts, and opens nothing else; none: nobody steers.
    """

    def __init__(self, tokens: Sequence[str], steering: Sequence[str] = ()) -> None:
        self._accepted, self._steering = _expected(tokens), _expected(steering)

    def require(self, headers: Mapping[bytes, bytes]) -> None:
        """Look at the token of a request of a caller.

        :raises RequestError: it brings none, or one that is not accepted.
        """
        if self._accepted and not _brings(headers, self._accepted):
            raise RequestError(401, "the bearer token is missing or wrong")

    def require_steering(self, headers: Mapping[bytes, bytes]) -> None:
        """Look at the token of a request that steers a rollout.

        :raises RequestError: it brings none, one that is not accepted, or one that callers have.
        """
        if _brings(headers, self._steering):
            return
        if not self._steering:
            raise RequestError(
                403, "nobody steers this service: it was started without AIRFLOW_MLOPS_STEERING_TOKEN"
            )
        if _brings(headers, self._accepted):
            raise RequestError(
                403, "this token asks for predictions; a rollout is steered with a steering token"
            )
        raise RequestError(401, "the steering token is missing or wrong")


def _expected(tokens: Sequence[str]) -> list[bytes]:
    return [b"Bearer " + token.encode() for token in tokens]


def _brings(headers: Mapping[bytes, bytes], expected: Sequence[bytes]) -> bool:
    given = headers.get(b"authorization", b"")
    # All are compared, each in constant time: how long it takes tells nothing about any of them.
    return bool(sum(hmac.compare_digest(given, one) for one in expected))

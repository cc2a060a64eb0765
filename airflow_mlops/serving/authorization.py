"""Bearer tokens: several are accepted at once, so that one can replace another without a caller being turned away."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence

from airflow_mlops.serving.requests import RequestError


class Authorization:
    """Lets those in who bring a token.

    :param tokens: each of which opens; none: everybody comes in.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self._accepted = [b"Bearer " + token.encode() for token in tokens]

    def require(self, headers: Mapping[bytes, bytes]) -> None:
        """Look at a request's token.

        :raises RequestError: it brings none, or one that is not accepted.
        """
        if not self._accepted:
            return
        given = headers.get(b"authorization", b"")
        # All are compared, each in constant time: how long it takes tells nothing about any of them.
        if not sum(hmac.compare_digest(given, one) for one in self._accepted):
            raise RequestError(401, "the bearer token is missing or wrong")

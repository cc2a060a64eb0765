"""Bearer tokens that a service accepts, as digests: whoever reads them can't ask with them."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

#: The file of a serving folder that holds them; the service takes what is new in it without being started again.
TOKENS_FILE = "tokens.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class AcceptedTokens:
    """Keyed digests of tokens: of those that open what callers ask for, and of those that steer rollouts.

    :param key: of the digests; drawn anew for each set of tokens.
    :param callers: digests of the former; none: everybody comes in.
    :param steering: digests of the latter; none: nobody steers.
    """

    key: bytes
    callers: tuple[bytes, ...]
    steering: tuple[bytes, ...]

    @classmethod
    def of(
        cls, callers: Iterable[str], steering: Iterable[str], *, key: bytes | None = None
    ) -> AcceptedTokens:
        """Digest tokens.

        :param key: of the digests; default a new one.
        """
        key = secrets.token_bytes(32) if key is None else key
        digested = [
            tuple(sorted(_digest(key, b"Bearer " + token.encode()) for token in tokens))
            for tokens in (callers, steering)
        ]
        return cls(key=key, callers=digested[0], steering=digested[1])

    @classmethod
    def from_bytes(cls, data: bytes) -> AcceptedTokens:
        """Read the file.

        :raises ValueError: it does not hold what it should; says nothing of what it holds.
        """
        try:
            known = json.loads(data)
            callers, steering = (
                tuple(bytes.fromhex(one) for one in known[name]) for name in ("callers", "steering")
            )
            return cls(key=bytes.fromhex(known["key"]), callers=callers, steering=steering)
        except (KeyError, TypeError, ValueError) as err:
            raise ValueError(
                f"it holds no accepted tokens ({type(err).__name__}); deploy again to write it"
            ) from None

    def to_bytes(self) -> bytes:
        """Give the file's content."""
        known = {
            "key": self.key.hex(),
            "callers": [one.hex() for one in self.callers],
            "steering": [one.hex() for one in self.steering],
        }
        return json.dumps(known).encode()

    def are(self, callers: Iterable[str], steering: Iterable[str]) -> bool:
        """Tell whether it is these tokens that are accepted, in whatever order."""
        return AcceptedTokens.of(callers, steering, key=self.key) == self

    def asks(self, authorization: bytes) -> bool:
        """Tell whether a request that brings this header may ask for predictions."""
        return not self.callers or self.is_callers(authorization)

    def is_callers(self, authorization: bytes) -> bool:
        """Tell whether this header brings a token of callers."""
        return _is_one(_digest(self.key, authorization), self.callers)

    def steers(self, authorization: bytes) -> bool:
        """Tell whether a request that brings this header may steer rollouts."""
        return _is_one(_digest(self.key, authorization), self.steering)


def _digest(key: bytes, authorization: bytes) -> bytes:
    return hashlib.blake2b(authorization, key=key, digest_size=32).digest()


def _is_one(given: bytes, accepted: tuple[bytes, ...]) -> bool:
    # All are compared, each in constant time: how long it takes tells nothing about any of them.
    return bool(sum(hmac.compare_digest(given, one) for one in accepted))

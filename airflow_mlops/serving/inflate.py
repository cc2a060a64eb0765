"""Bodies that were packed for the way here: unpacked within limits, of each body and of all that are at hand."""

from __future__ import annotations

import asyncio
import zlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from airflow_mlops.serving.requests import BODIES_AT_ONCE, RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

#: How many times as large as its packed form a body can be, by the way gzip packs.
_LARGEST_RATIO = 1_032

#: Tells zlib to expect the header of gzip.
_GZIP_WINDOW = 31


class Inflater:
    """Unpacks bodies off the event loop, and no more of one than it may be large.

    :param maximum_bytes: of an unpacked body.
    """

    def __init__(self, maximum_bytes: int) -> None:
        self._maximum_bytes = maximum_bytes
        self._held = 0

    @asynccontextmanager
    async def unpacked(self, encoding: bytes, body: bytes) -> AsyncIterator[bytes]:
        """Give an unpacked body, for as long as it is needed.

        :param encoding: its ``Content-Encoding``.
        :raises RequestError: it is packed in another way, is not whole, is too large, or too many are at hand.
        """
        name = encoding.strip().lower()
        if name in (b"", b"identity"):
            yield body
            return
        if name not in (b"gzip", b"x-gzip"):
            raise RequestError(
                415,
                f"Content-Encoding {encoding.decode('latin-1')!r:.60} is not understood: send the body packed with gzip, or as it is",
            )
        # What it may take is put aside beforehand: a hundred bodies of a few kilobytes must not become gigabytes at once.
        held = _claimed(body, self._maximum_bytes)
        if self._held + held > BODIES_AT_ONCE * self._maximum_bytes:
            raise RequestError(429, f"packed bodies of up to {self._held} bytes are at hand; come again")
        self._held += held
        try:
            plain = await asyncio.to_thread(inflate, body, self._maximum_bytes)
            self._held -= held - len(plain)
            held = len(plain)
            yield plain
        finally:
            self._held -= held


def inflate(body: bytes, maximum_bytes: int) -> bytes:
    """Unpack one gzip stream; no more than a byte beyond what it says of itself, and beyond the limit, is ever made of it.

    :raises RequestError: it is none, is not whole, is not what it says, or is too large.
    """
    limit = _claimed(body, maximum_bytes)
    unpacker = zlib.decompressobj(_GZIP_WINDOW)
    try:
        plain = unpacker.decompress(body, limit + 1)
    except zlib.error as err:
        raise RequestError(
            422, f"the body is not packed with gzip, as its Content-Encoding says: {err}"
        ) from err
    if len(plain) > maximum_bytes:
        raise RequestError(
            413, f"more than {maximum_bytes} bytes when unpacked; send fewer rows in one request"
        )
    if len(plain) > limit or not unpacker.eof or unpacker.unused_data:
        raise RequestError(
            422,
            "the body is not one whole gzip stream, as its Content-Encoding says: it is cut off, is larger than it says at its end, "
            "or something follows it; send one member",
        )
    return plain


def _claimed(body: bytes, maximum_bytes: int) -> int:
    """Give how large a body says that it is: gzip ends with it. Whoever lies gets no more than he said."""
    return min(maximum_bytes, int.from_bytes(body[-4:], "little"), _LARGEST_RATIO * len(body))

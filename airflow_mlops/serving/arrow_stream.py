"""The size of a table in an Arrow stream, from its messages alone: nothing is unpacked to learn how large it would be."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

#: Stands before the length of a message's metadata, but in streams of before Arrow 0.15.
_CONTINUATION = 0xFFFFFFFF

#: Kinds of messages that hold rows.
_DICTIONARY, _ROWS = 2, 3

#: Slots of the fields in the FlatBuffers tables of Arrow's ``Message.fbs``.
_KIND, _HEADER, _BODY_LENGTH = 1, 2, 3
_DICTIONARY_DATA = 1
_LENGTH, _NODES, _BUFFERS, _COMPRESSION = 0, 1, 2, 3


class StreamSize(NamedTuple):
    """Size of a table.

    :param rows: of all record batches.
    :param size: bytes that its buffers take when unpacked.
    """

    rows: int
    size: int


class _Table:
    """A FlatBuffers table.

    :param data: buffer it lies in.
    :param place: where it begins.
    """

    def __init__(self, data: bytes, place: int) -> None:
        self._data = data
        self._place = place
        self._slots = place - _read("<i", data, place)
        self._slots_size = _read("<H", data, self._slots)

    def find(self, slot: int) -> int | None:
        """Give where a field is; ``None`` where the table leaves it out."""
        entry = 4 + 2 * slot
        offset = _read("<H", self._data, self._slots + entry) if entry + 2 <= self._slots_size else 0
        return self._place + offset if offset else None

    def number(self, slot: int, form: str) -> int:
        """Read a number; 0 where it is left out, as in all of Arrow's tables."""
        place = self.find(slot)
        return 0 if place is None else _read(form, self._data, place)

    def table(self, slot: int) -> _Table:
        """Follow the reference to another table."""
        place = self.find(slot)
        if place is None:
            raise ValueError("a message is not whole")
        return _Table(self._data, place + _read("<I", self._data, place))

    def pairs(self, slot: int) -> list[tuple[int, int]]:
        """Read a vector of structs of two 64-bit integers."""
        place = self.find(slot)
        if place is None:
            return []
        start = place + _read("<I", self._data, place)
        count = _read("<I", self._data, start)
        whole = self._data[start + 4 : start + 4 + 16 * count]
        if len(whole) != 16 * count:
            raise ValueError("a message is not whole")
        return list(struct.iter_unpack("<qq", whole))


def unpacked_size(data: bytes) -> StreamSize:
    """Add up what a stream's messages say.

    :param data: the stream.
    :raises ValueError: it is none.
    """
    rows = size = 0
    for metadata, body in _messages(data):
        message = _Table(metadata, _read("<I", metadata, 0))
        kind = message.number(_KIND, "<B")
        if kind not in (_DICTIONARY, _ROWS):
            continue
        batch = message.table(_HEADER)
        if kind == _DICTIONARY:
            batch = batch.table(_DICTIONARY_DATA)
        else:
            rows += _count(batch.number(_LENGTH, "<q"))
        size += _batch_size(batch, body)
    return StreamSize(rows, size)


def _messages(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Give metadata and body of each message."""
    place = 0
    while place < len(data):
        length = _read("<I", data, place)
        place += 4
        if length == _CONTINUATION:
            length = _read("<I", data, place)
            place += 4
        if not length:
            return
        metadata = data[place : place + length]
        body_length = _Table(metadata, _read("<I", metadata, 0)).number(_BODY_LENGTH, "<q")
        place += length
        if not 0 <= body_length <= len(data) - place:
            raise ValueError("a message is not whole")
        yield metadata, data[place : place + body_length]
        place += body_length


def _batch_size(batch: _Table, body: bytes) -> int:
    if batch.find(_COMPRESSION) is None:
        return len(body)
    # Packed, each buffer begins with its length when unpacked, or -1 if it is not packed. Readers may make room for as many values
    # as a column is said to have, whatever its buffers say.
    claimed = sum(_count(length) for length, _ in batch.pairs(_NODES))
    unpacked = 0
    for offset, length in batch.pairs(_BUFFERS):
        if length:
            said = _read("<q", body, offset)
            unpacked += length if said < 0 else said
    return max(claimed, unpacked)


def _count(number: int) -> int:
    if number < 0:
        raise ValueError("a message counts less than nothing")
    return number


def _read(form: str, data: bytes, place: int) -> int:
    if place < 0:
        raise ValueError("a message points out of itself")
    try:
        (value,) = struct.unpack_from(form, data, place)
    except struct.error as err:
        raise ValueError("a message is not whole") from err
    return int(value)

"""Profiles as files: JSON beside the model, a few arrays beside the inference log; older formats are read, too."""

from __future__ import annotations

import base64
import binascii
import json
import struct
import zlib
from typing import Any

import numpy as np

from airflow_mlops.core.profiles.profile import Profile
from airflow_mlops.core.profiles.profile_layout import Array, ColumnLayout, Layout

#: Name of the reference profile inside a model package.
REFERENCE_PROFILE_FILE = "reference_profile.json"

#: Name of the predictions' column in it; no column of a table is called so.
PREDICTION = "(prediction)"

#: Version of the layout that is written.
FORMAT = 2
_MAGIC = b"AMPROF02"


def profile_to_json(profile: Profile) -> str:
    """Write a profile with its cells; equal profiles give equal text."""
    return json.dumps(
        {
            "format": FORMAT,
            "row_count": profile.row_count,
            "columns": [_column_to_dict(item) for item in profile.layout.columns],
            "counts": _pack(profile.counts, "<i8"),
            "offsets": _pack(profile.offsets, "<f8"),
            "moments": _pack(profile.moments, "<f8"),
            "unseen": profile.unseen,
        },
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
    )


def profile_from_json(text: str) -> Profile:
    """Read a profile of this or of an older format.

    :raises ValueError: naming what is wrong: no profile, or of a newer format.
    """
    try:
        data = json.loads(text)
        version = data["format"]
        if version == 1:
            return _from_format_1(data)
        if version != FORMAT:
            raise ValueError(f"format {version} is newer than this version reads ({FORMAT})")
        layout = Layout(_column_from_dict(item) for item in data["columns"])
        return _checked(
            Profile(
                layout=layout,
                row_count=int(data["row_count"]),
                counts=_unpack(data["counts"], "<i8"),
                offsets=_unpack(data["offsets"], "<f8"),
                moments=_unpack(data["moments"], "<f8").reshape(5, -1),
                unseen=data["unseen"],
            )
        )
    except (KeyError, TypeError, ValueError, binascii.Error, zlib.error) as err:
        raise ValueError(
            f"not a profile: {type(err).__name__}: {err}; train the model again to get one"
        ) from err


def profile_to_bytes(profile: Profile, *, key: str) -> bytes:
    """Write the numbers of a profile whose cells are known elsewhere.

    :param key: digest of what was profiled.
    """
    header = json.dumps(
        {
            "key": key,
            "layout": profile.layout.digest,
            "rows": profile.row_count,
            "unseen": profile.unseen,
        }
    ).encode()
    header += b" " * (-(len(header) + 12) % 8)  # arrays at multiples of eight are read without a copy
    body = b"".join(
        array.astype(kind).tobytes()
        for array, kind in ((profile.counts, "<i8"), (profile.offsets, "<f8"), (profile.moments, "<f8"))
    )
    return _MAGIC + struct.pack("<I", len(header)) + header + body


def profile_from_bytes(data: bytes, layout: Layout, *, key: str) -> Profile | None:
    """Read what :func:`profile_to_bytes` wrote; ``None`` when it is damaged, of other rows or of other cells."""
    try:
        if data[:8] != _MAGIC:
            return None
        (length,) = struct.unpack("<I", data[8:12])
        header = json.loads(data[12 : 12 + length])
        if header["key"] != key or header["layout"] != layout.digest:
            return None
        numbers = np.frombuffer(data, dtype="<i8", offset=12 + length)
        shapes = (layout.size, layout.offset_size, 5 * len(layout.histograms))
        counts, offsets, moments = np.split(numbers, np.cumsum(shapes)[:-1])
        return _checked(
            Profile(
                layout=layout,
                row_count=header["rows"],
                counts=counts,
                offsets=offsets.view("<f8"),
                moments=moments.view("<f8").reshape(5, -1),
                unseen=header["unseen"],
            )
        )
    except (KeyError, TypeError, ValueError, struct.error):
        return None


def _checked(profile: Profile) -> Profile:
    layout = profile.layout
    sizes = (profile.counts.shape, profile.offsets.shape, profile.moments.shape)
    wanted = ((layout.size,), (layout.offset_size,), (5, len(layout.histograms)))
    if sizes != wanted:
        raise ValueError(f"arrays of sizes {sizes}, its cells need {wanted}")
    return profile


def _column_to_dict(column: ColumnLayout) -> dict[str, Any]:
    return {
        "name": column.name,
        "kind": column.kind,
        "edges": _pack(column.edges, "<f8"),
        "points": column.points,
        "categories": column.categories,
        "buckets": column.buckets,
        "parts": column.parts,
    }


def _column_from_dict(data: dict[str, Any]) -> ColumnLayout:
    edges = _unpack(data["edges"], "<f8")
    return ColumnLayout(
        name=data["name"],
        kind=data["kind"],
        edges=edges.reshape(2, -1) if data["kind"] == "pair" else edges,
        points=data["points"],
        categories=tuple(data["categories"]),
        buckets=data["buckets"],
        parts=tuple(data["parts"]),
    )


def _pack(array: Array, kind: str) -> str:
    return base64.b64encode(zlib.compress(array.astype(kind).tobytes(), 9)).decode()


def _unpack(text: str, kind: str) -> Array:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=kind)


def _from_format_1(data: dict[str, Any]) -> Profile:
    """Read what versions before 0.2 wrote: edges, counts and sums as lists, 200 named categories, the rest together."""
    columns, counts, offsets, moments = [], [], [], []
    for item in data["numeric"]:
        edges = np.asarray(item["edges"], dtype=float)
        rows, sums = np.asarray(item["counts"], dtype=np.int64), np.asarray(item["sums"], dtype=float)
        shift = sums - rows * (np.concatenate((edges[:1], edges)) if len(edges) else np.zeros(1))
        points = len(edges) > 0 and bool(np.all(np.abs(shift) <= 1e-9 * np.abs(sums)))
        if points:  # every row was at the left edge of its cell
            edges, rows, shift = _as_points(edges, rows)
        columns.append(ColumnLayout(name=item["name"], kind="number", edges=edges, points=points))
        counts.append(np.concatenate(([item["null_count"], 0], rows)))
        offsets.append(shift)
        ends = [item[name] if item["count"] else nothing for name, nothing in _ENDS]
        moments.append([item["count"], item["mean"], item["m2"], *ends])
    for item in data["categorical"]:
        columns.append(
            ColumnLayout(name=item["name"], kind="category", categories=tuple(item["counts"]), buckets=1)
        )
        counts.append(np.array([item["null_count"], 0, *item["counts"].values(), item["other_count"]]))
    return Profile(
        layout=Layout(columns),
        row_count=data["row_count"],
        counts=np.concatenate(counts).astype(np.int64),
        offsets=np.concatenate([*offsets, np.empty(0)]),
        moments=np.array(moments, dtype=float).reshape(-1, 5).T,
    )


_ENDS = (("minimum", np.inf), ("maximum", -np.inf))


def _as_points(edges: Array, rows: Array) -> tuple[Array, Array, Array]:
    pairs = np.stack((edges, np.nextafter(edges, np.inf)), axis=1).ravel()
    counts = np.zeros(len(pairs) + 1, dtype=np.int64)
    counts[1::2] = rows[1:]
    return pairs, counts, np.zeros(len(counts))

"""Frozen dataclasses to and from JSON: the one codec of specs, results, ledger payloads and packages."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}


def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def to_dict(value: Any) -> dict[str, Any]:
    """Turn a dataclass into JSON-ready builtins; NaN and infinities become ``None``.

    XCom, asset event extras and the ledger accept no NaN, so there is one place that removes it.
    """
    cleaned: dict[str, Any] = json_safe(_adapter(type(value)).dump_python(value, mode="json"))
    return cleaned


def json_safe(value: Any) -> Any:
    """Replace NaN and infinities by ``None`` and tuples by lists, at any depth.

    >>> json_safe({"mae": float("nan"), "rows": (1, 2)})
    {'mae': None, 'rows': [1, 2]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return value


def from_dict(cls: type[T], data: Any) -> T:
    """Rebuild ``cls`` from what :func:`to_dict` gave; also converts rendered strings ("3" to 3).

    :raises ValueError: naming every field that does not fit.
    """
    try:
        built: T = _adapter(cls).validate_python(data)
    except ValidationError as err:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or cls.__name__}: {item['msg']}" for item in err.errors()
        )
        raise ValueError(f"{cls.__name__}: {problems}") from err
    return built


def canonical_json(value: Any) -> str:
    """Serialize with sorted keys and no spaces, so equal values give equal text (for digests)."""
    return json.dumps(json_safe(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def unknown_fields(cls: type[Any], data: Mapping[str, Any], path: str = "") -> list[str]:
    """List the names in ``data`` that ``cls`` has no field for, at any depth of dataclasses.

    Stored documents may come from a newer version, so reading ignores such names; what a user writes is checked.

    >>> from airflow_mlops.core.comparison.promotion import PromotionPolicy
    >>> unknown_fields(PromotionPolicy, {"uplift": 0.1, "significance": 0.01})
    ['uplift']
    """
    types = get_type_hints(cls)
    unknown = [f"{path}{name}" for name in data if name not in types]
    for name, value in data.items():
        inner = _only_dataclass(types.get(name))
        items = value if isinstance(value, list | tuple) else [value]
        for item in items:
            if inner is not None and isinstance(item, Mapping):
                unknown += unknown_fields(inner, item, f"{path}{name}.")
    return unknown


def _only_dataclass(annotation: Any) -> type[Any] | None:
    """Give the dataclass that a field holds, alone, in a union or in a sequence; ``None`` where several could be meant."""
    inside = (
        get_args(annotation) if get_origin(annotation) in {Union, UnionType, tuple, list} else (annotation,)
    )
    found = [part for part in inside if isinstance(part, type) and is_dataclass(part)]
    return found[0] if len(found) == 1 else None

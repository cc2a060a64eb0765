"""Errors on their way from one process to another: told as JSON, raised again as what they were."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any

from airflow_mlops import exceptions
from airflow_mlops.core.codec import json_safe

if TYPE_CHECKING:
    from collections.abc import Mapping


def describe_error(err: Exception) -> dict[str, Any]:
    """Say what went wrong in a form that :func:`rebuild_error` understands.

    Of a class that is neither Python's nor ours, the other side may know no more than what it derives from.
    """
    known = [cls.__name__ for cls in type(err).__mro__ if _class(cls.__name__) is cls]
    evidence = {"evidence": json_safe(err.evidence)} if isinstance(err, exceptions.GateFailedError) else {}
    return {"type": type(err).__name__, "kinds": known, "message": str(err), **evidence}


def rebuild_error(described: Mapping[str, Any], *, details: str = "") -> Exception:
    """Give the error as its own class, or the nearest one that a message makes, so that a retry policy treats it alike.

    :param described: what :func:`describe_error` gave.
    :param details: added to an error of a class that is not known here.

    >>> rebuild_error(describe_error(exceptions.StorageError("disk full")))
    StorageError('disk full')
    >>> rebuild_error({"type": "ParserError", "kinds": ["ValueError", "Exception"], "message": "bad"})
    ValueError('ParserError: bad')
    """
    name, message = described["type"], described["message"]
    for kind in described.get("kinds", [name]):
        text = message if kind == name else f"{name}: {message}"
        cls = _class(kind)
        if cls is None or cls is Exception:
            continue
        try:
            if issubclass(cls, exceptions.GateFailedError):
                return cls(text, evidence=described.get("evidence", {}))
            return cls(text)
        except TypeError:  # such as UnicodeDecodeError, which wants more than a message: its base will do
            continue
    return RuntimeError(f"{name}: {message}" + (f"\n{details}" if details else ""))


def _class(name: str) -> type[Exception] | None:
    found = getattr(exceptions, name, None) or getattr(builtins, name, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else None

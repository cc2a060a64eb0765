"""Finding a user's own metric, detector, estimator or policy by import path: the one way to extend."""

from __future__ import annotations

import importlib
from typing import Any


def load_object(path: str) -> Any:
    """Import what a path names.

    :param path: ``package.module:name`` or ``package.module.name``.
    :raises ValueError: naming the path and the part of it that is not there.

    >>> load_object("math:hypot")(3, 4)
    5.0
    """
    module_name, separator, name = path.rpartition(":" if ":" in path else ".")
    if not separator or not module_name or not name:
        raise ValueError(f"{path!r} is not an import path such as package.module:name")
    try:
        module = importlib.import_module(module_name)
    except ImportError as err:
        raise ValueError(f"{path!r}: module {module_name!r} can't be imported: {err}") from err
    try:
        return getattr(module, name)
    except AttributeError as err:
        raise ValueError(f"{path!r}: module {module_name!r} has no {name!r}") from err

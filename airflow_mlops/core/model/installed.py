"""Installed packages: which of them a module is of."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, version

#: Modules whose package has another name, of which many models are made.
_OTHER_NAMES = {"sklearn": "scikit-learn"}


def packages_of(module: str) -> list[str]:
    """Name the packages that bring a top-level module; a module of your own is of none.

    Asking for all modules at once reads the files of every installed package, about half a second; most are named alike.

    >>> packages_of("numpy"), packages_of("sklearn"), packages_of("functools"), packages_of("my_models")
    (['numpy'], ['scikit-learn'], [], [])
    """
    if module in sys.stdlib_module_names:
        return []
    name = _OTHER_NAMES.get(module, module)
    try:
        version(name)
    except PackageNotFoundError:
        return sorted({*packages_distributions().get(module, [])})
    return [name]

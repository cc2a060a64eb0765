"""What a module takes along to run elsewhere: the files of our own it imports, and the packages that others made."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

#: Namespaces that packages of many makers share, and whose package it is that we import from there.
_NAMESPACES = {"google.protobuf": "protobuf"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Imports:
    """What a module imports, directly or not, at once or later.

    :param files: our own, relative to the folder that holds the package.
    :param modules: those of others: top-level names, and in shared namespaces one level more.
    """

    files: tuple[str, ...]
    modules: frozenset[str]


def imports_of(module: str, root: Path) -> Imports:
    """Follow a module's imports by reading the sources, those inside functions included; nothing is run.

    :param module: of ours, such as ``airflow_mlops.serving.service``.
    :param root: folder that holds its top-level package.
    :raises ValueError: there is no such module.

    >>> import airflow_mlops
    >>> found = imports_of("airflow_mlops.core.model.bundle", Path(airflow_mlops.__file__).parents[1])
    >>> [file.removeprefix("airflow_mlops/") for file in found.files]
    ['__init__.py', 'core/__init__.py', 'core/model/__init__.py', 'core/model/bundle.py']
    >>> sorted(found.modules)
    ['packaging']
    """
    top = module.partition(".")[0]
    if _file(module, root) is None:
        raise ValueError(f"there is no module {module} in {root}")
    seen: dict[str, Path] = {}
    others: set[str] = set()
    left = [module]
    while left:
        name = left.pop()
        file = _file(name, root)
        if name in seen or file is None:
            continue
        seen[name] = file
        left += [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
        for imported in _imported(ast.parse(file.read_text(encoding="utf-8")).body):
            if imported.partition(".")[0] == top:
                left.append(imported)
            else:
                others.add(_maker(imported))
    files = sorted({file.relative_to(root).as_posix() for file in seen.values()})
    return Imports(files=tuple(files), modules=frozenset(others - sys.stdlib_module_names))


def pinned(packages: Iterable[str]) -> list[str]:
    """Name packages and all they need, each in the version that is installed here, as pip takes them.

    :param packages: names of installed packages, extras in brackets.
    :raises ValueError: one of them, or one that they need, is not installed.

    >>> [line.partition("==")[0] for line in pinned(["python-dateutil"])]
    ['python-dateutil', 'six']
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    left = [Requirement(package) for package in packages]
    while left:
        wanted = left.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            installed = distribution(name)
        except PackageNotFoundError as err:
            raise ValueError(
                f"package {wanted.name!r} is needed to serve, and is not installed here: install it, so that its version is known"
            ) from err
        found[name] = installed.version
        for line in installed.requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)
            ):
                left.append(needed)
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def split_requirements(lines: Iterable[str]) -> tuple[list[str], list[str]]:
    """Tell bare names, whose version is the installed one, from lines that say more, for pip as they are.

    :raises ValueError: a line is no requirement.

    >>> split_requirements(["lightgbm", "acme-features==2.1"])
    (['lightgbm'], ['acme-features==2.1'])
    """
    names: list[str] = []
    others: list[str] = []
    for line in lines:
        try:
            read = Requirement(line)
        except InvalidRequirement as err:
            raise ValueError(f"{line!r} is no requirement such as 'lightgbm' or 'acme==2.1': {err}") from err
        (others if read.specifier or read.url or read.marker else names).append(line)
    return names, others


def _file(module: str, root: Path) -> Path | None:
    path = root.joinpath(*module.split("."))
    return next((one for one in (path / "__init__.py", path.with_suffix(".py")) if one.is_file()), None)


def _imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            yield from _imported(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from _imported(ast.iter_child_nodes(node))


def _maker(module: str) -> str:
    shared = next((name for name in _NAMESPACES if f"{module}.".startswith(f"{name}.")), None)
    return _NAMESPACES[shared] if shared else module.partition(".")[0]

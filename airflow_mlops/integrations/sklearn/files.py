"""What a model is made of and kept in: code, libraries, skops."""

from __future__ import annotations

import hashlib
import inspect
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.extension import load_object
from airflow_mlops.core.model.installed import packages_of
from airflow_mlops.integrations.sklearn.skops_archive import write_repeatable

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Types that fitting puts into the estimators of a module, which skops asks about as well.
_HELD_WHEN_FITTED = {
    "lightgbm.sklearn": ("collections.OrderedDict", "lightgbm.basic.Booster"),
    "xgboost.sklearn": ("xgboost.core.Booster",),
}

#: What fits, converts and stores a model beside the estimator's own package.
_LIBRARIES = ("airflow-mlops", "scikit-learn", "numpy", "scipy", "skl2onnx", "onnxruntime", "skops", "optuna")


def code_of(path: str) -> dict[str, str]:
    """Tell by which code an estimator is made: digest of the module the path leads to, and its package's version.

    A module that this one imports is not looked at.

    :raises ValueError: naming the path and the part of it that is not there.
    """
    found = load_object(path)
    module = inspect.getmodule(found)
    package = (module.__name__ if module else path).partition(".")[0]
    code = {"path": path, **_versions(packages_of(package))}
    file = source_file(path)
    if file is not None:
        code["source"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return code


def source_file(path: str) -> Path | None:
    """Give the file of the module an import path leads to; ``None`` for what is made in no file.

    :raises ValueError: naming the path and the part of it that is not there.
    """
    file = getattr(inspect.getmodule(load_object(path)), "__file__", None)
    return None if file is None else Path(file)


def libraries() -> dict[str, str]:
    """Give the versions of what every training here stands on."""
    return _versions(_LIBRARIES)


def _versions(distributions: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in distributions:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def untrusted_types(pipeline: Any) -> list[str]:
    """Name the types that a reader of the skops form must trust, also those that fitting will put into it.

    :param pipeline: fitted or not.
    """
    import skops.io

    found: list[str] = skops.io.get_untrusted_types(data=skops.io.dumps(pipeline))
    later = [more for name in found for more in _HELD_WHEN_FITTED.get(name.rpartition(".")[0], ())]
    return sorted({*found, *later})


def save_skops(pipeline: Any, path: Path) -> list[str]:
    """Save without pickle; equal models give equal bytes.

    :returns: names of the types in the file that a reader must trust explicitly.
    """
    import skops.io

    with tempfile.TemporaryFile() as dumped:
        skops.io.dump(pipeline, dumped)
        write_repeatable(dumped, path)
    untrusted: list[str] = skops.io.get_untrusted_types(file=path)
    return untrusted

"""Whether two versions can be compared on the same requests, and what a caller must send the new one beside."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow_mlops.core.model.package import PackageManifest
    from airflow_mlops.core.model.signature import ModelSignature


def why_not_comparable(
    new: PackageManifest, old: PackageManifest, *, versions: tuple[str, str]
) -> str | None:
    """Say why answers of two versions can't be compared at all; ``None`` where they can.

    :param versions: the numbers of both, the new one first.
    """
    if (new.task, set(new.classes or ())) == (old.task, set(old.classes or ())):
        return None
    return (
        f"version {versions[0]} answers {_answers(new)}, version {versions[1]} {_answers(old)}: they can't be compared, "
        "deploy it with strategy='recreate'"
    )


def changed_inputs(new: ModelSignature, old: ModelSignature) -> list[str]:
    """Name the inputs that the new version takes and the old one does not, or otherwise.

    >>> from airflow_mlops.core.model.signature import FieldSpec, ModelSignature
    >>> x, z = FieldSpec(name="x", type="number"), FieldSpec(name="z", type="number")
    >>> changed_inputs(ModelSignature(inputs=(x, z), output="y"), ModelSignature(inputs=(x,), output="y"))
    ['z']
    """
    known = {field.name: field for field in old.inputs}
    return [field.name for field in new.inputs if known.get(field.name) != field]


def _answers(manifest: PackageManifest) -> str:
    return f"the labels {', '.join(manifest.classes)}" if manifest.classes else "numbers"

"""Build: a registered version becomes a Bento, all that it takes to serve it anywhere, and a container's build context."""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import airflow_mlops
from airflow_mlops.core.codec import canonical_json
from airflow_mlops.core.model.bundle import imports_of, pinned, split_requirements
from airflow_mlops.core.model.signing import Trust
from airflow_mlops.core.rollouts.desired_state import serve_alone
from airflow_mlops.integrations.bentoml_build import (
    bento_name,
    built_bento,
    copy_sources,
    digest_of,
    files_of,
    pack,
)
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.integrations.object_store import ObjectStore
from airflow_mlops.serving.bundled import BUNDLE_FOLDER, bundle
from airflow_mlops.serving.model import load_model
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.registry.aliases import resolve_alias

if TYPE_CHECKING:
    from airflow_mlops.core.model.package import ServingForm
    from airflow_mlops.integrations.mlflow import RegisteredVersion
    from airflow_mlops.services import Services

_SERVICE_MODULE = "airflow_mlops.serving.bento_service"

#: Where a container builder finds what to do, in the Bento.
DOCKERFILE = "env/docker/Dockerfile"

#: What the service imports only for a model of another form.
_OF_OTHER_FORMS = {
    "onnx": {"pandas", "skops"},
    "sklearn": {"onnxruntime", "protobuf"},
    "pickle": {"onnxruntime", "protobuf", "skops"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSpec:
    """What to build, and where to.

    :param model_name: registered model.
    :param model_version: version number; ``None`` takes the one ``alias`` points at.
    :param alias: see ``model_version``.
    :param destination: folder or URI under which the Bento is written.
    :param form: ``folder``, or ``tar``: one file, which a container builder takes as well.
    :param requirements: packages that the model needs beside what the service does, such as ``lightgbm``: a bare name is taken in
        the version that is installed here, anything else as pip takes it.
    :param base_image: that the container is built on; it must have Python, bash and apt; default BentoML's choice.
    """

    model_name: str
    model_version: str | None = None
    alias: str = "champion"
    destination: str
    form: Literal["folder", "tar"] = "folder"
    requirements: tuple[str, ...] = ()
    base_image: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildResult:
    """The Bento.

    :param tag: ``name:version`` of the Bento.
    :param digest: of all its files; a version built again of the same code has the same one.
    :param path: of its folder or tar file.
    :param dockerfile: inside of it.
    :param reused: whether it was there already.
    """

    model_name: str
    model_version: str
    package_digest: str
    tag: str
    digest: str
    path: str
    dockerfile: str
    form: Literal["folder", "tar"]
    requirements: int
    seconds: float
    reused: bool


def run(spec: BuildSpec, services: Services) -> BuildResult:
    """Build the Bento of a version, or find it built.

    :raises ModelVersionNotFoundError: no such version or alias.
    :raises ArtifactIntegrityError: its package is not the registered one, or can't be loaded.
    :raises ConnectionConfigError: nothing here knows such a destination.
    :raises OSError: it can't be written.
    :raises ValueError: a requirement is none, or is not installed here.
    """
    started = time.monotonic()
    registry = Registry.connect(services)
    version = (
        registry.version(spec.model_name, spec.model_version)
        if spec.model_version
        else resolve_alias(registry, services, spec.model_name, spec.alias)
    )
    with tempfile.TemporaryDirectory(prefix="build-") as temporary:
        package = registry.download_version(version, Path(temporary) / "package")
        trust = Trust.of(services.signing_public_keys, version.model_name)
        model = load_model(package, expected_digest=version.package_digest, trust=trust)
        context = Path(temporary) / "context"
        requirements = _lay_out(context, package, version, model.manifest.serving_form, spec.requirements)
        made = [digest_of(context), requirements, spec.base_image, platform.python_version_tuple()[:2]]
        sources = hashlib.sha256(canonical_json(made).encode()).hexdigest()
        name, number = bento_name(version.model_name), f"{version.model_version}-{sources[:12]}"
        store = ObjectStore(spec.destination)
        target = f"{name}-{number}.tar" if spec.form == "tar" else f"{name}-{number}"
        known = _read(store, f"{target}.json")
        if known is None:
            (Path(temporary) / "serving").mkdir()
            with built_bento(
                context,
                service=f"{_SERVICE_MODULE}:ModelEndpoint",
                name=name,
                version=number,
                requirements=requirements,
                base_image=spec.base_image,
                serving_dir=Path(temporary) / "serving",
            ) as bento:
                if spec.form == "tar":
                    pack(bento.folder, Path(temporary) / "bento.tar")
                    store.put(target, Path(temporary) / "bento.tar")
                else:
                    for file in files_of(bento.folder):
                        store.put(f"{target}/{file.relative_to(bento.folder).as_posix()}", file)
                # Last of all: what has no such file beside it may not be whole.
                facts = {"tag": bento.tag, "digest": bento.digest, "package_digest": version.package_digest}
            known = json.dumps(facts, indent=2).encode()
            store.write(f"{target}.json", known)
            reused = False
        else:
            reused = True
    told = json.loads(known)
    return BuildResult(
        model_name=version.model_name,
        model_version=version.model_version,
        package_digest=version.package_digest,
        tag=told["tag"],
        digest=told["digest"],
        path=f"{store}/{target}",
        dockerfile=DOCKERFILE,
        form=spec.form,
        requirements=len(requirements),
        seconds=time.monotonic() - started,
        reused=reused,
    )


def _lay_out(
    context: Path, package: Path, version: RegisteredVersion, form: ServingForm, more: tuple[str, ...]
) -> list[str]:
    """Put into a folder what the service needs, and nothing else.

    :returns: what it needs of others, for pip.
    """
    root = Path(airflow_mlops.__file__).parents[1]
    found = imports_of(_SERVICE_MODULE, root)
    names, others = split_requirements(more)
    requirements = [*pinned([*sorted(found.modules - _OF_OTHER_FORMS[form]), *names]), *others]
    context.mkdir()
    copy_sources(root, found.files, context)
    desired = serve_alone(
        None,
        model_name=version.model_name,
        model_version=version.model_version,
        package_digest=version.package_digest,
    )
    bundle(package, desired, context / BUNDLE_FOLDER)
    return requirements


def _read(store: ObjectStore, name: str) -> bytes | None:
    try:
        return store.read(name)
    except FileNotFoundError:
        return None


STEP = Step(name="build", spec=BuildSpec, result=BuildResult, run=run)

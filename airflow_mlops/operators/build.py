"""Build the Bento of a model version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from airflow_mlops.operators.base import StepOperator, names, optional, optional_text, part_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow.sdk import Context


class BuildBentoOperator(StepOperator):
    """Build a registered version into a Bento: service, model and pinned packages, to be served where this package is not installed.

    What comes out is BentoML's own format and, with its Dockerfile, a container's build context. It needs neither MLflow nor Airflow
    nor the ledger to serve. The same version, built of the same code and packages, is the same to the byte, and is built once.

    :param model_name: registered model. (templated)
    :param model_version: version number, or the whole output of a register task; default the one ``alias`` points at. (templated)
    :param alias: see ``model_version``. (templated)
    :param destination: folder or fsspec URI under which the Bento is written, such as ``s3://bucket/bentos``. (templated)
    :param form: ``folder``, or ``tar``: one file.
    :param requirements: packages that the model needs beside what the service does: bare names in the version that is installed
        where the step runs, anything else as pip takes it. (templated)
    :param base_image: that the container is built on; default BentoML's choice. (templated)
    """

    step = "build"
    needs = frozenset({"mlflow", "ledger"})
    template_fields: Sequence[str] = (
        "model_name",
        "model_version",
        "alias",
        "destination",
        "requirements",
        "base_image",
    )

    def __init__(
        self,
        *,
        model_name: str,
        model_version: str | Mapping[str, Any] | None = None,
        alias: str = "champion",
        destination: str,
        form: Literal["folder", "tar"] = "folder",
        requirements: Sequence[str] | str = (),
        base_image: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.model_version = model_version
        self.alias = alias
        self.destination = destination
        self.form = form
        self.requirements = requirements
        self.base_image = base_image

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give a :class:`~airflow_mlops.steps.build.BuildSpec`."""
        return {
            "model_name": self.model_name,
            "model_version": optional_text(part_of(self.model_version, "model_version")),
            "alias": self.alias,
            "destination": self.destination,
            "form": self.form,
            "requirements": names(self.requirements),
            "base_image": optional(self.base_image),
        }

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Write to the ledger which Bento is which version."""
        from airflow_mlops.ledger import EntryKind

        self.write_entry(
            context,
            kind=EntryKind.BUILD,
            key=f"{result['model_name']}|{result['model_version']}|{result['digest']}",
            model_name=result["model_name"],
            window=None,
            subject=result["model_version"],
            summary=f"built {result['model_name']} version {result['model_version']} as {result['tag']} ({result['path']})",
            payload=result,
        )

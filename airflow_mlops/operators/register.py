"""Register a model version."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from airflow_mlops.links import ModelVersionLink
from airflow_mlops.operators.base import StepOperator, actor, optional, optional_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context


class RegisterModelOperator(StepOperator):
    """Make a model version of a finished training; the same package twice gives the same version.

    :param training: what the training task returned. (templated)
    :param evaluation: what the evaluation task returned; its verdict and numbers go to the version and its
        model card. (templated)
    :param alias: alias to set on the version, unless a newer one has it; ``None`` sets none; ``champion`` is promoted instead.
        (templated)
    :param vouched_by: your name, to sign a package of which the ledger does not know that a training made it. (templated)
    """

    step = "register"
    needs = frozenset({"mlflow", "signing", "ledger"})
    operator_extra_links = (ModelVersionLink(),)
    template_fields: Sequence[str] = ("training", "evaluation", "alias", "vouched_by")

    def __init__(
        self,
        *,
        training: Any,
        evaluation: Any = None,
        alias: str | None = "challenger",
        vouched_by: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.training = training
        self.evaluation = evaluation
        self.alias = alias
        self.vouched_by = vouched_by

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give a :class:`~airflow_mlops.steps.register.RegisterSpec`."""
        training = self.training
        return {
            "model_name": training["model_name"],
            "run_id": training["run_id"],
            "package_digest": training["package_digest"],
            "model_id": training.get("model_id"),
            "alias": optional(self.alias),
            "evaluation": self.evaluation or None,
            "vouched_by": optional_text(self.vouched_by),
            "actor": actor(context),
        }

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Write the version to the ledger and link to it."""
        from airflow_mlops.ledger import EntryKind

        self.note_link(ModelVersionLink, result["version_url"])
        # A number may be given again, and a version signed, evaluated or vouched for again: each is an entry of its own.
        about = ("model_name", "model_version", "package_digest", "signed_by", "evaluation_digest")
        vouched = f", vouched for by {result['vouched_by']}" if result["vouched_by"] else ""
        self.write_entry(
            context,
            kind=EntryKind.REGISTRATION,
            key="|".join([*(str(result.get(name)) for name in about), *_voucher(result["vouched_by"])]),
            model_name=result["model_name"],
            window=None,
            subject=result["model_version"],
            summary=f"registered {result['model_name']} version {result['model_version']} "
            f"(run {result['run_id']}){vouched}",
            payload=result,
        )


def _voucher(name: str | None) -> list[str]:
    """Name who vouched, in few characters: a ledger's key has an end."""
    return [hashlib.sha256(name.encode()).hexdigest()[:16]] if name else []

"""What operators have in common that write down a dataset version, or a verdict on one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import Asset

from airflow_mlops.operators.base import Recording, instance_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow.sdk import Context

    from airflow_mlops.ledger import EntryKind


class RecordingDatasets(Recording):
    """Write the ledger's entries of a dataset: that a version is there, and what was found in it."""

    def write_version(
        self, result: Mapping[str, Any], context: Context, *, summary: str, payload: Mapping[str, Any]
    ) -> None:
        """Write down a new version; one version is one entry, whoever writes it.

        :param result: of the step, with ``dataset`` and ``window``.
        """
        from airflow_mlops.ledger import EntryKind

        self._write(result, context, kind=EntryKind.DATASET, by="", summary=summary, payload=payload)

    def write_verdict(
        self, result: Mapping[str, Any], context: Context, *, kind: EntryKind, summary: str
    ) -> str:
        """Write down what was found in a version; every try of every mapped instance has a verdict of its own.

        :param result: of the step, with ``dataset`` and ``window``.
        :returns: key of the entry.
        """
        by = f"|{instance_of(context)}|{context['ti'].try_number}"
        return self._write(result, context, kind=kind, by=by, summary=summary, payload=result)

    def tell_quality(self, context: Context, quality: Mapping[str, Any]) -> None:
        """Put a validation's summary into the event of every outlet, where Airflow's data quality provider looks for it."""
        from airflow_mlops.core.checks.verdict import QUALITY_KEY

        for outlet in self.outlets:
            if isinstance(outlet, Asset):
                context["outlet_events"][outlet].extra[QUALITY_KEY] = dict(quality)

    def _write(
        self,
        result: Mapping[str, Any],
        context: Context,
        *,
        kind: EntryKind,
        by: str,
        summary: str,
        payload: Mapping[str, Any],
    ) -> str:
        dataset = result["dataset"]
        key = f"{dataset['uri']}|{dataset['version']}{by}"
        self.write_entry(
            context,
            kind=kind,
            key=key,
            model_name=None,
            window=result["window"],
            subject=dataset["uri"],
            summary=summary,
            payload=payload,
        )
        return key

"""Every error this package raises, on one screen.

``TransientError`` and its children may succeed when tried again; ``GateFailedError`` and its children
are verdicts, so retrying cannot help. The shipped retry policy (``airflow_mlops.policies``) maps the
two branches. Wrong arguments are plain ``ValueError`` or ``TypeError``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


class MLOpsError(Exception):
    """Base of every error of this package."""


class TransientError(MLOpsError):
    """The same call may succeed later."""


class RegistryUnavailableError(TransientError):
    """MLflow did not answer, or answered with a server error."""


class EndpointUnavailableError(TransientError):
    """The model service did not answer, or answered with a server error."""


class LedgerUnavailableError(TransientError):
    """The ledger database could not be reached or is locked."""


class SourceUnavailableError(TransientError):
    """A database or web server that an ingest reads from did not answer, or broke off; nothing was written."""


class CommitConflictError(TransientError):
    """Another write to the same table was committed first; nothing was written."""


class NotificationError(TransientError):
    """A channel could not be told of an incident; the message names it. The others were told."""


class GateFailedError(MLOpsError):
    """A gate ran and said no.

    :param message: what was found, with names, and what to do.
    :param evidence: JSON-ready facts behind the verdict, bounded in size.
    """

    def __init__(self, message: str, *, evidence: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.evidence = dict(evidence)


class DataQualityError(GateFailedError):
    """The dataset broke expectations of its suite."""


class PartitionHeldError(GateFailedError):
    """The labels of a new partition do not fit its features as those of trusted ones do: nothing may learn from it yet."""


class DriftDetectedError(GateFailedError):
    """The current window differs from the reference by more than the policy allows."""


class PromotionRejectedError(GateFailedError):
    """The challenger did not earn the champion's place."""


class RolloutRejectedError(GateFailedError):
    """The new version did worse than the one that served, or nothing could be told; that one serves again."""


class PromotionConflictError(MLOpsError):
    """Somebody else moved the alias first; the message says who and to which version."""


class InsufficientDataError(MLOpsError, ValueError):
    """There is too little data to measure; never to be read as "measured and fine"."""


class DatasetNotFoundError(MLOpsError, LookupError):
    """No dataset (table, version or source file) under that name."""


class StaleDatasetError(MLOpsError):
    """A dataset version is not the newest of its rows any more, so what was found in it must not be written on top of them."""


class ModelVersionNotFoundError(MLOpsError, LookupError):
    """No model, version or alias under that name in the registry."""


class SchemaMismatchError(MLOpsError, ValueError):
    """A dataset's columns are not the declared ones."""


class SignatureMismatchError(MLOpsError, ValueError):
    """Rows do not fit a model's signature; the message names the field."""


class ArtifactIntegrityError(MLOpsError):
    """A model file is not the one that was registered (its digest differs)."""


class UnsafeModelError(MLOpsError):
    """A model can be stored in no form that is safe to load; the message names the types that stand in the way."""


class StorageError(MLOpsError, OSError):
    """A file or table could not be read or written (store, permission, disk full); nothing half-written stays visible."""


class ConnectionConfigError(MLOpsError, ValueError):
    """An Airflow connection is missing or incomplete; the message names it and its fields."""


class ExpectationError(MLOpsError):
    """An expectation could not be evaluated at all: neither a pass nor a failure of the data."""


class RolloutError(MLOpsError):
    """A deployment did not reach the wanted state; the message says what serves now."""


class RolloutInterruptedError(RolloutError):
    """The task was killed while it deployed, which says nothing of the version: a retry does it. What served before serves."""


class VersionRefusedError(RolloutError):
    """Every worker of a service says that it can't load a version: trying again changes nothing. What served before serves."""

"""Evidence: what can be told of how the versions of a rollout do, from the service, its log, labels and estimates."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from airflow_mlops.core.codec import from_dict
from airflow_mlops.core.model.signing import Trust
from airflow_mlops.core.rollouts.canary import Analysis, analyze, find_deaths
from airflow_mlops.core.rollouts.comparable import changed_inputs, why_not_comparable
from airflow_mlops.core.rollouts.observations import Observations
from airflow_mlops.exceptions import RolloutError
from airflow_mlops.serving.in_flight import died_in
from airflow_mlops.serving.inference_log import read_received_since
from airflow_mlops.serving.log_settings import LOG_FOLDER
from airflow_mlops.serving.observer import OBSERVED_FOLDER
from airflow_mlops.serving.package import read_package
from airflow_mlops.steps.rollouts.quality import (
    ANSWER_COLUMNS,
    MOST_ESTIMATED,
    Copy,
    estimated_losses,
    losses_with_labels,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import polars as pl

    from airflow_mlops.core.model.package import PackageManifest
    from airflow_mlops.core.rollouts.desired_state import DesiredState, ServedVersion
    from airflow_mlops.core.rollouts.mean_losses import EstimatedLoss, Losses, PairedLosses
    from airflow_mlops.core.rollouts.rollout import Phase, RolloutState
    from airflow_mlops.ledger import Ledger
    from airflow_mlops.serving.local import LocalEndpoint
    from airflow_mlops.steps.rollouts.spec import RolloutSpec

log = logging.getLogger(__name__)

#: How long weighing the evidence may take: labels have to be joined.
WEIGHING_SECONDS = 300.0


class Evidence:
    """Reads how the new version does beside the stable one.

    :param spec: of the rollout.
    :param endpoint: where both are served.
    :param ledger: which knows how versions were graded.
    :param model_name: registered model.
    :param new: version that is rolled out.
    """

    def __init__(
        self,
        spec: RolloutSpec,
        endpoint: LocalEndpoint,
        ledger: Ledger,
        *,
        model_name: str,
        new: ServedVersion,
    ) -> None:
        self.spec, self.endpoint, self.ledger = spec, endpoint, ledger
        self.model_name, self.new = model_name, new

    def weigh(self, state: RolloutState, current: DesiredState) -> Analysis:
        """Compare both versions on all that was seen in this phase."""
        plan, phase = self.spec.plan, self.spec.plan.phases[state.phase]
        with self.endpoint.client() as client:
            seen = from_dict(Observations, client.rollout())
            if state.revision is not None:
                client.renew_lease(state.revision, max(self.spec.lease_seconds, WEIGHING_SECONDS))
        return analyze(
            seen,
            stable=current.stable.model_version,
            new=self.new.model_version,
            policy=self.spec.policy,
            looks=plan.all_looks,
            most_looks=plan.most_looks,
            share=None if phase.mirror else phase.share,
            sticky=plan.sticky,
            losses=self._losses(state, current, phase),
            estimates=self._estimates(state, current),
        )

    def deaths(self, current: DesiredState) -> Analysis | None:
        """Judge by nothing but the workers that died; ``None``: they are not held against the new version."""
        versions = [one.model_version for one in current.versions]
        died = died_in(self.endpoint.serving_dir / OBSERVED_FOLDER, self.spec.name, versions)
        found = find_deaths(died, self.new.model_version)
        return (
            None if found is None else Analysis(judgement="worse", findings=(found,), sentence=found.sentence)
        )

    def why_not_comparable(self, package: Path, current: DesiredState) -> str | None:
        """Say why answers of both versions can't be compared at all: no trial ever will, so the new one has not passed."""
        new = read_package(package, self.new.package_digest)
        old = self._manifest(current, current.stable)
        return why_not_comparable(new, old, versions=(self.new.model_version, current.stable.model_version))

    def inputs_told(self, current: DesiredState) -> str:
        """Name the inputs of which callers may not know yet: the likeliest reason why a version fails."""
        others = changed_inputs(
            self._manifest(current, self.new).signature, self._manifest(current, current.stable).signature
        )
        if not others:
            return ""
        return (
            f"; its inputs {', '.join(others[:10])} are not those of version {current.stable.model_version}: callers must send "
            "them before it is rolled out"
        )

    def _manifest(self, current: DesiredState, version: ServedVersion) -> PackageManifest:
        return read_package(self.endpoint.serving_dir / current.folder(version), version.package_digest)

    def _losses(
        self, state: RolloutState, current: DesiredState, phase: Phase
    ) -> tuple[Losses, Losses] | PairedLosses | None:
        """Give what both versions lost on the answers of this phase whose labels have arrived."""
        if self.spec.quality is None:
            return None
        return losses_with_labels(
            self.spec.quality,
            self._answered(state, columns=ANSWER_COLUMNS),
            stable=current.stable.model_version,
            new=self.new.model_version,
            mirrored=phase.mirror is not None,
            sticky=self.spec.plan.sticky,
            classes=self._manifest(current, current.stable).classes,
        )

    def _estimates(
        self, state: RolloutState, current: DesiredState
    ) -> tuple[EstimatedLoss, EstimatedLoss] | None:
        """Estimate what both versions lose; where that can't be told the rollout goes on without."""
        if not self.spec.policy.estimates:
            return None

        def copy(version: ServedVersion) -> Copy:
            folder = self.endpoint.serving_dir / current.folder(version)
            return Copy(version.model_version, folder, version.package_digest)

        try:
            found, why = estimated_losses(
                lambda: self._answered(state, most_rows=MOST_ESTIMATED),
                stable=copy(current.stable),
                new=copy(self.new),
                sticky=self.spec.plan.sticky,
                trust=Trust.of(self.endpoint.server.public_keys, self.model_name),
                grades=self.ledger.grades(self.model_name, measured=True),
                metric=self.spec.quality.metric if self.spec.quality else None,
            )
        except RolloutError:
            raise  # the task is being killed
        except Exception as err:  # noqa: BLE001 - whatever is wrong with an estimate, it is an extra
            found, why = None, f"{type(err).__name__}: {err}"
        if found is None:
            log.info("what both versions lose is not estimated: %s", why)
        return found

    def _answered(
        self, state: RolloutState, *, columns: Sequence[str] | None = None, most_rows: int | None = None
    ) -> pl.DataFrame | None:
        """Give what was answered in this phase, seen or unseen."""
        if state.since is None:
            return None
        return read_received_since(
            self.endpoint.serving_dir / LOG_FOLDER,
            self.model_name,
            state.since,
            shadow=True,
            columns=columns,
            most_rows=most_rows,
        )

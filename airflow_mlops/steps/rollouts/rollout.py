"""Rollout: one step further on the way of a version to the service, as far as it goes without waiting."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlops.core.codec import from_dict
from airflow_mlops.core.rollouts.canary import Analysis, clearly_better
from airflow_mlops.core.rollouts.desired_state import (
    DesiredState,
    ServedVersion,
    require_same_model,
    serve_alone,
)
from airflow_mlops.core.rollouts.observations import Observations
from airflow_mlops.core.rollouts.rollout import (
    Action,
    RolloutState,
    action_after,
    next_action,
    phase_state,
)
from airflow_mlops.exceptions import (
    ArtifactIntegrityError,
    ConnectionConfigError,
    EndpointUnavailableError,
    RolloutError,
    RolloutInterruptedError,
    VersionRefusedError,
)
from airflow_mlops.serving.local import REFUSALS
from airflow_mlops.steps.rollouts.evidence import Evidence
from airflow_mlops.steps.rollouts.history import RolloutHistory
from airflow_mlops.steps.rollouts.spec import Progress, RolloutSpec

if TYPE_CHECKING:
    from airflow_mlops.ledger import Ledger
    from airflow_mlops.serving.local import LocalEndpoint

log = logging.getLogger(__name__)

#: What a look ends in, where there is no next phase.
_DECIDED = ("finish", "roll_back")


class Rollout:
    """Carries out a rollout and writes down what happens.

    :param spec: how to.
    :param endpoint: where to.
    :param ledger: where it is written down.
    :param model_name: registered model.
    :param new: version to roll out.
    :param fetch: gives the folder of its package.
    """

    def __init__(
        self,
        spec: RolloutSpec,
        endpoint: LocalEndpoint,
        ledger: Ledger,
        *,
        model_name: str,
        new: ServedVersion,
        fetch: Callable[[], Path],
    ) -> None:
        self.spec = replace(spec, name=rollout_name(spec.name, endpoint))
        self.endpoint, self.ledger = endpoint, ledger
        self.model_name, self.new, self.fetch = model_name, new, fetch
        self.started = False
        self.evidence = Evidence(self.spec, endpoint, ledger, model_name=model_name, new=new)
        self.history = RolloutHistory(
            ledger,
            name=self.spec.name,
            model_name=model_name,
            model_version=new.model_version,
            strategy=spec.plan.strategy,
            endpoint=endpoint.server.url,
            actor=spec.actor,
            request=spec.request,
        )

    @property
    def state(self) -> RolloutState:
        """Where it stands."""
        return self.history.state

    def advance(self) -> Progress:
        """Do all that can be done now.

        :raises RolloutError: somebody else rolls out here, or the new version does not come up; the old one serves.
        """
        with self.endpoint.exclusive():
            self._read_history()  # in here: nobody else can add to it any more
            if self.state.status == "rolled_back" and self.spec.abort is None:
                return self._ended()
            current = self.endpoint.desired()
            self.endpoint.require_no_rollout(current, but=self.spec.name)
            require_same_model(
                current,
                model_name=self.model_name,
                model_version=self.new.model_version,
                package_digest=self.new.package_digest,
            )
            if self.spec.abort is not None:
                return self._abort(current, self.spec.abort)
            if self.state.status == "finished" and self._serves_no_more(current):
                self.history.begin_again()
            if current is not None and self._is_superseded(current) and self._end_superseded(current):
                return self._ended()
            if current is None:
                may_serve = self.spec.first_serves and self.state.status == "new"
                if self.spec.plan.strategy in ("shadow", "ab", "blue_green") and not may_serve:
                    raise RolloutError(
                        f"{self.endpoint.serving_dir} serves nothing that version {self.new.model_version} could be compared with: "
                        "deploy a first version with strategy='recreate', or correct the folder"
                    )
                return self._finish("nothing was served that it could be compared with", current)
            if current.stable.model_version == self.new.model_version and not current.leased:
                return self._finish("it serves already", current)
            try:
                return self._advance()
            except BaseException as err:
                # SIGTERM included: whatever was served before serves again.
                if self._is_under_way(self._desired()):
                    self._roll_back(f"the rollout ended early: {_said(err)}")
                raise

    def note_refusal(self, err: Exception) -> None:
        """Write down that the new version never came up, where it was to serve at once.

        :param err: why.
        """
        self._read_history()
        if self.state.status in ("finished", "rolled_back"):
            self.history.begin_again()
        if self.state.status == "new":
            self._write_refused(err)

    def _read_history(self) -> None:
        """Read the newest attempt; one that was rolled back is over, and whoever comes again begins anew.

        Not so the retry of a task whose version a look has judged: callers must not be given it once more. It does what follows.
        """
        self.history.read()
        if self.state.status == "rolled_back" and self.spec.abort is None and not self.history.was_judged:
            self.history.begin_again()

    def _is_under_way(self, current: DesiredState) -> bool:
        """Tell whether there is anything to take back, or to write down as taken back: the ledger may lag behind what is served."""
        passed = current.stable.model_version == self.new.model_version and not current.leased
        return not passed and (
            current.rollout == self.spec.name or (self.state.status == "running" and current.rollout is None)
        )

    def _serves_no_more(self, current: DesiredState | None) -> bool:
        """Tell whether a rollout that passed was undone since: whoever runs it again wants it again."""
        if current is None:
            return True
        ends_with_new = self.spec.plan.ends_with == "new"
        return ends_with_new and current.stable.model_version != self.new.model_version

    def _is_superseded(self, current: DesiredState) -> bool:
        """Tell whether another deployment went through since this rollout was steered last: its trial is over, whatever it had found."""
        decided = self.state.then in _DECIDED
        gone = current.rollout is None and current.find(self.new.model_version) is None
        return self.state.status == "running" and not decided and gone

    def _advance(self) -> Progress:
        steered = self._steered()
        action = next_action(self.spec.plan, self.state, now=_now(), steered=steered)
        if not steered and self.state.status == "running" and self.state.then not in _DECIDED:
            # Nobody can be asked: perhaps because no worker has lived for long.
            action = self._condemned() or action
        while True:
            if action.what == "look":
                action = self._look()
            if action.what == "enter":
                self._enter(action)
                action = next_action(self.spec.plan, self.state, now=_now(), steered=True)
                continue
            if action.what == "wait" and action.until is not None:
                seconds = max(0.0, (action.until - _now()).total_seconds())
                return Progress(self.state, seconds, self._desired(), self.started)
            if action.what == "finish":
                return self._finish(action.reason, self._desired())
            if action.what == "roll_back":
                self._roll_back(action.reason)
            return self._ended()

    def _enter(self, action: Action) -> None:
        phase = self.spec.plan.phases[action.phase]
        current = self._desired()
        if self.state.status == "new" or current.find(self.new.model_version) is None:
            package = self.fetch()
            try:
                self.endpoint.bring(package, self.model_name, self.new)
            except ArtifactIntegrityError as err:
                self._end_refused(_said(err))
                return
            unlike = self.evidence.why_not_comparable(package, current)
            if unlike is not None:
                self._end_refused(unlike)
                return
        desired = phase_state(current, self.spec.plan, phase, self.new, rollout=self.spec.name)
        try:
            with self._refusal_noted():
                _, started = self.endpoint.serve(desired, lease_seconds=self.spec.lease_seconds)
        except VersionRefusedError as err:
            self._end_refused(_said(err))
            return
        self.started = self.started or started
        self.history.write(
            "entered",
            phase=action.phase,
            revision=desired.revision,
            reason=action.reason,
            summary=f"rollout of {self.model_name} version {self.new.model_version}: {phase.name}, "
            f"beside version {current.stable.model_version}: {action.reason}",
        )

    def _end_refused(self, reason: str) -> None:
        """Take back a version that will never be served: it has not passed, as one that did worse."""
        if self.state.status == "running":
            self._roll_back(reason)
        elif self.state.status != "rolled_back":
            self.history.write(
                "rolled_back", phase=self.state.phase, reason=reason, summary=self._not_out(reason)
            )

    def _look(self) -> Action:
        """Compare the versions, and say what follows."""
        plan = self.spec.plan
        analysis = self.evidence.weigh(self.state, self._desired())
        action = action_after(plan, self.state, analysis, now=_now())
        if action.what == "roll_back" and any(
            one.metric == "errors" and one.judgement == "worse" for one in analysis.findings
        ):
            action = replace(action, reason=action.reason + self.evidence.inputs_told(self._desired()))
        if (
            plan.strategy == "ab"
            and action.what == "finish"
            and not clearly_better(analysis, self.spec.policy)
        ):
            action = replace(
                action,
                what="roll_back",
                reason=f"the new version is not clearly better, so the stable one stays: {analysis.sentence}",
            )
        self._write_look(analysis, action)
        return action

    def _condemned(self) -> Action | None:
        """Look at nothing but the workers that died; ``None``: they are not held against the new version."""
        current = self._desired()
        if current.rollout != self.spec.name:
            return None
        analysis = self.evidence.deaths(current)
        if analysis is None:
            return None
        action = Action(what="roll_back", phase=self.state.phase, reason=analysis.sentence)
        self._write_look(analysis, action)
        return action

    def _write_look(self, analysis: Analysis, action: Action) -> None:
        phase = self.spec.plan.phases[self.state.phase]
        self.history.write(
            "looked",
            phase=self.state.phase,
            analysis=analysis,
            then=action.what,
            reason=action.reason,
            summary=f"rollout of {self.model_name} version {self.new.model_version}, {phase.name}: "
            f"{analysis.judgement}: {analysis.sentence}",
        )

    def _finish(self, reason: str, current: DesiredState | None) -> Progress:
        """Let the plan's version serve alone."""
        keeps_old = self.spec.plan.ends_with == "old" and current is not None
        end = current.stable if keeps_old and current is not None else self.new
        if current is None or current.find(self.new.model_version) is None:
            package = self.fetch()
            with self._refusal_noted():
                self.endpoint.bring(package, self.model_name, self.new)
        desired = serve_alone(
            current,
            model_name=self.model_name,
            model_version=end.model_version,
            package_digest=end.package_digest,
        )
        with self._refusal_noted():
            _, started = self.endpoint.serve(desired)
        self.endpoint.remove_others(desired)
        self.started = self.started or started
        if self.state.status != "finished":
            self.history.write(
                "finished",
                phase=self.state.phase,
                revision=desired.revision,
                reason=reason,
                summary=f"rollout of {self.model_name} version {self.new.model_version} passed; "
                f"version {end.model_version} serves: {reason}",
            )
        return Progress(self.state, None, desired, self.started)

    def _roll_back(self, reason: str) -> None:
        """Let the version serve that did before.

        That it is to be so is written down first: whoever comes next does it, should this process die before it is done.
        """
        self._write_intent(reason)
        current = self._desired()
        stable = current.stable
        desired = serve_alone(
            current,
            model_name=self.model_name,
            model_version=stable.model_version,
            package_digest=stable.package_digest,
        )
        began = _now()
        try:
            self.endpoint.take_back(desired)
            seconds: float | None = (_now() - began).total_seconds()
            told = f"version {stable.model_version} serves again after {seconds:.1f} s"
        except RolloutError as err:
            seconds, told = (
                None,
                f"version {stable.model_version} was asked to serve again, which is not confirmed: {err}",
            )
        self.history.write(
            "rolled_back",
            phase=self.state.phase,
            revision=desired.revision,
            seconds=seconds,
            reason=reason,
            summary=f"rollout of {self.model_name} version {self.new.model_version} was rolled back; {told}: {reason}",
        )

    def _write_intent(self, reason: str) -> None:
        if self.state.then == "roll_back":  # a look said so, or whoever died before it was done
            return
        try:
            self.history.write(
                "stopping",
                phase=self.state.phase,
                then="roll_back",
                reason=reason,
                summary=f"rollout of {self.model_name} version {self.new.model_version} is about to be rolled back: {reason}",
            )
        except Exception:  # a ledger that is down must not keep a version in service
            log.exception(
                "that the rollout is to be rolled back can't be written down; it is rolled back all the same"
            )

    def _end_superseded(self, current: DesiredState) -> bool:
        """Write down that another deployment has ended the trial, without anything to take back; whoever asks anew begins another.

        :returns: whether it is over for the one who asks.
        """
        is_retry = self.history.is_own
        reason = f"version {current.stable.model_version} was deployed meanwhile, and serves"
        self.history.write(
            "rolled_back",
            phase=self.state.phase,
            revision=current.revision,
            reason=reason,
            summary=f"rollout of {self.model_name} version {self.new.model_version} is over: {reason}",
        )
        if not is_retry:
            self.history.begin_again()
        return is_retry

    @contextmanager
    def _refusal_noted(self) -> Iterator[None]:
        """Write down why the new version never came up, if it does not."""
        try:
            yield
        except REFUSALS as err:
            if self.state.status == "new" and not isinstance(err, RolloutInterruptedError):
                self._write_refused(err)
            raise

    def _write_refused(self, err: Exception) -> None:
        """Write down that the service never served the new version; there is nothing to take back."""
        reason = _said(err)
        try:
            self.history.write(
                "rolled_back", phase=self.state.phase, reason=reason, summary=self._not_out(reason)
            )
        except Exception:  # whoever asked for it shall see what went wrong first
            log.exception("that the version could not be rolled out can't be written down")

    def _not_out(self, reason: str) -> str:
        return f"{self.model_name} version {self.new.model_version} could not be rolled out: {reason}"

    def _abort(self, current: DesiredState | None, reason: str) -> Progress:
        if current is not None and self._is_under_way(current):
            self._roll_back(reason)
        return self._ended()

    def _ended(self) -> Progress:
        events = self.history.events
        seconds = events[-1].seconds if events else None
        looked = next((event.analysis for event in reversed(events) if event.analysis), None)
        worse = tuple(one.metric for one in looked.findings if one.judgement == "worse") if looked else ()
        return Progress(self.state, None, self._desired(), self.started, seconds, worse)

    def _steered(self) -> bool:
        """Tell whether the service serves what the state says."""
        current = self._desired()
        if current.rollout != self.spec.name or current.revision != self.state.revision:
            return False
        try:
            with self.endpoint.client() as client:
                seen = from_dict(Observations, client.rollout())
                if seen.revision != current.revision or seen.fell_back:
                    return False
                client.renew_lease(current.revision, self.spec.lease_seconds)
        except ConnectionConfigError:
            raise  # beginning anew would not help
        except (EndpointUnavailableError, ValueError):
            return False
        return True

    def _desired(self) -> DesiredState:
        current = self.endpoint.desired()
        if current is None:
            raise RolloutError(
                f"{self.endpoint.serving_dir} has lost its desired state; deploy a version again"
            )
        return current


def rollout_name(name: str, endpoint: LocalEndpoint) -> str:
    """Name a rollout: one task may deploy to several endpoints."""
    return f"{name}@{endpoint.server.url}"


def _now() -> datetime:
    """Give the time: a rollout is an experiment on live traffic, which can't be run for another day."""
    return datetime.now(UTC)


def _said(err: BaseException) -> str:
    return f"{type(err).__name__}: {err}"

"""What is asked of a rollout, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from airflow_mlops.core.rollouts.canary import CanaryPolicy
from airflow_mlops.core.rollouts.rollout import RolloutPlan, RolloutState
from airflow_mlops.serving.lease import MAXIMUM_LEASE
from airflow_mlops.steps.rollouts.quality import QualitySpec

if TYPE_CHECKING:
    from airflow_mlops.core.rollouts.desired_state import DesiredState


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutSpec:
    """How to roll out.

    :param name: names this rollout: whoever comes with the same one goes on with it.
    :param plan: its phases.
    :param policy: what is tolerated of the new version.
    :param quality: labels to judge it by; ``None``: none are expected while it lasts.
    :param lease_seconds: how long the shares hold when nobody says that he steers; above 0, at most 3600.
    :param actor: who rolls out.
    :param request: names the run of a task that asks. Where a look had taken back what this request asked for, it is not tried again.
    :param abort: roll back what is under way, for this reason.
    :param first_serves: let the version serve at once, whatever the plan, where nothing is served that it could be compared with;
        otherwise a plan that is nothing but a comparison is refused there.
    :raises ValueError: a lease that no service grants.
    """

    name: str
    plan: RolloutPlan
    policy: CanaryPolicy
    quality: QualitySpec | None = None
    lease_seconds: float = 60.0
    actor: str
    request: str = ""
    abort: str | None = None
    first_serves: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.lease_seconds <= MAXIMUM_LEASE:
            raise ValueError(
                f"lease_seconds={self.lease_seconds:g}: above 0 and at most {MAXIMUM_LEASE} are needed; whoever steers renews it, "
                "so it only has to last while nobody does"
            )


class Progress(NamedTuple):
    """Where a rollout stands.

    :param state: the state.
    :param wait_seconds: until the next look; ``None`` when it has ended.
    :param desired: what is to be served.
    :param started: whether the service had to be started.
    :param restore_seconds: that it took to serve what had served before, where it was rolled back.
    :param worse: what the new version did worse at the last look, by name.
    """

    state: RolloutState
    wait_seconds: float | None
    desired: DesiredState
    started: bool
    restore_seconds: float | None = None
    worse: tuple[str, ...] = ()

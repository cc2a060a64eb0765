"""Decide whether to retrain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import timezone
from airflow.sdk.bases.xcom import BaseXCom
from airflow.sdk.exceptions import AirflowSkipException, DownstreamTasksSkipped

from airflow_mlops.operators.base import StepOperator, actor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow.sdk import Context


class DecideRetrainingOperator(StepOperator):
    """Decide every window nobody has decided on yet, exactly once, and say why.

    It works from the ledger, not from the event that woke it: lost, merged or repeated events change nothing. When a retraining is
    due, the result holds its window (``training``) and ``decision_key``; otherwise what follows is skipped.
    Where an earlier champion is to come back, only ``bring_back_task_id`` follows, and ``deploy_task_id`` after it: the result holds
    its version (``bring_back``), in whose place (``champion_version``) and why. Without such a task this is never decided, and what was decided before is given up.
    A retraining that was decided but never ended is taken up again. If its version was promoted and could not be deployed,
    only ``deploy_task_id`` follows; ``held_out`` of the result says whether it is to be tried first. Which challengers are worth a training is in the ledger, whatever was decided:
    :func:`~airflow_mlops.ledger.wanted_challengers`.

    :param model_name: registered model. (templated)
    :param policy: parameters of :class:`~airflow_mlops.core.decision.retraining.RetrainingPolicy`. (templated)
    :param decide_function: import path of the decision, a pure function. (templated)
    :param required_checks: a window is ripe when these checks are in the ledger. When the policy's patience with labels is over, or
        it acts on an estimate that is degraded, the challengers' is not waited for; one that never comes for ``missing_check_days``.
    :param deploy_task_id: task after this one that deploys the champion, or tries it first, to run it alone.
    :param bring_back_task_id: task after this one that promotes an earlier champion, to run it before that.
    """

    step = "retraining"
    needs = frozenset({"ledger"})
    template_fields: Sequence[str] = ("model_name", "policy", "decide_function")

    def __init__(
        self,
        *,
        model_name: str,
        policy: Mapping[str, Any] | None = None,
        decide_function: str = "airflow_mlops.core.decision.retraining:decide_retraining",
        required_checks: Sequence[str] = ("performance_check", "drift_check"),
        deploy_task_id: str | None = None,
        bring_back_task_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.policy = policy
        self.decide_function = decide_function
        self.required_checks = required_checks
        self.deploy_task_id = deploy_task_id
        self.bring_back_task_id = bring_back_task_id

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give a :class:`~airflow_mlops.steps.retraining.RetrainingSpec`.

        :raises ValueError: ``deploy_task_id`` or ``bring_back_task_id`` names no task that follows this one.
        """
        self._following("deploy_task_id")  # wrong is said before anything is decided
        return {
            "model_name": self.model_name,
            "policy": dict(self.policy or {}),
            "decide": self.decide_function,
            "required_checks": list(self.required_checks),
            "may_bring_back": self._following("bring_back_task_id") is not None,
            "actor": actor(context),
            "now": timezone.utcnow().isoformat(),
        }

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Log the decisions; the ledger was written by the step, in one transaction."""
        decided, waiting = result["decision_count"], result["waiting_count"]
        self.log.info("%s windows decided, %s wait; the newest are:", decided, waiting)
        for decision in result["decisions"]:
            self.log.info("%s: %s: %s", decision["window"], decision["outcome"], decision["reason"])
        for window in result["waiting"]:
            self.log.info("%s: not decided yet: %s", window["window"], window["reason"])
        if result["retrain"] and result["resumed"]:
            self.log.info("taking up the retraining that was decided as %s", result["decision_key"])

    def decide(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Pass the training on, or skip what follows, but for a deployment that is owed."""
        if result["retrain"] or result["bring_back"]:
            self.fill_outlets(context, {"decision_key": result["decision_key"], "reason": result["reason"]})
            return self._go_on(result, context)
        deploy = self._following("deploy_task_id")
        if result["deploy"] and deploy is not None:
            self.log.info("%s: going on with %s", result["reason"], deploy)
            return self._go_on(result, context)
        raise AirflowSkipException(result["reason"])

    def _go_on(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Skip the ways that are not taken: a training and what follows, that an earlier champion comes back, or both."""
        following = set(self.downstream_task_ids)
        bring_back = self._following("bring_back_task_id")
        taken = {self._following("deploy_task_id")}
        if result["bring_back"]:
            taken.add(bring_back)
        left = following & {bring_back} if result["retrain"] else following - taken
        if not left:
            return result
        # Who skips returns nothing, and those that go on read the result.
        context["ti"].xcom_push(key=BaseXCom.XCOM_RETURN_KEY, value=result)
        raise DownstreamTasksSkipped(tasks=sorted(left))

    def _following(self, argument: str) -> str | None:
        """Give the id of the task that an argument names: as it is given, or in this task's own group; ``None``: it names none.

        :raises ValueError: no task of that name follows this one.
        """
        named = getattr(self, argument)
        if named is None:
            return None
        groups = self.task_id.split(".")[:-1]
        for depth in range(len(groups), -1, -1):
            task_id = ".".join([*groups[:depth], named])
            if task_id in self.downstream_task_ids:
                return task_id
        raise ValueError(
            f"{argument}={named!r} of task {self.task_id!r} names no task that follows it directly; those are "
            f"{', '.join(sorted(self.downstream_task_ids)) or 'none'}. Correct the id, or set the task downstream of this one"
        )

"""The retry policy: verdicts and wrong input fail at once, what may pass is tried again."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import ExceptionRetryPolicy, RetryAction, RetryRule

_ERRORS = "airflow_mlops.exceptions"

#: Put it into ``default_args``: ``{"retries": 3, "retry_policy": MLOPS_RETRY_POLICY}``.
MLOPS_RETRY_POLICY = ExceptionRetryPolicy(
    rules=[
        RetryRule(
            exception=f"{_ERRORS}.TransientError", action=RetryAction.RETRY, retry_delay=timedelta(seconds=30)
        ),
        # Not a transient error: who waits for those to pass must not wait on when the task is being killed.
        RetryRule(
            exception=f"{_ERRORS}.RolloutInterruptedError",
            action=RetryAction.RETRY,
            retry_delay=timedelta(seconds=30),
        ),
        RetryRule(
            exception=f"{_ERRORS}.StorageError", action=RetryAction.RETRY, retry_delay=timedelta(minutes=5)
        ),
        RetryRule(exception=f"{_ERRORS}.GateFailedError", action=RetryAction.FAIL, reason="a gate said no"),
        RetryRule(
            exception=f"{_ERRORS}.MLOpsError", action=RetryAction.FAIL, reason="trying again changes nothing"
        ),
        # A person's no to ApproveModelOperator(fail_on_reject=True): nobody wants to be asked the same again.
        RetryRule(
            exception="airflow.providers.standard.exceptions.HITLRejectException",
            action=RetryAction.FAIL,
            reason="a person said no",
        ),
        RetryRule(exception="builtins.ValueError", action=RetryAction.FAIL, reason="wrong input"),
        RetryRule(exception="builtins.TypeError", action=RetryAction.FAIL, reason="wrong input"),
    ]
)

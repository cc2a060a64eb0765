"""Channels ready for incidents: Airflow's own notifiers for Slack, PagerDuty and e-mail, with the right templates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.sdk import BaseNotifier


def slack_channel(slack_webhook_conn_id: str = "slack_default", **kwargs: Any) -> BaseNotifier:
    """Post to a Slack channel by an incoming webhook: a line in bold, the reason, links.

    :param slack_webhook_conn_id: connection of type ``slackwebhook``.
    :param kwargs: further arguments of Airflow's ``SlackWebhookNotifier``, instead of those chosen here.
    :raises ModuleNotFoundError: the Slack provider is not installed.
    """
    try:
        from airflow.providers.slack.notifications.slack_webhook import SlackWebhookNotifier
    except ModuleNotFoundError as err:
        raise _missing("slack", err) from err
    chosen = {"slack_webhook_conn_id": slack_webhook_conn_id, "text": "{{ incident.slack }}"}
    return _made(SlackWebhookNotifier, chosen | kwargs)


def pagerduty_channel(
    pagerduty_events_conn_id: str = "pagerduty_events_default", **kwargs: Any
) -> BaseNotifier:
    """Trigger one PagerDuty alert per incident, and resolve it when the incident is over.

    :param pagerduty_events_conn_id: connection with the integration key.
    :param kwargs: further arguments of Airflow's ``PagerdutyNotifier``, instead of those chosen here.
    :raises ModuleNotFoundError: the PagerDuty provider is not installed.
    """
    try:
        from airflow.providers.pagerduty.notifications.pagerduty import PagerdutyNotifier
    except ModuleNotFoundError as err:
        raise _missing("pagerduty", err) from err
    chosen = {
        "pagerduty_events_conn_id": pagerduty_events_conn_id,
        "summary": "{{ incident.title }}",
        "severity": "{{ incident.severity }}",
        "source": "model {{ incident.model_name }}",
        "action": "{{ incident.action }}",
        "dedup_key": "{{ incident.dedup_key }}",
        "class_type": "{{ incident.cause }}",
        "custom_details": {"window": "{{ incident.window }}", "details": "{{ incident.text }}"},
    }
    return _made(PagerdutyNotifier, chosen | kwargs)


def email_channel(to: str | Iterable[str], **kwargs: Any) -> BaseNotifier:
    """Send a mail; the connection is ``smtp_default`` unless ``smtp_conn_id`` says another.

    :param to: recipients.
    :param kwargs: further arguments of Airflow's ``SmtpNotifier``, instead of those chosen here.
    :raises ModuleNotFoundError: the SMTP provider is not installed.
    """
    try:
        from airflow.providers.smtp.notifications.smtp import SmtpNotifier
    except ModuleNotFoundError as err:
        raise _missing("email", err) from err
    chosen = {"to": to, "subject": "{{ incident.title }}", "html_content": "{{ incident.html }}"}
    return _made(SmtpNotifier, chosen | kwargs)


def _made(cls: Any, arguments: dict[str, Any]) -> BaseNotifier:
    made: BaseNotifier = cls(**arguments)
    return made


def _missing(extra: str, err: ModuleNotFoundError) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"the channel {extra!r} needs an Airflow provider that is not installed ({err}): pip install 'airflow-mlops[{extra}]'",
        name=err.name,
    )

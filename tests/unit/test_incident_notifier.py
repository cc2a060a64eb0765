"""Alerts over the wire: Airflow's own notifiers talk to a mail server and a webhook on this machine."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from airflow.sdk import DAG, BaseNotifier
from airflow.serialization.serialized_objects import DagSerialization

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.monitoring.incidents import Cause, EventKind, IncidentEvent
from airflow_mlops.exceptions import NotificationError
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.notifiers.channels import email_channel, pagerduty_channel, slack_channel
from airflow_mlops.notifiers.incidents import IncidentNotifier
from airflow_mlops.operators.incidents import UpdateIncidentsOperator
from airflow_mlops.services import Services
from tests.conftest import REPOSITORY
from tests.mailbox import MailServer, Webhook, running
from tests.unit.test_incidents import check, drift, window, write

NATIVE = DAG("native", schedule=None, render_template_as_native_obj=True)
CONTEXT = {
    "dag": NATIVE,
    "ti": SimpleNamespace(
        dag_id="monitor", run_id="run", task_id="incidents", log_url="http://airflow/log?a=1&b=2"
    ),
    "outlet_events": {},
}


class PostNotifier(BaseNotifier):
    """A site's own notifier: posts a text, in Slack's form; without an asynchronous side."""

    template_fields = ("text", "url")

    def __init__(self, *, url: str, text: str = "{{ incident.slack }}", timeout: float = 5.0) -> None:
        super().__init__()
        self.timeout = timeout
        self.url = url
        self.text = text

    def notify(self, context: Any) -> None:
        httpx.post(self.url, json={"text": self.text}, timeout=self.timeout).raise_for_status()


class AsyncPostNotifier(PostNotifier):
    """The same, in the event loop."""

    async def async_notify(self, context: Any) -> None:
        async with httpx.AsyncClient(timeout=self.timeout) as client:
            (await client.post(self.url, json={"text": f"async: {self.text}"})).raise_for_status()


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Services:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    connection = {"conn_type": "mlops_ledger", "extra": {"url": url}}
    monkeypatch.setenv("AIRFLOW_CONN_LEDGER_DEFAULT", json.dumps(connection))
    return Services(ledger_url=url)


@pytest.fixture
def mailbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[MailServer]:
    with running(MailServer()) as server:
        connection = {
            "conn_type": "smtp",
            "host": "127.0.0.1",
            "port": server.port,
            "extra": {"disable_ssl": True, "disable_tls": True, "from_email": "mlops@example.org"},
        }
        monkeypatch.setenv("AIRFLOW_CONN_SMTP_DEFAULT", json.dumps(connection))
        yield server


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with running(Webhook()) as server:
        yield server


def update(channels: dict[str, BaseNotifier] | None, **more: Any) -> dict[str, Any]:
    task = UpdateIncidentsOperator(task_id="incidents", model_name="m", channels=channels, **more)
    return task.execute(CONTEXT)


def notifications(services: Services) -> list[LedgerEntry]:
    with Ledger.open(services.require("ledger_url")) as ledger:
        return ledger.entries(kind=EntryKind.NOTIFICATION, newest_first=False)


def test_a_mail_when_it_opens_none_for_the_same_again_and_one_when_it_is_over(
    services: Services, mailbox: MailServer
) -> None:
    channels = {"mail": email_channel("team@example.org")}
    told = []
    for index, drifted in enumerate((True, True, False, False)):
        write(services, drift(index, drifted))
        for _ in range(2):  # the second time nothing is new
            update(channels)
        told.append(len(mailbox.mails))
    assert told == [1, 1, 1, 2]
    opened, over = mailbox.mails
    assert (opened["To"], opened["From"]) == ("team@example.org", "mlops@example.org")
    assert opened["Subject"] == "m: inputs drifted"
    body = opened.get_body(("html",))
    assert body is not None
    assert "<p>[2024-01-01, 2024-01-02): 1 of 2 drifted.</p>" in body.get_content()
    assert '<a href="http://airflow/log?a=1&amp;b=2">Airflow run</a>' in body.get_content()
    assert over["Subject"] == "m: inputs no longer drift"
    assert [entry.actor for entry in notifications(services)] == ["monitor/run/incidents"] * 2


def test_a_channel_that_is_down_keeps_nobody_else_from_hearing_and_hears_later(
    services: Services, mailbox: MailServer, webhook: Webhook
) -> None:
    write(services, drift(0, True))
    webhook.answer = (503, b"busy")
    channels = {"hook": PostNotifier(url=webhook.url), "mail": email_channel("team@example.org")}
    with pytest.raises(
        NotificationError, match=r"told to hook: HTTPStatusError: .*503.*mail heard all"
    ) as failed:
        update(channels)
    assert isinstance(failed.value.__cause__, httpx.HTTPStatusError)
    assert (len(mailbox.mails), len(webhook.posts)) == (1, 1)
    webhook.answer = (200, b"ok")
    update(channels)
    assert (len(mailbox.mails), len(webhook.posts)) == (1, 2)
    update(channels)
    assert (len(mailbox.mails), len(webhook.posts)) == (1, 2)
    assert [entry.key for entry in notifications(services)] == ["m|inputs|1|mail", "m|inputs|1|hook"]


def tell(in_a_loop: bool, url: str, **arguments: Any) -> None:
    channel = (AsyncPostNotifier if in_a_loop else PostNotifier)(url=url, **arguments)
    notifier = IncidentNotifier(model_name="m", channels={"hook": channel}, context=dict(CONTEXT))
    asyncio.run(awaited(notifier)) if in_a_loop else notifier(CONTEXT)


@pytest.mark.parametrize("in_a_loop", [False, True])
def test_messages_a_channel_refuses_keep_it_from_no_other(
    services: Services, webhook: Webhook, in_a_loop: bool
) -> None:
    """A site's own template may fail on some causes alone, in every run."""
    one_of_each_cause(services)
    refused = [Cause.PERFORMANCE, Cause.ESTIMATE, Cause.LABELS, Cause.DEPLOYMENT]
    picky = f"{{{{ 1 / (incident.cause not in {[str(cause) for cause in refused]}) | int }}}}"
    for _ in range(2):
        with pytest.raises(NotificationError, match="told to hook: ZeroDivisionError"):
            tell(in_a_loop, webhook.url, text=picky)
        assert len(webhook.posts) == 3
    told = {entry.key for entry in notifications(services)}
    assert told == {f"m|{cause}|1|hook" for cause in set(Cause) - set(refused)}
    tell(in_a_loop, webhook.url)
    assert len(webhook.posts) == len(Cause)


@pytest.mark.parametrize("in_a_loop", [False, True])
def test_a_channel_that_never_answers_is_not_waited_for_with_every_message(
    services: Services, webhook: Webhook, in_a_loop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_of_each_cause(services)
    monkeypatch.setattr("airflow_mlops.notifiers.incidents._PATIENCE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0), backlog=16) as silent:
        with pytest.raises(NotificationError, match="told to hook: ReadTimeout"):
            tell(in_a_loop, f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.3)
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):  # nobody called a second time
            silent.accept()
    tell(in_a_loop, webhook.url)
    assert len(webhook.posts) == len(Cause)


def one_of_each_cause(services: Services) -> None:
    events = [
        IncidentEvent(
            model_name="m",
            cause=cause,
            number=1,
            incident=f"m|{cause}|1",
            kind=EventKind.OPENED,
            window=window(0),
            opened=window(0),
            worst=None,
            title=f"m: {cause}",
            reason="x",
        )
        for cause in Cause
    ]
    write(
        services,
        *(
            replace(check(EntryKind.INCIDENT, 0, subject=event.cause), key=event.key, payload=to_dict(event))
            for event in events
        ),
    )


async def awaited(notifier: BaseNotifier) -> None:
    await notifier


def test_what_came_and_went_while_a_channel_was_down_is_not_told(
    services: Services, webhook: Webhook
) -> None:
    write(services, drift(0, True), drift(1, False), drift(2, False), drift(3, True))
    update({"hook": PostNotifier(url=webhook.url)})
    assert [post["text"].splitlines()[:2] for post in webhook.posts] == [
        ["*m: inputs drifted*", "[2024-01-04, 2024-01-05): 1 of 2 drifted."]
    ]


def test_a_channel_is_told_of_the_causes_it_is_for(services: Services, webhook: Webhook) -> None:
    write(services, drift(0, True))
    channels = {"all": PostNotifier(url=webhook.url), "pager": PostNotifier(url=f"{webhook.url}/pager")}
    update(channels, causes={"pager": ["performance"]})
    assert [entry.subject for entry in notifications(services)] == ["all"]
    with pytest.raises(ValueError, match="'speed' is not a valid Cause"):
        update(channels, causes={"pager": ["speed"]})
    with pytest.raises(ValueError, match="causes names page, channels has all, pager"):
        update(channels, causes={"page": ["performance"]})


def test_without_channels_incidents_are_only_written_down(services: Services) -> None:
    write(services, drift(0, True))
    assert update(None)["headline"] == "m: inputs drifted; 1 open"
    assert notifications(services) == []


def test_a_process_that_dies_between_sending_and_writing_sends_again(
    services: Services, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least once: what is not written down is not known to be told."""
    write(services, drift(0, True))
    with monkeypatch.context() as patched:
        patched.setattr(IncidentNotifier, "_record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            update({"hook": PostNotifier(url=webhook.url)})
    update({"hook": PostNotifier(url=webhook.url)})
    assert len(webhook.posts) == 2
    assert webhook.posts[0] == webhook.posts[1]


def test_as_a_callback(services: Services, webhook: Webhook) -> None:
    """The way Airflow calls it: with the context, templates unrendered."""
    write(services, drift(0, True))
    update(None)
    notifier = IncidentNotifier(
        model_name="{{ params.model }}", channels={"hook": PostNotifier(url=webhook.url)}
    )
    notifier({**CONTEXT, "params": {"model": "m"}})
    assert len(webhook.posts) == 1
    assert notifier.channels["hook"].text == "{{ incident.slack }}", "rendering must not touch the channel"
    notifier({"dag_run": SimpleNamespace(dag_id="monitor", run_id="r")})  # a callback of a Dag has no task
    assert len(webhook.posts) == 1


def test_off_the_event_loop(services: Services, webhook: Webhook, mailbox: MailServer) -> None:
    """Channels with an asynchronous side are awaited, the others run in a thread; both are told once."""
    write(services, drift(0, True))
    update(None)
    channels = {
        "sync": PostNotifier(url=webhook.url),
        "async": AsyncPostNotifier(url=webhook.url),
        "mail": email_channel("team@example.org"),
        "down": AsyncPostNotifier(url="http://127.0.0.1:9"),
    }

    async def tell(channels: dict[str, BaseNotifier]) -> None:
        await IncidentNotifier(model_name="m", channels=channels, context=dict(CONTEXT))

    with pytest.raises(NotificationError, match="told to down: ConnectError"):
        asyncio.run(tell(channels))
    assert sorted(post["text"].split("*")[0] for post in webhook.posts) == ["", "async: "]
    assert len(mailbox.mails) == 1
    del channels["down"]
    asyncio.run(tell(channels))
    assert (len(webhook.posts), len(mailbox.mails)) == (2, 1)


def test_a_dag_with_channels_is_serialized(services: Services) -> None:
    with DAG("alerts", schedule=None, start_date=datetime(2024, 1, 1, tzinfo=UTC)) as dag:
        notifier = IncidentNotifier(model_name="m", channels={"hook": PostNotifier(url="http://127.0.0.1:9")})
        UpdateIncidentsOperator(
            task_id="incidents", model_name="m", channels=notifier.channels, on_failure_callback=notifier
        )
    (task,) = json.loads(json.dumps(DagSerialization.to_dict(dag)))["dag"]["tasks"]
    assert task["__var"]["task_type"] == "UpdateIncidentsOperator"


@pytest.mark.parametrize(("make", "module", "extra"), [
    (slack_channel, "airflow.providers.slack.notifications.slack_webhook", "slack"),
    (pagerduty_channel, "airflow.providers.pagerduty.notifications.pagerduty", "pagerduty"),
    (lambda: email_channel("x"), "airflow.providers.smtp.notifications.smtp", "email"),
])  # fmt: skip
def test_a_provider_that_is_not_installed(
    make: Any, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'airflow-mlops\[{extra}\]'"):
        make()


def snippets() -> list[str]:
    """The programs on the page about alerts."""
    page = (REPOSITORY / "docs" / "how-to" / "alerts.md").read_text()
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)


@pytest.mark.parametrize("index", range(4))
def test_what_the_page_shows_runs(index: int) -> None:
    source = snippets()[index]
    for provider in ("slack", "pagerduty"):
        if provider in source:
            pytest.importorskip(
                f"airflow.providers.{provider}", reason=f"pip install 'airflow-mlops[{provider}]'"
            )
    names: dict[str, Any] = {}
    exec(compile(source, "alerts.md", "exec"), names)  # noqa: S102 - our own page
    assert len(snippets()) == 4
    for channel in names.get("channels", {}).values():
        assert isinstance(channel, BaseNotifier)


def test_slack(services: Services, webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("airflow.providers.slack", reason="pip install 'airflow-mlops[slack]'")
    connection = {"conn_type": "slackwebhook", "password": f"{webhook.url}/services/T/B/x"}
    monkeypatch.setenv("AIRFLOW_CONN_SLACK_DEFAULT", json.dumps(connection))
    write(services, drift(0, True))
    for _ in range(2):
        update({"slack": slack_channel()})
    (post,) = webhook.posts
    assert post["text"].startswith("*m: inputs drifted*\n[2024-01-01, 2024-01-02): 1 of 2 drifted.\n")
    assert post["text"].endswith("<http://airflow/log?a=1&amp;b=2|Airflow run>")


def test_pagerduty(services: Services, webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("airflow.providers.pagerduty", reason="pip install 'airflow-mlops[pagerduty]'")
    import pagerduty

    # The client takes no other address than https: this one is this machine's.
    here = property(lambda _: webhook.url, lambda *_: None)
    monkeypatch.setattr(pagerduty.EventsApiV2Client, "url", here)
    monkeypatch.setenv(
        "AIRFLOW_CONN_PAGERDUTY_EVENTS_DEFAULT",
        json.dumps({"conn_type": "pagerduty_events", "password": "0" * 32}),
    )
    webhook.answer = (202, b'{"status": "success", "dedup_key": "x"}')
    for index, drifted in enumerate((True, True, False, False)):
        write(services, drift(index, drifted))
        update({"pager": pagerduty_channel()})
    trigger, resolve = webhook.posts
    assert (trigger["event_action"], resolve["event_action"]) == ("trigger", "resolve")
    assert (
        trigger["dedup_key"] == resolve["dedup_key"] == "m|inputs|2024-01-01T00:00:00Z/2024-01-02T00:00:00Z"
    )
    assert trigger["payload"]["severity"] == "warning"
    assert trigger["payload"]["summary"] == "m: inputs drifted"

"""Incidents told from a real run: by the task, and by a callback on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mailbox import MailServer, Webhook, running

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


def test_one_mail_and_one_post_when_it_opens_and_when_it_is_over(tmp_path: Path) -> None:
    (tmp_path / "dags").mkdir()
    scenario = shutil.copy(Path(__file__).parent / "alerts_scenario.py", tmp_path / "dags" / "alerts.py")
    ledger = {"conn_type": "mlops_ledger", "extra": {"url": f"sqlite:///{tmp_path / 'ledger.db'}"}}
    with running(MailServer()) as mailbox, running(Webhook()) as webhook:
        plain = {"disable_ssl": True, "disable_tls": True, "from_email": "mlops@example.org"}
        smtp = {"conn_type": "smtp", "host": "127.0.0.1", "port": mailbox.port, "extra": plain}
        environment = {
            **os.environ,
            "AIRFLOW_HOME": str(tmp_path / "airflow"),
            "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path / "dags"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__API__BASE_URL": "http://airflow.example.org",
            "AIRFLOW_CONN_LEDGER_DEFAULT": json.dumps(ledger),
            "AIRFLOW_CONN_SMTP_DEFAULT": json.dumps(smtp),
            "SCENARIO_WEBHOOK": webhook.url,
            "PYTHONWARNINGS": "ignore",
        }
        for command in (
            ["-m", "airflow", "db", "migrate"],
            ["-m", "airflow", "dags", "reserialize"],
            [scenario],
        ):
            done = subprocess.run(
                [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=200
            )
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == ["success"] * 4, done.stdout[-5000:]
    titles = ["fare: inputs drifted", "fare: inputs no longer drift"]
    assert [mail["Subject"] for mail in mailbox.mails] == titles
    assert [post["text"] for post in webhook.posts] == titles
    body = mailbox.mails[0].get_body(("html",))
    assert body is not None
    assert '<a href="http://airflow.example.org/dags/alerts/runs/' in body.get_content()
    assert "distance: mean 2.9 to 4.1." in body.get_content()

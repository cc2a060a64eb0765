"""A person's word for a test that no code can answer, and how long it counts."""

from __future__ import annotations

import string
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from airflow_mlops.core.ml_test.ml_test_score import Evidence, Finding, note
from airflow_mlops.core.ml_test.ml_tests import find_test

if TYPE_CHECKING:
    from airflow_mlops.core.ml_test.facts import ModelFacts

ATTESTATION = "attestation"

#: A hundred years: longer than anybody vouches for anything.
_MOST_DAYS = 36_525


def attestation_payload(
    *, test_id: str, by: str, evidence: str, automated: bool, at: datetime, days: float
) -> dict[str, Any]:
    """Give what the ledger keeps of a person's word.

    :param test_id: the test that is vouched for.
    :param by: a name.
    :param evidence: link to what can be looked at.
    :param automated: a job does it again and again, and the link leads to it.
    :param at: when it is said.
    :param days: how long it counts.
    :raises ValueError: the test is one that is measured, the name is empty, the evidence is no link, or it would never count.
    """
    test = find_test(test_id)
    if not test.attestable:
        raise ValueError(f"{test_id} is not taken on anybody's word, as it is measured here: {test.remedy}")
    if not by.strip():
        raise ValueError(f"{test_id} is vouched for by nobody: give a name with --by")
    _require_link(evidence)
    if not 0.0 < days <= _MOST_DAYS:
        raise ValueError(
            f"an attestation can't count for {days:g} days: give more than 0 and at most {_MOST_DAYS:,}"
        )
    return {
        "test": test_id,
        "by": by.strip(),
        "evidence": evidence,
        "automated": automated,
        "expires_at": (at + timedelta(days=days)).isoformat(),
    }


def _require_link(evidence: str) -> None:
    """See that it is an address everybody may read; the ledger keeps it for ever."""
    try:
        link = urlsplit(evidence)
    except ValueError:
        link = urlsplit("")
    if link.scheme not in {"https", "http"} or not link.hostname or set(evidence) & set(string.whitespace):
        raise ValueError(
            f"evidence {evidence!r} is no link: give the address of what can be looked at, such as https://wiki.example/review-12"
        )
    if link.username is not None or link.password is not None:
        raise ValueError(
            f"the evidence at {link.hostname} holds a login: give the address without it, as the ledger keeps it for ever"
        )


def attested(facts: ModelFacts, test_id: str) -> Finding | None:
    """Give what a person's newest word is worth; ``None``: nobody said anything."""
    said = next((fact for fact in facts.of(ATTESTATION) if fact.payload["test"] == test_id), None)
    if said is None:
        return None
    by, expires = said.payload["by"], datetime.fromisoformat(said.payload["expires_at"])
    proof = (Evidence(source=str(said.payload["evidence"]), at=said.at, by=by), note(said))
    if expires <= facts.now:
        return Finding(
            points=0.0,
            sentence=f"{by} vouched for it on {said.at:%Y-%m-%d}; that expired on {expires:%Y-%m-%d}",
            evidence=proof,
        )
    how = "automated and repeated" if said.payload["automated"] else "done by hand and written down"
    return Finding(
        points=1.0 if said.payload["automated"] else 0.5,
        sentence=f"{how}, says {by} on {said.at:%Y-%m-%d}, good until {expires:%Y-%m-%d}",
        evidence=proof,
    )

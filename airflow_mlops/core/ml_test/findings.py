"""What the rules share: whether a check recurs, is fresh, and was done of what is released."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

from airflow_mlops.core.ml_test.facts import Fact, ModelFacts
from airflow_mlops.core.ml_test.ml_test_score import Evidence, Finding, ScorePolicy, note

Rule = Callable[[ModelFacts, ScorePolicy], Finding]

#: Entries a finding names.
SHOWN = 2


def recurring(facts: ModelFacts, policy: ScorePolicy, done: Sequence[Fact], what: str) -> Finding:
    """Judge what has to be done window after window.

    :param done: the checks, those of the newest window first.
    :param what: happens, in words.
    """
    if not done:
        return Finding(points=0.0, sentence=f"no sign that {what}")
    proof = tuple(note(fact) for fact in done[:SHOWN])
    fresh = [fact for fact in done if is_fresh(facts, policy, fact)]
    if not fresh:
        told = f"{what}: last for {what_for(done[0])}, {age_days(facts, done[0]):.0f} days ago; stale, so not recurring"
        return Finding(points=0.5, sentence=told, evidence=proof)
    scheduled = [fact for fact in done if fact.scheduled]
    if not any(fact.scheduled for fact in fresh):
        told = f"{what}, last for {what_for(fresh[0])}; but by hand: {fresh[0].actor}"
        return Finding(points=0.5, sentence=told, evidence=proof)
    if len({fact.window or fact.at for fact in scheduled}) < 2:
        return Finding(points=0.5, sentence=f"{what}: once so far, which is not recurring", evidence=proof)
    newest = next(fact for fact in fresh if fact.scheduled)
    return Finding(points=1.0, sentence=f"{what}, last for {what_for(newest)}", evidence=proof)


def released(
    facts: ModelFacts,
    policy: ScorePolicy,
    done: Sequence[Fact],
    what: str,
    *,
    mine: Fact | None = None,
    more: Sequence[Fact] = (),
) -> Finding:
    """Judge what has to be done for every version.

    A task of the releasing Dag does it whoever starts the Dag; that it recurs is shown by a run nobody started, or by a
    second version.

    :param done: entries, newest first; by default the champion's is the one about its run.
    :param mine: the champion's.
    :param more: further evidence.
    """
    mine = mine or next((fact for fact in done if fact.subject in facts.champion_runs), None)
    if mine is None:
        if not done or facts.champion is None:
            return Finding(points=0.0, sentence=f"no sign that {what}")
        told = f"{what} for other versions, not for version {facts.champion}, which serves"
        return Finding(points=0.5, sentence=told, evidence=(note(done[0]),))
    proof = tuple(note(fact) for fact in (mine, *more))
    told = f"{what}, also for version {facts.champion}"
    if age_days(facts, mine) > policy.release_days:
        told += f"; that was {age_days(facts, mine):.0f} days ago: stale, so not recurring"
        return Finding(points=0.5, sentence=told, evidence=proof)
    if not mine.of_a_dag:
        return Finding(points=0.5, sentence=f"{told}; by hand: {mine.actor}", evidence=proof)
    if not mine.scheduled and len({fact.subject for fact in done if fact.of_a_dag}) < 2:
        told += "; once so far, in a run that a person started, which is not recurring"
        return Finding(points=0.5, sentence=told, evidence=proof)
    return Finding(points=1.0, sentence=told, evidence=proof)


def checked(
    facts: ModelFacts, policy: ScorePolicy, name: str, what: str, done: Sequence[Fact] | None = None
) -> Finding:
    """Judge a check of the evaluation; one that could not be measured is none.

    :param name: what the check's name begins with.
    :param done: evaluations that can have it; default all.
    """
    made = [
        fact
        for fact in (facts.of("evaluation") if done is None else done)
        if (checks := checks_named(fact, name)) and all(one["outcome"] != "not_measured" for one in checks)
    ]
    found = released(facts, policy, made, what)
    mine = next((fact for fact in made if fact.subject in facts.champion_runs), None)
    if mine is None:
        return found
    checks = checks_named(mine, name)
    failed = [str(one["reason"]) for one in checks if one["outcome"] == "fail"]
    told = f"{found.sentence}: {'; '.join(str(one['reason']) for one in checks)}"
    return replace(found, sentence=told, concern="; ".join(failed) or None)


def checks_named(fact: Fact, name: str) -> list[Mapping[str, Any]]:
    """Give the checks of an evaluation whose name begins so."""
    return [one for one in fact.payload.get("checks", ()) if str(one["name"]).startswith(name)]


def graded_windows(facts: ModelFacts) -> list[Fact]:
    """Give the grades that are numbers, the newest window first."""
    return latest_first(
        [
            fact
            for fact in facts.of("performance_check")
            if fact.payload.get("measured") and is_finite(fact.payload.get("value"))
        ]
    )


def latest_first(done: Sequence[Fact]) -> list[Fact]:
    """Sort by window, as an older one may be graded later; of several entries about one the newest first."""
    return sorted(
        done, key=lambda fact: (fact.window.end if fact.window else fact.at, fact.entry_id), reverse=True
    )


def not_seen(facts: ModelFacts, found: Finding, file: str) -> Finding:
    """Give half for what the ledger says was done, where the run's file can't be looked at."""
    why = facts.run.trouble or f"the champion's run holds no {file}"
    return replace(found, points=0.5, sentence=f"{found.sentence}; by the ledger alone: {why}")


def explanation_file(facts: ModelFacts, name: str) -> Evidence:
    """Name a file of the explanation in the champion's run."""
    return Evidence(
        source=f"MLflow run {facts.run.run_id}, explanation/{name}", at=None, by="the explanation"
    )


def is_fresh(facts: ModelFacts, policy: ScorePolicy, fact: Fact) -> bool:
    """Tell whether it is recent: no older than the policy's days, and of one of the newest windows."""
    if age_days(facts, fact) > policy.maximum_days:
        return False
    newest = facts.windows[: policy.maximum_windows]
    return fact.window is None or not newest or fact.window.end > newest[-1].start


def age_days(facts: ModelFacts, fact: Fact) -> float:
    """Give how many days ago it was written."""
    return (facts.now - fact.at) / timedelta(days=1)


def what_for(fact: Fact) -> str:
    """Name its window, or its day where it has none."""
    return str(fact.window) if fact.window else f"{fact.at:%Y-%m-%d}"


def is_finite(value: Any) -> bool:
    """Tell whether it is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def listed(names: Sequence[str], most: int = 5) -> str:
    """Name so many, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

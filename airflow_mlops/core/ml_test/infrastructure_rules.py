"""Rules of the tests of infrastructure: training, validation, rollout and rollback."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from datetime import timedelta
from itertools import combinations
from typing import TYPE_CHECKING

from airflow_mlops.core.ml_test.findings import (
    Rule,
    age_days,
    checks_named,
    explanation_file,
    is_finite,
    not_seen,
    released,
)
from airflow_mlops.core.ml_test.ml_test_score import Finding, ScorePolicy, note

if TYPE_CHECKING:
    from airflow_mlops.core.ml_test.facts import Fact, ModelFacts

#: Relative difference up to which two trainings came to the same.
_SAME = 1e-6


def _reproducible(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    """Look for trainings of the same rows, weighted alike, by the same method in runs of their own."""
    same: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts.of("training"):
        if fact.payload.get("training_digest") is not None:
            same[_asked_for(fact)].append(fact)
    pairs = [
        pair
        for group in same.values()
        for pair in combinations(group, 2)
        if pair[0].subject != pair[1].subject
    ]
    if not pairs:
        return Finding(points=0.0, sentence="no training was ever repeated")
    newest = max(pairs, key=lambda pair: pair[0].entry_id)
    proof = tuple(note(fact) for fact in newest)
    if not _agree(*newest):
        values = " and ".join(str(fact.payload.get("metric_value")) for fact in newest)
        told = f"the same training came to different models: {newest[0].payload.get('metric')} {values}"
        return Finding(points=0.0, sentence=told, evidence=proof, concern=told)
    told = f"runs {newest[1].subject} and {newest[0].subject} were the same training and came to the same"
    if age_days(facts, newest[0]) > policy.release_days:
        return Finding(
            points=0.5,
            sentence=f"{told}, but {age_days(facts, newest[0]):.0f} days ago: stale",
            evidence=proof,
        )
    if len(pairs) < 2 or not newest[0].of_a_dag:
        return Finding(points=0.5, sentence=f"{told}; once is not recurring", evidence=proof)
    return Finding(points=1.0, sentence=f"{told}; {len(pairs)} pairs in all", evidence=proof)


def _asked_for(fact: Fact) -> str:
    dataset = fact.payload.get("dataset") or {}
    names = ("training", "holdout", "training_digest")
    return repr([dataset.get("dataset_digest"), *(fact.payload.get(name) for name in names)])


def _agree(first: Fact, second: Fact) -> bool:
    if first.payload.get("package_digest") == second.payload.get("package_digest"):
        return True
    one, other = (fact.payload.get("metric_value") for fact in (first, second))
    return (
        is_finite(one)
        and is_finite(other)
        and math.isclose(float(one or 0), float(other or 0), rel_tol=_SAME)
    )


def _validated(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    """Ask for the verdict that the champion came by; what was promoted by hand went past the gate."""
    promotions = [fact for fact in facts.of("promotion") if fact.payload.get("alias") == "champion"]
    mine = next((fact for fact in promotions if fact.subject == facts.champion), None)
    if facts.champion is None or mine is None:
        return Finding(points=0.0, sentence="nothing was promoted")
    gated = [fact for fact in promotions if fact.payload.get("verdict") == "promote"]
    decided = _answered(facts, mine)
    if mine in gated and decided is not None and decided.payload.get("outcome") == "bring_back":
        what = "an earlier champion comes back where it did much better again than every model of today"
        return released(facts, policy, gated, what, mine=mine, more=(decided,))
    run = mine.payload.get("evaluated_run_id")
    verdicts = [fact for fact in facts.of("evaluation") if fact.payload.get("verdict") == "promote"]
    earned = next((fact for fact in verdicts if run is not None and fact.subject == run), None)
    if mine.payload.get("verdict") != "promote" or earned is None:
        return Finding(
            points=0.0,
            sentence=f"version {facts.champion} serves without an evaluation that let it through: {mine.summary}",
            evidence=(note(mine),),
        )
    if not any(checks_named(earned, name) for name in ("champion", "baseline")):
        return _untested(facts, mine, earned)
    return released(
        facts, policy, gated, "only what its evaluation lets through is promoted", mine=mine, more=(earned,)
    )


def _answered(facts: ModelFacts, promotion: Fact) -> Fact | None:
    """Find the decision that a promotion answers."""
    key = promotion.payload.get("decision_key")
    return next((one for one in facts.of("retraining_decision") if key and one.key == key), None)


def _untested(facts: ModelFacts, mine: Fact, earned: Fact) -> Finding:
    """Judge a champion that learned from all rows, so that none was left to test it on: half where its predecessors were tested."""
    decided = _answered(facts, mine)
    told = f"version {facts.champion} was not tested itself"
    proof = (note(mine), note(earned))
    if decided is None or decided.payload.get("promote_on") != "predecessors":
        return Finding(points=0.0, sentence=f"{told}, nor were its predecessors", evidence=proof)
    return Finding(
        points=0.5,
        sentence=f"{told}: it learned from all rows there were; it was promoted on tests of its predecessors",
        evidence=(*proof, note(decided)),
    )


def _debuggable(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    found = released(facts, policy, facts.of("explanation"), "single answers are explained")
    if found.points == 0.0:
        return found
    if not facts.run.explained_rows:
        return not_seen(facts, found, "explanation/rows.json")
    return replace(
        found,
        sentence=f"{found.sentence}; {facts.run.explained_rows} rows, each with what every input did to the answer",
        evidence=(*found.evidence, explanation_file(facts, "rows.json")),
    )


def _canaried(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    """Give a whole point for a version that has passed a rollout under traffic, by a Dag, before it answered everything."""
    mine = [fact for fact in facts.of("rollout") if facts.champion and fact.subject == facts.champion]
    passed = [fact for fact in mine if fact.payload["event"]["what"] == "finished" and fact.of_a_dag]
    looked = [fact for fact in mine if fact.payload["event"]["what"] == "looked"]
    if passed and looked:
        return Finding(
            points=1.0,
            sentence=f"version {facts.champion} was compared with the one before it under the same traffic "
            f"({passed[0].payload['strategy']}), and passed on {passed[0].at:%Y-%m-%d}",
            evidence=(note(looked[0]), note(passed[0])),
        )
    tried = [fact for fact in facts.of("deployment") if facts.champion and fact.subject == facts.champion]
    if not tried:
        return Finding(points=0.0, sentence="no deployment of the champion is known")
    return Finding(
        points=0.5,
        sentence=f"version {facts.champion} answered known rows rightly where it serves, before any traffic; no canary "
        "took a share of it",
        evidence=(note(tried[0]),),
    )


def _rolled_back(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    back = next((one for one in facts.of("rollback") if one.payload.get("alias") == "champion"), None)
    if back is None:
        return Finding(points=0.0, sentence="no rollback was ever done or rehearsed")
    version = str(back.payload.get("model_version"))
    served = [
        one for one in facts.of("deployment") if one.subject == version and one.entry_id > back.entry_id
    ]
    told = f"version {version} came back on {back.at:%Y-%m-%d}"
    if not served:
        return Finding(points=0.5, sentence=f"{told}, but was never deployed again", evidence=(note(back),))
    proof = (note(back), note(served[-1]))
    minutes = (served[-1].at - back.at) / timedelta(minutes=1)
    told += f" and served {minutes:.0f} minutes later"
    if age_days(facts, back) > policy.release_days:
        return Finding(
            points=0.5, sentence=f"{told}: {age_days(facts, back):.0f} days ago, stale", evidence=proof
        )
    if not (back.of_a_dag and served[-1].of_a_dag):
        return Finding(points=0.5, sentence=f"{told}, done by hand", evidence=proof)
    return Finding(points=1.0, sentence=told, evidence=proof)


INFRASTRUCTURE_RULES: dict[str, Rule] = {
    "infra-1": _reproducible,
    "infra-4": _validated,
    "infra-5": _debuggable,
    "infra-6": _canaried,
    "infra-7": _rolled_back,
}

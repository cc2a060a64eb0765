"""Rules of the tests of monitoring."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from airflow_mlops.core.ml_test.findings import (
    Rule,
    checked,
    graded_windows,
    is_finite,
    latest_first,
    listed,
    recurring,
)
from airflow_mlops.core.ml_test.ml_test_score import Finding, ScorePolicy, note
from airflow_mlops.core.ml_test.model_rules import schema

if TYPE_CHECKING:
    from airflow_mlops.core.ml_test.facts import ModelFacts


def _invariants(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    """Both sides are needed for the whole point: the tables, and what is asked of the service."""
    tables, asked = schema(facts, policy), _skewed(facts, policy)
    both = (tables.points, asked.points)
    points = 1.0 if min(both) == 1.0 else 0.5 if max(both) > 0.0 else 0.0
    return Finding(
        points=points,
        sentence=f"tables: {tables.sentence}; requests: {asked.sentence}",
        evidence=(*tables.evidence[:1], *asked.evidence[:1]),
        concern=tables.concern,
    )


def _skewed(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    done = latest_first(
        [fact for fact in facts.of("drift_check") if "skew" in fact.payload and fact.payload.get("row_count")]
    )
    found = recurring(facts, policy, done, "requests are held against the training rows")
    skew = done[0].payload["skew"] if done else ()
    names = [str(item["feature"]) for item in skew]
    return replace(found, concern=f"unlike anything in training: {listed(names)}" if names else None)


def _stale(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    decided = latest_first(facts.of("retraining_decision"))
    found = recurring(facts, policy, decided, "whether to retrain is decided window by window")
    return replace(found, sentence=f"{found.sentence}; {decided[0].summary}") if decided else found


def _stable(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    """Training measures the held-out error, grading the served one; neither takes an answer that is no number."""
    trained = next((one for one in facts.of("training") if one.subject in facts.champion_runs), None)
    sound = trained is not None and is_finite(trained.payload.get("metric_value"))
    served = recurring(facts, policy, graded_windows(facts), "graded answers are finite numbers")
    in_training = (
        "the champion gave finite answers on its held-out rows"
        if sound
        else "no finite held-out error of the champion is known"
    )
    points = 1.0 if sound and served.points == 1.0 else 0.5 if sound or served.points else 0.0
    proof = (note(trained),) if trained is not None and sound else ()
    return Finding(
        points=points,
        sentence=f"training: {in_training}; serving: {served.sentence}",
        evidence=(*proof, *served.evidence[:1]),
    )


def _computing(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    done = [fact for fact in facts.of("evaluation") if fact.payload.get("artifact")]
    return checked(
        facts, policy, "artifact", "size, time and memory of the package are measured and limited", done
    )


def _quality(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    known = latest_first(
        [
            fact
            for fact in facts.of("performance_check")
            if fact.payload.get("measured") or fact.payload.get("estimate_trusted")
        ]
    )
    found = recurring(facts, policy, known, "the champion's answers are graded, or their error estimated")
    worse = known and (known[0].payload.get("degraded") or known[0].payload.get("estimate_degraded"))
    return replace(found, concern=known[0].summary if worse else None)


MONITORING_RULES: dict[str, Rule] = {
    "monitor-2": _invariants,
    "monitor-3": _skewed,
    "monitor-4": _stale,
    "monitor-5": _stable,
    "monitor-6": _computing,
    "monitor-7": _quality,
}

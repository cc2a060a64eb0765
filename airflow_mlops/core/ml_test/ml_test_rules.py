"""Rules of the ML Test Score: what in the ledger and in MLflow shows that a test is done, and how often."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from airflow_mlops.core.ml_test.attestation import attested
from airflow_mlops.core.ml_test.infrastructure_rules import INFRASTRUCTURE_RULES
from airflow_mlops.core.ml_test.ml_test_score import Finding, MLTestScore, ScorePolicy, add_up
from airflow_mlops.core.ml_test.ml_tests import TESTS
from airflow_mlops.core.ml_test.model_rules import MODEL_RULES
from airflow_mlops.core.ml_test.monitoring_rules import MONITORING_RULES

if TYPE_CHECKING:
    from airflow_mlops.core.ml_test.facts import ModelFacts


def score_facts(facts: ModelFacts, policy: ScorePolicy) -> MLTestScore:
    """Apply every rule; a person's word counts where it is more than what is measured."""
    findings = {}
    for test in TESTS:
        rule = _RULES.get(test.test_id)
        measured = (
            rule(facts, policy)
            if rule
            else Finding(points=0.0, sentence="only a person can know, and nobody has vouched for it")
        )
        said = attested(facts, test.test_id) if test.attestable and test.test_id != "model-1" else None
        better = said is not None and (said.points > measured.points or rule is None)
        findings[test.test_id] = replace(said, concern=measured.concern) if said and better else measured
    return add_up(facts, findings)


_RULES = {**MODEL_RULES, **INFRASTRUCTURE_RULES, **MONITORING_RULES}

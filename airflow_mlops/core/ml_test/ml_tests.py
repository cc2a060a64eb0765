"""The 28 tests: what is to hold, and what to do where it does not."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """The four sections; the weakest is the score."""

    DATA = "data"
    MODEL = "model"
    INFRASTRUCTURE = "infra"
    MONITORING = "monitor"


@dataclass(frozen=True, kw_only=True, slots=True)
class MLTest:
    """One of the 28.

    :param test_id: section and number in the paper, such as ``data-5``.
    :param title: what is to hold.
    :param remedy: what to do where it is missing.
    :param attestable: whether a person may vouch for it, as this package can't know, or not all of it.
    """

    test_id: str
    title: str
    remedy: str
    attestable: bool = False

    @property
    def part(self) -> Part:
        """Its section."""
        return Part(self.test_id.partition("-")[0])


_ATTEST = "check it, then say so: airflow-mlops score MODEL --attest {} --by NAME --evidence LINK (--automated where a job does it)"


def _person(test_id: str, title: str, first: str = "") -> MLTest:
    return MLTest(test_id=test_id, title=title, remedy=f"{first}{_ATTEST.format(test_id)}", attestable=True)


TESTS = (
    MLTest(
        test_id="data-1",
        title="Feature expectations are captured in a schema",
        remedy="add ValidateDatasetOperator with a suite to the Dag that ingests the model's table, and schedule it",
    ),
    MLTest(
        test_id="data-2",
        title="All features are beneficial",
        remedy="add ExplainModelOperator behind the training: it measures what each feature is worth",
    ),
    _person("data-3", "No feature's cost is too much"),
    _person("data-4", "Features adhere to meta-level requirements"),
    _person("data-5", "The data pipeline has appropriate privacy controls"),
    _person("data-6", "New features can be added quickly"),
    _person("data-7", "All input feature code is tested"),
    _person(
        "model-1",
        "Model specs are reviewed and submitted",
        "train from a clean git checkout, so that the run names the commit; that it was reviewed, a person says: ",
    ),
    MLTest(
        test_id="model-2",
        title="Offline and online metrics correlate",
        remedy="schedule CheckPerformanceOperator with labels; from three versions on, what was promised is held against what came",
    ),
    MLTest(
        test_id="model-3",
        title="All hyperparameters have been tuned",
        remedy="give TrainModelOperator a search over more than one parameter set",
    ),
    MLTest(
        test_id="model-4",
        title="The impact of model staleness is known",
        remedy="add CompareChallengersOperator to the Dag that monitors: models of different age on the same rows show what age costs",
    ),
    MLTest(
        test_id="model-5",
        title="A simpler model is not better",
        remedy="evaluate every training with EvaluateModelOperator: it has to beat a simple guess beyond chance",
    ),
    MLTest(
        test_id="model-6",
        title="Model quality is sufficient on all important data slices",
        remedy="leave `slices` of EvaluateModelOperator unset (all inputs) or name columns; slices are held against a champion, "
        "so the first version of a model has none",
    ),
    MLTest(
        test_id="model-7",
        title="The model has been tested for considerations of inclusion",
        remedy="name the columns with groups of people in `groups` of EvaluateModelOperator, and set maximum_group_difference",
    ),
    _person(
        "infra-1",
        "Training is reproducible",
        "train the same rows and parameters again into another experiment (TrainModelOperator, `experiment`) and let the ledger "
        "compare, or ",
    ),
    _person("infra-2", "Model specification code is unit tested"),
    _person("infra-3", "The full ML pipeline is integration tested"),
    MLTest(
        test_id="infra-4",
        title="Model quality is validated before attempting to serve it",
        remedy="promote with PromoteModelOperator behind EvaluateModelOperator, not by hand",
    ),
    MLTest(
        test_id="infra-5",
        title="The model allows debugging by observing step by step on a single example",
        remedy="add ExplainModelOperator behind the training with explained_rows above zero: it tells what each input did to an answer",
    ),
    _person(
        "infra-6",
        "Models are tested via a canary process before they enter production serving",
        "deploy with strategy='canary' (DeployModelOperator); where another canary takes a share of the traffic, ",
    ),
    MLTest(
        test_id="infra-7",
        title="Models can be quickly and safely rolled back to a previous serving version",
        remedy="rehearse it once a year: RollBackModelOperator, then DeployModelOperator",
    ),
    _person("monitor-1", "Dependency changes result in notification"),
    MLTest(
        test_id="monitor-2",
        title="Data invariants hold in training and serving inputs",
        remedy="schedule ValidateDatasetOperator on the table and CheckDriftOperator on what is asked of the service",
    ),
    MLTest(
        test_id="monitor-3",
        title="Training and serving features compute the same values",
        remedy="schedule CheckDriftOperator: it looks for requests unlike anything in training",
    ),
    MLTest(
        test_id="monitor-4",
        title="Models are not too stale",
        remedy="schedule DecideRetrainingOperator",
    ),
    MLTest(
        test_id="monitor-5",
        title="The model is numerically stable",
        remedy="train with TrainModelOperator and schedule CheckPerformanceOperator: both refuse answers that are no numbers",
    ),
    MLTest(
        test_id="monitor-6",
        title="Computing performance has not regressed",
        remedy="evaluate every training with EvaluateModelOperator: it starts the package in a process of its own and holds size, "
        "time and memory against artifact_limits",
    ),
    MLTest(
        test_id="monitor-7",
        title="Prediction quality has not regressed on served data",
        remedy="schedule CheckPerformanceOperator, with labels, or without them where estimates have proved right",
    ),
)

_BY_ID = {test.test_id: test for test in TESTS}


def find_test(test_id: str) -> MLTest:
    """Find a test.

    :raises ValueError: there is none of this name.
    """
    if test_id not in _BY_ID:
        raise ValueError(f"there is no test {test_id!r}; there are {', '.join(_BY_ID)}")
    return _BY_ID[test_id]

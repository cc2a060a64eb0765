"""What may stand for a test of a model, on a real MLflow server: its twin and its predecessors, and nothing that only looks like them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import ArtifactIntegrityError
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.mlflow import PACKAGE_FOLDER, TWIN_FOLDER, Registry
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step

pytestmark = pytest.mark.integration

START = datetime(2024, 1, 1, tzinfo=UTC)
#: The champion's rows, those of its challengers, and those they are compared on.
FIRST, SECOND, THIRD = (
    {
        "start": (START + timedelta(days=20 * place)).isoformat(),
        "end": (START + timedelta(days=20 * place + 20)).isoformat(),
    }
    for place in range(3)
)
RECIPE = {"recipe": "recent", "refit": True, "rows": "all"}


class World:
    """A stream whose slope grows, with a champion of its first days."""

    def __init__(self, services: Services, folder: Path, name: str) -> None:
        self.services, self.name, self.table = services, name, str(folder / "table")
        self.registry = Registry.connect(services)
        noise, hours = np.random.default_rng(0), np.arange(60 * 24)
        x = noise.normal(size=len(hours))
        frame = pl.DataFrame(
            {
                "at": [START + timedelta(hours=int(hour)) for hour in hours],
                "x": x,
                "y": x * (1.0 + hours / 400.0),
            }
        )
        window = Window(start=START, end=START + timedelta(days=60))
        delta.replace_window(self.table, frame, time_column="at", window=window)
        self.champion = self.register(self.train(window=FIRST))
        self.promote(self.champion, None)

    def train(self, **more: Any) -> dict[str, Any]:
        return run_step(
            "train",
            {
                "dataset": self.table,
                "model_name": self.name,
                "estimator": "sklearn.linear_model.Ridge",
                "target": "y",
                "numeric": ["x"],
                "time_column": "at",
                **more,
            },
            self.services,
        )

    def register(self, training: dict[str, Any]) -> str:
        asked = {key: training[key] for key in ("model_name", "run_id", "package_digest", "model_id")}
        return str(run_step("register", asked, self.services)["model_version"])

    def promote(self, version: str, expected: str | None) -> None:
        asked = {"model_name": self.name, "model_version": version, "expected_version": expected}
        now = {"actor": "test", "now": datetime.now(UTC).isoformat()}
        run_step("promote", asked | now, self.services)

    def evaluate(self, training: dict[str, Any], **more: Any) -> dict[str, Any]:
        keys = ("dataset", "model_name", "run_id", "package_digest", "twin_digest")
        asked = {key: training[key] for key in keys} | {"window": training["holdout"], "time_column": "at"}
        return run_step("evaluate", asked | more, self.services)

    def compare(self, *, earlier: tuple[str, ...] = ()) -> dict[str, Any]:
        asked = {
            "dataset": self.table,
            "model_name": self.name,
            "window": THIRD,
            "time_column": "at",
            "earlier": list(earlier),
        }
        return run_step("challengers", asked, self.services)

    def decide(self) -> str:
        """Note the comparison, and a decision that the recipe has earned a promotion."""
        check, window = self.compare(), Window.parse(THIRD["start"], THIRD["end"])
        decision = {
            "outcome": "retrain",
            "promote_on": "predecessors",
            "recipe": "recent",
            "champion_version": self.champion,
            "grounds": "they beat it",
            "training": {"start": None, "end": THIRD["end"]},
        }
        with Ledger.open(str(self.services.ledger_url)) as ledger:
            for kind, payload in (
                (EntryKind.CHALLENGER_CHECK, check),
                (EntryKind.RETRAINING_DECISION, decision),
            ):
                ledger.record(
                    LedgerEntry(
                        kind=kind,
                        key=self.name,
                        model_name=self.name,
                        window=window,
                        subject=None,
                        summary="a test",
                        payload=payload,
                        actor="test",
                        recorded_at=window.end,
                    )
                )
        return self.name


@pytest.fixture
def world(mlflow_server: str, tmp_path: Path, request: pytest.FixtureRequest) -> World:
    services = Services(tracking_uri=mlflow_server, ledger_url=f"sqlite:///{tmp_path / 'ledger.db'}")
    return World(services, tmp_path, f"earned {request.node.name}"[:60])


class TestFormerChampions:
    """One that can't be compared any more keeps nobody from comparing the others."""

    def change_champion(self, world: World, **more: Any) -> None:
        version = world.register(world.train(window=FIRST, estimator_params={"alpha": 0.5}, **more))
        world.promote(version, world.champion)

    def test_one_that_can_be_compared(self, world: World) -> None:
        self.change_champion(world)
        told = world.compare(earlier=("1", "99", "2"))
        (former,) = told["check"]["earlier"]
        assert former["version"] == "1"
        assert "former champions left out: 99" in told["reason"]

    def test_one_whose_columns_are_gone(self, world: World) -> None:
        frame = delta.read_table(world.table).collect()
        world.table += "_renamed"
        window = Window(start=START, end=START + timedelta(days=60))
        delta.replace_window(world.table, frame.rename({"x": "z"}), time_column="at", window=window)
        self.change_champion(world, numeric=["z"])
        told = world.compare(earlier=("1",))
        assert (told["check"]["champion"], told["check"]["earlier"]) == ("2", [])
        assert "former champions left out: 1" in told["reason"]

    def test_one_that_is_not_what_was_registered(self, world: World) -> None:
        self.change_champion(world)
        world.registry.set_version_tag(world.name, "1", "airflow_mlops.package_digest", "sha256:0")
        assert world.compare(earlier=("1",))["check"]["earlier"] == []


class TestInfiniteLabels:
    def test_they_are_named_and_left_out(self, world: World) -> None:
        plain = world.compare()
        frame = delta.read_table(world.table).collect()
        inside = pl.col("at").is_between(
            datetime.fromisoformat(THIRD["start"]), datetime.fromisoformat(THIRD["end"]), closed="left"
        )
        first = inside & (inside.cast(pl.Int64).cum_sum() <= 2)
        spoiled = frame.with_columns(y=pl.when(first).then(float("inf")).otherwise(pl.col("y")))
        window = Window(start=START, end=START + timedelta(days=60))
        delta.replace_window(world.table, spoiled, time_column="at", window=window)
        told = world.compare()
        assert told["check"]["row_count"] == plain["check"]["row_count"] - 2
        assert told["check"]["contenders"][0]["loss"] == pytest.approx(
            plain["check"]["contenders"][0]["loss"], rel=0.05
        )
        assert told["reason"].endswith("; 2 rows have a label that is infinite or too large and are left out")

    def test_so_are_answers_that_are_no_finite_numbers(self, world: World) -> None:
        version = world.register(world.train(window=SECOND, **RECIPE))
        plain = world.compare()
        frame = delta.read_table(world.table).collect()
        here = pl.col("at") == datetime.fromisoformat(THIRD["start"])
        spoiled = frame.with_columns(x=pl.when(here).then(1e200).otherwise(pl.col("x")))
        window = Window(start=START, end=START + timedelta(days=60))
        delta.replace_window(world.table, spoiled, time_column="at", window=window)
        told = world.compare()
        assert told["check"]["row_count"] == plain["check"]["row_count"] - 1
        assert [one["loss"] for one in told["check"]["contenders"]] == pytest.approx(
            [one["loss"] for one in plain["check"]["contenders"]], rel=0.05
        )
        assert told["reason"].endswith(
            f"; 1 row has an answer of version {world.champion}, {version} that is no finite number and is left out"
        )


class TestPredecessors:
    def test_a_model_made_as_they_were(self, world: World) -> None:
        version = world.register(world.train(window=SECOND, **RECIPE))
        key = world.decide()
        verdict = world.evaluate(world.train(window=THIRD, **RECIPE, half_life_days=5), decision_key=key)
        assert (verdict["verdict"], verdict["reason"], verdict["report"]) == ("promote", "they beat it", None)
        assert (version != world.champion, verdict["measured"]) == (True, "predecessors")

    def test_the_name_of_the_recipe_is_not_enough(self, world: World) -> None:
        version = world.register(world.train(window=SECOND, **RECIPE))
        key = world.decide()
        other = world.train(window=THIRD, **RECIPE, estimator_params={"alpha": 1e9})
        verdict = world.evaluate(other, decision_key=key)
        assert verdict["verdict"] == "reject"
        assert f"version {version} of recipe 'recent' earned the promotion" in verdict["reason"]

    def test_a_model_of_older_rows_has_earned_nothing(self, world: World) -> None:
        older = world.train(window=SECOND, **RECIPE)
        world.register(older)
        verdict = world.evaluate(older, decision_key=world.decide())
        assert verdict["verdict"] == "reject"
        assert "the model has learned from those until 2024-02-10 00:00 only" in verdict["reason"]

    def test_tags_make_no_predecessor(self, world: World) -> None:
        """Who may write to MLflow lets a model that has seen the rows pass for a challenger that has not."""
        version = world.register(world.train(window=THIRD, refit=True))
        tags = {"recipe": "recent", "trained_until": THIRD["start"]}
        for name, value in tags.items():
            world.registry.set_version_tag(world.name, version, f"airflow_mlops.{name}", value)
        with pytest.raises(
            ArtifactIntegrityError, match=f"tags of .* version {version} say that it is of recipe 'recent'"
        ):
            world.compare()
        world.register(world.train(window=THIRD, **RECIPE))
        world.registry.client.delete_model_version(world.name, version)
        assert [one["version"] for one in world.compare()["check"]["contenders"]] == [world.champion]


class TestTwins:
    def test_of_another_training(self, world: World, tmp_path: Path) -> None:
        asked = {"refit": True, "keep_twin": True, "holdout_start": (START + timedelta(days=35)).isoformat()}
        weak = world.train(window=SECOND, **asked, estimator_params={"alpha": 300.0})
        good = world.train(window=SECOND, **asked)
        folder = world.registry.download_package(good["run_id"], tmp_path, artifact_folder=TWIN_FOLDER)
        world.registry.upload(weak["run_id"], folder, TWIN_FOLDER)
        with pytest.raises(ArtifactIntegrityError, match="not the package that was registered"):
            world.evaluate(weak)
        with pytest.raises(ArtifactIntegrityError, match="is no twin of the package of run"):
            world.evaluate(weak | {"twin_digest": good["twin_digest"]})


def test_an_explanation_on_learned_rows_says_so(world: World) -> None:
    for more, learned in (({}, False), ({"refit": True}, True)):
        training = world.train(window=SECOND, **more)
        keys = ("dataset", "model_name", "run_id", "package_digest")
        asked = {key: training[key] for key in keys} | {"window": training["holdout"], "time_column": "at"}
        told = run_step("explain", asked | {"maximum_rows": 50, "explained_rows": 3}, world.services)
        assert ("on rows it has learned from" in told["headline"]) == learned


def test_a_folder_in_a_package_is_not_downloaded(world: World, tmp_path: Path) -> None:
    """What lies in it counts in no sum, so it could fill the disk before the first digest is looked at."""
    run_id = world.train(window=SECOND)["run_id"]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "filler").write_bytes(b"0" * 1000)
    world.registry.upload(run_id, tmp_path / "more", f"{PACKAGE_FOLDER}/more")
    into = tmp_path / "here"
    into.mkdir()
    with pytest.raises(ArtifactIntegrityError, match="holds a folder 'more', and packages hold none"):
        world.registry.download_package(run_id, into)
    assert list(into.iterdir()) == []

"""Windows as they come: text inputs, one class so far, a champion that was not asked, labels that are no numbers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest

from airflow_mlops.core.model.signature import FieldSpec, FieldType, ModelSignature
from airflow_mlops.core.windows import Window
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.services import Services
from airflow_mlops.serving.inference_log import InferenceLog
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.monitoring.drift_sides import DriftSides
from airflow_mlops.steps.registry.packages import champion_profile, load_version

pytestmark = pytest.mark.integration

MODEL = "claims"
START = datetime(2024, 1, 1, tzinfo=UTC)


def rows(count: int, seed: int, *, words: int = 4) -> pl.DataFrame:
    """Give claims with a note whose length says something, and how they turned out: 1 for accepted."""
    random = np.random.default_rng(seed)
    amount, lengths = random.standard_normal(count), random.integers(1, 2 * words, count)
    accepted = random.random(count) < 1 / (1 + np.exp(-2.0 * amount))
    times = [START + timedelta(days=30 * seed, minutes=place) for place in range(count)]
    return pl.DataFrame(
        {
            "id": [f"{seed}-{place}" for place in range(count)],
            "t": times,
            "amount": amount,
            "note": ["word " * length for length in lengths],
            "accepted": accepted.astype(np.int64),
        }
    )


def broken(target: np.ndarray, prediction: np.ndarray) -> float:
    raise ZeroDivisionError("no refunds")


class Claims(NamedTuple):
    folder: Path
    services: Services

    def ask(
        self,
        asked: pl.DataFrame,
        *,
        version: str = "1",
        took: dict[str, FieldType] | None = None,
        shadow: bool = False,
    ) -> Window:
        """Let the champion answer; the log says that ``version`` did, which took other inputs where ``took`` says so."""
        registry = Registry.connect(self.services)
        served = load_version(registry, registry.version_by_alias(MODEL, "champion"), self.services)
        columns = {name: asked[name].to_list() for name in ("amount", "note")}
        signature = served.manifest.signature
        predictions = served.predict_columns(columns)
        if took is not None:
            fields = tuple(FieldSpec(name=name, type=kind) for name, kind in took.items())
            signature = ModelSignature(inputs=fields, output="accepted")
            known = {item.name: item.type for item in served.manifest.signature.inputs}
            other = {"number": [1.0] * asked.height, "string": ["1"] * asked.height}
            columns = {
                name: columns[name] if known.get(name) == kind else other[kind] for name, kind in took.items()
            }
        log = InferenceLog(Path(self.services.require("serving_dir")) / "inference_log")
        log.append(
            model_name=MODEL, model_version=version, signature=signature,
            prediction_ids=asked["id"].to_list(), times=asked["t"].to_list(), columns=columns,
            predictions=predictions, latency_ms=1.0, shadow=shadow,
        )  # fmt: skip
        log.flush()
        return Window(start=asked["t"].min(), end=asked["t"].max() + timedelta(seconds=1))  # type: ignore[operator,arg-type]

    def grade(
        self, window: Window, labels: pl.DataFrame, *, table: str = "labels", **more: Any
    ) -> dict[str, Any]:
        uri = str(self.folder / f"{table}-{window.start:%j}")
        delta.replace_window(uri, labels, time_column=None, window=None)
        spec = {
            "model_name": MODEL, "window": window, "labels": uri, "id_column": "id", "target": "accepted", "metric": "roc_auc",
        }  # fmt: skip
        return run_step("performance", spec | more, self.services)

    def drift(self, window: Window, **more: Any) -> dict[str, Any]:
        spec = {"model_name": MODEL, "window": window, "report": "never"} | more
        return run_step("drift", spec, self.services)


@pytest.fixture(scope="module")
def claims(mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Claims:
    folder = tmp_path_factory.mktemp("claims")
    services = Services(
        tracking_uri=mlflow_server,
        ledger_url=f"sqlite:///{folder}/ledger.db",
        serving_dir=str(folder / "serving"),
    )
    delta.replace_window(str(folder / "rows"), rows(3000, 0), time_column="t", window=None)
    spec = {
        "dataset": str(folder / "rows"), "model_name": MODEL, "estimator": "sklearn.linear_model.LogisticRegression",
        "target": "accepted", "numeric": ["amount"], "text": ["note"], "time_column": "t", "id_column": "id",
        "holdout_share": 0.5, "metric": "roc_auc",
    }  # fmt: skip
    trained = run_step("train", spec, services)
    spec = {"model_name": MODEL, "run_id": trained["run_id"], "package_digest": trained["package_digest"]}
    run_step("register", spec, services)
    Registry.connect(services).set_alias(MODEL, "champion", "1")
    return Claims(folder, services)


class TestDrift:
    def test_text_is_compared_by_its_length_from_rows_too(self, claims: Claims) -> None:
        window = claims.ask(rows(400, 2, words=40))
        found = {
            detector: next(
                item
                for item in claims.drift(window, detector={"note": detector})["features"]
                if item["feature"] == "note"
            )
            for detector in ("wasserstein", "anderson")
        }
        assert found["anderson"]["exact"]
        assert found["anderson"]["drifted"] == found["wasserstein"]["drifted"] is True

    def test_too_few_rows_for_the_classifier_cost_no_verdict(self, claims: Claims) -> None:
        window = claims.ask(rows(40, 3, words=40))
        result = claims.drift(window, domain_classifier=True)
        assert result["drifted"]
        assert not result["classifier"]["measured"]
        assert "needs 50 rows in each" in result["classifier"]["sentence"]

    def test_inputs_that_are_left_out(self, claims: Claims) -> None:
        window = claims.ask(rows(400, 4, words=40))
        result = claims.drift(window, columns=["amount"])
        assert [item["feature"] for item in result["features"]] == ["amount"]
        assert not result["drifted"]
        with pytest.raises(ValueError, match="no profile of column 'amuont'; there are amount, note"):
            claims.drift(window, columns=["amuont"])

    def test_the_page_shows_what_the_verdict_was_about(self, claims: Claims) -> None:
        claims.ask(rows(400, 5, words=40))
        claims.ask(rows(400, 6, words=40))
        before, window = (
            Window(start=START + timedelta(days=30 * n), end=START + timedelta(days=30 * (n + 1)))
            for n in (5, 6)
        )
        result = claims.drift(window, report="always", reference="trailing", reference_windows=1)
        assert not result["drifted"]
        assert result["reference"] == f"predictions in {before}"
        registry = Registry.connect(claims.services)
        manifest, trained = champion_profile(registry, claims.services, MODEL, "champion")
        sides = DriftSides(
            log=Path(claims.services.require("serving_dir")) / "inference_log",
            model_name=MODEL,
            manifest=manifest,
            trained=trained,
        )
        reference = sides.reference(window, "trailing", 1)
        assert reference.windows == (before,)
        assert (
            reference.open_rows(["note"]).collect()["note"].to_list()
            == rows(400, 5, words=40)["note"].to_list()
        )
        assert result["report_url"]  # of these rows: of the training ones there is no text column in the page


def test_labels_the_model_has_no_answer_for_are_named(claims: Claims) -> None:
    asked = rows(400, 60)
    window = claims.ask(asked)
    known = asked.select("id", "accepted")
    tenth = pl.col("id").is_in(asked["id"].gather_every(10).to_list())
    strange = known.with_columns(accepted=pl.when(tenth).then(2).otherwise("accepted"))
    assert "does not know" not in claims.grade(window, known)["reason"]
    grade = claims.grade(window, strange, table="strange")
    assert grade["measured"]
    assert "40 labelled rows are of a class the model does not know, such as 2" in grade["reason"]


def month(number: int) -> Window:
    return Window(start=START + timedelta(days=30 * number), end=START + timedelta(days=30 * (number + 1)))


class TestInputsThatCameOrChanged:
    """Versions before the champion took other inputs; what they logged is no reference for what they did not know."""

    @pytest.mark.parametrize(
        ("place", "took", "why"),
        [
            (20, {"amount": "number"}, "not in the log of {}"),
            (
                23,
                {"amount": "number", "note": "number"},
                "a number in the log of {}, where the champion takes text",
            ),
        ],
    )
    def test_an_input_the_windows_before_do_not_have_is_not_measured(
        self, claims: Claims, place: int, took: dict[str, FieldType], why: str
    ) -> None:
        claims.ask(rows(400, place), version="0", took=took)
        claims.ask(rows(400, place + 1))
        claims.ask(rows(400, place + 2, words=40))
        result = claims.drift(month(place + 1), reference="trailing", reference_windows=1)
        (note,) = (item for item in result["features"] if item["feature"] == "note")
        assert (note["measured"], note["drifted"]) == (False, False)
        assert note["sentence"].startswith(f"note: {why.format(month(place))}")
        assert note["sentence"].endswith(
            f"measured from the window {month(place + 2)} on, for which this one is a reference"
        )
        assert not result["drifted"]
        assert result["headline"].startswith("none of 1 inputs moved; not measured: note (")
        later = claims.drift(month(place + 2), reference="trailing", reference_windows=1)
        (note,) = (item for item in later["features"] if item["feature"] == "note")
        assert note["drifted"]

    def test_other_inputs_are_judged_as_ever(self, claims: Claims) -> None:
        claims.ask(rows(400, 26), version="0", took={"amount": "number"})
        claims.ask(rows(400, 27).with_columns(pl.col("amount") + 5.0))
        result = claims.drift(month(27), reference="trailing", reference_windows=1)
        assert result["drifted"]
        assert result["headline"].startswith("1 of 1 inputs moved (amount: mean ")

    @pytest.mark.parametrize("reference", ["fixed", "trailing", "last_year"])
    def test_a_window_before_the_input_is_no_drift_either(self, claims: Claims, reference: str) -> None:
        place = {"fixed": 30, "trailing": 33, "last_year": 36}[reference]
        claims.ask(rows(400, place - 1))
        claims.ask(rows(400, place), version="0", took={"amount": "number"})
        result = claims.drift(month(place), reference=reference, reference_windows=1, domain_classifier=True)
        (note,) = (item for item in result["features"] if item["feature"] == "note")
        assert (note["measured"], note["drifted"]) == (False, False)
        assert note["sentence"].endswith(
            "measured from the first window on in which it is logged as the champion takes it"
        )
        assert not result["drifted"]
        assert not result["skew"]
        assert result["not_judged"] == [
            f"note: not in the log of {month(place)}: the versions that answered there did not take it, or it is kept out "
            "of the log"
        ]
        assert not result["classifier"]["drifted"]  # by what is in all rows

    def test_an_input_that_only_shadow_answers_have_is_not_of_another_kind(self, claims: Claims) -> None:
        claims.ask(rows(400, 45), version="0", took={"amount": "number"})
        claims.ask(rows(400, 45), version="1", shadow=True)
        result = claims.drift(month(45), columns=["note", "amount"])
        (note,) = (item for item in result["features"] if item["feature"] == "note")
        assert note["sentence"].startswith(
            f"note: no answer that callers saw has it in the log of {month(45)}; measured from"
        )

    def test_an_input_that_went_is_not_looked_for(self, claims: Claims) -> None:
        claims.ask(rows(400, 40), version="0", took={"amount": "number", "note": "string", "gone": "string"})
        claims.ask(rows(400, 41))
        result = claims.drift(month(41), reference="trailing", reference_windows=1)
        assert {item["feature"]: item["measured"] for item in result["features"]} == {
            "amount": True,
            "note": True,
        }
        assert not result["drifted"]

    def test_versions_side_by_side_have_files_of_their_own_inputs(
        self, claims: Claims, tmp_path: Path
    ) -> None:
        log = InferenceLog(tmp_path)
        for version, fields in (("1", {"x": "number"}), ("2", {"x": "string", "y": "number"})):
            inputs = tuple(FieldSpec(name=name, type=kind) for name, kind in fields.items())  # type: ignore[arg-type]
            log.append(
                model_name=MODEL, model_version=version, signature=ModelSignature(inputs=inputs, output="z"),
                prediction_ids=[version], times=[START], latency_ms=1.0, predictions=[1.0],
                columns={name: [1.0 if kind == "number" else "1"] for name, kind in fields.items()},
            )  # fmt: skip
        log.flush()
        schemas = [pl.read_parquet_schema(file) for file in tmp_path.rglob("*.parquet")]
        assert sorted(str(schema["feature_x"]) for schema in schemas) == ["Float64", "String"]
        assert sum("feature_y" in schema for schema in schemas) == 1


class TestPerformance:
    def test_one_class_so_far_is_not_measured_yet(self, claims: Claims) -> None:
        asked = rows(400, 7)
        first = asked.filter(pl.col("accepted") == 1).head(120).select("id", "accepted")
        result = claims.grade(claims.ask(asked), first)
        assert not result["measured"]
        assert result["awaits_labels"]
        assert result["estimated_value"] is not None
        assert result["reason"].startswith("performance not measured: 30% labelled so far")
        enough = claims.grade(
            Window(start=asked["t"].min(), end=asked["t"].max() + timedelta(seconds=1)),  # type: ignore[operator,arg-type]
            first,
            policy={"minimum_labelled_share": 0.2},
        )
        assert not enough["measured"]
        assert "roc_auc is nan on 120 rows" in enough["reason"]

    def test_a_champion_that_was_not_asked(self, claims: Claims) -> None:
        asked = rows(300, 8)
        result = claims.grade(claims.ask(asked, version="7"), asked.select("id", "accepted"))
        assert not result["measured"]
        assert not result["estimated"]
        assert "(without 300 answers not given by the champion, version 1)" in result["reason"]

    def test_labels_with_a_point_are_the_same_labels(self, claims: Claims) -> None:
        asked = rows(300, 9)
        window = claims.ask(asked)
        as_trained = claims.grade(window, asked.select("id", "accepted"), metrics=["accuracy"])
        with_point = asked.select("id", pl.col("accepted").cast(pl.Float64))
        again = claims.grade(window, with_point, metrics=["accuracy"], table="with-point")
        assert again["value"] == as_trained["value"]
        assert again["other_metrics"] == as_trained["other_metrics"]
        assert again["other_metrics"]["accuracy"] > 0.5

    def test_an_infinite_label_is_no_class_and_costs_its_row(self, claims: Claims) -> None:
        asked = rows(300, 12)
        labels = asked.select("id", pl.col("accepted").cast(pl.Float64))
        spoiled = labels.with_columns(
            pl.when(pl.int_range(pl.len()) == 0)
            .then(float("inf"))
            .otherwise(pl.col("accepted"))
            .alias("accepted")
        )
        result = claims.grade(claims.ask(asked), spoiled, metrics=["accuracy"])
        assert (result["measured"], result["row_count"], result["invalid_count"]) == (True, 299, 1)
        assert result["reason"].endswith(
            "; 1 row has a label that is infinite or too large and is not graded"
        )
        assert result["other_metrics"]["accuracy"] > 0.5

    def test_labels_the_model_never_heard_of_are_no_grade(self, claims: Claims) -> None:
        asked = rows(300, 10)
        words = asked.select(
            "id", accepted=pl.when(pl.col("accepted") == 1).then(pl.lit("yes")).otherwise(pl.lit("no"))
        )
        with pytest.raises(ValueError, match="labels in 'accepted' are no, yes, and the model answers 0, 1"):
            claims.grade(claims.ask(asked), words)

    def test_a_metric_beside_that_fails_costs_no_grade(self, claims: Claims) -> None:
        asked = rows(300, 11)
        result = claims.grade(
            claims.ask(asked), asked.select("id", "accepted"), metrics=["accuracy", f"{__name__}:broken"]
        )
        assert result["measured"]
        assert result["other_metrics"][f"{__name__}:broken"] is None
        assert result["other_metrics"]["accuracy"] > 0.5
        assert (
            f"metric '{__name__}:broken' failed on 300 rows: ZeroDivisionError: no refunds"
            in result["reason"]
        )

"""Importance, dependence and counterfactuals of models whose inside is known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from airflow_mlops.core.model.explanation import (
    Importance,
    PartialDependence,
    find_counterfactual,
    partial_dependence,
    permutation_importance,
    rank_contributions,
)
from airflow_mlops.integrations import plots, shap
from airflow_mlops.steps.explain import _counterfactuals, _headline

Table = dict[str, Any]


@pytest.fixture
def table() -> Table:
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=400),
        "b": rng.normal(size=400),
        "kind": rng.choice(["x", "y", "z"], 400).astype(object),
        "idle": rng.normal(size=400),
    }


def score(table: Table) -> Any:
    """Three per a, two for kind x, and a with b."""
    return 3.0 * table["a"] + 2.0 * (table["kind"] == "x") + table["a"] * table["b"]


def test_importance_ranks_and_an_idle_feature_has_none(table: Table) -> None:
    truth = score(table)
    found = permutation_importance(lambda rows: float(np.abs(score(rows) - truth).mean()), table)
    by_name = {item.name: item for item in found}
    assert found[0].name == "a"
    assert by_name["idle"].increase == by_name["idle"].standard_deviation == 0.0
    # E|2 (1_x - 1_x')| for P(x) = 1/3 is 2 * 2 * 1/3 * 2/3.
    assert by_name["kind"].increase == pytest.approx(8 / 9, abs=0.1)


def test_dependence_is_the_mean_over_the_other_features(table: Table) -> None:
    curve = partial_dependence(score, table, "a", points=7)
    slopes = np.diff(curve.scores) / np.diff(curve.values)
    assert slopes == pytest.approx([3.0 + table["b"].mean()] * 6)
    kinds = dict(
        zip(*(lambda c: (c.values, c.scores))(partial_dependence(score, table, "kind")), strict=True)
    )
    assert set(kinds) == {"x", "y", "z"}
    assert kinds["x"] - kinds["y"] == pytest.approx(2.0)
    table["a"][:] = np.nan
    assert len(partial_dependence(score, table, "a").values) == 1


def test_a_counterfactual_changes_little_and_reaches_the_answer(table: Table) -> None:
    row = {"a": 0.1, "b": 0.0, "kind": "y", "idle": 0.7}
    found = find_counterfactual(score, row, table, lambda scores: scores > 3.0)
    assert found is not None
    assert found.score_before == pytest.approx(0.3)
    assert found.score_after > 3.0
    assert "idle" not in found.changes
    assert len(found.changes) <= 2
    after = row | {name: new for name, (_, new) in found.changes.items()}
    assert (
        float(
            score(
                {
                    name: np.array([value], dtype=object if name == "kind" else float)
                    for name, value in after.items()
                }
            )[0]
        )
        == found.score_after
    )
    assert find_counterfactual(score, row, table, lambda scores: scores > 1e9) is None
    assert find_counterfactual(score, row, table, lambda scores: scores > 0.0) is None


@pytest.mark.parametrize("metric", ["accuracy", "mae"])
def test_without_a_feature_any_metric_gets_worse(metric: str) -> None:
    found = Importance(name="x", increase=0.5, standard_deviation=0.01)
    idle = Importance(name="z", increase=0.0, standard_deviation=0.0)
    assert _headline((found, idle), metric) == (
        f"most important: x ({metric.upper()} gets worse by 0.5 without it); 1 of 2 features change nothing"
    )


def drawn(text: str, **how: Any) -> bytes:
    figure = Figure(figsize=(4, 1))
    canvas = FigureCanvasAgg(figure)
    figure.text(0.1, 0.5, text, **how)
    canvas.draw()
    return bytes(canvas.buffer_rgba())


@pytest.mark.parametrize("name", ["cost_$_per_$", "Amount ($) vs. budget ($)", "a$\\b$", r"\$^2$ $x_$"])
def test_names_with_dollar_signs_are_drawn_as_they_are(name: str, tmp_path: Path) -> None:
    importances = [Importance(name=name, increase=1.0, standard_deviation=0.1)]
    curves = [PartialDependence(name=name, values=(name, "$5%-$10%"), scores=(1.0, 2.0))]
    table = {name: np.array([name, "b"], dtype=object)}
    pictures = [tmp_path / f"{number}.png" for number in range(3)]
    plots.draw_importances(importances, name, pictures[0])
    plots.draw_partial_dependences(curves, f"share of {name}", pictures[1])
    plots.draw_contributions([name], np.array([[1.0], [2.0]]), table, [name], pictures[2])
    assert all(picture.stat().st_size > 1_000 for picture in pictures)
    assert drawn(plots._literal(name)) == drawn(name, parse_math=False)


def test_a_missing_value_is_far_from_every_other(table: Table) -> None:
    row = {"a": 0.0, "b": float("nan"), "kind": "y", "idle": 0.0}
    found = find_counterfactual(
        lambda rows: np.where(np.isnan(rows["b"]), 0.0, 1.0), row, table, lambda scores: scores > 0.5
    )
    assert found is not None
    assert list(found.changes) == ["b"]
    assert found.changes["b"][0] is None


def test_contributions_add_up_to_the_answer(table: Table) -> None:
    rows = {name: column[:10] for name, column in table.items()}
    background = {name: column[-30:] for name, column in table.items()}
    values, mean = shap.explain_rows(score, rows, background)
    assert values.shape == (10, 4)
    assert mean == pytest.approx(float(score(background).mean()))
    assert mean + values.sum(axis=1) == pytest.approx(score(rows))
    assert np.abs(values[:, 3]).max() < 1e-12
    assert rank_contributions(list(table), values)[0][0] == "a"


@pytest.mark.parametrize(("inputs", "background"), [(260, 5), (600, 40)])
def test_contributions_of_hundreds_of_inputs(inputs: int, background: int) -> None:
    rng = np.random.default_rng(0)
    wide = {f"x{number}": rng.normal(size=background) for number in range(inputs)}
    rows = {name: column[:1] for name, column in wide.items()}

    def first_two(table: Table) -> Any:
        return table["x0"] - 2 * table["x1"]

    values, mean = shap.explain_rows(first_two, rows, wide)
    assert mean + values.sum(axis=1) == pytest.approx(first_two(rows))
    assert values[0, :2].all()
    assert not values[0, 2:].any()


def test_a_counterfactual_of_several_labels_is_another_label() -> None:
    """A model of three regions on a line: a from 0, b from 1, c from 2."""

    def probabilities(table: Table) -> np.ndarray:
        x = np.asarray(table["x"], dtype=float)
        scores = -np.abs(x[:, None] - np.array([0.5, 1.5, 2.5]))
        return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)

    def labels(table: Table) -> list[str]:
        return [str(label) for label in np.array(["a", "b", "c"])[probabilities(table).argmax(axis=1)]]

    model: Any = SimpleNamespace(
        manifest=SimpleNamespace(classes=("a", "b", "c")), probabilities=probabilities, predict_columns=labels
    )
    pool = {"x": np.linspace(0.0, 3.0, 301)}
    spec: Any = SimpleNamespace(counterfactual_shift=1.0)
    explained = {"x": np.array([0.2, 1.4, 2.9])}
    found = _counterfactuals(spec, model, explained, pool)
    before = labels(explained)
    assert before == ["a", "b", "c"]
    for own, other in zip(before, found, strict=True):
        assert other is not None
        _, after = other.changes["x"]
        assert other.answer_before == own
        assert other.answer_after == labels({"x": np.array([after])})[0] != own


def test_the_pool_is_asked_once_however_many_rows_are_explained() -> None:
    asked: list[int] = []

    def predict(table: Table) -> list[float]:
        asked.append(len(table["x"]))
        return [2.0 * value for value in table["x"]]

    model: Any = SimpleNamespace(
        manifest=SimpleNamespace(classes=None), probabilities=None, predict_columns=predict
    )
    pool = {"x": np.linspace(0.0, 3.0, 301)}
    spec: Any = SimpleNamespace(counterfactual_shift=1.0)
    found = _counterfactuals(spec, model, {"x": pool["x"][:100]}, pool)
    assert sorted(asked)[-2:] == [100, 301]
    assert all(item and item.answer_after == pytest.approx(item.score_after) for item in found)
    assert all(
        float(str(item.answer_after)) >= float(str(item.answer_before)) + 1.0 for item in found if item
    )

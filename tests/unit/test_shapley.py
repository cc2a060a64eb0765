"""Shapley values of models whose inside is known, beside a closed form, the axioms, and SHAP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from airflow_mlops.core.model.background import as_table
from airflow_mlops.core.model.shapley import ROWS_AT_ONCE, Shapley
from airflow_mlops.core.model.signature import FieldSpec, ModelSignature
from airflow_mlops.integrations import shap

Table = dict[str, Any]


def normal(inputs: int, rows: int, seed: int = 0) -> Table:
    rng = np.random.default_rng(seed)
    return {f"x{place}": rng.normal(size=rows) for place in range(inputs)}


def tangled(table: Table) -> Any:
    """Three inputs that act together, two that saturate, one that stands alone; others do nothing."""
    together = table["x0"] * table["x1"] * table["x2"] + np.tanh(2.0 * table["x3"] * table["x4"])
    return together + np.maximum(table["x0"], table["x5"]) + 3.0 * table["x5"]


def matrix(table: Table) -> Any:
    return np.column_stack(list(table.values()))


#: Of seven inputs and thirty background rows: every coalition, or orders that are drawn.
EXACT, DRAWN = 30 * 2**7, 30 * 12 * 8


class TestClosedForm:
    @pytest.mark.parametrize("inputs", [1, 2, 5, 40])
    def test_a_linear_model_shares_out_by_distance_from_the_mean(self, inputs: int) -> None:
        weights = np.random.default_rng(1).normal(size=inputs)
        background, rows = normal(inputs, 20), normal(inputs, 6, seed=2)
        found = Shapley(background).explain(lambda table: matrix(table) @ weights, rows)
        assert found.values == pytest.approx(weights * (matrix(rows) - matrix(background).mean(axis=0)))
        assert found.base_value == pytest.approx(float((matrix(background) @ weights).mean()))
        assert np.nanmax(found.standard_errors) < 1e-12

    def test_opposite_orders_are_exact_where_no_more_than_two_inputs_act_together(self) -> None:
        """A product of two against one row: each gets its own change times the mean of the other's ends."""
        background, rows = normal(30, 8), normal(30, 5, seed=1)
        shapley = Shapley(background, evaluations=2_000)
        assert not shapley.exact
        found = shapley.explain(lambda table: table["x3"] * table["x7"], rows)
        mine, other = (rows[name][:, np.newaxis] for name in ("x3", "x7"))
        expected = ((mine - background["x3"]) * (other + background["x7"]) / 2.0).mean(axis=1)
        assert found.values[:, 3] == pytest.approx(expected)

    def test_texts_and_missing_values_are_inputs_like_others(self) -> None:
        signature = ModelSignature(
            inputs=(FieldSpec(name="x", type="number"), FieldSpec(name="kind", type="string")), output="y"
        )
        background = as_table({"x": [0.0, float("nan")], "kind": ["a", None]}, signature)
        rows = as_table({"x": [float("nan"), 2.0], "kind": ["a long one", None]}, signature)

        def score(table: Table) -> Any:
            kinds = np.array([len(kind or "") for kind in table["kind"]])
            return np.where(np.isnan(table["x"]), -1.0, table["x"]) + kinds

        found = Shapley(background).explain(score, rows)
        assert found.values.tolist() == [[-0.5, 9.5], [2.5, -0.5]]


class TestAxioms:
    @settings(max_examples=60)
    @given(
        inputs=st.integers(1, 7),
        backgrounds=st.integers(1, 6),
        evaluations=st.integers(1, 2_000),
        seed=st.integers(0, 10_000),
    )
    def test_additive_with_dummies_and_symmetric(
        self, inputs: int, backgrounds: int, evaluations: int, seed: int
    ) -> None:
        """Any function at all: a sine of a random form, whose cells differ with all inputs but the dummy and its twin."""
        rng = np.random.default_rng(seed)
        weights = rng.normal(scale=3.0, size=inputs)
        background, rows = normal(inputs, backgrounds, seed), normal(inputs, 3, seed + 1)
        for table in (background, rows):
            table["idle"] = table["x0"].copy()
            table["twin"] = table["x0"].copy()  # acts as x0 does, and has its values

        def score(table: Table) -> Any:
            mixed = matrix({name: table[name] for name in rows if name.startswith("x")}) @ weights
            return np.sin(mixed + weights[0] * table["twin"]) + np.abs(mixed + weights[0] * table["twin"])

        shapley = Shapley(background, evaluations=evaluations)
        found = shapley.explain(score, rows)
        names = list(rows)
        assert found.scores == pytest.approx(score(rows))
        assert found.base_value + found.values.sum(axis=1) == pytest.approx(found.scores, abs=1e-9)
        assert np.abs(found.values[:, names.index("idle")]).max() < 1e-9
        if shapley.exact:
            assert found.values[:, names.index("twin")] == pytest.approx(found.values[:, 0], abs=1e-9)
            assert not found.standard_errors.any()

    def test_the_sum_of_two_games_gives_the_sum_of_their_values(self) -> None:
        background, rows = normal(7, 30), normal(7, 5, seed=1)
        for evaluations in (EXACT, DRAWN):
            shapley = Shapley(background, evaluations=evaluations)
            one, other, both = (
                shapley.explain(score, rows).values
                for score in (tangled, lambda t: t["x1"] ** 2, lambda t: tangled(t) + t["x1"] ** 2)
            )
            assert both == pytest.approx(one + other)

    def test_the_same_rows_are_explained_the_same_way_in_any_company(self) -> None:
        shapley = Shapley(normal(7, 30), evaluations=DRAWN)
        rows = normal(7, 5, seed=1)
        values = shapley.explain(tangled, rows).values
        again = Shapley(normal(7, 30), evaluations=DRAWN).explain(
            tangled, {name: column[::-1] for name, column in rows.items()}
        )
        assert (again.values[::-1] == values).all()


class TestAccuracy:
    def test_every_coalition_is_what_shap_finds_exactly(self) -> None:
        background, rows = normal(7, 30), normal(7, 8, seed=1)
        explain = _shap_exact(tangled, background)
        found = Shapley(background, evaluations=EXACT)
        assert found.exact
        assert found.explain(tangled, rows).values == pytest.approx(explain(rows), abs=1e-12)

    def test_drawn_orders_are_off_by_what_they_say(self) -> None:
        background, rows = normal(7, 30), normal(7, 60, seed=1)
        exact = Shapley(background, evaluations=EXACT).explain(tangled, rows).values
        drawn = Shapley(background, evaluations=DRAWN)
        assert not drawn.exact
        found = drawn.explain(tangled, rows)
        taken = found.standard_errors > 1e-9  # others are exact
        off = (found.values - exact)[taken] / found.standard_errors[taken]
        assert 0.8 < np.sqrt(np.mean(off**2)) < 1.25
        assert np.abs((found.values - exact)[~taken]).max() < 1e-9

    def test_drawn_orders_are_as_near_as_those_of_shap_for_the_same_work(self) -> None:
        background, rows = normal(9, 30), normal(9, 20, seed=1)
        work = [0]

        def score(table: Table) -> Any:
            work[0] += len(table["x0"])
            return tangled(table)

        exact = Shapley(background, evaluations=10**6).explain(tangled, rows).values
        theirs, _ = shap.explain_rows(score, rows, background)
        drawn = Shapley(background, evaluations=work[0] // 20)
        assert not drawn.exact
        off = [
            float(np.sqrt(np.mean((values - exact) ** 2)))
            for values in (drawn.explain(tangled, rows).values, theirs)
        ]
        assert off[0] < 1.25 * off[1]


class TestCost:
    @pytest.mark.parametrize("inputs", [3, 9, 60, 400])
    def test_it_is_bounded_per_row_and_per_call(self, inputs: int) -> None:
        sizes: list[int] = []

        def score(table: Table) -> Any:
            sizes.append(len(table["x0"]))
            return table["x0"] * table["x1"] * table["x2"]

        background, rows = normal(inputs, 50), normal(inputs, 4, seed=1)
        found = Shapley(background, evaluations=5_000).explain(score, rows)
        assert sum(sizes) <= 4 * 5_000 + 50 + 4
        assert max(sizes) <= ROWS_AT_ONCE
        assert found.base_value + found.values.sum(axis=1) == pytest.approx(found.scores)
        assert not np.isnan(found.standard_errors).any()

    def test_one_order_and_its_opposite_is_the_least(self) -> None:
        found = Shapley(normal(50, 10), evaluations=1).explain(tangled, normal(50, 2, seed=1))
        assert np.isnan(found.standard_errors).all()
        assert found.base_value + found.values.sum(axis=1) == pytest.approx(found.scores)


def _shap_exact(score: Callable[[Table], Any], background: Table) -> Callable[[Table], Any]:
    import shap as library

    names = list(background)
    masker = library.maskers.Independent(matrix(background), max_samples=len(background["x0"]))
    explainer = library.explainers.Exact(
        lambda cells: score({name: cells[:, place] for place, name in enumerate(names)}), masker
    )
    return lambda rows: explainer(matrix(rows), silent=True).values

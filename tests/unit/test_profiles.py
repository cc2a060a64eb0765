"""Profiles: merging, files, batches; digests and windows."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from airflow_mlops.core.data.digest import RowDigest
from airflow_mlops.core.monitoring.drift import compare_profiles
from airflow_mlops.core.monitoring.drift_policy import DriftPolicy
from airflow_mlops.core.profiles import profile as profile_module
from airflow_mlops.core.profiles.profile import (
    ColumnKinds,
    Profile,
    merge_profiles,
    profile_frame,
    profile_scan,
)
from airflow_mlops.core.profiles.profile_columns import CategoricalProfile, NumericProfile
from airflow_mlops.core.profiles.profile_format import (
    profile_from_bytes,
    profile_from_json,
    profile_to_bytes,
    profile_to_json,
)
from airflow_mlops.core.windows import Window

RANDOM = np.random.default_rng(5)
KINDS = {
    "numeric": ["x", "flag"],
    "categorical": ["kind"],
    "boolean": ["on"],
    "datetime": ["at"],
    "text": ["note"],
}
START = datetime(2024, 1, 1, tzinfo=UTC)


def frame(count: int, *, shift: float = 0.0) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "x": RANDOM.gamma(2.0, 3.0, count) + shift,
            "flag": RANDOM.choice([0, 1, 2], count),
            "kind": RANDOM.choice(["a", "b", "c"], count, p=[0.6, 0.3, 0.1]),
            "on": RANDOM.random(count) < 0.2,
            "at": [START + timedelta(minutes=int(m)) for m in RANDOM.integers(0, 10_000, count)],
            "note": ["n" * int(n) for n in RANDOM.poisson(20, count)],
        }
    )


def same(first: Profile, second: Profile) -> None:
    """Counts to the row; sums and moments to rounding."""
    assert first.row_count == second.row_count
    assert first.counts.tolist() == second.counts.tolist()
    assert first.unseen == second.unseen
    scale = np.maximum(1.0, np.abs(second.moments))
    # Large values of both signs cancel in the mean and the offsets: they round as the largest value does.
    largest = np.abs(np.where(np.isfinite(second.moments[3:]), second.moments[3:], 0.0)).max(
        axis=0, initial=0.0
    )
    scale[1] = np.maximum(scale[1], largest)
    with np.errstate(invalid="ignore"):  # no values: the minimum is infinite
        close = np.abs(first.moments - second.moments) <= 1e-7 * scale
    assert (close | (first.moments == second.moments)).all()
    widest = np.max(np.abs(second.offsets), initial=1.0)
    rounding = 1e-15 * max(1, second.row_count) * np.max(largest, initial=0.0)
    assert (np.abs(first.offsets - second.offsets) <= 1e-9 * widest + rounding).all()


NUMBERS = (
    st.none()
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.sampled_from([0.0, -0.0, 1.0, 1.0, 7.0, float(2**63 - 1), float(-(2**63)), 1e308, 5e-324])
)
CATEGORIES = st.none() | st.sampled_from(["a", "b"]) | st.text(max_size=3)


class TestMerge:
    @settings(max_examples=150)
    @given(
        st.lists(st.tuples(NUMBERS, CATEGORIES), max_size=60),
        st.lists(NUMBERS, max_size=30),
        st.integers(0, 60),
        st.integers(0, 60),
    )
    def test_merged_equals_one_shot_in_any_grouping(
        self, rows: list[tuple[float | None, str | None]], learned: list[float | None], cut: int, other: int
    ) -> None:
        schema = {"v": pl.Float64, "c": pl.String}
        table = pl.DataFrame(rows, schema=schema, orient="row")
        kinds: dict[str, Any] = {"numeric": ["v"], "categorical": ["c"]}
        reference = profile_frame(
            pl.DataFrame({"v": learned, "c": ["a"] * len(learned)}, schema=schema), **kinds
        )
        first, second = sorted((min(cut, table.height), min(other, table.height)))
        a, b, c = (
            profile_frame(part, **kinds, like=reference)
            for part in (table[:first], table[first:second], table[second:])
        )
        whole = profile_frame(table, **kinds, like=reference)
        assert whole.column("v").row_count == whole.column("c").row_count == table.height
        same(merge_profiles([a, b, c]), whole)
        same(merge_profiles([merge_profiles([a, b]), c]), whole)
        same(merge_profiles([a, merge_profiles([b, c])]), whole)
        same(merge_profiles([c, a, b]), whole)

    def test_integers_at_the_ends_of_their_range(self) -> None:
        ends = [2**63 - 1, -(2**63), 0]
        column = profile_frame(pl.DataFrame({"v": ends}, schema={"v": pl.Int64}), numeric=["v"]).column("v")
        assert isinstance(column, NumericProfile)
        assert (column.count, column.minimum, column.maximum) == (3, float(-(2**63)), float(2**63))
        assert column.standard_deviation == pytest.approx(np.std(np.array(ends, dtype=float)))

    def test_a_million_ids_take_no_room_and_merge_in_any_order(self) -> None:
        known, ids = ([f"u{n}" for n in numbers] for numbers in (range(3_000), range(2_000, 60_000)))
        reference = profile_frame(pl.DataFrame({"id": known}), categorical=["id"])
        parts = [
            profile_frame(pl.DataFrame({"id": part}), categorical=["id"], like=reference)
            for part in (ids[:20_000], ids[20_000:20_001], ids[20_001:])
        ]
        merged = merge_profiles(parts)
        same(merged, merge_profiles(parts[::-1]))
        same(merged, profile_frame(pl.DataFrame({"id": ids}), categorical=["id"], like=reference))
        assert len(profile_to_json(merged)) < 20_000
        column = merged.column("id")
        assert isinstance(column, CategoricalProfile)
        named = set(column.named_counts) & set(ids)
        assert column.other_count == len(ids) - len(named)
        assert len(column.unseen) == 20

    def test_other_columns_or_cells_do_not_merge(self) -> None:
        first, second = (profile_frame(frame(50), **KINDS) for _ in range(2))
        with pytest.raises(ValueError, match="column 'x': profiles with different cells"):
            merge_profiles([first, second])
        with pytest.raises(ValueError, match="different columns"):
            merge_profiles([first, first.select(["kind"])])
        with pytest.raises(ValueError, match="no profiles"):
            merge_profiles([])


class TestProfile:
    def test_every_kind_of_column(self) -> None:
        rows = frame(4_000).with_columns(
            pl.when(pl.int_range(pl.len()) % 10 == 0).then(None).otherwise("x").alias("x")
        )
        made = profile_frame(rows, **KINDS, pairs=[("x", "flag")])
        assert {item.name: item.null_count for item in made.columns} == {
            "x": 400, "flag": 0, "kind": 0, "on": 0, "at": 0, "note": 0, "x*flag": 400,
        }  # fmt: skip
        x, on, note, at = (made.column(name) for name in ("x", "on", "note", "at"))
        assert isinstance(x, NumericProfile)
        assert isinstance(on, CategoricalProfile)
        assert isinstance(note, NumericProfile)
        assert isinstance(at, NumericProfile)
        assert x.mean == pytest.approx(rows["x"].mean())
        assert x.standard_deviation == pytest.approx(rows["x"].std(ddof=0))
        assert on.named_counts == {"false": int((~rows["on"]).sum()), "true": int(rows["on"].sum())}
        assert note.mean == pytest.approx(rows["note"].str.len_chars().mean())
        assert at.minimum == rows["at"].min().timestamp() * 1e6
        assert len(profile_to_json(made)) < 30_000

    def test_documents_as_categories_take_no_room_and_stay_apart(self) -> None:
        texts = [f"{'page ' * 1000}{number}" for number in range(1000)]
        profile = profile_frame(pl.DataFrame({"v": texts}), categorical=["v"])
        assert len(profile_to_json(profile)) < 150_000
        assert profile.column("v").count == np.count_nonzero(profile.column("v").counts) == 1000
        merged = merge_profiles(
            [profile, profile_frame(pl.DataFrame({"v": texts}), categorical=["v"], like=profile)]
        )
        assert set(merged.column("v").counts[:1000].tolist()) == {2}

    def test_a_category_that_is_no_number_is_none(self) -> None:
        column = profile_frame(pl.DataFrame({"v": [1.0, 2.0, float("nan"), None]}), categorical=["v"]).column(
            "v"
        )
        assert isinstance(column, CategoricalProfile)
        assert (column.null_count, column.named_counts) == (2, {"1": 1, "2": 1})

    def test_cells_end_at_the_reference(self) -> None:
        reference = profile_frame(frame(4_000), numeric=["x"])
        assert isinstance(inside := reference.column("x"), NumericProfile)
        assert inside.outside_count == 0
        current = profile_frame(frame(100, shift=1e3), numeric=["x"], like=reference).column("x")
        assert isinstance(current, NumericProfile)
        assert current.outside_count == 100

    def test_a_table_that_is_read_in_batches(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(profile_module, "BATCH_ROWS", 700)
        rows = frame(5_000)
        rows.write_parquet(tmp_path / "rows.parquet", row_group_size=1_100)
        kinds = ColumnKinds(**KINDS, pairs=[("x", "flag")])
        scanned = profile_scan(lambda: pl.scan_parquet(tmp_path / "rows.parquet"), kinds)
        whole = profile_frame(rows, **KINDS, pairs=[("x", "flag")])
        assert scanned.layout.digest == whole.layout.digest
        same(scanned, whole)
        monkeypatch.setattr(profile_module, "LAYOUT_ROWS", 1_000)
        sampled = profile_scan(lambda: pl.scan_parquet(tmp_path / "rows.parquet"), kinds)
        assert sampled.row_count == 5_000  # cells are chosen from a fifth of the rows, all rows are counted
        assert [item.row_count for item in sampled.columns] == [5_000] * 7

    def test_an_empty_table_has_a_profile(self, tmp_path: Path) -> None:
        frame(1).clear().write_parquet(tmp_path / "none.parquet")
        made = profile_scan(lambda: pl.scan_parquet(tmp_path / "none.parquet"), ColumnKinds(**KINDS))
        assert (made.row_count, len(made.columns)) == (0, 6)
        same(profile_from_json(profile_to_json(made)), made)

    def test_a_column_of_another_kind(self) -> None:
        reference = profile_frame(frame(50), **KINDS)
        with pytest.raises(ValueError, match="'kind' is a category in the reference, a number here"):
            profile_frame(frame(50), numeric=["kind"], like=reference)
        with pytest.raises(ValueError, match="no profile of column 'gone'; there are x, flag"):
            reference.column("gone")

    def test_numbers_declared_as_text_are_as_long_as_they_are_served(self) -> None:
        trained = profile_frame(pl.DataFrame({"note": [12.0, 0.5]}), text=["note"])
        served = profile_frame(pl.DataFrame({"note": ["12", "0.5"]}), text=["note"], like=trained)
        assert trained.counts.tolist() == served.counts.tolist()


class TestFormat:
    def test_a_round_trip_through_json(self) -> None:
        made = profile_frame(frame(500), **KINDS, pairs=[("x", "flag")])
        read = profile_from_json(profile_to_json(made))
        assert read.layout.digest == made.layout.digest
        same(read, made)
        assert profile_to_json(read) == profile_to_json(made)

    def test_a_round_trip_through_bytes(self) -> None:
        reference = profile_frame(frame(500), **KINDS)
        made = profile_frame(frame(60).with_columns(kind=pl.lit("new")), **KINDS, like=reference)
        data = profile_to_bytes(made, key="files")
        read = profile_from_bytes(data, reference.layout, key="files")
        assert read is not None
        same(read, made)
        assert read.unseen == {"kind": {"new": 60}}

    @pytest.mark.parametrize("damage", [slice(0, 5), slice(0, 40), slice(0, -8), slice(3, None), slice(0, 0)])
    def test_damaged_bytes_are_no_profile(self, damage: slice) -> None:
        reference = profile_frame(frame(500), **KINDS)
        data = profile_to_bytes(reference, key="files")
        assert profile_from_bytes(data[damage], reference.layout, key="files") is None

    def test_bytes_of_other_files_or_cells_are_no_profile(self) -> None:
        first, second = (profile_frame(frame(500), **KINDS) for _ in range(2))
        data = profile_to_bytes(first, key="files")
        assert profile_from_bytes(data, first.layout, key="other files") is None
        assert profile_from_bytes(data, second.layout, key="files") is None

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 3}'])
    def test_what_is_no_profile_says_so(self, text: str) -> None:
        with pytest.raises(ValueError, match="not a profile"):
            profile_from_json(text)

    def test_format_1_is_read(self) -> None:
        # As version 0.1 wrote it, from x = [1, 2, 2, 4, NaN], y = 0.5 * [0 .. 4] cut at 0 and 1.5, k = [a, a, b, other].
        old = {
            "format": 1,
            "row_count": 5,
            "numeric": [
                {"name": "x", "count": 4, "null_count": 1, "mean": 2.25, "m2": 4.75, "minimum": 1.0, "maximum": 4.0,
                 "edges": [1.0, 2.0, 4.0], "counts": [0, 1, 2, 1], "sums": [0.0, 1.0, 4.0, 4.0]},
                {"name": "y", "count": 5, "null_count": 0, "mean": 1.0, "m2": 2.5, "minimum": 0.0, "maximum": 2.0,
                 "edges": [0.0, 1.5], "counts": [0, 3, 2], "sums": [0.0, 1.5, 3.5]},
            ],
            "categorical": [
                {"name": "k", "count": 5, "null_count": 0, "counts": {"a": 2, "b": 1}, "other_count": 2}
            ],
        }  # fmt: skip
        read = profile_from_json(json.dumps(old))
        fresh = profile_frame(
            pl.DataFrame(
                {
                    "x": [1.0, 2.0, 2.0, 4.0, None],
                    "y": [0.0, 0.5, 1.0, 1.5, 2.0],
                    "k": ["a", "a", "b", "c", "d"],
                }
            ),
            numeric=["x", "y"],
            categorical=["k"],
            like=read,
        )
        same(Profile(**_without_unseen(read)), Profile(**_without_unseen(fresh)))
        report = compare_profiles(read, fresh, policy=DriftPolicy(rule="evidently"))
        assert report.drifted_count == 0


def _without_unseen(made: Profile) -> dict[str, Any]:
    return {name: getattr(made, name) for name in ("layout", "row_count", "counts", "offsets", "moments")}


class TestDigest:
    @staticmethod
    def digest(rows: pl.DataFrame) -> str:
        digest = RowDigest({name: str(dtype) for name, dtype in rows.schema.items()})
        digest.update(rows)
        return digest.hexdigest()

    def test_order_does_not_matter_content_does(self) -> None:
        rows = frame(300)
        assert self.digest(rows) == self.digest(rows.sample(fraction=1.0, shuffle=True, seed=1))
        changed = rows.with_columns(
            pl.when(pl.int_range(pl.len()) == 7).then(pl.col("x") + 1e-9).otherwise("x").alias("x")
        )
        assert self.digest(rows) != self.digest(changed)
        assert self.digest(rows) != self.digest(rows.head(299))

    def test_values_must_not_trade_places(self) -> None:
        rows = pl.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]})
        assert self.digest(rows) != self.digest(pl.DataFrame({"a": [1.0, 2.0], "b": [4.0, 3.0]}))


class TestWindow:
    def test_it_is_half_open_and_in_utc(self) -> None:
        window = Window.parse("2019-02-01", "2019-03-01T02:00:00+02:00")
        assert window.contains(datetime(2019, 2, 1, tzinfo=UTC))
        assert not window.contains(datetime(2019, 3, 1, tzinfo=UTC))
        assert Window.from_key(window.key) == window
        assert str(window) == "[2019-02-01, 2019-03-01)"

    @pytest.mark.parametrize(
        ("start", "end", "words"),
        [("2019-02-01", "2019-02-01", "is empty"), ("soon", "later", "window start 'soon'")],
    )
    def test_what_is_no_window(self, start: str, end: str, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            Window.parse(start, end)

"""Profiles: what a table's columns looked like, small and mergeable, so that a window is judged without its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from airflow_mlops.core.data.dataset import count_rows
from airflow_mlops.core.profiles.counting import (
    as_numbers,
    category_counts,
    count_categories,
    count_numbers,
    count_pairs,
    smallest_hashes,
    sort_finite,
)
from airflow_mlops.core.profiles.profile_columns import (
    CategoricalProfile,
    ColumnProfile,
    NumericProfile,
    PairProfile,
)
from airflow_mlops.core.profiles.profile_layout import (
    BUCKETS,
    NAMED_CATEGORIES,
    Array,
    ColumnLayout,
    Kind,
    Layout,
    choose_edges,
    choose_pair_edges,
)

if TYPE_CHECKING:
    import polars as pl

#: Rows per batch: sorted in the processor's cache, and no window is ever in memory as a whole.
BATCH_ROWS = 131_072
#: Rows the cells are chosen from; with more, every n-th row is.
LAYOUT_ROWS = 1_000_000

#: Columns read at once from a table that is not in memory.
COLUMNS_AT_ONCE = 6

#: Rows of :attr:`Profile.moments`.
_COUNT, _MEAN, _M2, _MINIMUM, _MAXIMUM = range(5)


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnKinds:
    """Which columns are profiled, and as what.

    :param numeric: numbers.
    :param categorical: one of some values.
    :param boolean: true or false.
    :param datetime: instants.
    :param text: free text, of which the length is kept.
    :param pairs: two numeric columns each, of which the common distribution is kept.
    """

    numeric: Sequence[str] = ()
    categorical: Sequence[str] = ()
    boolean: Sequence[str] = ()
    datetime: Sequence[str] = ()
    text: Sequence[str] = ()
    pairs: Sequence[tuple[str, str]] = ()

    @property
    def names(self) -> list[str]:
        """All columns with a profile of their own."""
        return [name for names in self.by_kind.values() for name in names]

    @property
    def sources(self) -> list[str]:
        """Columns that have to be read."""
        return list(dict.fromkeys([*self.names, *(name for pair in self.pairs for name in pair)]))

    @property
    def by_kind(self) -> dict[Kind, Sequence[str]]:
        """Columns per kind; pairs are made of others."""
        return {
            "number": self.numeric,
            "datetime": self.datetime,
            "text": self.text,
            "category": self.categorical,
            "boolean": self.boolean,
        }


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Profile:
    """Profiles of a table's columns, in a few arrays: adding arrays is all that merging takes.

    :param layout: the cells of all columns.
    :param row_count: rows profiled; of a column that some of them do not have, its own count is smaller.
    :param counts: per column rows without a value, rows with an infinite one, and rows per cell.
    :param offsets: per column of numbers and cell the sum of distances to the cell's left edge.
    :param moments: count, mean, sum of squared deviations, minimum and maximum, shape ``(5, columns of numbers)``.
    :param unseen: per column values without a cell of their own, with their rows.
    """

    layout: Layout
    row_count: int
    counts: Array
    offsets: Array
    moments: Array
    unseen: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def columns(self) -> list[ColumnProfile]:
        """All columns' profiles."""
        return [self.column(item.name) for item in self.layout.columns]

    @property
    def names(self) -> tuple[str, ...]:
        """All columns' names."""
        return tuple(self.layout.by_name)

    def column(self, name: str) -> ColumnProfile:
        """Find a column's profile.

        :raises ValueError: listing the columns there are.
        """
        layout = self.layout.by_name.get(name)
        if layout is None:
            raise ValueError(f"no profile of column {name!r}; there are {', '.join(self.layout.by_name)}")
        nulls, infinite, *_ = self.counts[self.layout.places[name]].tolist()
        counts = self.counts[self.layout.places[name]][2:]
        if layout.kind == "pair":
            return PairProfile(layout=layout, null_count=nulls, counts=counts)
        unseen = self.unseen.get(name, {})
        if not layout.is_histogram:
            return CategoricalProfile(layout=layout, null_count=nulls, counts=counts, unseen=unseen)
        moments = self.moments[:, self.layout.rows[name]].tolist()
        return NumericProfile(
            layout=layout,
            null_count=nulls,
            infinite_count=infinite,
            counts=counts,
            offsets=self.offsets[self.layout.offset_places[name]],
            mean=moments[_MEAN],
            m2=moments[_M2],
            minimum=moments[_MINIMUM] if moments[_COUNT] else None,
            maximum=moments[_MAXIMUM] if moments[_COUNT] else None,
            unseen=unseen,
        )

    def select(self, names: Sequence[str]) -> Profile:
        """Give the profile of some of the columns."""
        layout = self.layout.select(names)
        return Profile(
            layout=layout,
            row_count=self.row_count,
            counts=_cut(self.counts, self.layout.places, layout.places),
            offsets=_cut(self.offsets, self.layout.offset_places, layout.offset_places),
            moments=self.moments[:, [self.layout.rows[name] for name in layout.rows]],
            unseen={name: dict(self.unseen[name]) for name in names if name in self.unseen},
        )


def profile_frame(
    frame: pl.DataFrame,
    *,
    numeric: Sequence[str] = (),
    categorical: Sequence[str] = (),
    boolean: Sequence[str] = (),
    datetime: Sequence[str] = (),
    text: Sequence[str] = (),
    pairs: Sequence[tuple[str, str]] = (),
    like: Profile | None = None,
) -> Profile:
    """Profile a table that is in memory.

    :param frame: the rows.
    :param numeric: its columns of numbers.
    :param categorical: its columns of categories.
    :param boolean: its columns of truth values.
    :param datetime: its columns of instants.
    :param text: its columns of free text.
    :param pairs: columns of numbers to look at together.
    :param like: profile whose cells are used, so that both can be compared and merged; ``None`` chooses cells.
    """
    kinds = ColumnKinds(
        numeric=numeric, categorical=categorical, boolean=boolean, datetime=datetime, text=text, pairs=pairs
    )
    if like is None:
        layout = choose_layout(frame, kinds)
    else:
        layout = like.layout.select([*kinds.names, *("*".join(pair) for pair in pairs)])
        _require_kinds(layout, kinds)
    return profile_batches(frame.iter_slices(BATCH_ROWS), layout)


def profile_scan(
    scan: Callable[[], pl.LazyFrame], kinds: ColumnKinds, *, like: Layout | None = None
) -> Profile:
    """Profile a table of any size in constant memory: some columns at a time, batch by batch.

    The rows are read once, and twice where cells have to be chosen for more than :data:`LAYOUT_ROWS`: every n-th row decides
    then where the cells are. All rows are counted.

    :param scan: opens the table.
    :param kinds: which columns are profiled, and as what.
    :param like: cells to use; ``None`` chooses them.
    """
    if like is None:
        rows = count_rows(scan())
        step = max(1, -(-rows // LAYOUT_ROWS))
        layouts, profiles = [], []
        for part in _in_groups(kinds):
            kept = _every(scan().select(part.sources), step)
            layouts.append(choose_layout(kept, part))
            if step == 1:  # these are all rows
                profiles.append(profile_batches(kept.iter_slices(BATCH_ROWS), layouts[-1]))
        if profiles:
            return join_profiles(profiles)
        like = join_layouts(layouts)
    return profile_scan_like(lambda names: scan().select(names), like)


def profile_scan_like(scan: Callable[[Sequence[str]], pl.LazyFrame], layout: Layout) -> Profile:
    """Profile a table of any size into given cells, some columns at a time.

    :param scan: opens columns of the table, by name.
    """
    parts = [layout.select(names) for names in _groups([item.name for item in layout.columns])]
    if not parts:
        return empty_profile(layout)
    made = [profile_batches(_batches(scan(_sources(part)), _sources(part)), part) for part in parts]
    joined = join_profiles(made)
    return Profile(
        layout=layout,
        row_count=joined.row_count,
        counts=joined.counts,
        offsets=joined.offsets,
        moments=joined.moments,
        unseen=joined.unseen,
    )


def profile_batches(batches: Iterable[pl.DataFrame], layout: Layout) -> Profile:
    """Profile batches of rows into the cells of a layout."""
    return merge_profiles((_profile_batch(batch, layout) for batch in batches), layout=layout)


def merge_profiles(profiles: Iterable[Profile], *, layout: Layout | None = None) -> Profile:
    """Give the profile of all tables' rows together: counts exactly, sums and moments to rounding.

    The order and the grouping do not matter. Moments are combined by the pairwise update.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
    COMPSTAT 1982, equation 2.1.

    :param layout: cells, where there may be no profile at all.
    :raises ValueError: they have other columns or other cells, or there are none and no layout is given.
    """
    total = None if layout is None else empty_profile(layout)
    row_count = 0
    unseen: dict[str, dict[str, int]] = {}
    for profile in profiles:
        if total is None:
            total = empty_profile(profile.layout)
        elif profile.layout is not total.layout and profile.layout.digest != total.layout.digest:
            raise ValueError(_difference(total.layout, profile.layout))
        row_count += profile.row_count
        np.add(total.counts, profile.counts, out=total.counts)
        np.add(total.offsets, profile.offsets, out=total.offsets)
        _add_moments(total.moments, profile.moments)
        for name, values in profile.unseen.items():
            unseen[name] = _add_unseen(unseen.get(name, {}), values)
    if total is None:
        raise ValueError("there are no profiles to merge")
    return Profile(
        layout=total.layout,
        row_count=row_count,
        counts=total.counts,
        offsets=total.offsets,
        moments=total.moments,
        unseen=unseen,
    )


def join_profiles(profiles: Sequence[Profile]) -> Profile:
    """Put profiles of different columns side by side.

    :returns: a profile with the first one's row count; every column knows its own.
    """
    first = profiles[0]
    return Profile(
        layout=join_layouts(profile.layout for profile in profiles),
        row_count=first.row_count,
        counts=np.concatenate([profile.counts for profile in profiles]),
        offsets=np.concatenate([profile.offsets for profile in profiles]),
        moments=np.concatenate([profile.moments for profile in profiles], axis=1),
        unseen={name: values for profile in profiles for name, values in profile.unseen.items()},
    )


def widen_profile(profile: Profile, layout: Layout, *, row_count: int) -> Profile:
    """Give a profile more columns, of which its rows have no values.

    :param layout: all columns, those of the profile with the same cells.
    :param row_count: rows that were profiled.
    """
    wide = empty_profile(layout)
    for name in profile.names:
        wide.counts[layout.places[name]] = profile.counts[profile.layout.places[name]]
        if name in layout.rows:
            wide.offsets[layout.offset_places[name]] = profile.offsets[profile.layout.offset_places[name]]
            wide.moments[:, layout.rows[name]] = profile.moments[:, profile.layout.rows[name]]
    return replace(wide, row_count=row_count, unseen=profile.unseen)


def join_layouts(layouts: Iterable[Layout]) -> Layout:
    """Put layouts of different columns side by side."""
    return Layout(column for layout in layouts for column in layout.columns)


def empty_profile(layout: Layout) -> Profile:
    """Give the profile of no rows: merging it changes nothing."""
    moments = np.zeros((5, len(layout.histograms)))
    moments[_MINIMUM], moments[_MAXIMUM] = np.inf, -np.inf
    return Profile(
        layout=layout,
        row_count=0,
        counts=np.zeros(layout.size, dtype=np.int64),
        offsets=np.zeros(layout.offset_size),
        moments=moments,
    )


def choose_layout(frame: pl.DataFrame, kinds: ColumnKinds) -> Layout:
    """Choose the cells by which the rows are told apart best."""
    columns: list[ColumnLayout] = []
    for kind, names in kinds.by_kind.items():
        for name in names:
            if kind in {"category", "boolean"}:
                columns.append(_category_layout(name, kind, frame[name]))
            else:
                ordered, _, _ = sort_finite(as_numbers(frame[name], kind))
                edges, points = choose_edges(ordered)
                columns.append(ColumnLayout(name=name, kind=kind, edges=edges, points=points))
    for pair in kinds.pairs:
        sides = [sort_finite(as_numbers(frame[name], "number"))[0] for name in pair]
        columns.append(
            ColumnLayout(name="*".join(pair), kind="pair", edges=choose_pair_edges(*sides), parts=tuple(pair))
        )
    return Layout(columns)


def _category_layout(name: str, kind: Kind, column: pl.Series) -> ColumnLayout:
    if kind == "boolean":
        return ColumnLayout(name=name, kind=kind, categories=("false", "true"), buckets=1)
    counts = category_counts(column)
    named = sorted(counts, key=lambda value: (-counts[value], value))[:NAMED_CATEGORIES]
    return ColumnLayout(name=name, kind=kind, categories=tuple(named), buckets=BUCKETS)


def _profile_batch(batch: pl.DataFrame, layout: Layout) -> Profile:
    profile = empty_profile(layout)
    unseen = {}
    for item in layout.columns:
        cells = profile.counts[layout.places[item.name]]
        if item.kind == "pair":
            first, second = (as_numbers(batch[name], "number") for name in item.parts)
            cells[0], cells[2:] = count_pairs(first, second, item)
            continue
        if item.is_histogram:
            numbers = count_numbers(as_numbers(batch[item.name], item.kind), item)
            cells[0], cells[1], cells[2:], new = (
                numbers.nulls,
                numbers.infinite,
                numbers.counts,
                numbers.unseen,
            )
            profile.offsets[layout.offset_places[item.name]] = numbers.offsets
            profile.moments[:, layout.rows[item.name]] = numbers.moments
        else:
            categories = count_categories(batch[item.name], item)
            cells[0], cells[2:], new = categories.nulls, categories.counts, categories.unseen
        if new:
            unseen[item.name] = new
    return Profile(
        layout=layout,
        row_count=batch.height,
        counts=profile.counts,
        offsets=profile.offsets,
        moments=profile.moments,
        unseen=unseen,
    )


def _add_moments(total: Array, more: Array) -> None:
    count = total[_COUNT] + more[_COUNT]
    share = more[_COUNT] / np.maximum(count, 1.0)
    delta = more[_MEAN] - total[_MEAN]
    total[_M2] += more[_M2] + delta * delta * total[_COUNT] * share
    total[_MEAN] += delta * share
    total[_COUNT] = count
    np.minimum(total[_MINIMUM], more[_MINIMUM], out=total[_MINIMUM])
    np.maximum(total[_MAXIMUM], more[_MAXIMUM], out=total[_MAXIMUM])


def _add_unseen(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    return smallest_hashes({name: first.get(name, 0) + second.get(name, 0) for name in (*first, *second)})


def _cut(values: Array, places: dict[str, slice], wanted: dict[str, slice]) -> Array:
    return np.concatenate([values[places[name]] for name in wanted]) if wanted else values[:0]


def _require_kinds(layout: Layout, kinds: ColumnKinds) -> None:
    for kind, names in kinds.by_kind.items():
        for name in names:
            if layout.by_name[name].kind != kind:
                raise ValueError(
                    f"column {name!r} is a {layout.by_name[name].kind} in the reference, a {kind} here"
                )


def _difference(first: Layout, second: Layout) -> str:
    if list(first.by_name) != list(second.by_name):
        return "profiles of different columns can't be merged"
    name = next(
        item.name for item in first.columns if item.identity() != second.by_name[item.name].identity()
    )
    return f"column {name!r}: profiles with different cells can't be merged"


def _sources(layout: Layout) -> list[str]:
    """Name the columns that have to be read."""
    return list(dict.fromkeys(name for item in layout.columns for name in (item.parts or (item.name,))))


def _groups(names: Sequence[str]) -> list[list[str]]:
    return [list(names[start : start + COLUMNS_AT_ONCE]) for start in range(0, len(names), COLUMNS_AT_ONCE)]


def _in_groups(kinds: ColumnKinds) -> Iterable[ColumnKinds]:
    """Split the columns, so that only some are in memory; pairs come last, with their columns."""
    for kind, names in kinds.by_kind.items():
        for group in _groups(names):
            chosen = {item: group if item == kind else [] for item in kinds.by_kind}
            yield ColumnKinds(
                numeric=chosen["number"],
                categorical=chosen["category"],
                boolean=chosen["boolean"],
                datetime=chosen["datetime"],
                text=chosen["text"],
            )
    for pair in kinds.pairs:
        yield ColumnKinds(pairs=[pair])


def _batches(frame: pl.LazyFrame, names: Sequence[str]) -> Iterable[pl.DataFrame]:
    return frame.select(names).collect_batches(chunk_size=BATCH_ROWS, maintain_order=True)


def _every(frame: pl.LazyFrame, step: int) -> pl.DataFrame:
    """Give every n-th row."""
    import polars as pl

    start, kept = 0, [frame.limit(0).collect()]
    for batch in _batches(frame, kept[0].columns):
        kept.append(batch.gather_every(step, offset=-start % step))
        start += batch.height
    return pl.concat(kept)

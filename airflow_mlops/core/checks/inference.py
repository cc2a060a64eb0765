"""A suite of expectations inferred from reference rows: what was seen, how far it may move, and why, in each expectation's notes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.checks.whole_columns import count_distinct, exact_median
from airflow_mlops.core.data.dataset import row_count
from airflow_mlops.exceptions import InsufficientDataError

if TYPE_CHECKING:
    import polars as pl

Expectation = dict[str, Any]

#: Fewer rows say too little about shares of half a percent.
MIN_ROWS = 200
#: So many standard errors are left to chance: with hundreds of expectations a month one in thousands of months is false.
_SIGMAS = 4.0
#: Negative values that are rarer look like errors, and the reviewer is asked.
_RARE = 0.01
#: Whole numbers beyond are hardly measurements, and not exact as floats.
_LARGEST = 2**43
#: Medians and means are told of columns with more different values; the median of few jumps from one to the next.
_CONTINUOUS = 50
#: An estimated number of distinct values above this share of all is counted exactly: it may be all of them.
_MAYBE_UNIQUE = 0.8
#: Values of columns that are in memory at once, of all that are sorted or counted.
_VALUES_AT_ONCE = 1_000_000
#: Longest value that a note quotes.
_SHOWN_WIDTH = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class InferencePolicy:
    """How far what was seen may move. The defaults are rules of thumb for windows of some thousand rows and more.

    :param share: what a share of rows (missing, zero, negative, unknown values) may always move by, in ``[0, 1]``; half a percent
        is what most models don't notice.
    :param change: and in proportion to itself: with 0.5 a share may grow by half or lose half.
    :param outlier_factor: how many times the largest absolute value seen a value may be. Maxima of skewed columns double and triple
        from month to month; a wrong unit or a lost decimal point is a factor of ten and more.
    :param level: what a mean or median may move by in proportion to itself.
    :param max_categories: a column with at most so many different values has a set of them.
    :param row_count_factor: how many times more or fewer rows there may be.
    """

    share: float = 0.005
    change: float = 0.5
    outlier_factor: float = 10.0
    level: float = 0.2
    max_categories: int = 20
    row_count_factor: float = 2.0

    def __post_init__(self) -> None:
        for name, lowest in (("share", 0), ("change", 0), ("level", 0), ("outlier_factor", 1), ("row_count_factor", 1)):  # fmt: skip
            if not getattr(self, name) >= lowest:
                raise ValueError(
                    f"{name} of an inference policy is at least {lowest}, got {getattr(self, name)}"
                )

    def slack(self, share: float, rows: int) -> float:
        """Give what a share may move by: always a little, in proportion, and by chance; each way.

        >>> InferencePolicy().slack(0.0, 10_000), InferencePolicy().slack(0.2, 10_000)
        (0.005, 0.1)
        """
        chance = _SIGMAS * math.sqrt(2 * share * (1 - share) / rows)
        return max(self.share, self.change * min(share, 1 - share), chance)


def infer_expectations(
    frame: pl.LazyFrame, policy: InferencePolicy, private: Collection[str] = ()
) -> list[Expectation]:
    """Infer what rows like these look like.

    :param frame: reference rows; read a few times, in a stream, so that memory does not grow with their number.
    :param private: columns of which nothing is told but that they are there and how many values are missing.
    :raises InsufficientDataError: fewer than :data:`MIN_ROWS` rows.
    """
    from polars.selectors import by_name  # of names as they are: select() takes ^a$ for a pattern

    schema = frame.collect_schema()
    seen = _measure(frame, schema, private)
    rows = seen["rows"]
    if rows < MIN_ROWS:
        raise InsufficientDataError(
            f"expectations can't be inferred from {rows} rows; take a reference of at least {MIN_ROWS}"
        )
    seen |= _measure_exactly(frame, schema, seen, policy)
    few = [
        name
        for name, dtype in schema.items()
        if name not in private and _is_listed(dtype) and 0 < seen[f"distinct:{name}"] <= policy.max_categories
    ]
    values = {
        name: _without_nan(frame.select(by_name(name)), schema[name])
        .drop_nulls()
        .unique()
        .collect()[name]
        .sort()
        .to_list()
        for name in few
    }
    told: dict[str, dict[str, Any]] = {name: {"rows": rows} for name in schema}
    for key, value in seen.items():
        kind, _, name = key.partition(":")
        told.get(name, {})[kind] = value
    found = [_row_count(rows, policy)]
    for name, dtype in schema.items():
        found += _of_column(name, dtype, told[name], values.get(name), policy)
    return found


def _without_nan(frame: pl.LazyFrame, dtype: pl.DataType) -> pl.LazyFrame:
    return frame.fill_nan(None) if dtype.is_float() else frame


def columns_unsaid(expectations: Sequence[Expectation]) -> list[str]:
    """Find the columns of whose values an inferred suite says nothing but how many are missing."""
    kinds: dict[str, set[str]] = {}
    for item in expectations:
        if "column" in item["kwargs"]:
            kinds.setdefault(item["kwargs"]["column"], set()).add(item["type"])
    return [column for column, told in kinds.items() if len(told) == 2]


def _is_number(dtype: pl.DataType) -> bool:
    """Tell whether a column holds numbers that can be told in JSON."""
    return _is_measured(dtype) or dtype.is_decimal()


def _is_measured(dtype: pl.DataType) -> bool:
    """Tell whether a column holds numbers that polars judges as Great Expectations does."""
    import polars as pl

    return dtype.is_float() or (dtype.is_integer() and dtype not in (pl.UInt64, pl.Int128))


def _is_listed(dtype: pl.DataType) -> bool:
    """Tell whether values of a column can be in a set: of decimals the floats of JSON are others."""
    import polars as pl

    return _is_measured(dtype) or dtype == pl.String


def _may_name_rows(dtype: pl.DataType) -> bool:
    """Tell whether values of a column may be names of rows, as fractions are not."""
    return not dtype.is_float() and getattr(dtype, "scale", 0) == 0


def _measure(frame: pl.LazyFrame, schema: pl.Schema, private: Collection[str]) -> dict[str, Any]:
    import polars as pl
    from polars.selectors import by_name

    wanted = {"rows": row_count()}
    for name, dtype in schema.items():
        value = by_name(name).as_expr()
        wanted[f"missing:{name}"] = value.is_null().sum()
        if dtype.is_float():
            value = value.cast(pl.Float64).fill_nan(None)
            wanted[f"missing:{name}"] = value.is_null().sum()
        if name in private:
            continue
        if dtype.is_float():
            wanted[f"infinite:{name}"] = value.is_infinite().sum()
        if _is_number(dtype):
            finite = pl.when(value.is_finite()).then(value) if dtype.is_float() else value
            wanted |= {
                f"least:{name}": finite.min(),
                f"most:{name}": finite.max(),
                f"zero:{name}": (value == 0).sum(),
                f"negative:{name}": (value < 0).sum(),
            }
        if _is_measured(dtype):
            wanted |= {f"mean:{name}": value.mean(), f"spread:{name}": value.std()}
        if dtype == pl.Boolean:
            wanted[f"true:{name}"] = value.sum()
        if _is_number(dtype) or dtype == pl.String:
            wanted[f"distinct:{name}"] = value.drop_nulls().approx_n_unique()
    seen = frame.select(**wanted).collect(engine="streaming").row(0, named=True)
    return {key: _outward(key, value) if isinstance(value, Decimal) else value for key, value in seen.items()}


def _measure_exactly(
    frame: pl.LazyFrame, schema: pl.Schema, seen: Mapping[str, Any], policy: InferencePolicy
) -> dict[str, Any]:
    """Measure what needs all values of a column at once, where it is told: few columns at a time, and of many rows a part."""
    few = 2 * max(policy.max_categories, _CONTINUOUS)
    values = {name: _values(name, schema[name]) for name in schema if seen.get(f"distinct:{name}")}
    there = {name: seen["rows"] - seen[f"missing:{name}"] for name in values}
    about = {name: seen[f"distinct:{name}"] for name in values}
    small = [name for name in values if about[name] <= few]
    # An estimate is off by a few percent; of names the number decides whether one is repeated.
    unique = [
        name
        for name, dtype in schema.items()
        if about.get(name, 0) > max(few, _MAYBE_UNIQUE * there.get(name, 0)) and _may_name_rows(dtype)
    ]
    spread = [
        name
        for name in values
        if about[name] > _CONTINUOUS / 2 and _is_measured(schema[name]) and not seen.get(f"infinite:{name}")
    ]
    rows = seen["rows"]
    found = _each(frame, {f"distinct:{name}": values[name].n_unique() for name in small}, len(small))
    if rows > _VALUES_AT_ONCE:
        for name in unique:
            found[f"distinct:{name}"] = count_distinct(frame, values[name], rows_at_once=_VALUES_AT_ONCE)
        for name in spread:
            found[f"median:{name}"] = exact_median(frame, values[name], rows_at_once=_VALUES_AT_ONCE)
        return found
    at_once = _VALUES_AT_ONCE // rows
    found |= _each(frame, {f"distinct:{name}": values[name].n_unique() for name in unique}, at_once)
    return found | _each(frame, {f"median:{name}": values[name].median() for name in spread}, at_once)


def _values(name: str, dtype: pl.DataType) -> pl.Expr:
    """Give a column's values that are there."""
    import polars as pl
    from polars.selectors import by_name

    value = by_name(name).as_expr()
    return (value.cast(pl.Float64).fill_nan(None) if dtype.is_float() else value).drop_nulls()


def _each(frame: pl.LazyFrame, wanted: Mapping[str, pl.Expr], at_once: int) -> dict[str, Any]:
    """Measure so many at a time."""
    found: dict[str, Any] = {}
    keys = list(wanted)
    for first in range(0, len(keys), max(at_once, 1)):
        some = {key: wanted[key] for key in keys[first : first + max(at_once, 1)]}
        found |= frame.select(**some).collect(engine="streaming").row(0, named=True)
    return found


def _outward(key: str, value: Decimal) -> float:
    """Give the float that is no less extreme than a decimal: the nearest may be inside of it, and the value itself beyond."""
    near = float(value)
    if key.startswith("least:"):
        return near if Decimal(near) <= value else math.nextafter(near, -math.inf)
    return near if Decimal(near) >= value else math.nextafter(near, math.inf)


def _of_column(
    name: str, dtype: pl.DataType, seen: Mapping[str, Any], values: list[Any] | None, policy: InferencePolicy
) -> Iterator[Expectation]:
    yield _expect(
        "column_to_exist", name, f"the reference has it, as {dtype}; a Delta table refuses other types"
    )
    yield from _missing(name, seen, policy)
    there = seen["rows"] - seen["missing"]
    if not there:
        return
    if "true" in seen:
        yield from _truths(name, seen["true"] / there, there, policy)
    elif seen.get("infinite"):
        yield from _finite(name, seen, there, policy)
    elif "distinct" in seen:
        yield from _of_values(name, dtype, seen, values, policy)


def _of_values(
    name: str, dtype: pl.DataType, seen: Mapping[str, Any], values: list[Any] | None, policy: InferencePolicy
) -> Iterator[Expectation]:
    there = seen["rows"] - seen["missing"]
    if values is not None:
        slack = policy.slack(0.0, there)
        yield _expect(
            "column_values_to_be_in_set",
            name,
            _only(values[0], slack)
            if len(values) == 1
            else f"the {len(values)} values seen; {slack:.2%} of others may come, as rare ones are missing from a sample",
            value_set=values,
            mostly=_mostly(slack),
        )
    elif seen["distinct"] == there and _may_name_rows(dtype):
        yield _expect("column_values_to_be_unique", name, f"no value was repeated in {there} rows")
        return  # it names rows, and a name has no size
    if not _is_number(dtype) or max(abs(seen["least"]), abs(seen["most"])) >= _LARGEST:
        return
    yield from _zeros(name, seen, there, policy)
    if values is None:
        yield from _range(name, seen, there, policy)
    if values is None or dtype.is_float():
        # Few whole numbers are codes, which have no size: 99 often means unknown.
        yield from _signs(name, seen, there, policy)
        yield from _outliers(name, seen, policy)
    if _is_measured(dtype):  # Great Expectations has no mean of decimals of which one is missing
        yield from _levels(name, seen, there, policy)


def _only(value: Any, slack: float) -> str:
    return (
        f"REVIEW: {_brief(value)} is the only value of all rows: may others come, as in a column that names the month? "
        f"As it stands {slack:.2%} may"
    )


def _missing(name: str, seen: Mapping[str, Any], policy: InferencePolicy) -> Iterator[Expectation]:
    share = seen["missing"] / seen["rows"]
    slack = policy.slack(share, seen["rows"])
    yield _expect(
        "column_proportion_of_non_null_values_to_be_between",
        name,
        f"{share:.2%} were missing; that may move by {slack:.2%} of the rows either way",
        min_value=_down(max(0.0, 1 - share - slack)),
        max_value=_up(min(1.0, 1 - share + slack)),
    )


def _zeros(name: str, seen: Mapping[str, Any], there: int, policy: InferencePolicy) -> Iterator[Expectation]:
    return _share_of(name, 0, "zero", seen["zero"] / there, there, policy)


def _truths(name: str, share: float, there: int, policy: InferencePolicy) -> Iterator[Expectation]:
    if 0 < share < 1:
        yield from _share_of(name, True, "true", share, there, policy)
        return
    slack = policy.slack(0.0, there)
    yield _expect(
        "column_values_to_be_in_set",
        name,
        _only(share == 1, slack),
        value_set=[share == 1],
        mostly=_mostly(slack),
    )


def _share_of(
    name: str, value: Any, told: str, share: float, there: int, policy: InferencePolicy
) -> Iterator[Expectation]:
    if not 0 < share < 1:
        return
    slack = policy.slack(share, there)
    note = f"{share:.2%} were {told}; that may move by {slack:.2%} of the values either way"
    if share + slack < 1:
        yield _expect(
            "column_values_to_not_be_in_set", name, note, value_set=[value], mostly=_mostly(share + slack)
        )
    if share > slack:
        yield _expect(
            "column_values_to_be_in_set", name, note, value_set=[value], mostly=_down(share - slack)
        )


def _finite(name: str, seen: Mapping[str, Any], there: int, policy: InferencePolicy) -> Iterator[Expectation]:
    """Say of a column with infinities what its other values are: means, and sizes, are infinite there."""
    share = seen["infinite"] / there
    slack = policy.slack(share, there)
    if seen["least"] is None or share + slack >= 1:
        return
    yield _expect(
        "column_values_to_be_between",
        name,
        f"REVIEW: {seen['infinite']} of {there} values were infinite, the others from {seen['least']} to {seen['most']}: can they be? "
        f"As it stands {share + slack:.2%} may be beyond",
        min_value=seen["least"],
        max_value=seen["most"],
        mostly=_mostly(share + slack),
    )


def _range(name: str, seen: Mapping[str, Any], there: int, policy: InferencePolicy) -> Iterator[Expectation]:
    slack = policy.slack(0.0, there)
    yield _expect(
        "column_values_to_be_between",
        name,
        f"from {seen['least']} to {seen['most']} were seen; {slack:.2%} may be beyond, as extremes are missing from a sample",
        min_value=seen["least"],
        max_value=seen["most"],
        mostly=_mostly(slack),
    )


def _signs(name: str, seen: Mapping[str, Any], there: int, policy: InferencePolicy) -> Iterator[Expectation]:
    share = seen["negative"] / there
    if 0 < share < _RARE:
        slack = policy.slack(share, there)
        yield _expect(
            "column_values_to_be_between",
            name,
            f"REVIEW: {seen['negative']} of {there} values were negative, down to {seen['least']}: can they be? "
            f"As it stands {share + slack:.2%} may",
            min_value=0,
            mostly=_mostly(share + slack),
        )


def _outliers(name: str, seen: Mapping[str, Any], policy: InferencePolicy) -> Iterator[Expectation]:
    largest = max(abs(seen["least"]), abs(seen["most"]))
    if largest:
        yield _expect(
            "column_values_to_be_between",
            name,
            f"no value may be beyond {policy.outlier_factor:g} times the largest seen, {largest:g}",
            min_value=-policy.outlier_factor * largest,
            max_value=policy.outlier_factor * largest,
        )


def _levels(name: str, seen: Mapping[str, Any], there: int, policy: InferencePolicy) -> Iterator[Expectation]:
    """Give where the values lie: a warning, as rows that moved are not wrong; the drift check judges that."""
    if seen["distinct"] <= _CONTINUOUS:
        return
    chance = _SIGMAS * (seen["spread"] or 0.0) * math.sqrt(2 / there)
    for kind, factor in (("mean", 1.0), ("median", math.sqrt(math.pi / 2))):
        slack = max(policy.level * abs(seen[kind]), factor * chance)
        yield _expect(
            f"column_{kind}_to_be_between",
            name,
            f"{seen[kind]:.6g} was seen; it may move by {slack:.3g}: {policy.level:.0%}, or chance where that is more",
            severity="warning",
            min_value=_rounded(seen[kind] - slack),
            max_value=_rounded(seen[kind] + slack),
        )


def _row_count(rows: int, policy: InferencePolicy) -> Expectation:
    return {
        "type": "expect_table_row_count_to_be_between",
        "kwargs": {
            "min_value": math.floor(rows / policy.row_count_factor),
            "max_value": math.ceil(rows * policy.row_count_factor),
        },
        "severity": "critical",
        "notes": f"{rows} rows were seen; a window may have {policy.row_count_factor:g} times more or fewer",
    }


def _expect(kind: str, column: str, notes: str, *, severity: str = "critical", **kwargs: Any) -> Expectation:
    return {
        "type": f"expect_{kind}",
        "kwargs": {"column": column, **kwargs},
        "severity": severity,
        "notes": notes,
    }


def _brief(value: Any) -> str:
    return repr(value) if len(repr(value)) <= _SHOWN_WIDTH else f"{repr(value)[:_SHOWN_WIDTH]}…"


def _mostly(broken: float) -> float:
    return _down(1 - broken)


def _down(share: float) -> float:
    return math.floor(share * 1e4) / 1e4


def _up(share: float) -> float:
    return math.ceil(share * 1e4) / 1e4


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")

"""Great Expectations: read a suite, judge a frame, one result in its own shape whatever engine judged."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from airflow_mlops.core.checks.validation import judge_compiled, shape_result
from airflow_mlops.core.checks.verdict import SEVERITIES, may_show, name_expectation, without_arguments
from airflow_mlops.exceptions import ExpectationError

if TYPE_CHECKING:
    import polars as pl

Suite = Mapping[str, Any]

#: Expectations that ask for the names of the columns and nothing else.
_OF_NAMES = frozenset(
    {
        "expect_column_to_exist",
        "expect_table_column_count_to_be_between",
        "expect_table_column_count_to_equal",
        "expect_table_columns_to_match_ordered_list",
        "expect_table_columns_to_match_set",
    }
)

#: Longest cause, and longest arguments, of an error: pandas puts a whole column into some.
_CAUSE = 500


def load_suite(suite: str | Suite) -> dict[str, Any]:
    """Read a suite from its JSON file (as ``ExpectationSuite.to_json_dict`` writes it), or take it as given.

    :raises ValueError: naming the file and what is wrong with it.
    """
    if isinstance(suite, str):
        path = Path(suite)
        try:
            suite = json.loads(path.read_text())
        except FileNotFoundError as err:
            raise ValueError(f"no expectation suite at {path}") from err
        except json.JSONDecodeError as err:
            raise ValueError(f"expectation suite {path} is not JSON: {err}") from err
    if not isinstance(suite, Mapping) or not suite.get("expectations"):
        raise ValueError("an expectation suite needs a name and a non-empty list under 'expectations'")
    return {**suite, "expectations": [_read_expectation(item) for item in suite["expectations"]]}


def _read_expectation(item: Any) -> dict[str, Any]:
    """Take one expectation of a suite, its severity where Great Expectations writes it."""
    if not isinstance(item, Mapping) or not isinstance(item.get("kwargs", {}), Mapping | None):
        raise ValueError(
            f"an expectation of the suite is no object with 'type' and 'kwargs': {str(item)[:200]}"
        )
    if "type" not in item:
        old = "; expectation_type is of Great Expectations 0.x, the page on how to migrate converts it"
        raise ValueError(
            f"an expectation of the suite has no 'type': {str(dict(item))[:200]}{old if 'expectation_type' in item else ''}"
        )
    kwargs = dict(item.get("kwargs") or {})
    # It takes one among the arguments as well.
    known = {"severity": kwargs.pop("severity")} if "severity" in kwargs else {}
    read = {**known, **item, "kwargs": kwargs}
    if read.get("severity", SEVERITIES[0]) not in SEVERITIES:
        raise ValueError(
            f"{name_expectation(read)} of the suite has severity {read['severity']!r}; known: {', '.join(SEVERITIES)}"
        )
    return read


def validate_frame(
    frame: pl.LazyFrame,
    suite: Suite,
    *,
    engine: str = "auto",
    modules: Sequence[str] = (),
    private: Collection[str] = (),
) -> dict[str, Any]:
    """Judge every expectation of the suite.

    :param frame: the rows, which need not fit into memory for what is judged in polars.
    :param engine: ``auto`` judges the common expectations in polars and leaves the others to Great
        Expectations; ``great_expectations`` leaves all to it.
    :param modules: modules that define expectations of one's own, imported when Great Expectations judges.
    :param private: columns of which an error tells no cause, as that may name values.
    :returns: a validation result in Great Expectations' shape: ``success``, ``suite_name``, ``statistics`` and ``results``;
        each result's ``meta.engine`` says who judged.
    :raises ExpectationError: naming the expectations that could not be evaluated at all, with the cause.
    """
    expectations = list(suite["expectations"])
    judged: list[dict[str, Any] | None] = [None] * len(expectations)
    if engine == "auto":
        judged = judge_compiled(frame, expectations)
    rest = [item for item, result in zip(expectations, judged, strict=True) if result is None]
    by_gx = (
        shape_result(
            item, success=bool(raw["success"]), result=raw.get("result", {}), engine="great_expectations"
        )
        for item, raw in zip(
            rest, _ask(frame, suite, rest, modules, "SUMMARY", private=private) if rest else (), strict=True
        )
    )
    results = [result or next(by_gx) for result in judged]
    passed = sum(result["success"] for result in results)
    return {
        "success": passed == len(results),
        "suite_name": suite.get("name"),
        "statistics": {
            "evaluated_expectations": len(results),
            "successful_expectations": passed,
            "unsuccessful_expectations": len(results) - passed,
            "success_percent": 100.0 * passed / len(results),
        },
        "results": results,
    }


def unexpected_ids(
    frame: pl.LazyFrame,
    suite: Suite,
    expectations: list[Suite],
    *,
    id_column: str,
    modules: Sequence[str] = (),
) -> list[list[Any] | None]:
    """Have Great Expectations name every row that breaks an expectation.

    :param id_column: holds the names.
    :returns: per expectation the names; ``None`` where it does not tell of single rows.
    """
    wanted = {"result_format": "COMPLETE", "unexpected_index_column_names": [id_column]}
    found = []
    for raw in _ask(frame, suite, expectations, modules, wanted, also=id_column):
        rows = raw.get("result", {}).get("unexpected_index_list")
        found.append(None if rows is None else [row[id_column] for row in rows])
    return found


def _ask(
    frame: pl.LazyFrame,
    suite: Suite,
    expectations: list[Suite],
    modules: Sequence[str],
    result_format: Literal["SUMMARY"] | dict[str, Any],
    also: str | None = None,
    private: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Give Great Expectations' own answers.

    :param also: column that is needed beside those of the expectations.
    """
    # Great Expectations logs 209 lines while it registers functions; a task log is for the user's own lines.
    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    # This module sets its own logger to INFO, and tells of a folder it makes and removes again.
    logging.getLogger(ProgressBarsConfig.__module__).setLevel(logging.WARNING)
    _register(modules)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    built = [_build(suite, item, private) for item in expectations]
    rows = context.data_sources.add_pandas("frame").add_dataframe_asset("rows")
    whole = rows.add_batch_definition_whole_dataframe("all")

    def batch_of(data: pl.DataFrame) -> Any:
        return whole.get_batch(batch_parameters={"dataframe": data.to_pandas()})

    of_names = [_is_of_names(item) for item in expectations]
    of_rows = [item for item, names in zip(expectations, of_names, strict=True) if not names]
    own = any(not type(item).__module__.startswith("great_expectations.") for item in built)
    names_only: Any = batch_of(frame.head(0).collect()) if any(of_names) else None
    batch: Any = None
    if of_rows:
        batch = batch_of(frame.collect() if own else _columns_of(frame, of_rows, also))
    answers = []
    schema = frame.collect_schema()
    for source, expectation, names in zip(expectations, built, of_names, strict=True):
        raw: dict[str, Any] = {}
        judged: Any = names_only if names else batch
        try:
            raw = judged.validate(expectation, result_format=result_format).to_json_dict()
            cause = _raised(raw.get("exception_info", {}))
        except Exception as err:  # noqa: BLE001 - a parameter without a value, or a value that it can't write as JSON
            cause = str(err)  # raised below: an exception's cause shows values, also of private columns
        if cause is not None:
            raise _not_evaluated(source, cause, schema, private)
        answers.append(raw)
    return answers


def _register(modules: Sequence[str]) -> None:
    """Import modules whose classes Great Expectations notes when they are made."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as err:
            raise ValueError(
                f"expectation_modules: {name!r} can't be imported: {err}; it must be on the Python path where the step runs"
            ) from err


def _build(suite: Suite, item: Suite, private: Collection[str]) -> Any:
    """Make an expectation; one by one, as ``validate()`` reorders a suite's results and a result must stay with its expectation."""
    import great_expectations as gx
    from great_expectations.exceptions.exceptions import ExpectationNotFoundError
    from great_expectations.expectations.registry import get_expectation_impl

    try:
        get_expectation_impl(item["type"])
    except ExpectationNotFoundError as err:
        raise ExpectationError(
            f"the suite holds {str(item['type'])[:_CAUSE]!r}, which Great Expectations does not accept: it knows no such type. Types are written "
            "in small letters, such as expect_column_values_to_not_be_null; those of your own are in expectation_modules"
        ) from err
    try:
        return gx.ExpectationSuite(
            name=str(suite.get("name", "suite")), expectations=[dict(item)]
        ).expectations[0]
    except Exception as err:  # noqa: BLE001 - pydantic's, and what an expectation of one's own raises
        cause = err
    shown, told = _tellable(item, str(cause), private)
    # An exception's cause shows values, also of private columns.
    raise ExpectationError(
        f"the suite holds an expectation Great Expectations does not accept: {name_expectation(shown)}: {told}"
    ) from (cause if shown is item else None)


def _is_of_names(item: Suite) -> bool:
    """Tell whether an expectation is about the names of the columns alone, so that no row is needed."""
    return item["type"] in _OF_NAMES and not (item.get("kwargs") or {}).get("row_condition")


def _columns_of(frame: pl.LazyFrame, expectations: list[Suite], also: str | None) -> pl.DataFrame:
    """Load the columns that some expectations and their conditions name; all of them if one names none."""
    from polars.selectors import by_name  # of names as they are: select() takes ^a$ for a pattern

    known = frame.collect_schema().names()
    named = {also}
    for item in expectations:
        kwargs = item.get("kwargs", {})
        lists = [kwargs.get("column_list") or [], kwargs.get("column_set") or []]
        found = {kwargs.get(name) for name in ("column", "column_A", "column_B")}.union(*lists) & set(known)
        found |= _columns_in(kwargs.get("row_condition"), known)
        counts_rows = item["type"].startswith("expect_table_row_count")
        if not found or ("expect_table" in item["type"] and not counts_rows):
            return frame.collect()
        named |= found
    return frame.select(by_name([name for name in known if name in named])).collect()


def _columns_in(condition: Any, known: Sequence[str]) -> set[str]:
    """Find the columns that a condition may be about: all whose name it has somewhere, and some that only look so."""
    if not condition:
        return set()
    text = condition if isinstance(condition, str) else json.dumps(condition, default=str, ensure_ascii=False)
    # Such names may be written in another way.
    return {name for name in known if name in text or not name.isprintable() or {"\\", '"', "'"} & set(name)}


def _not_evaluated(
    item: Suite, cause: str, schema: Mapping[str, pl.DataType], private: Collection[str]
) -> ExpectationError:
    """Word the error of an expectation, bounded, and without a cause that may show private values."""
    shown, told = _tellable(item, cause, private)
    kwargs = item.get("kwargs", {})
    asked = json.dumps(shown.get("kwargs", {}), default=str)
    return ExpectationError(
        f"{item['type']}({asked[:_CAUSE]}) could not be evaluated: {told}{_remedy(kwargs, cause, schema)}"
    )


def _tellable(item: Suite, cause: str, private: Collection[str]) -> tuple[Suite, str]:
    """Give an expectation and the cause of its error as an error may show them."""
    if not may_show(item.get("kwargs", {}), private, "great_expectations"):
        return item, cause[:_CAUSE]
    hidden = "it may show values of a private column, so the cause is told only without private_columns"
    return without_arguments(item), hidden


def _remedy(kwargs: Mapping[str, Any], cause: str, schema: Mapping[str, pl.DataType]) -> str:
    """Tell what to write instead, where that is known."""
    import polars as pl

    if "$PARAMETER" in cause:
        return "; a suite is judged without parameters here: write the value itself"
    dtype = schema.get(str(kwargs.get("column")))
    if not isinstance(dtype, pl.Date | pl.Datetime) or not {"min_value", "max_value"} & set(kwargs):
        return ""
    zone = isinstance(dtype, pl.Datetime) and dtype.time_zone is not None
    written = "2024-01-31T00:00:00Z" if zone else "2024-01-31T00:00:00"
    return f"; bounds of a column of {dtype} are written like {written}"


def _raised(info: Mapping[str, Any]) -> str | None:
    """Find the cause in ``exception_info``, which is flat or keyed by metric id."""
    for item in (info, *info.values()):
        if isinstance(item, Mapping) and item.get("raised_exception"):
            return str(item.get("exception_message"))
    return None

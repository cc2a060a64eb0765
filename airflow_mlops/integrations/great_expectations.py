"""Great Expectations: read a suite, judge a frame, one result in its own shape whatever engine judged."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.expectations import (
    PARTIAL_LIST_SIZE,
    missing_expression,
    success_by_share,
    table_check,
    unexpected_expression,
)
from airflow_mlops.exceptions import ExpectationError

if TYPE_CHECKING:
    import polars as pl

Suite = Mapping[str, Any]


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
    return dict(suite)


def validate_frame(frame: pl.DataFrame, suite: Suite, *, engine: str = "auto") -> dict[str, Any]:
    """Judge every expectation of the suite.

    :param engine: ``auto`` compiles the common expectations to polars and leaves the others to Great
        Expectations; ``great_expectations`` leaves all to it.
    :returns: a validation result in Great Expectations' shape: ``success``, ``suite_name``, ``statistics`` and ``results``;
        each result's ``meta.engine`` says who judged.
    :raises ExpectationError: naming the expectations that could not be evaluated at all, with the cause.
    """
    expectations = list(suite["expectations"])
    results: dict[int, dict[str, Any]] = {}
    if engine == "auto":
        for index, expectation in enumerate(expectations):
            result = _judge_with_polars(frame, expectation)
            if result is not None:
                results[index] = result
    rest = [index for index in range(len(expectations)) if index not in results]
    if rest:
        judged = _judge_with_gx(frame, suite, [expectations[index] for index in rest])
        results.update(zip(rest, judged, strict=True))
    ordered = [results[index] for index in range(len(expectations))]
    passed = sum(result["success"] for result in ordered)
    return {
        "success": passed == len(ordered),
        "suite_name": suite.get("name"),
        "statistics": {
            "evaluated_expectations": len(ordered),
            "successful_expectations": passed,
            "unsuccessful_expectations": len(ordered) - passed,
            "success_percent": 100.0 * passed / len(ordered),
        },
        "results": ordered,
    }


def _judge_with_polars(frame: pl.DataFrame, expectation: Suite) -> dict[str, Any] | None:
    """Judge one expectation in polars, or ``None`` when it is not covered (or its column is not there: GX words that error)."""
    kind, kwargs = expectation["type"], expectation.get("kwargs", {})
    check = table_check(kind, kwargs)
    if check is not None:
        success, observed = check(frame.height, frame.columns)
        return _result(
            expectation, success, {"observed_value": observed} if observed is not None else {}, "polars"
        )
    if kwargs.get("column") not in frame.columns:
        return None
    broken = unexpected_expression(kind, kwargs, frame.schema)
    if broken is None:
        return None
    column, is_null_rule = kwargs["column"], kind == "expect_column_values_to_not_be_null"
    nulls = 0 if is_null_rule else int(frame.select(missing_expression(column, frame.schema).sum()).item())
    unexpected = frame.filter(broken)[column]
    counts = {
        "element_count": frame.height,
        "unexpected_count": unexpected.len(),
        "unexpected_percent": _percent(unexpected.len(), frame.height - nulls),
        "partial_unexpected_list": [] if is_null_rule else unexpected.head(PARTIAL_LIST_SIZE).to_list(),
    }
    if not is_null_rule:
        counts |= {"missing_count": nulls, "missing_percent": _percent(nulls, frame.height)}
    success = success_by_share(
        element_count=frame.height,
        null_count=nulls,
        unexpected_count=unexpected.len(),
        mostly=kwargs.get("mostly", 1.0),
    )
    return _result(expectation, success, counts, "polars")


def _percent(part: int, whole: int) -> float | None:
    return 100.0 * part / whole if whole else None


def _result(expectation: Suite, success: bool, result: dict[str, Any], engine: str) -> dict[str, Any]:
    return {
        "success": success,
        "expectation_config": {
            "type": expectation["type"],
            "kwargs": dict(expectation.get("kwargs", {})),
            "severity": expectation.get("severity", "critical"),
        },
        "result": result,
        "exception_info": {"raised_exception": False, "exception_message": None, "exception_traceback": None},
        "meta": {"engine": engine},
    }


def _judge_with_gx(frame: pl.DataFrame, suite: Suite, expectations: list[Suite]) -> list[dict[str, Any]]:
    # Great Expectations logs 209 lines while it registers functions; a task log is for the user's own lines.
    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    batch = (
        context.data_sources.add_pandas("frame")
        .add_dataframe_asset("rows")
        .add_batch_definition_whole_dataframe("all")
        .get_batch(batch_parameters={"dataframe": frame.to_pandas()})
    )
    try:
        # One by one: validate() reorders a suite's results, and a result must stay with its expectation.
        built = [
            gx.ExpectationSuite(name=str(suite.get("name", "suite")), expectations=[dict(item)]).expectations[
                0
            ]
            for item in expectations
        ]
    except Exception as err:
        raise ExpectationError(
            f"the suite holds an expectation Great Expectations does not accept: {err}"
        ) from err
    results = []
    for source, expectation in zip(expectations, built, strict=True):
        raw: dict[str, Any] = batch.validate(expectation, result_format="SUMMARY").to_json_dict()
        cause = _raised(raw.get("exception_info", {}))
        if cause is not None:
            raise ExpectationError(
                f"{source['type']}({json.dumps(source.get('kwargs', {}), default=str)}) could not be evaluated: {cause}"
            )
        results.append(_result(source, bool(raw["success"]), raw.get("result", {}), "great_expectations"))
    return results


def _raised(info: Mapping[str, Any]) -> str | None:
    """Find the cause in ``exception_info``, which is flat or keyed by metric id."""
    for item in (info, *info.values()):
        if isinstance(item, Mapping) and item.get("raised_exception"):
            return str(item.get("exception_message"))
    return None

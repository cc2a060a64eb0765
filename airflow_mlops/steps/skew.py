"""Skew: what the service was asked, held against the contract of the training data and against the same rows in the table."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.checks.skew import SKEW_SHARE
from airflow_mlops.core.checks.validation import shape_result
from airflow_mlops.core.checks.verdict import (
    gates,
    hide_arguments,
    hide_values,
    shown_positions,
    tell_failures,
    tell_verdict,
)
from airflow_mlops.core.data.categories import category_texts
from airflow_mlops.core.rollouts.served_values import (
    TABLE,
    TYPES,
    ServedDifference,
    about_inputs,
    as_contract,
    contract_of,
    describe_difference,
    same_within,
)
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import InsufficientDataError, MLOpsError, SchemaMismatchError
from airflow_mlops.integrations import delta, great_expectations
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.serving.inference_log import read_inference_log
from airflow_mlops.serving.log_rows import FEATURE_PREFIX
from airflow_mlops.serving.log_settings import LogSettings
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.common import DatasetRef, resolve_dataset
from airflow_mlops.steps.monitoring.labels import id_texts, newest_answers
from airflow_mlops.steps.registry.packages import champion_profile

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

    from airflow_mlops.core.model.package import PackageManifest
    from airflow_mlops.services import Services

_LOG = logging.getLogger(__name__)

_ID = "prediction_id"


@dataclass(frozen=True, kw_only=True, slots=True)
class SkewSpec:
    """What to hold against what.

    :param model_name: model whose inference log is read.
    :param window: predictions whose time is inside.
    :param champion_alias: the version whose package declares the inputs.
    :param suite: the training data's suite, or the path of its JSON file; what it says of columns that are no inputs is left out.
    :param share: share of the requests that may be unlike the training rows, in ``[0, 1)``; what chance may add to it is allowed.
    :param table: dataset version or table URI that later has the same rows as the service was asked.
    :param id_column: its column that equals the prediction id.
    :param tolerance: difference of two numbers that is none, in proportion.
    :param different_share: share of the rows in which an input may differ from the table.
    :param private_columns: inputs whose values no evidence shows; with ``id_column`` or ``prediction_id`` among them no row is named.
    """

    model_name: str
    window: Window
    champion_alias: str = "champion"
    suite: str | dict[str, Any] | None = None
    share: float = SKEW_SHARE
    table: DatasetRef | None = None
    id_column: str | None = None
    tolerance: float = 1e-6
    different_share: float = 0.001
    private_columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("share", "tolerance", "different_share"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is in [0, 1), got {getattr(self, name)}")
        if (self.table is None) != (self.id_column is None):
            raise ValueError(
                "comparing with a table needs both: table, and id_column that equals the prediction id"
            )

    @property
    def names_rows(self) -> bool:
        """Whether evidence may show prediction ids."""
        return not {_ID, self.id_column} & set(self.private_columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class SkewResult:
    """The verdict, in the shape of a validation's.

    :param success: no critical expectation failed.
    :param row_count: predictions; a client that retried counts once.
    :param compared_rows: of these, found in the table; ``None`` where none is given.
    :param failures: the first expectations that failed; ``row_ids`` are prediction ids.
    :param differences: inputs with other values than in the table, the most different first.
    :param not_judged: what was left out, and why: expectations about no input, inputs the log drops or hides.
    """

    model_name: str
    window: Window
    success: bool
    suite_name: str | None
    row_count: int
    compared_rows: int | None
    evaluated: int
    failed: int
    failed_critical: int
    failures: tuple[dict[str, Any], ...]
    differences: tuple[ServedDifference, ...]
    not_judged: tuple[str, ...]
    headline: str


#: Inputs that are told of, and things that were left out.
_SHOWN = 20


def run(spec: SkewSpec, services: Services) -> SkewResult:
    """Judge the window.

    :raises InsufficientDataError: nothing was predicted in it, or none of it is in the table.
    :raises ExpectationError: an expectation could not be evaluated.
    """
    manifest, trained = champion_profile(
        Registry.connect(services), services, spec.model_name, spec.champion_alias
    )
    _require_known(spec, manifest)
    root = Path(services.require("serving_dir")) / "inference_log"
    asked = newest_answers(read_inference_log(root, spec.model_name, spec.window))
    settings = LogSettings.load(root)
    hidden = {*settings.drop, *settings.pseudonymize}
    fields = [item for item in manifest.signature.inputs if item.name not in hidden]
    logged = {
        item.name: FEATURE_PREFIX + item.name
        for item in fields
        if FEATURE_PREFIX + item.name in asked.columns
    }
    inputs, problems = as_contract(asked.select(_ID, **logged), fields)
    types = [_type_result(problem, inputs.height) for problem in problems]
    results = hide_values(types, spec.private_columns)
    results += _others_logged(asked, list(manifest.signature.names))
    there = {name: inputs.height - inputs[name].null_count() for name in logged}
    contract = contract_of(fields, trained, share=spec.share, rows=inputs.height, there=there)
    ids = inputs[_ID]
    failures = _judge(
        spec, inputs, [item for item in contract if _is_there(item, logged)], None, results, ids
    )
    results += [_missing(item) for item in contract if _is_gone(item, logged)]
    not_judged = [
        f"{name}: the log drops or hides it" for name in sorted(hidden & set(manifest.signature.names))
    ]
    suite: dict[str, Any] = {}
    if spec.suite is not None:
        suite = great_expectations.load_suite(spec.suite)
        kept, left = about_inputs(suite["expectations"], list(logged))
        not_judged += [f"{item['type']}: about no input that is logged" for item in left]
        if kept:
            failures += _judge(spec, _as_in_table(inputs, manifest, logged), kept, suite, results, ids)
    differences: list[ServedDifference] = []
    compared = None
    if spec.table is not None and spec.id_column is not None:
        served = inputs.select(_ID, *logged)
        compared, pairs = _beside_table(spec, served, manifest, list(logged))
        expected = [_equal(name, spec.different_share) for name in logged if name + TABLE in pairs.columns]
        not_judged += [
            f"{name}: the table has no such column" for name in logged if name + TABLE not in pairs.columns
        ]
        differences = _differences(spec, pairs, manifest, compared)
        failures += _judge(spec, _equalized(spec, pairs, manifest), expected, None, results, pairs[_ID])
    failed = [result for result in results if not result["success"]]
    shown = {id(result) for result, _ in failures}
    told = [*failures, *((result, {}) for result in failed if id(result) not in shown)]
    return SkewResult(
        model_name=spec.model_name,
        window=spec.window,
        success=not any(map(gates, results)),
        suite_name=suite.get("name"),
        row_count=inputs.height,
        compared_rows=compared,
        evaluated=len(results),
        failed=len(failed),
        failed_critical=sum(map(gates, results)),
        failures=tuple(item for result, names in told for item in tell_failures([result], names))[:_SHOWN],
        differences=tuple(differences[:_SHOWN]),
        not_judged=tuple(not_judged[:_SHOWN]),
        headline=_headline(results, differences, inputs.height),
    )


def _require_known(spec: SkewSpec, manifest: PackageManifest) -> None:
    """Refuse a private column that is none: its values would be shown under the name it really has."""
    known = {*manifest.signature.names, _ID, spec.id_column}
    unknown = [name for name in spec.private_columns if name not in known]
    if unknown:
        raise SchemaMismatchError(
            f"private_columns: {', '.join(unknown)} is no input of {spec.model_name}, id_column or {_ID}; "
            f"the inputs are {', '.join(manifest.signature.names)}"
        )


def _hide(spec: SkewSpec, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return hide_arguments(hide_values(results, spec.private_columns))


def _judge(
    spec: SkewSpec,
    frame: pl.DataFrame,
    expectations: Sequence[dict[str, Any]],
    suite: dict[str, Any] | None,
    results: list[dict[str, Any]],
    ids: pl.Series,
) -> list[tuple[dict[str, Any], dict[int, Any]]]:
    """Judge rows, add the results to the others, and give the failed ones with what names their rows."""
    if not expectations:
        return []
    given = {"name": (suite or {}).get("name", "package"), "expectations": list(expectations)}
    judged = great_expectations.validate_frame(frame.lazy(), given, private=spec.private_columns)["results"]
    told = _hide(spec, judged)
    results += told
    failed = [result for result in told if not result["success"]]
    if not spec.names_rows:
        return [(result, {}) for result in failed]
    return [(result, {place: ids[place] for place in shown_positions([result])}) for result in failed]


def _is_there(item: dict[str, Any], logged: dict[str, str]) -> bool:
    return item["kwargs"]["column"] in logged


def _is_gone(item: dict[str, Any], logged: dict[str, str]) -> bool:
    return item["type"] == "expect_column_to_exist" and not _is_there(item, logged)


def _missing(item: dict[str, Any]) -> dict[str, Any]:
    return shape_result(item, success=False, result={}, engine="polars")


def _others_logged(asked: pl.DataFrame, declared: list[str]) -> list[dict[str, Any]]:
    """Word inputs that the package does not declare: of another version of the model, as the service logs only what a model takes."""
    logged = {
        name.removeprefix(FEATURE_PREFIX): name for name in asked.columns if name.startswith(FEATURE_PREFIX)
    }
    others = [
        name for name in logged if name not in declared and asked[logged[name]].null_count() < asked.height
    ]
    item = {
        "type": "expect_table_columns_to_match_set",
        "kwargs": {"column_set": declared, "exact_match": True},
        "severity": "warning",
    }
    if not others:
        return []
    return [
        shape_result(item, success=False, result={"observed_value": sorted(others)[:_SHOWN]}, engine="polars")
    ]


def _type_result(problem: dict[str, Any], rows: int) -> dict[str, Any]:
    """Word an input of another type as the expectation it breaks."""
    count = problem["lost"] or rows
    return shape_result(
        {
            "type": "expect_column_values_to_be_of_type",
            "kwargs": {"column": problem["column"], "type_": TYPES[problem["type"]]},
        },
        success=False,
        result={
            "element_count": rows,
            "unexpected_count": count,
            "unexpected_percent": 100.0 * count / rows,
            "partial_unexpected_list": problem["examples"],
        },
        engine="polars",
    )


def _as_in_table(inputs: pl.DataFrame, manifest: PackageManifest, logged: dict[str, str]) -> pl.DataFrame:
    """Give inputs the types of the training table, which the suite is about: codes that are numbers there are text in the log."""
    import polars as pl

    try:
        schema = _training_schema(manifest)
    except MLOpsError as err:
        _LOG.warning(
            "the suite is judged on the log's own types, as the training table can't be read: %s", err
        )
        return inputs
    casts = []
    for name in logged:
        there, wanted = inputs[name], schema.get(name)
        if there.dtype == pl.String and wanted is not None and (wanted.is_numeric() or wanted == pl.Boolean):
            number = there.cast(pl.Float64, strict=False)
            # One text that is no number leaves all as they are: the suite says then what is wrong with it.
            if number.null_count() == there.null_count():
                casts.append(number.cast(pl.Boolean) if wanted == pl.Boolean else number)
    return inputs.with_columns(casts)


def _training_schema(manifest: PackageManifest) -> dict[str, pl.DataType]:
    trained = manifest.trained_on
    return dict(delta.read_table(trained.dataset_uri, version=trained.dataset_version).collect_schema())


def _beside_table(
    spec: SkewSpec, served: pl.DataFrame, manifest: PackageManifest, names: list[str]
) -> tuple[int, pl.DataFrame]:
    """Put the table's values beside the served ones of the same row."""
    import polars as pl

    dataset = resolve_dataset(spec.table or "")
    id_column = str(spec.id_column)
    delta.require_columns([id_column], list(dataset.columns), dataset.uri)
    there = [name for name in names if name in dataset.columns]
    if not there:
        raise SchemaMismatchError(
            f"{dataset.uri} has none of the inputs {', '.join(names)}: nothing to compare with"
        )
    columns = list(dict.fromkeys([id_column, *there]))
    kinds = {item.name: item.type for item in manifest.signature.inputs}
    rows = delta.read_table(dataset.uri, version=dataset.version, columns=columns)
    rows = rows.select(
        id_texts(rows, id_column).alias(_ID),
        *(
            pl.col(name).cast(pl.Float64).fill_nan(None).alias(name + TABLE)
            if kinds[name] == "number"
            else pl.col(name).alias(name + TABLE)
            for name in there
        ),
    )
    try:
        found = rows.join(served.lazy().select(_ID), on=_ID, how="semi").unique().collect()
    except pl.exceptions.InvalidOperationError:  # it quotes values, which may be private
        numbers = ", ".join(name for name in there if kinds[name] == "number")
        raise SchemaMismatchError(
            f"{dataset.uri} has values that are no numbers in one of {numbers}, which are numbers to the model: "
            "give a table with the inputs as the training table has them"
        ) from None
    texts = [name + TABLE for name in there if kinds[name] != "number"]
    found = found.with_columns(category_texts(found[name]) for name in texts).unique()
    again = found.filter(found[_ID].is_duplicated())
    if again.height:
        such = f", such as {id_column} {again[_ID].sort()[0]!r}" if spec.names_rows else ""
        raise SchemaMismatchError(
            f"{dataset.uri} has several rows with other inputs for {again[_ID].n_unique()} predictions{such}: "
            "give a table with one row per prediction"
        )
    joined = served.join(found, on=_ID, how="inner", maintain_order="left")
    if joined.height == 0:
        raise InsufficientDataError(
            f"none of the {served.height} predictions is in {dataset.uri} yet, by {id_column}: ingest their rows first, or give the "
            "column that holds the prediction id"
        )
    return joined.height, joined


def _numbers(manifest: PackageManifest) -> dict[str, bool]:
    return {item.name: item.type == "number" for item in manifest.signature.inputs}


def _equalized(spec: SkewSpec, pairs: pl.DataFrame, manifest: PackageManifest) -> pl.DataFrame:
    """Make values that are the same up to the tolerance equal."""
    import polars as pl

    return pairs.with_columns(
        pl.when(same_within(pl.col(name), pl.col(name + TABLE), number=number, tolerance=spec.tolerance))
        .then(pl.col(name))
        .otherwise(pl.col(name + TABLE))
        .alias(name + TABLE)
        for name, number in _numbers(manifest).items()
        if name + TABLE in pairs.columns
    )


def _equal(name: str, different_share: float) -> dict[str, Any]:
    kwargs = {"column_A": name, "column_B": name + TABLE, "mostly": 1.0 - different_share}
    return {"type": "expect_column_pair_values_to_be_equal", "kwargs": kwargs, "severity": "critical"}


def _differences(
    spec: SkewSpec, pairs: pl.DataFrame, manifest: PackageManifest, rows: int
) -> list[ServedDifference]:
    import polars as pl

    found = []
    for name, number in _numbers(manifest).items():
        if name + TABLE not in pairs.columns:
            continue
        same = same_within(pl.col(name), pl.col(name + TABLE), number=number, tolerance=spec.tolerance)
        other = pairs.filter(~same).select(
            _ID, pl.col(name).alias("served"), pl.col(name + TABLE).alias("table")
        )
        if other.height:
            told = describe_difference(name, other, rows=rows, number=number, tolerance=spec.tolerance)
            found.append(_without_values(told) if name in spec.private_columns else _named(spec, told))
    return sorted(found, key=lambda item: -item.different)


def _without_values(told: ServedDifference) -> ServedDifference:
    return replace(told, value="", examples=())


def _named(spec: SkewSpec, told: ServedDifference) -> ServedDifference:
    """Leave out the prediction ids where they are private."""
    if spec.names_rows:
        return told
    unnamed = tuple({name: one for name, one in row.items() if name != _ID} for row in told.examples)
    return replace(told, examples=unnamed)


def _headline(results: list[dict[str, Any]], differences: list[ServedDifference], rows: int) -> str:
    told = tell_verdict(results, rows)
    if not differences:
        return told
    first = differences[0]
    how = f" ({first.pattern} {first.value})".replace(" )", ")") if first.pattern != "none" else ""
    return f"{told}; {first.feature} differs from the table in {first.share:.2%} of {first.rows} rows{how}"


STEP = Step(name="skew", spec=SkewSpec, result=SkewResult, run=run)

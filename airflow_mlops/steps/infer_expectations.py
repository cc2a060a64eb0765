"""Infer expectations: a suite as a file, from reference rows of a dataset version, for a person to review."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlops.core.checks.inference import InferencePolicy, columns_unsaid, infer_expectations
from airflow_mlops.core.codec import json_safe, to_dict
from airflow_mlops.core.data.dataset import DatasetVersion, count_rows
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import StorageError
from airflow_mlops.integrations import delta
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.common import DatasetRef, resolve_dataset

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow_mlops.services import Services

#: Columns that the headline names.
_SHOWN = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class InferExpectationsSpec:
    """What to infer from, and where the suite goes.

    :param dataset: dataset version, or table URI for its newest: the reference.
    :param suite: path of the JSON file to write.
    :param time_column: needed with ``window``.
    :param window: infer from these rows; ``None``: from the whole version.
    :param exclude: columns to say nothing about.
    :param private_columns: columns whose values the suite may not show: it says that they are there, and how many are missing.
    :param policy: tolerances.
    :param overwrite: replace a suite that is there.
    """

    dataset: DatasetRef
    suite: str
    time_column: str | None = None
    window: Window | None = None
    exclude: tuple[str, ...] = ()
    private_columns: tuple[str, ...] = ()
    policy: InferencePolicy = field(default_factory=InferencePolicy)
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class InferExpectationsResult:
    """The suite that was inferred.

    :param suite: where it is.
    :param unsaid: columns of whose values it says nothing but how many are missing.
    :param written: false where this very suite was there already.
    """

    dataset: DatasetVersion
    window: Window | None
    suite: str
    row_count: int
    expectation_count: int
    written: bool
    headline: str
    unsaid: tuple[str, ...] = ()


def run(spec: InferExpectationsSpec, services: Services) -> InferExpectationsResult:
    """Infer, and write the file once.

    :raises InsufficientDataError: too few rows.
    :raises FileExistsError: another suite is there and ``overwrite`` is false.
    """
    if spec.window is not None and spec.time_column is None:
        raise ValueError("a window of a dataset needs time_column, which places a row in it")
    dataset = resolve_dataset(spec.dataset, time_column=spec.time_column)
    rows = delta.read_table(
        dataset.uri, version=dataset.version, window=spec.window, time_column=spec.time_column
    )
    delta.require_columns([*spec.exclude, *spec.private_columns], rows.collect_schema().names(), dataset.uri)
    rows = rows.drop(spec.exclude)
    expectations = infer_expectations(rows, spec.policy, spec.private_columns)
    unsaid = columns_unsaid(expectations)
    path = Path(spec.suite)
    inferred_from = {
        "dataset": dataset.uri,
        "version": dataset.version,
        "dataset_digest": dataset.dataset_digest,
        "window": spec.window.key if spec.window else None,
        "policy": to_dict(spec.policy),
    }
    content = {
        "name": path.stem,
        "expectations": expectations,
        "meta": {"inferred_from": inferred_from},
        "notes": f"Inferred from data: what was seen, not what is right. Review it, beginning with REVIEW{_told(unsaid)}.",
    }
    text = json.dumps(json_safe(content), indent=2, ensure_ascii=False) + "\n"
    written = _write(path, text, overwrite=spec.overwrite)
    count = count_rows(rows)
    asked = sum("REVIEW" in item["notes"] for item in expectations)
    return InferExpectationsResult(
        dataset=dataset,
        window=spec.window,
        suite=str(path),
        row_count=count,
        expectation_count=len(expectations),
        written=written,
        headline=f"{len(expectations)} expectations inferred from {count} rows {'are in' if written else 'were already in'} {path}; "
        f"review it{f', {asked} of them ask a question' if asked else ''}{_told(unsaid)}",
        unsaid=tuple(unsaid),
    )


def _told(unsaid: Sequence[str]) -> str:
    if not unsaid:
        return ""
    more = f" and {len(unsaid) - _SHOWN} more" if len(unsaid) > _SHOWN else ""
    return f"; nothing is said about the values of {', '.join(unsaid[:_SHOWN])}{more}"


def _write(path: Path, text: str, *, overwrite: bool) -> bool:
    """Write a file whole, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.exists() and path.read_text() == text:
            return False
        temporary.write_text(text)
        if overwrite:
            temporary.replace(path)
        else:
            os.link(temporary, path)  # of two at once the second fails
    except FileExistsError as err:
        raise FileExistsError(
            f"{path} is there already and somebody may have reviewed it: write to another file and compare, or give overwrite=True"
        ) from err
    except OSError as err:
        raise StorageError(f"could not write the suite {path}: {err}") from err
    finally:
        temporary.unlink(missing_ok=True)
    return True


STEP = Step(name="infer-expectations", spec=InferExpectationsSpec, result=InferExpectationsResult, run=run)

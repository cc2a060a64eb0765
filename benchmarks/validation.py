"""Cost of a validation: 15 expectations on 20 columns, each way in a process of its own, one after the other.

``python benchmarks/validation.py [rows ...]`` (default one million) makes its tables in a temporary folder and prints CPU seconds of the
whole process, start and imports included, its peak of resident memory (``VmHWM``) and wall time:

* ``ours``: what ``ValidateDatasetOperator`` judges with, from Parquet, in the environment its step has.
* ``by hand``: the same counts as one polars query that somebody wrote for this suite, without evidence: the limit.
* ``great-expectations``: the same suite on pandas; with up to a million rows.
* ``pandera``: the expectations it has, on pandas; with up to a million rows. It is no dependency: where it is not installed it is
  skipped (``uv pip install --no-deps --target FOLDER pandera typeguard``, and ``FOLDER`` on ``PYTHONPATH``).
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from airflow_mlops.core.data.batches import limit_read_ahead

BLOCK = 250_000
MOST_ROWS_OF_PEERS = 1_000_000
PEERS = ("great-expectations", "pandera")
WAYS = ("ours", "by hand", *PEERS)


def columns(random: np.random.Generator, first: int, rows: int) -> dict[str, Any]:
    """Ten numbers, five whole ones, an id, three texts and a time; few rows break the suite."""
    made: dict[str, Any] = {f"x{k}": random.normal(k, 1.0, rows) for k in range(10)}
    made["x9"] = np.where(random.random(rows) < 0.01, np.nan, made["x9"])
    made |= {f"n{k}": random.integers(0, 100 * 10**k, rows) for k in range(5)}
    made["id"] = np.arange(first, first + rows)
    made["kind"] = random.choice(["a", "b", "c", "d"], rows)
    made["code"] = np.char.add("K-", random.integers(10_000, 99_999, rows).astype(str))
    made["name"] = random.choice([f"name {k}" for k in range(1_000)], rows)
    made["at"] = np.datetime64("2024-01-01", "us") + random.integers(0, 10**12, rows).astype("m8[us]")
    return made


def _on(kind: str, column: str, **arguments: Any) -> dict[str, Any]:
    return {"type": f"expect_column_{kind}", "kwargs": {"column": column, **arguments}}


SUITE: dict[str, Any] = {
    "name": "benchmark",
    "expectations": [
        {"type": "expect_table_row_count_to_be_between", "kwargs": {"min_value": 1}},
        _on("values_to_not_be_null", "x0"),
        _on("values_to_not_be_null", "x9", mostly=0.95),
        _on("values_to_be_between", "x1", min_value=-4, max_value=6),
        _on("values_to_be_between", "x2", min_value=-3, max_value=7),
        _on("values_to_be_between", "n0", min_value=0, max_value=99),
        _on("values_to_be_in_set", "kind", value_set=["a", "b", "c", "d"]),
        _on("values_to_match_regex", "code", regex=r"^K-\d{5}$"),
        _on("value_lengths_to_be_between", "name", min_value=6, max_value=8),
        _on("values_to_be_unique", "id"),
        _on("mean_to_be_between", "x3", min_value=2.9, max_value=3.1),
        _on("median_to_be_between", "x4", min_value=3.9, max_value=4.1),
        _on("stdev_to_be_between", "x5", min_value=0.9, max_value=1.1),
        _on("unique_value_count_to_be_between", "name", min_value=900, max_value=1_000),
        {
            "type": "expect_column_pair_values_a_to_be_greater_than_b",
            "kwargs": {"column_A": "x8", "column_B": "x0", "mostly": 0.99},
        },
    ],
}


def write(path: Path, rows: int) -> None:
    """Write a table block by block."""
    import pyarrow.parquet as pq

    random, writer = np.random.default_rng(0), None
    for first in range(0, rows, BLOCK):
        block = pl.DataFrame(columns(random, first, min(BLOCK, rows - first))).to_arrow()
        writer = writer or pq.ParquetWriter(path, block.schema)
        writer.write_table(block)
    if writer:
        writer.close()


def ours(path: Path) -> str:
    """Judge as the operator does."""
    from airflow_mlops.core.checks.validation import judge_compiled

    results = judge_compiled(pl.scan_parquet(path), SUITE["expectations"])
    return f"{sum(bool(one and one['success']) for one in results)} of {len(results)} hold"


def by_hand(path: Path) -> str:
    """Count what the suite asks for, and nothing else."""
    c = pl.col
    counts = [
        c("x0").is_null().sum(),
        (c("x9").is_null() | c("x9").is_nan()).sum(),
        (~c("x1").is_between(-4, 6)).sum(),
        (~c("x2").is_between(-3, 7)).sum(),
        (~c("n0").is_between(0, 99)).sum(),
        (~c("kind").is_in(["a", "b", "c", "d"])).sum(),
        (~c("code").str.contains(r"^K-\d{5}$")).sum(),
        (~c("name").str.len_chars().is_between(6, 8)).sum(),
        c("id").n_unique(),
        c("x3").mean(),
        c("x4").median(),
        c("x5").std(),
        c("name").n_unique().alias("names"),
        (c("x8") <= c("x0")).sum(),
        pl.len(),
    ]
    row = pl.scan_parquet(path).select(counts).collect(engine="streaming").row(0)
    return f"{len(row)} numbers"


def great_expectations(path: Path) -> str:
    """Judge by Great Expectations alone."""
    from airflow_mlops.integrations.great_expectations import validate_frame

    told = validate_frame(pl.scan_parquet(path), SUITE, engine="great_expectations")["statistics"]
    return f"{told['successful_expectations']} of {told['evaluated_expectations']} hold"


def pandera(path: Path) -> str:
    """Judge by pandera what it has: a schema of eight columns."""
    import pandas as pd
    import pandera.pandas as pa

    schema = pa.DataFrameSchema(
        {
            "x0": pa.Column(float),
            "x1": pa.Column(float, pa.Check.in_range(-4, 6)),
            "x2": pa.Column(float, pa.Check.in_range(-3, 7)),
            "n0": pa.Column(int, pa.Check.in_range(0, 99)),
            "kind": pa.Column(str, pa.Check.isin(["a", "b", "c", "d"])),
            "code": pa.Column(str, pa.Check.str_matches(r"^K-\d{5}$")),
            "name": pa.Column(str, pa.Check.str_length(6, 8)),
            "id": pa.Column(int, unique=True),
        }
    )
    try:
        schema.validate(pd.read_parquet(path), lazy=True)
    except pa.errors.SchemaErrors as err:
        return f"{len(err.schema_errors)} of 8 columns fail"
    return "8 columns hold"


def measure(way: str, path: Path) -> None:
    """Run one way in this process and print what it took."""
    if way == "ours":
        limit_read_ahead()
    began = time.perf_counter()
    told = globals()[way.replace(" ", "_").replace("-", "_")](path)
    wall = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    megabytes = int(peak.split()[1]) / 1024
    print(
        f"{way:20} {used.ru_utime + used.ru_stime:8.2f} {megabytes:10,.0f} {wall:8.2f}   {told}", flush=True
    )


def main() -> None:
    """Measure every way for every number of rows."""
    if len(sys.argv) == 4 and sys.argv[1] == "--measure":
        measure(sys.argv[2], Path(sys.argv[3]))
        return
    for rows in [int(text) for text in sys.argv[1:]] or [1_000_000]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.parquet"
            write(path, rows)
            print(f"\n{rows:,} rows{'':10} CPU s    peak MB   wall s")
            for way in WAYS:
                if rows > MOST_ROWS_OF_PEERS and way in PEERS:
                    continue
                command = [sys.executable, __file__, "--measure", way, str(path)]
                done = subprocess.run(
                    command,
                    check=False,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    capture_output=True,
                    text=True,
                )
                print(
                    done.stdout or f"{way:20} skipped: {done.stderr.strip().splitlines()[-1]}\n",
                    end="",
                    flush=True,
                )


if __name__ == "__main__":
    main()

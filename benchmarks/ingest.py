"""Ingest of a Parquet file beside a bare delta-rs write of the same batches.

``python benchmarks/ingest.py [rows ...]``, default 1, 5 and 10 million rows of 20 columns. Each figure is from a process of its own.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl

from airflow_mlops.core.data.batches import limit_read_ahead

#: Rows of one row group of the source.
GROUP = 250_000
WAYS = ("bare", "ingest", "ingest, id checked")


def make(path: Path, count: int) -> None:
    """Write the source a group at a time: an id, a time, 12 floats, 3 whole numbers, a flag and 2 texts."""
    import pyarrow.parquet as pq

    writer = None
    for start in range(0, count, GROUP):
        rows = min(GROUP, count - start)
        random = np.random.default_rng(start)
        columns: dict[str, object] = {
            "id": np.arange(start, start + rows),
            "t": pl.Series(np.arange(start, start + rows) * 1_000_000 + 1_704_067_200_000_000).cast(
                pl.Datetime("us", "UTC")
            ),
        }
        columns |= {f"f{number}": random.normal(size=rows) for number in range(12)}
        columns |= {f"i{number}": random.integers(0, 1000, rows) for number in range(3)}
        columns["flag"] = random.random(rows) > 0.5
        columns |= {
            f"s{number}": random.choice([f"city {n}" for n in range(200)], rows) for number in range(2)
        }
        table = pl.DataFrame(columns).to_arrow()
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def bare(source: str, table: str) -> None:
    """Write the batches as they come, unchecked."""
    import pyarrow as pa
    from deltalake import DeltaTable, write_deltalake

    from airflow_mlops.core.data.batches import stream_batches

    frame = pl.scan_parquet(source)
    schema = pl.DataFrame(schema=frame.collect_schema()).to_arrow().schema
    batches = (batch for rows in stream_batches(frame) for batch in rows.to_arrow().to_batches())
    DeltaTable.create(table, schema)
    write_deltalake(table, pa.RecordBatchReader.from_batches(schema, batches), mode="append")


def ingest(source: str, table: str, id_column: str | None) -> None:
    """Run the step: times, schema and digest; with an id, that it does not repeat."""
    from airflow_mlops.services import Services
    from airflow_mlops.steps.ingest import run
    from airflow_mlops.steps.ingestion.spec import IngestSpec

    run(IngestSpec(source=source, table=table, time_column="t", id_column=id_column), Services())


def measure(way: str, source: str, table: str) -> None:
    """Print wall seconds, CPU seconds and peak MB of one way."""
    import deltalake  # noqa: F401 - imports are not what is measured

    import airflow_mlops.steps.ingest  # noqa: F401

    if way != "bare":
        limit_read_ahead()  # as in the task
    before, started = _cpu(), time.monotonic()
    if way == "bare":
        bare(source, table)
    else:
        ingest(source, table, "id" if "id" in way.partition(",")[2] else None)
    seconds = time.monotonic() - started
    # Not ru_maxrss: that is never below what the parent had.
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    print(json.dumps([seconds, _cpu() - before, int(peak[1]) / 1024 if peak else None]))


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Print the table."""
    sizes = [int(float(size)) for size in sys.argv[1:]] or [1_000_000, 5_000_000, 10_000_000]
    print(f"{datetime.now(UTC):%Y-%m-%d}, 20 columns")
    print(f"{'rows':>10}  {'way':<20}{'s':>7}{'CPU s':>8}{'peak MB':>9}{'of bare speed':>15}")
    for count in sizes:
        with tempfile.TemporaryDirectory() as folder:
            source = str(Path(folder) / "source.parquet")
            make(Path(source), count)
            speed = {}
            for number, way in enumerate(WAYS):
                told = subprocess.run(
                    [sys.executable, __file__, "--way", way, source, f"{folder}/table{number}"],
                    check=True,
                    stdout=subprocess.PIPE,
                ).stdout
                seconds, cpu, peak = json.loads(told)
                speed[way] = seconds
                share = f"{speed['bare'] / seconds:.0%}"
                print(f"{count:>10}  {way:<20}{seconds:>7.1f}{cpu:>8.1f}{peak:>9.0f}{share:>15}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--way"]:
        measure(*sys.argv[2:])
    else:
        main()

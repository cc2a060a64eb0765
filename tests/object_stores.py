"""A real S3 server of moto on the loopback address, and the Airflow connection that opens it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import httpx

from tests.ports import free_port

KEY, SECRET = "lake-key", "lake-secret-that-is-written-nowhere"


class Bucket:
    """A bucket of its own on the server."""

    def __init__(self, endpoint: str, name: str) -> None:
        self.endpoint, self.name = endpoint, name
        self.files = fsspec.filesystem(
            "s3", key=KEY, secret=SECRET, endpoint_url=endpoint, use_listings_cache=False
        )
        assert httpx.put(f"{endpoint}/{name}").status_code == 200

    def uri(self, key: str) -> str:
        return f"s3://lake@{self.name}/{key}"

    def put(self, path: Path, key: str) -> str:
        self.files.put_file(str(path), f"{self.name}/{key}")
        return self.uri(key)

    def connection(self) -> str:
        """Give what ``AIRFLOW_CONN_LAKE`` has to be."""
        extra = {"endpoint_url": self.endpoint, "region_name": "eu-central-1"}
        return json.dumps({"conn_type": "aws", "login": KEY, "password": SECRET, "extra": extra})


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Run the server and give its address."""
    port, log = free_port(), folder / "s3.log"
    command = [
        sys.executable,
        "-c",
        "from moto.server import main; main()",
        "-H",
        "127.0.0.1",
        "-p",
        str(port),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not _answers(url):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False

"""HTTP: a file as a whole, gone on with where a server broke off."""

from __future__ import annotations

import hashlib
import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from airflow_mlops.exceptions import ConnectionConfigError, DatasetNotFoundError, SourceUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import httpx

_REDIRECTS = 5
#: Answers, beside those from 500 on, after which the same request may be answered otherwise.
_PASSING = frozenset({408, 425, 429})


class _Broken(Exception):  # noqa: N818 - not raised to a caller
    """An attempt came to nothing; the next one may go on from there."""


def plain_url(url: str) -> str:
    """Give an address without what may be secret in it: query and login."""
    parts = urlsplit(url)
    return parts._replace(query="", fragment="", netloc=parts.netloc.rpartition("@")[2]).geturl()


def web_mark(url: str) -> str | None:
    """Ask whether a file is there; its content is not read.

    :returns: what tells this content from another one as far as the server says; ``None``: it is not there, and may come.
    :raises DatasetNotFoundError: it was there and will not be again.
    :raises ConnectionConfigError: the server refuses to give it.
    :raises SourceUnavailableError: it does not answer, or fails.
    :raises ValueError: it refuses the request otherwise.
    """
    import httpx

    name = plain_url(url)
    try:
        with _unlogged(), httpx.Client(timeout=15) as client:
            response = _answer(client, url, {"Accept-Encoding": "identity"}, None)
            response.close()
    except httpx.HTTPError as err:
        raise SourceUnavailableError(
            f"{name} does not answer: {err}. Check the address, if this lasts"
        ) from err
    status = response.status_code
    if status == 404:
        return None
    if status == 410:
        raise DatasetNotFoundError(f"{name} is gone for good (410): check the address")
    if status in {401, 403, 407}:
        raise ConnectionConfigError(
            f"{name} refuses to give the file ({status}), which no waiting mends: take an address that needs no login, or one of a "
            "store, such as s3://conn_id@bucket/key. A public bucket says 403 also of what is not there, unless it may be listed"
        )
    if status in _PASSING or status >= 500:
        raise SourceUnavailableError(f"{name} can't be asked for now: the server answers {status}")
    if status not in {200, 206}:
        raise ValueError(f"{name} answers {status}, no file")
    return repr([response.headers.get(field) for field in ("etag", "last-modified", "content-length")])


def download(
    url: str,
    target: Path,
    *,
    headers: Mapping[str, str],
    login: tuple[str, str] | None,
    attempts: int = 5,
    pause_seconds: float = 1.0,
) -> str:
    """Write the file that an address answers with, all of it.

    :param target: file to write; overwritten.
    :param headers: for the address's own server; another one that it redirects to does not get them.
    :param login: user and password, likewise.
    :param attempts: how often in a row the server may send nothing new.
    :param pause_seconds: before the second attempt; doubles with each.
    :returns: SHA-256 of the content.
    :raises DatasetNotFoundError: there is no such file.
    :raises ConnectionConfigError: the server refuses the login.
    :raises SourceUnavailableError: it does not answer, fails, or keeps breaking off.
    :raises ValueError: it refuses the request otherwise.
    """
    import httpx

    failed, problem = 0, ""
    with _unlogged(), httpx.Client(timeout=httpx.Timeout(60, connect=15)) as client:
        file = _File(client, url, target, headers, login)
        while failed < attempts:
            before = file.size
            try:
                file.go_on()
            except (_Broken, httpx.TransportError) as err:
                problem = str(err) or type(err).__name__
            else:
                return _sha256(target)
            failed = 1 if file.size > before else failed + 1
            if failed < attempts:
                time.sleep(pause_seconds * 2 ** (failed - 1))
    raise SourceUnavailableError(
        f"{plain_url(url)} could not be downloaded: {problem}; {file.size} bytes came, and no more in {attempts} attempts"
    )


@contextmanager
def _unlogged() -> Iterator[None]:
    """Have httpx not write each address into the log, query and all: in a signed one that is a credential."""
    logger = logging.getLogger("httpx")

    def nothing(_: logging.LogRecord) -> bool:
        return False

    logger.addFilter(nothing)
    try:
        yield
    finally:
        logger.removeFilter(nothing)


class _File:
    """A file that is on its way; what is there of it stays when an attempt breaks off."""

    def __init__(
        self,
        client: httpx.Client,
        url: str,
        target: Path,
        headers: Mapping[str, str],
        login: tuple[str, str] | None,
    ) -> None:
        self.size = 0
        self._client, self._url, self._target, self._login = client, url, target, login
        # Compressed on the way, the lengths would be others than the file's.
        self._headers = {**headers, "Accept-Encoding": "identity"}
        #: What the server calls this content; empty: it can't be gone on with.
        self._validator = ""

    def go_on(self) -> None:
        """Take the rest, or all of it.

        :raises _Broken: it did not come to its end.
        """
        part = (
            {"Range": f"bytes={self.size}-", "If-Range": self._validator}
            if self.size and self._validator
            else {}
        )
        response = _answer(self._client, self._url, self._headers | part, self._login)
        try:
            _require_file(response, self._url)
            self._take(response)
        finally:
            response.close()

    def _take(self, response: httpx.Response) -> None:
        told = response.headers
        goes_on = response.status_code == 206
        if goes_on and not told.get("content-range", "").startswith(f"bytes {self.size}-"):
            self._validator = ""
            raise _Broken("the server sends another part than the one asked for")
        if not goes_on:
            tag = told.get("etag", "")
            # A weak tag names what is like the content, not its bytes.
            self._validator = tag if tag and not tag.startswith("W/") else told.get("last-modified", "")
            self.size = 0
        expected = self.size + int(told["content-length"]) if "content-length" in told else None
        with self._target.open("ab" if goes_on else "wb") as file:
            for piece in response.iter_raw():
                file.write(piece)
                self.size += len(piece)
        if expected is not None and self.size != expected:
            raise _Broken(f"it ended after {self.size} of {expected} bytes")


def _answer(
    client: httpx.Client, url: str, headers: Mapping[str, str], login: tuple[str, str] | None
) -> httpx.Response:
    """Follow redirects; what is secret goes to the first server only."""
    import httpx

    first, own = httpx.URL(url), {"Accept-Encoding", "Range", "If-Range"}
    request = client.build_request("GET", url, headers=dict(headers))
    for _ in range(_REDIRECTS + 1):
        same = (request.url.scheme, request.url.host, request.url.port) == (
            first.scheme,
            first.host,
            first.port,
        )
        if not same:
            kept = {name: value for name, value in headers.items() if name in own}
            request = client.build_request("GET", request.url, headers=kept)
        given: Any = login if same and login is not None else None
        response = client.send(request, auth=given, stream=True)
        if response.next_request is None:
            return response
        response.close()
        request = client.build_request("GET", response.next_request.url, headers=dict(headers))
    raise ValueError(f"{plain_url(url)} redirects more than {_REDIRECTS} times: give the address it ends at")


def _require_file(response: httpx.Response, url: str) -> None:
    status, name = response.status_code, plain_url(url)
    if status in {200, 206}:
        return
    if status in {404, 410}:
        raise DatasetNotFoundError(f"{name} is not there ({status}): check the address")
    if status in {401, 403, 407}:
        raise ConnectionConfigError(
            f"{name} refuses the login ({status}): give source_conn_id, an http connection with Login and Password or with headers in Extra"
        )
    if status in {416, *_PASSING} or status >= 500:
        raise _Broken(f"the server answers {status}")
    raise ValueError(f"{name} answers {status}, no file")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

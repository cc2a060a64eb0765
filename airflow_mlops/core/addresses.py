"""Addresses of services, looked at before anything is sent to them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from airflow_mlops.exceptions import ConnectionConfigError


def require_http_url(value: object, *, purpose: str) -> str:
    """Give an address back, or refuse what can never answer, so that nobody waits for it.

    :param value: what was configured.
    :param purpose: whose address it is, for the message.
    :raises ConnectionConfigError: it is no ``http(s)://host[:port]``.

    >>> require_http_url("http://mlflow:5000", purpose="MLflow")
    'http://mlflow:5000'
    >>> require_http_url("mlflow:5000", purpose="MLflow")
    Traceback (most recent call last):
    airflow_mlops.exceptions.ConnectionConfigError: MLflow: 'mlflow:5000' is no address such as http://localhost:5000; \
correct the connection
    """
    text = value if isinstance(value, str) else ""
    try:
        parts = urlsplit(text)
        fits = parts.scheme in {"http", "https"} and bool(parts.hostname) and text.count("://") == 1
        fits = fits and not re.search(r"\s", text)
        _ = parts.port  # reads the number, or refuses
    except ValueError:
        fits = False
    if not fits:
        shown = re.sub(r"//[^/]*@", "//***@", repr(value))  # no password into a log
        raise ConnectionConfigError(
            f"{purpose}: {shown} is no address such as http://localhost:5000; correct the connection"
        )
    return text

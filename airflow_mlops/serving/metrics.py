"""Prometheus metrics of the endpoint; BentoML exposes them on ``/metrics`` beside its own."""

from __future__ import annotations


class EndpointMetrics:
    """Counters and a latency histogram, by model version.

    Made when the service starts, not at import: BentoML first has to say where its workers share their metrics.
    """

    def __init__(self) -> None:
        from prometheus_client import Counter, Histogram

        self._requests = Counter(
            "airflow_mlops_requests_total", "Requests for predictions", ["model_version", "status"]
        )
        self._rows = Counter("airflow_mlops_predictions_total", "Rows predicted", ["model_version"])
        self._seconds = Histogram(
            "airflow_mlops_predict_seconds", "Time to predict one request", ["model_version"]
        )
        self._shed = Counter("airflow_mlops_shed_log_rows_total", "Rows the inference log had no room for")

    def count_request(self, model_version: str, status: int) -> None:
        """Count one request by its answer."""
        self._requests.labels(model_version, str(status)).inc()

    def observe(self, model_version: str, *, rows: int, seconds: float, kept: bool) -> None:
        """Note one request's predictions."""
        self._rows.labels(model_version).inc(rows)
        self._seconds.labels(model_version).observe(seconds)
        if not kept:
            self._shed.inc(rows)

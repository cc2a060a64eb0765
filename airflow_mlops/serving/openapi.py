"""The endpoint's OpenAPI document, with the inputs and an example of the model that answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_mlops.core.model.package import PackageManifest
    from airflow_mlops.core.model.signature import FieldSpec
    from airflow_mlops.serving.settings import ServiceSettings

_ERRORS = {
    401: "the bearer token is missing or wrong",
    408: "the body took too long",
    413: "too many rows or bytes",
    415: "the body is packed in another way than gzip",
    422: "the body does not fit: names row, field and type",
    429: "too many requests at once; come again",
    500: "the model failed",
    503: "no version is live, or the service is about to end",
}

_NOT_EXPLAINED = {409: "this version can't be explained: its package holds no background rows"}

_ARROW = {"application/vnd.apache.arrow.stream": {"schema": {"type": "string", "format": "binary"}}}

_HEADERS = [
    {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": text}
    for name, text in (
        ("X-Request-Id", "comes back as it was sent"),
        ("X-Sticky-Key", "the same key is answered by the same version, where a rollout is sticky"),
    )
]


def openapi_document(
    manifest: PackageManifest | None,
    model_name: str | None,
    settings: ServiceSettings,
    *,
    explains: bool = False,
    asks_tokens: bool = False,
) -> dict[str, Any]:
    """Describe the endpoint.

    :param manifest: of the stable version; ``None``: nothing answers yet, so nothing is known about rows.
    :param explains: whether a version that answers can be explained.
    :param asks_tokens: whether callers have to bring a bearer token.
    """
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": model_name or "model endpoint",
            "version": "1",
            "description": "Predictions of a registered model.",
        },
        "paths": {
            "/predict": {"post": _predict(manifest, settings)},
            "/status": {"get": _get("What answers now, its inputs, and why not what was asked for.")},
            "/readyz": {"get": _get("Which versions are live.", 503)},
        },
    }
    if explains:
        document["paths"]["/predict/explain"] = {"post": _explain(manifest, settings)}
    if asks_tokens:
        document["components"] = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
        document["security"] = [{"token": []}]
    return document


def _predict(manifest: PackageManifest | None, settings: ServiceSettings) -> dict[str, Any]:
    answer = {
        "type": "object",
        "required": ["model_name", "model_version", "prediction_ids", "predictions"],
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "prediction_ids": {"type": "array", "items": {"type": "string"}},
            "predictions": {"type": "array", "items": {"type": _prediction_type(manifest)}},
        },
    }
    return {
        "summary": "Predict rows.",
        "operationId": "predict",
        "parameters": _HEADERS,
        "requestBody": _rows_body(manifest, settings.maximum_rows),
        "responses": _responses("one prediction per row", answer, *_ERRORS),
    }


def _explain(manifest: PackageManifest | None, settings: ServiceSettings) -> dict[str, Any]:
    number = {"type": "number"}
    names = manifest.signature.names if manifest is not None else ()
    row = {
        "type": "object",
        "required": ["prediction", "label", "score", "base_value", "contributions", "standard_error"],
        "properties": {
            "prediction": {"type": _prediction_type(manifest)},
            "label": {
                "type": ["string", "null"],
                "description": "Whose score is explained; null for a regression.",
            },
            "score": {**number, "description": "The base value plus all contributions."},
            "base_value": {**number, "description": "Mean score of the training rows in the package."},
            "contributions": {
                "type": "object",
                "properties": dict.fromkeys(names, number),
                "additionalProperties": number,
            },
            "standard_error": {
                "type": ["number", "null"],
                "description": "How far a contribution may be off, at most over the inputs; 0: exact.",
            },
        },
    }
    answer = {
        "type": "object",
        "required": ["model_name", "model_version", "prediction_ids", "explained", "explanations"],
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "prediction_ids": {
                "type": ["array", "null"],
                "items": {"type": "string"},
                "description": "As they were sent.",
            },
            "explained": {
                "type": "string",
                "enum": ["prediction", "probability", "share"],
                "description": "What the score is: the predicted number, the label's probability, or whether it is answered (0 or 1).",
            },
            "explanations": {"type": "array", "items": row},
        },
    }
    label = {
        "name": "label",
        "in": "query",
        "required": False,
        "schema": {"type": "string", "enum": list(manifest.classes or ()) if manifest else []},
        "description": "Whose probability is explained in all rows; in each row the label that is answered, where it is missing.",
    }
    return {
        "summary": "Say what each input of a row contributed to the answer.",
        "operationId": "explain",
        "parameters": [*_HEADERS, label] if manifest is not None and manifest.classes else _HEADERS,
        "requestBody": _rows_body(manifest, settings.explain_rows),
        "responses": _responses("one explanation per row", answer, *_ERRORS, 409),
    }


def _rows_body(manifest: PackageManifest | None, maximum_rows: int) -> dict[str, Any]:
    row = _row_schema(manifest)
    column = _columns_schema(row)
    many = {"minItems": 1, "maxItems": maximum_rows}
    common = {
        "prediction_ids": {
            "type": ["array", "null"],
            "items": {"type": ["string", "integer"], "minLength": 1, "maxLength": 256},
            "uniqueItems": True,
            "description": 'One per row, each one once (1 and "1" are the same), to join labels by; predictions get some where they are missing.',
        },
        "times": {
            "type": ["array", "null"],
            "items": {"type": "string", "format": "date-time"},
            "description": "Event times, one per row; now where they are missing.",
        },
    }

    def form(name: str, schema: dict[str, Any]) -> dict[str, Any]:
        return {"type": "object", "required": [name], "properties": {name: schema, **common}}

    body: dict[str, Any] = {
        "schema": {
            "oneOf": [
                form("rows", {"type": "array", "items": row, **many}),
                form("row", row),
                form("columns", column),
            ]
        }
    }
    if manifest is not None:
        body["example"] = {"rows": [dict(manifest.known_rows[0])]}
    return {"required": True, "content": {"application/json": body, **_ARROW}}


def _responses(description: str, answer: dict[str, Any], *statuses: int) -> dict[str, Any]:
    content = {"application/json": {"schema": answer}, **_ARROW}
    return {
        "200": {"description": description, "content": content},
        **{str(status): _error(status) for status in statuses},
    }


def _prediction_type(manifest: PackageManifest | None) -> str:
    return "number" if manifest is None or manifest.task == "regression" else "string"


def _get(summary: str, *statuses: int) -> dict[str, Any]:
    answer = {"description": summary, "content": {"application/json": {"schema": {"type": "object"}}}}
    return {
        "summary": summary,
        "responses": {"200": answer, **{str(status): _error(status) for status in (401, *statuses)}},
    }


def _error(status: int) -> dict[str, Any]:
    description = (_ERRORS | _NOT_EXPLAINED)[status]
    return {"description": description, "content": {"application/json": {"schema": {"type": "object"}}}}


def _row_schema(manifest: PackageManifest | None) -> dict[str, Any]:
    if manifest is None:
        return {"type": "object"}
    values = {field.name: {"type": _types(field)} for field in manifest.signature.inputs}
    return {"type": "object", "required": list(values), "properties": values}


def _columns_schema(row: dict[str, Any]) -> dict[str, Any]:
    """Give the schema of rows that are sent by column: where a row has a value there is a list of them."""
    lists = {
        name: {"type": "array", "minItems": 1, "items": value}
        for name, value in row.get("properties", {}).items()
    }
    return {**row, "properties": lists} if lists else row


def _types(field: FieldSpec) -> list[str]:
    types = ["number"] if field.type == "number" else ["string", "number", "boolean"]
    return [*types, "null"] if field.nullable else types

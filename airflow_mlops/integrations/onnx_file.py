"""ONNX files before they are loaded: whether they ask for other files."""

from __future__ import annotations

from functools import cache
from typing import Any

#: The parts of ONNX's schema on the way to a tensor: message, then field number to name and message of the field. All
#: else is skipped by the parser. Source: onnx/onnx.proto of ONNX 1.19, unchanged since IR version 10; field numbers never
#: change.
_SCHEMA: dict[str, dict[int, tuple[str, str]]] = {
    "Model": {7: ("graph", "Graph"), 20: ("training", "Training"), 25: ("functions", "Function")},
    "Training": {1: ("initialization", "Graph"), 2: ("algorithm", "Graph")},
    "Graph": {1: ("node", "Node"), 5: ("initializer", "Tensor"), 15: ("sparse", "SparseTensor")},
    "Function": {7: ("node", "Node"), 11: ("attribute", "Attribute")},
    "Node": {5: ("attribute", "Attribute")},
    "Attribute": {
        5: ("t", "Tensor"),
        6: ("g", "Graph"),
        10: ("tensors", "Tensor"),
        11: ("graphs", "Graph"),
        22: ("sparse", "SparseTensor"),
        23: ("sparses", "SparseTensor"),
    },
    "SparseTensor": {1: ("values", "Tensor"), 2: ("indices", "Tensor")},
    "Tensor": {13: ("external_data", "Entry")},
    "Entry": {},
}
_DATA_LOCATION = 14


def asks_for_files(data: bytes) -> bool:
    """Tell whether any tensor of an ONNX model, at any depth, is said to be stored in another file.

    Such a file is named by the model, so its digest is not in the manifest, and it may be anywhere.

    :param data: the file.
    :raises ValueError: it is no ONNX model.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = _message("Model").FromString(data)
    except DecodeError as err:
        raise ValueError(f"no ONNX model: {err}") from err
    waiting = [("Model", model)]
    while waiting:
        kind, message = waiting.pop()
        if kind == "Tensor" and (message.external_data or message.data_location):
            return True
        waiting += [
            (inner, part) for name, inner in _SCHEMA[kind].values() for part in getattr(message, name)
        ]
    return False


@cache
def _message(name: str) -> Any:
    """Build the message classes; every field is taken as repeated, as parsers merge what is given twice."""
    from google.protobuf import (  # type: ignore[import-untyped]
        descriptor_pb2,
        descriptor_pool,
        message_factory,
    )

    file = descriptor_pb2.FileDescriptorProto(name="airflow_mlops/onnx.proto", package="airflow_mlops.onnx")
    for message, fields in _SCHEMA.items():
        described = file.message_type.add(name=message)
        for number, (field, inner) in fields.items():
            described.field.add(
                name=field, number=number, label=3, type=11, type_name=f".{file.package}.{inner}"
            )
        if message == "Tensor":
            described.field.add(name="data_location", number=_DATA_LOCATION, label=3, type=5)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{name}"))

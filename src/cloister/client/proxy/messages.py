"""Messages of the Open Inference Protocol over gRPC, made from a table instead of generated code.

The table states names, types and numbers of the public interface (``open_inference_grpc.proto`` of
https://github.com/kserve/open-inference-protocol, Apache-2.0); a test compares it, field by field, with what
tritonclient ships. The messages live in a descriptor pool of their own: in the default one, a program that
also imports tritonclient (or Triton's or KServe's generated modules) would register the same names twice,
which protobuf refuses. And generated code works with few versions of protobuf; this with any.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE: Final = "inference"
SERVICE: Final = f"{PACKAGE}.GRPCInferenceService"

# Message -> its fields: (label, type, name, number). A type in capitals is a message; label "map" is a map
# from string to it, "oneof" a member of the message's one alternative.
_Fields = tuple[tuple[str, str, str, int], ...]
_TENSOR: Final[_Fields] = (
    ("", "string", "name", 1),
    ("", "string", "datatype", 2),
    ("repeated", "int64", "shape", 3),
    ("map", "InferParameter", "parameters", 4),
    ("", "InferTensorContents", "contents", 5),
)
_MODEL: Final[_Fields] = (("", "string", "name", 1), ("", "string", "version", 2))
TABLE: Final[dict[str, _Fields]] = {
    "ServerLiveRequest": (),
    "ServerLiveResponse": (("", "bool", "live", 1),),
    "ServerReadyRequest": (),
    "ServerReadyResponse": (("", "bool", "ready", 1),),
    "ModelReadyRequest": _MODEL,
    "ModelReadyResponse": (("", "bool", "ready", 1),),
    "ServerMetadataRequest": (),
    "ServerMetadataResponse": (
        ("", "string", "name", 1),
        ("", "string", "version", 2),
        ("repeated", "string", "extensions", 3),
    ),
    "ModelMetadataRequest": _MODEL,
    "ModelMetadataResponse": (
        ("", "string", "name", 1),
        ("repeated", "string", "versions", 2),
        ("", "string", "platform", 3),
        ("repeated", "ModelMetadataResponse.TensorMetadata", "inputs", 4),
        ("repeated", "ModelMetadataResponse.TensorMetadata", "outputs", 5),
    ),
    "ModelMetadataResponse.TensorMetadata": (
        ("", "string", "name", 1),
        ("", "string", "datatype", 2),
        ("repeated", "int64", "shape", 3),
    ),
    "ModelInferRequest": (
        ("", "string", "model_name", 1),
        ("", "string", "model_version", 2),
        ("", "string", "id", 3),
        ("map", "InferParameter", "parameters", 4),
        ("repeated", "ModelInferRequest.InferInputTensor", "inputs", 5),
        ("repeated", "ModelInferRequest.InferRequestedOutputTensor", "outputs", 6),
        ("repeated", "bytes", "raw_input_contents", 7),
    ),
    "ModelInferRequest.InferInputTensor": _TENSOR,
    "ModelInferRequest.InferRequestedOutputTensor": (
        ("", "string", "name", 1),
        ("map", "InferParameter", "parameters", 2),
    ),
    "ModelInferResponse": (
        ("", "string", "model_name", 1),
        ("", "string", "model_version", 2),
        ("", "string", "id", 3),
        ("map", "InferParameter", "parameters", 4),
        ("repeated", "ModelInferResponse.InferOutputTensor", "outputs", 5),
        ("repeated", "bytes", "raw_output_contents", 6),
    ),
    "ModelInferResponse.InferOutputTensor": _TENSOR,
    "InferParameter": (
        ("oneof", "bool", "bool_param", 1),
        ("oneof", "int64", "int64_param", 2),
        ("oneof", "string", "string_param", 3),
        ("oneof", "double", "double_param", 4),
        ("oneof", "uint64", "uint64_param", 5),
    ),
    "InferTensorContents": (
        ("repeated", "bool", "bool_contents", 1),
        ("repeated", "int32", "int_contents", 2),
        ("repeated", "int64", "int64_contents", 3),
        ("repeated", "uint32", "uint_contents", 4),
        ("repeated", "uint64", "uint64_contents", 5),
        ("repeated", "float", "fp32_contents", 6),
        ("repeated", "double", "fp64_contents", 7),
        ("repeated", "bytes", "bytes_contents", 8),
    ),
}
ONEOF: Final = "parameter_choice"
_KIND: Final = descriptor_pb2.FieldDescriptorProto


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="cloister/open_inference.proto", package=PACKAGE, syntax="proto3"
    )
    made: dict[str, Any] = {}
    for name, fields in TABLE.items():  # a nested message stands after the one around it
        outer, _, inner = name.rpartition(".")
        message = made[outer].nested_type.add(name=inner) if outer else file.message_type.add(name=inner)
        made[name] = message
        if any(label == "oneof" for label, *_ in fields):
            message.oneof_decl.add(name=ONEOF)
        for field in fields:
            _add(message, f".{PACKAGE}.{name}", field)
    return file


def _add(message: Any, path: str, field: tuple[str, str, str, int]) -> None:
    label, kind, name, number = field
    if label == "map":
        entry = message.nested_type.add(name=f"{name.title()}Entry")
        entry.options.map_entry = True
        _add(entry, "", ("", "string", "key", 1))
        _add(entry, "", ("", kind, "value", 2))
        label, kind = "repeated", f"{path}.{entry.name}"
    elif kind in TABLE:
        kind = f".{PACKAGE}.{kind}"
    made = message.field.add(name=name, number=number)
    made.label = _KIND.LABEL_REPEATED if label == "repeated" else _KIND.LABEL_OPTIONAL
    if kind.startswith("."):
        made.type, made.type_name = _KIND.TYPE_MESSAGE, kind
    else:
        made.type = _KIND.Type.Value(f"TYPE_{kind.upper()}")
    if label == "oneof":
        made.oneof_index = 0


_pool = descriptor_pool.DescriptorPool()
_pool.AddSerializedFile(_file().SerializeToString())


def message(name: str) -> Any:
    """The class of a message, such as ``ModelInferRequest``."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))

"""The Open Inference Protocol's answers in JSON, and the paths that ask for them."""

from __future__ import annotations

import json
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from cloister.core import oip
from cloister.core.ohttp import bhttp
from cloister.enclave.worker.models import LoadedModel
from cloister.enclave.worker.specs import TensorSpec
from cloister.errors import FormatError, NotFound

JSON: Final = b"application/json"
EXTENSIONS: Final = ("binary_tensor_data", "model_repository")
_PREFIX: Final = b"/v2/models/"


def json_response(value: dict[str, Any] | list[Any]) -> bhttp.Response:
    """A response of JSON."""
    return bhttp.Response(status=200, fields=((b"content-type", JSON),), content=json.dumps(value).encode())


def server_metadata() -> dict[str, Any]:
    """What ``GET /v2`` tells."""
    return {"name": "cloister", "version": oip.VERSION, "extensions": list(EXTENSIONS)}


def model_metadata(model: str, loaded: LoadedModel) -> dict[str, Any]:
    """What ``GET /v2/models/<model>`` tells."""

    def describe(spec: TensorSpec) -> dict[str, Any]:
        return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}

    return {
        "name": model,
        "versions": [oip.VERSION],
        "platform": "onnxruntime_onnx",
        "inputs": [describe(spec) for spec in loaded.inputs.values()],
        "outputs": [describe(spec) for spec in loaded.outputs],
    }


def model_route(path: bytes) -> tuple[str, bytes]:
    """Model id and action of ``/v2/models/<owner>/<name>[/versions/1][/infer|/ready]``.

    Raises:
        NotFound: another path, or another version.
        FormatError: no model id.
    """
    if not path.startswith(_PREFIX):
        raise NotFound(code="not-found.route", claim="route", expected="/v2/...", actual="another")
    rest, action = path[len(_PREFIX) :], b""
    for known in (b"infer", b"ready"):
        if rest.endswith(b"/" + known):
            rest, action = rest[: -len(known) - 1], known
    rest, versioned, version = rest.partition(b"/versions/")
    if versioned and version != oip.VERSION.encode():
        raise NotFound(
            "the model has no such version",
            code="not-found.version",
            claim="model version",
            expected=oip.VERSION,
            actual=version[:40].decode("ascii", "replace"),
            hint="A new version of a model replaces the old one: leave /versions/ out",
        )
    return model_name(rest), action


def model_name(quoted: bytes) -> str:
    """The model id in a part of a path; raises FormatError."""
    try:
        return unquote_to_bytes(quoted).decode("ascii")
    except UnicodeDecodeError as error:
        raise FormatError(claim="model id", expected="ASCII", actual="other bytes") from error

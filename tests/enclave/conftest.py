"""A small real model, sealed, and a worker's side of it without a key service."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from cloister.core.protocol.statement import SealedModel, ServingOptions, Statement, model_id
from cloister.core.sealing import Section, seal
from cloister.core.secret import Secret
from cloister.enclave.worker.membership import LiveModel
from support.realm import MemoryHost, owner_key, statement

KEY = Secret(b"model key of thirty-two bytes ok")
SERVICE = b"S" * 32


def onnx_model(scale: float = 2.0, size: int = 0) -> tuple[bytes, bytes]:
    """Graph and weights of ``y = x * w``, shapes ``(n, 4)``; ``size`` adds weights that nobody reads."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights"), ("offset", "0"), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["y"]), helper.make_node("Identity", ["x"], ["copy"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4]),
            helper.make_tensor_value_info("copy", TensorProto.FLOAT, ["n", 4]),
        ],
        [weight],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return made.SerializeToString(), np.full(4, scale, dtype="<f4").tobytes() + bytes(size)


@dataclass(frozen=True)
class Sealed:
    """A sealed model: what the host stores, what the owner says of it."""

    blob: bytes
    sealed: SealedModel
    live: LiveModel

    @property
    def model(self) -> str:
        return self.live.statement.model


def seal_model(
    name: str = "scale",
    *,
    sections: dict[str, bytes] | None = None,
    key: Secret = KEY,
    label: str | None = None,
    grants: dict[bytes, int] | None = None,
    serving: ServingOptions | None = None,
    **options: Any,
) -> Sealed:
    """Seal a model; ``label`` is the id in its header where that shall be another than in the statement."""
    if sections is None:
        graph, weights = onnx_model(**options)
        sections = {"graph": graph, "weights": weights}
    model = model_id(owner_key().thumbprint, name)
    made = seal(
        [Section.of(each, content) for each, content in sections.items()],
        model_id=label or model,
        key=key,
        chunk_size=4096,
    )
    blob = b"".join(bytes(piece) for piece in made)
    sealed = SealedModel(header=made.header.digest, blob=hashlib.sha256(blob).digest(), size=len(blob))
    said: Statement = statement(
        SERVICE, name=name, sealed_model=sealed, grants=grants or {}, options=serving or ServingOptions()
    )
    return Sealed(blob=blob, sealed=sealed, live=LiveModel(statement=said, digest=said.digest, key=KEY))


def hosting(*models: Sealed) -> MemoryHost:
    """A host that stores these sealed models."""
    return MemoryHost(blobs={each.sealed.blob: each.blob for each in models}, piece=1000)


def restated(each: Sealed, **changes: Any) -> Sealed:
    """The same blob under a statement that says something else of it."""
    sealed = dataclasses.replace(each.sealed, **changes)
    said = dataclasses.replace(each.live.statement, sealed_model=sealed)
    live = LiveModel(statement=said, digest=said.digest, key=each.live.key)
    return Sealed(blob=each.blob, sealed=sealed, live=live)


@pytest.fixture
def scale() -> Sealed:
    return seal_model()

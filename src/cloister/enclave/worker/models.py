"""Models in enclave memory: opened as they arrive, one session each, least recently used out first."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from cloister.core.oip import DTYPES, Array
from cloister.core.protocol.statement import SealedModel, Statement
from cloister.core.sealing.header import PREFIX_SIZE, SealedHeader, header_size
from cloister.core.sealing.unseal import Unsealer
from cloister.enclave.link import HostLink
from cloister.enclave.memory import overwrite_freed
from cloister.enclave.worker import bfloat16
from cloister.enclave.worker.graph import WEIGHTS, require_safe
from cloister.enclave.worker.membership import LiveModel
from cloister.errors import BindingRefused, FormatError, InvalidRequest, Overloaded, Tampered

# ONNX Runtime's names of tensor types, as the Open Inference Protocol has them.
_DATATYPES: Final = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """An input or output: its name, datatype, and shape with -1 for a free dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, argument: Any) -> TensorSpec:
        """The spec of an ONNX Runtime argument."""
        shape = tuple(side if isinstance(side, int) else -1 for side in argument.shape)
        return cls(name=argument.name, datatype=_DATATYPES.get(argument.type, argument.type), shape=shape)

    def require(self, array: Array) -> Array:
        """Refuse an array of another datatype or shape; gives the array as the session takes it.

        Raises:
            InvalidRequest: which names the input, the expected and the actual value.
        """
        wanted = DTYPES.get(self.datatype)
        if wanted is None or array.dtype != wanted:
            raise InvalidRequest(
                code="request.datatype",
                claim=f"datatype of {self.name}",
                expected=self.datatype,
                actual=array.dtype,
            )
        fits = len(array.shape) == len(self.shape) and all(
            want in (-1, have) for want, have in zip(self.shape, array.shape, strict=True)
        )
        if not fits:
            raise InvalidRequest(
                code="request.shape", claim=f"shape of {self.name}", expected=self.shape, actual=array.shape
            )
        if self.datatype == "BYTES":
            try:
                return (
                    np.vectorize(lambda item: item.decode(), otypes=[object])(array) if array.size else array
                )
            except UnicodeDecodeError as error:
                raise InvalidRequest(
                    code="request.data", claim=f"data of {self.name}", expected="UTF-8"
                ) from error
        return array


@dataclass(slots=True, kw_only=True)
class LoadedModel:
    """A session, and what it took to get it.

    Attributes:
        session: Shared by every request; its `run` releases the GIL.
        inputs: By name.
        outputs: In the graph's order.
        open_seconds: What fetching and opening it took.
        build_seconds: What building the session took.
    """

    session: ort.InferenceSession
    inputs: dict[str, TensorSpec]
    outputs: tuple[TensorSpec, ...]
    open_seconds: float
    build_seconds: float

    def run(self, inputs: dict[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        """Run the model; blocking. Raises InvalidRequest where ONNX Runtime refuses the input."""
        names = list(outputs) or [spec.name for spec in self.outputs]
        special = any(spec.datatype == "BF16" for spec in (*self.inputs.values(), *self.outputs))
        try:
            results = (
                bfloat16.run(self.session, names, inputs) if special else self.session.run(names, inputs)
            )
        except Exception:
            raise InvalidRequest(
                "the model fails on this input",
                code="request.execution",
                claim="execution",
                expected="outputs",
            ) from None
        return dict(zip(names, results, strict=True))


SlotName = tuple[str, bytes, bytes, str]


@dataclass(slots=True)
class _Slot:
    """A model's place: taken, with its bytes, before the model is there."""

    size: int
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    model: LoadedModel | None = None
    users: int = 0  # that wait for it or use it


def slot_name(statement: Statement) -> SlotName:
    """A model's place: by its id too, for anybody may name a public header in a statement.

    By its isolation too, for a strict model's session is another one.
    """
    sealed = statement.sealed_model
    return statement.model, sealed.header, sealed.blob, statement.options.isolation


class ModelCache:
    """Opened models within a memory budget. A new sealed version is another model.

    Args:
        link: Where sealed models come from.
        budget: Bytes of plaintext that may be held.
    """

    def __init__(self, link: HostLink, *, budget: int) -> None:
        self._link = link
        self._budget = budget
        self._slots: OrderedDict[SlotName, _Slot] = OrderedDict()

    @asynccontextmanager
    async def use(self, live: LiveModel) -> AsyncIterator[tuple[LoadedModel, bool]]:
        """A model, loaded first where it isn't (then the flag is True), and pinned while in use."""
        sealed = live.statement.sealed_model
        name = slot_name(live.statement)
        slot = self._slots.get(name) or self._reserve(name, sealed)
        self._slots.move_to_end(name)
        slot.users += 1
        try:
            async with slot.lock:
                fresh = slot.model is None
                if slot.model is None:
                    slot.model = await self._load(live, sealed)
                model = slot.model
            yield model, fresh
        finally:
            slot.users -= 1
            if slot.model is None and not slot.users and self._slots.get(name) is slot:
                del self._slots[name]

    def retain(self, names: set[SlotName]) -> None:
        """Drop idle models whose statements are gone; ``names`` are those of `slot_name`."""
        for name, slot in list(self._slots.items()):
            if name not in names and not slot.users:
                del self._slots[name]

    def holds(self, name: SlotName) -> bool:
        """Whether a model is in memory, ready to run."""
        slot = self._slots.get(name)
        return slot is not None and slot.model is not None

    def drop(self, name: SlotName) -> bool:
        """Drop a model unless it is in use; True where it is not in memory any more."""
        slot = self._slots.get(name)
        if slot is not None and slot.users:
            return False
        self._slots.pop(name, None)
        return True

    @property
    def held(self) -> int:
        """Plaintext bytes held now, or about to be."""
        return sum(slot.size for slot in self._slots.values())

    async def _load(self, live: LiveModel, sealed: SealedModel) -> LoadedModel:
        started = time.monotonic()
        sections = await self._open(live, sealed)
        opened = time.monotonic()
        graph, weights = sections.get("graph"), sections.get(WEIGHTS)
        if graph is None or weights is None or len(sections) != 2:
            raise FormatError(
                "the sealed model has other sections",
                code="sealing.section",
                claim="sections",
                expected="graph, weights",
                actual=", ".join(sections),
            )
        strict = live.statement.options.isolation == "strict"
        session = await asyncio.to_thread(_build, graph, weights, strict=strict)
        built = time.monotonic()
        return LoadedModel(
            session=session,
            inputs={spec.name: spec for spec in map(TensorSpec.of, session.get_inputs())},
            outputs=tuple(map(TensorSpec.of, session.get_outputs())),
            open_seconds=opened - started,
            build_seconds=built - opened,
        )

    def _reserve(self, name: SlotName, sealed: SealedModel) -> _Slot:
        """Take room for a model, from the idle ones that were used longest ago; raises Overloaded."""
        if sealed.size > self._budget:
            raise Overloaded(
                "the model is larger than the worker's memory budget",
                code="overloaded.memory",
                claim="model size",
                expected=f"at most {self._budget} B",
                actual=f"{sealed.size} B",
            )
        for other, slot in list(self._slots.items()):
            if self.held + sealed.size <= self._budget:
                break
            if not slot.users:
                del self._slots[other]
        if self.held + sealed.size > self._budget:
            raise Overloaded(
                "every model in memory is in use", code="overloaded.memory", claim="memory budget"
            )
        slot = self._slots[name] = _Slot(size=sealed.size)
        return slot

    async def _open(self, live: LiveModel, sealed: SealedModel) -> dict[str, memoryview]:
        """Open the sealed model as it arrives; nothing of it is used before its last chunk verified."""
        unsealer: Unsealer | None = None
        start = bytearray()
        with ExitStack() as opened:
            async for piece in self._link.blob(sealed.blob, sealed.size):
                if unsealer is not None:
                    unsealer.feed(piece)
                    continue
                start += piece
                if len(start) < PREFIX_SIZE:
                    continue
                length = header_size(bytes(start[:PREFIX_SIZE]))
                if len(start) < length:
                    continue
                unsealer = opened.enter_context(self._begin(live, sealed, bytes(start[:length])))
                unsealer.feed(memoryview(start)[length:])
            if unsealer is not None:
                return unsealer.finish()
        raise Tampered("the sealed model ends in its header", code="sealing.truncated", claim="sealed model")

    def _begin(self, live: LiveModel, sealed: SealedModel, raw: bytes) -> Unsealer:
        header = SealedHeader.from_bytes(raw)
        header.require(sealed.header)
        if header.model_id != live.statement.model:
            raise BindingRefused(
                code="binding.model",
                claim="sealed model's id",
                expected=live.statement.model,
                actual=header.model_id,
            )
        if header.container_size != sealed.size:
            raise BindingRefused(
                code="binding.size", claim="sealed size", expected=sealed.size, actual=header.container_size
            )
        return Unsealer(live.key, header, digest=sealed.header)


def _build(graph: memoryview, weights: memoryview, *, strict: bool = False) -> ort.InferenceSession:
    require_safe(graph)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if strict:  # an arena would keep one request's intermediate results for the next; now a run frees them
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        overwrite_freed()
    # Else bytes that `require_safe` reads as a protocol buffer could be loaded as ONNX Runtime's own format.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        if len(weights):  # read while the session is made; the caller holds it until then
            options.add_external_initializers_from_files_in_memory([WEIGHTS], [weights], [len(weights)])
        return ort.InferenceSession(bytes(graph), options, providers=["CPUExecutionProvider"])
    except Exception:
        raise InvalidRequest(
            "ONNX Runtime does not load the model",
            code="model.load",
            claim="model",
            expected="a loadable graph",
        ) from None

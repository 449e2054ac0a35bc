"""Models in enclave memory: opened as they arrive, one session each, least recently used out first."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from cloister.core.oip import Array
from cloister.core.protocol.statement import SealedModel, Statement, owner_of
from cloister.core.sealing.header import SealedHeader
from cloister.enclave.link import HostLink
from cloister.enclave.worker import bfloat16
from cloister.enclave.worker.isolation import BASE_MEMORY, Children, RemoteModel
from cloister.enclave.worker.loading import Region, open_sealed
from cloister.enclave.worker.membership import LiveModel
from cloister.enclave.worker.session import PREPACK_LIMIT, Built, Memory, build
from cloister.enclave.worker.shared import SharedRegion
from cloister.enclave.worker.specs import TensorSpec
from cloister.errors import BindingRefused, InvalidRequest, Overloaded, Unavailable

MAX_KNOWN: Final = 4096  # models whose memory is remembered
REFUSED: Final = 60.0  # seconds for which a model that turned out too large isn't loaded again


@dataclass(slots=True, kw_only=True)
class LoadedModel:
    """A session, and what it took to get it.

    Attributes:
        session: Shared by every request: an `ort.InferenceSession`, whose `run` releases the GIL, or a
            `RemoteModel` in the owner's child process.
        inputs: By name.
        outputs: In the graph's order.
        open_seconds: What fetching and opening it took.
        build_seconds: What building the session took, and waiting for another to be built.
        memory: Bytes that it takes (`Built.memory`).
        region: Where its weights lie, until nobody holds the session any more.
        has_bfloat16: Whether an input or output is of the type that NumPy doesn't have.
        remote: Whether it runs in a child process, which may end.
    """

    session: Any
    inputs: dict[str, TensorSpec]
    outputs: tuple[TensorSpec, ...]
    open_seconds: float
    build_seconds: float
    memory: int = 0
    region: Memory | None = None
    has_bfloat16: bool = field(init=False)
    remote: bool = field(init=False)

    def __post_init__(self) -> None:
        specs = (*self.inputs.values(), *self.outputs)
        self.remote = isinstance(self.session, RemoteModel)
        self.has_bfloat16 = not self.remote and any(spec.datatype == "BF16" for spec in specs)

    @classmethod
    def of(cls, built: Built, *, open_seconds: float, build_seconds: float) -> LoadedModel:
        """The model of a session."""
        session = built.session
        if isinstance(session, RemoteModel):
            inputs, outputs = session.inputs, session.outputs
        else:
            inputs = tuple(map(TensorSpec.of, session.get_inputs()))
            outputs = tuple(map(TensorSpec.of, session.get_outputs()))
        return cls(
            session=session,
            inputs={spec.name: spec for spec in inputs},
            outputs=outputs,
            open_seconds=open_seconds,
            build_seconds=build_seconds,
            memory=built.memory,
            region=built.region,
        )

    @property
    def alive(self) -> bool:
        """Whether it can run; False once its child process ended."""
        return not self.remote or bool(self.session.alive)

    def run(self, inputs: dict[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        """Run the model; blocking.

        Raises:
            InvalidRequest: ONNX Runtime refuses the input.
            Unavailable: the child process that runs it ended, or there is no memory for the tensors.
        """
        names = list(outputs) or [spec.name for spec in self.outputs]
        try:
            if self.has_bfloat16:
                results = bfloat16.run(self.session, names, inputs)
            else:
                results = self.session.run(names, inputs)
        except Unavailable:
            raise
        except Exception:
            raise InvalidRequest(
                "the model fails on this input",
                code="request.execution",
                claim="execution",
                expected="outputs",
                actual="a failure of ONNX Runtime's",
                hint="Check that sides which belong together agree, such as the rows of each input",
            ) from None
        return dict(zip(names, results, strict=True))


SlotName = tuple[str, bytes, bytes, str]


@dataclass(slots=True)
class _Slot:
    """A model's place: taken, with its bytes, before the model is there."""

    size: int  # estimated until the model is built, then what it takes
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

    Counted for each model is what it takes once it is built: its plaintext, and what ONNX Runtime allocated
    and kept (`Built.memory`; measured: 1.2 times the weights for VGG19, 2.1 for ResNet50). Before a model's
    first load it is `estimate`; later loads know. Not counted: what building one allocates and frees again
    (up to 1.1 times the weights of a small model, 0.1 of a large one), and what runs allocate.

    Args:
        link: Where sealed models come from.
        budget: Bytes that models may take, child processes included.
        children: Of a shared pool's owners, where models run in them; owned by the caller.
    """

    def __init__(self, link: HostLink, *, budget: int, children: Children | None = None) -> None:
        self._link = link
        self._budget = budget
        self._children = children
        self._base = BASE_MEMORY if children is not None else 0  # bytes of each owner's process
        self._slots: OrderedDict[SlotName, _Slot] = OrderedDict()
        self._known: OrderedDict[SlotName, tuple[int, float]] = OrderedDict()  # bytes taken, believed until
        self._leaving: list[tuple[Memory, int]] = []  # dropped, and maybe still run by somebody
        self._freeing: set[asyncio.Future[None]] = set()

    @asynccontextmanager
    async def use(self, live: LiveModel) -> AsyncIterator[tuple[LoadedModel, bool]]:
        """A model, loaded first where it isn't (then the flag is True), and pinned while in use."""
        name = slot_name(live.statement)
        slot = self._slots.get(name) or self._reserve(name, live.statement.sealed_model)
        self._slots.move_to_end(name)
        slot.users += 1
        try:
            async with slot.lock:
                if slot.model is not None and not slot.model.alive:
                    self._free(slot)
                fresh = slot.model is None
                if slot.model is None:
                    slot.model = await self._load(live)
                    self._weigh(name, slot, slot.model.memory)
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
                self._free(self._slots.pop(name))

    def holds(self, name: SlotName) -> bool:
        """Whether a model is in memory, ready to run."""
        slot = self._slots.get(name)
        return slot is not None and slot.model is not None and slot.model.alive

    def drop(self, name: SlotName) -> bool:
        """Drop a model unless it is in use; True where it is not in memory any more."""
        slot = self._slots.get(name)
        if slot is not None and slot.users:
            return False
        if slot is not None:
            self._free(self._slots.pop(name))
        return True

    @property
    def held(self) -> int:
        """Bytes that models take now, or are about to; those that were dropped until they are gone."""
        self._leaving = [each for each in self._leaving if not each[0].released]
        return self._taken() + sum(size for _, size in self._leaving)

    async def _load(self, live: LiveModel) -> LoadedModel:
        if self._freeing:
            await asyncio.wait(set(self._freeing))
        with self._place(live.statement) as (take, make, loader):
            sealed, started = live.statement.sealed_model, time.monotonic()
            opened = await open_sealed(
                self._link.blob(sealed.blob, sealed.size),
                key=live.key,
                digest=sealed.header,
                admit=lambda header: _admit(header, live),
                take=take,
            )
            arrived = time.monotonic()
            try:
                strict = live.statement.options.isolation == "strict"
                loop = asyncio.get_running_loop()
                built = await loop.run_in_executor(loader, partial(make, opened, strict=strict))
            except asyncio.CancelledError:  # the thread goes on, and then nobody holds the session
                self._leaving.append((opened.region, opened.region.size))
                raise
        return LoadedModel.of(built, open_seconds=arrived - started, build_seconds=time.monotonic() - arrived)

    @contextmanager
    def _place(
        self, statement: Statement
    ) -> Iterator[tuple[Callable[[int], Region], Callable[..., Built], Executor | None]]:
        """How to take memory for a model, how to build it, and in whose thread: here, or in a child."""
        if self._children is None:
            yield Region, build, None
            return
        with self._children.hold(statement.owner) as child:  # it starts while the model arrives
            yield SharedRegion, partial(self._children.build, statement.owner, child), child.loader

    def _taken(self, *wanted: SlotName) -> int:
        """Bytes of all slots, and of the child processes of their owners, that of a wanted one included."""
        owners = {owner_of(name[0]) for name in (*self._slots, *wanted)} if self._base else ()
        return sum(slot.size for slot in self._slots.values()) + self._base * len(owners)

    def _weigh(self, name: SlotName, slot: _Slot, memory: int) -> None:
        """Count what the model turned out to take; raises Overloaded, and lets it go, if that's too much.

        What others' runs allocated meanwhile is counted with it, so of several loads the least is remembered,
        and a refusal for `REFUSED` seconds alone.
        """
        slot.size = min(memory, self._known.get(name, (memory, 0.0))[0])
        believed = math.inf
        try:
            self._make_room(name, 0, slot.size)
        except Overloaded:
            believed = time.monotonic() + REFUSED
            self._free(slot)
            raise
        finally:
            self._known[name] = slot.size, believed
            self._known.move_to_end(name)
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)

    def _reserve(self, name: SlotName, sealed: SealedModel) -> _Slot:
        """Take room for a model, from the idle ones that were used longest ago; raises Overloaded."""
        known, believed = self._known.get(name, (0, 0.0))
        # An estimate alone refuses no model that might fit.
        size = max(sealed.size, min(estimate(sealed.size), self._budget - self._base))
        if believed > time.monotonic():
            size = known
        self._make_room(name, size, size)
        slot = self._slots[name] = _Slot(size=size)
        return slot

    def _make_room(self, wanted: SlotName, more: int, size: int) -> None:
        """Drop idle models until ``more`` bytes fit, for a model of ``size`` in all; raises Overloaded."""
        if (size := size + self._base) > self._budget:
            raise Overloaded(
                "the model is larger than the worker's memory budget",
                code="overloaded.model",
                claim="model size",
                expected=f"at most {self._budget} B",
                actual=f"{size} B",
                hint="The operator can give workers more (memory_mib): about twice the weights is needed",
            )
        idle = (name for name, slot in list(self._slots.items()) if not slot.users)
        while self._taken(wanted) + more > self._budget:
            name = next(idle, None)
            if name is None:
                raise Overloaded(
                    "every model in memory is in use", code="overloaded.memory", claim="memory budget"
                )
            self._free(self._slots.pop(name))

    def _free(self, slot: _Slot) -> None:
        """Let a model go, in a thread: wiping takes a while. The next load begins behind it."""
        if slot.model is None:
            return
        if slot.model.region is not None:
            self._leaving.append((slot.model.region, slot.model.memory))
        last, slot.model = [slot.model], None
        freeing = asyncio.get_running_loop().run_in_executor(None, last.clear)
        self._freeing.add(freeing)
        freeing.add_done_callback(self._freeing.discard)


def estimate(size: int) -> int:
    """Bytes that a model takes whose sealed form has ``size``, before anybody has built it."""
    return size * 2 if size < PREPACK_LIMIT else size * 5 // 4


def _admit(header: SealedHeader, live: LiveModel) -> None:
    """Refuse a container that isn't what the statement says, before memory is taken for it."""
    if header.model_id != live.statement.model:
        raise BindingRefused(
            code="binding.model",
            claim="sealed model's id",
            expected=live.statement.model,
            actual=header.model_id,
        )
    size = live.statement.sealed_model.size
    if header.container_size != size:
        raise BindingRefused(
            code="binding.size", claim="sealed size", expected=size, actual=header.container_size
        )

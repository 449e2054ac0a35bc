"""The worker's side of shared pools: a child process for each owner, and the models that run there.

A child is a fresh interpreter that runs this enclave's own code (`child`). It inherits one socket and nothing
else: no memory of the worker, no other descriptor, no environment. Keys stay here; sealed models are opened
into memory that the child maps to read. What it answers is checked (`packets`, `tensors.copy`). One that
dies, lies, or is silent for `PATIENCE` is killed: what runs in it fails, and the next load starts another.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from cloister.core.oip import Array
from cloister.enclave.worker import packets, tensors
from cloister.enclave.worker.graph import require_safe
from cloister.enclave.worker.packets import Line, child_lied, child_lost
from cloister.enclave.worker.session import Built, Memory, Opened, unloadable
from cloister.enclave.worker.shared import Buffers, SharedRegion
from cloister.enclave.worker.specs import TensorSpec
from cloister.errors import FormatError, Overloaded, Unavailable

PATIENCE: Final = 300.0  # seconds for one answer, so for one run, too
BASE_MEMORY: Final = 64 << 20  # bytes that a child takes before its first model
ROOM: Final = 16 << 20  # bytes for outputs at first; what nobody writes takes no memory
MAX_OUTPUTS: Final = 256 << 20  # bytes of a run; an answer takes 64 MiB at most
_ATTEMPTS: Final = 3  # at a run whose outputs turn out to be larger
_BOOT: Final = (
    "import sys; sys.path[:] = sys.argv[4:]; del sys.argv[4:]; "
    "from cloister.enclave.worker.child import main; main(*map(int, sys.argv[1:]))"
)

logger: Final = logging.getLogger(__name__)
_elsewhere: Final = threading.local()


def cpu_seconds() -> float:
    """Processor time of this thread, and of what children ran for it."""
    return time.thread_time() + getattr(_elsewhere, "seconds", 0.0)


class Child:
    """One owner's process; made and counted by `Children`. Its methods may be called in any thread.

    Started in a thread that lives as long as the worker: the kernel ends a child with the thread.
    """

    def __init__(self, *, threads: int) -> None:
        self.uses = 0  # loads that go on, and models; guarded by `Children`
        self._ended = False
        self._lock = threading.Lock()
        self.loader: Final = ThreadPoolExecutor(1, "load")  # its loads keep nobody else's waiting
        self._numbers = itertools.count()
        self._buffers = Buffers()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = [str(os.getpid()), str(theirs.fileno()), str(threads), *filter(None, sys.path)]
        try:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-S", "-B", "-c", _BOOT, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={"LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"},
            )
        except OSError as error:
            ours.close()
            raise child_lost("it did not start") from error
        finally:
            theirs.close()
        self._line = Line(ours, patience=PATIENCE)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can be asked anything."""
        return not self._ended and self._process.poll() is None

    def end(self) -> None:
        """Kill it, and wait until it is gone; what waits for its answers fails."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
        self._process.kill()
        self._line.close()
        self._process.wait()
        self._buffers.close()
        self.loader.shutdown(wait=False, cancel_futures=True)

    def load(
        self, opened: Opened, *, strict: bool
    ) -> tuple[int, int, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Build a session there; blocking, in `loader`. Gives its number, its bytes, inputs and outputs.

        Raises:
            FormatError, InvalidRequest: as `session.build`.
            Unavailable: the child is gone, or was killed for its answer.
        """
        region = opened.region
        assert isinstance(region, SharedRegion)
        require_safe(opened.graph)
        number = next(self._numbers)
        places = [list(region.place(opened.graph)), list(region.place(opened.weights))]
        with self._trusting_nothing("loaded"):
            self._line.greet()
            kind, fields = self._line.ask("load", [number, strict, region.size, *places], region.descriptor)
            region.hand_over()
            if kind == "loaded":
                return number, *packets.parse_loaded(fields)
            if kind != "failed":
                raise child_lied("kind of an answer")
        self.drop(number)
        raise unloadable()

    def run(self, model: int, wanted: list[tuple[int, str]], inputs: list[Array]) -> list[Array] | None:
        """Run a model on inputs in its order; outputs by index and datatype. None where it fails on them.

        Raises:
            Unavailable: as `load`.
            Overloaded: there is no memory for the tensors.
        """
        parts, room = tensors.parts_of(inputs), ROOM
        for _ in range(_ATTEMPTS):
            outputs, room = self._run(model, wanted, parts, room)
            if not 0 < room <= MAX_OUTPUTS:
                return outputs
        return None

    def _run(
        self, model: int, wanted: list[tuple[int, str]], parts: list[tensors.Part], room: int
    ) -> tuple[list[Array] | None, int]:
        """Run with so much room for outputs; gives them, or the bytes that they need, or neither."""
        start = end = tensors.size_of(parts)
        with self._trusting_nothing("ran"), self._buffers.take(start + room) as buffer:
            began = time.monotonic()
            try:
                given, _ = tensors.write(buffer.memory, parts, 0)
                fields = [
                    model,
                    buffer.number,
                    len(buffer.memory),
                    given,
                    [index for index, _ in wanted],
                    start,
                ]
                kind, answer = self._line.ask("run", fields, buffer.descriptor)
                if kind == "failed":  # it may not have taken the buffer's descriptor
                    return None, 0
                buffer.hand_over()
                if kind == "large":
                    return None, packets.parse_large(answer)
                if kind != "ran":
                    raise child_lied("kind of an answer")
                seconds, places = packets.parse_ran(answer, outputs=len(wanted))
                outputs = [
                    tensors.copy(buffer.memory, place, kind=datatype, start=start)
                    for place, (_, datatype) in zip(places, wanted, strict=True)
                ]
                end = max([start, *(place[2] + place[3] for place in places)])
            finally:
                tensors.wipe(buffer.memory, end)
        passed = getattr(_elsewhere, "seconds", 0.0)
        _elsewhere.seconds = passed + min(seconds, time.monotonic() - began)
        return outputs, 0

    def drop(self, model: int) -> None:
        """Let a model go there; waits for its end alone, where it doesn't listen."""
        if not self._ended:
            try:
                self._line.tell("drop", [model])
            except Unavailable:
                self.end()

    @contextlib.contextmanager
    def _trusting_nothing(self, what: str) -> Iterator[None]:
        """End the child where it failed or lied; raises Unavailable for what doesn't parse."""
        try:
            yield
        except FormatError as error:
            self.end()
            logger.warning("a child process was ended: %s", error)
            raise child_lied(what) from error
        except Overloaded:
            raise
        except Unavailable as error:
            self.end()
            logger.warning("a child process was ended: %s", error)
            raise


class RemoteModel:
    """A model in a child; it lives there as long as anybody holds this.

    Attributes:
        inputs: In the graph's order, as `outputs`.
    """

    def __init__(
        self, child: Child, number: int, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        self._child = child
        self._number = number
        self.inputs = inputs
        self.outputs = outputs
        self._wanted = {spec.name: (index, spec.datatype) for index, spec in enumerate(outputs)}

    @property
    def alive(self) -> bool:
        """Whether it can run."""
        return self._child.alive

    def run(self, names: list[str], inputs: dict[str, Array]) -> list[Array]:
        """The named outputs; blocking.

        Raises:
            Unavailable, Overloaded: as `Child.run`.
            ValueError: the model fails on this input.
        """
        wanted = [self._wanted[name] for name in names]
        results = self._child.run(self._number, wanted, [inputs[spec.name] for spec in self.inputs])
        if results is None:
            raise ValueError
        return results


class Children:
    """The processes of a shared pool's owners: each lives while it loads a model or has one. Owns them.

    Args:
        threads: How many runs there may be at once.
    """

    def __init__(self, *, threads: int) -> None:
        self._threads = threads
        self._lock = threading.RLock()  # a finalizer may run while its own thread holds it
        self._children: dict[bytes, Child] = {}

    @contextlib.contextmanager
    def hold(self, owner: bytes) -> Iterator[Child]:
        """The child of an owner, started where there is none; in the event loop's thread.

        Raises:
            Unavailable: it could not be started.
        """
        with self._lock:
            child = self._children.get(owner)
            if child is None or not child.alive:
                child = self._children[owner] = Child(threads=self._threads)
            child.uses += 1
        try:
            yield child
        finally:
            self._leave(owner, child)

    def build(self, owner: bytes, child: Child, opened: Opened, *, strict: bool) -> Built:
        """Build a model in a child; blocking. Where that fails, the plaintext is wiped.

        Raises:
            FormatError, InvalidRequest, Unavailable: as `Child.load`.
        """
        region = opened.region
        try:
            number, memory, inputs, outputs = child.load(opened, strict=strict)
            with self._lock:
                child.uses += 1
        except BaseException:
            region.release()
            raise
        model = RemoteModel(child, number, inputs, outputs)
        weakref.finalize(model, self._drop, owner, child, number, region).atexit = False
        return Built(session=model, region=region, memory=max(memory, region.size))  # the rest is its word

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            children, self._children = list(self._children.values()), {}
        for child in children:
            child.end()

    def _drop(self, owner: bytes, child: Child, number: int, region: Memory) -> None:
        region.release()
        child.drop(number)
        self._leave(owner, child)

    def _leave(self, owner: bytes, child: Child) -> None:
        with self._lock:
            child.uses -= 1
            if child.uses:
                return
            if self._children.get(owner) is child:
                del self._children[owner]
        child.end()

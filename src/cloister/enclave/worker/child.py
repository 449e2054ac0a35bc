"""The process of one owner in a shared pool: runs that owner's models, and can do nothing else.

A worker starts it as a fresh interpreter with one socket and nothing of its own memory. It takes models and
tensors through shared memory, and messages, of which each is one packet of CBOR:

- to it: ``[number, "load", [model, strict, size, graph, weights]]`` with a descriptor, where the last two are
  ``[start, end]``; ``[number, "run", [model, buffer, size, inputs, outputs, start]]``, with a descriptor
  where the buffer is new; ``[0, "drop", [model]]``, which isn't answered;
- from it: ``[0, "ready", []]`` once, or ``[0, "failed", []]``; then under a question's number
  ``loaded [memory, inputs, outputs]``, ``ran [CPU seconds, tensors]``, ``large [bytes]`` where the outputs
  didn't fit, or ``failed []``.

Threads take packets from the one socket as they come. `confinement` says what it gives up before the first.
"""

from __future__ import annotations

import array
import mmap
import os
import socket
import sys
import threading
import time
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from cloister.core.encoding import decode, encode
from cloister.core.oip import Array
from cloister.enclave.memory import harden
from cloister.enclave.worker import bfloat16, confinement, tensors
from cloister.enclave.worker.batching import wipe_arrays
from cloister.enclave.worker.packets import MAX_PACKET
from cloister.enclave.worker.session import Opened, build, start_runtime
from cloister.enclave.worker.specs import TensorSpec

SPARE: Final = 1  # thread beside those that run, for a load
_INTS: Final = array.array("i").itemsize


class Mapping:
    """A model's plaintext as the worker opened it; read only."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        self.released = False
        self._memory: mmap.mmap | None = mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ)

    def view(self, start: int, end: int) -> memoryview:
        """A part of it."""
        assert self._memory is not None
        return memoryview(self._memory)[start:end]

    def release(self) -> None:
        """Let it go: it is unmapped with its last view. The worker wipes it."""
        self._memory, self.released = None, True


class _Model:
    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.inputs = [TensorSpec.of(each) for each in session.get_inputs()]
        self.outputs = [TensorSpec.of(each) for each in session.get_outputs()]
        self.has_bfloat16 = any(spec.datatype == "BF16" for spec in (*self.inputs, *self.outputs))

    def run(self, names: list[str], inputs: dict[str, Array]) -> list[Array]:
        if self.has_bfloat16:
            return bfloat16.run(self.session, names, inputs)
        results: list[Array] = self.session.run(names, inputs)
        return results


class _Server:
    """Answers packets; `serve` may run in several threads."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._models: dict[int, _Model] = {}
        self._buffers: dict[int, mmap.mmap] = {}

    def serve(self) -> None:
        """Until the worker is gone; then the process ends."""
        while True:
            packet, descriptors = self._receive()
            if not packet:
                os._exit(0)
            number, kind, fields = decode(packet, what="packet", limit=MAX_PACKET)
            try:
                if kind == "drop":
                    self._models.pop(fields[0], None)
                    continue
                answer = (self._load if kind == "load" else self._run)(fields, descriptors)
            except Exception:
                answer = ["failed", []]
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            self.answer(number, answer)

    def answer(self, number: int, answer: list[Any]) -> None:
        """Send one packet, or that the answer has no place in one."""
        packet = encode([number, *answer])
        self._link.send(packet if len(packet) <= MAX_PACKET else encode([number, "failed", []]))

    def _receive(self) -> tuple[bytes, list[int]]:
        packet, extra, _, _ = self._link.recvmsg(
            MAX_PACKET, socket.CMSG_SPACE(_INTS), socket.MSG_CMSG_CLOEXEC
        )
        descriptors = array.array("i")
        for _, _, data in extra:
            descriptors.frombytes(data[: len(data) // _INTS * _INTS])
        return packet, descriptors.tolist()

    def _load(self, fields: list[Any], descriptors: list[int]) -> list[Any]:
        model, strict, size, graph, weights = fields
        region = Mapping(descriptors[0], size)
        opened = Opened(region=region, graph=region.view(*graph), weights=region.view(*weights))
        built = build(opened, strict=strict)
        made = self._models[model] = _Model(built.session)
        specs = [
            [[spec.name, spec.datatype, spec.shape] for spec in each] for each in (made.inputs, made.outputs)
        ]
        return ["loaded", [built.memory, *specs]]

    def _run(self, fields: list[Any], descriptors: list[int]) -> list[Any]:
        model, buffer, size, inputs, outputs, start = fields
        if descriptors:
            self._buffers[buffer] = mmap.mmap(descriptors[0], size)
        memory, runs = self._buffers[buffer], self._models[model]
        names = [runs.outputs[index].name for index in outputs]
        given = {
            spec.name: tensors.view(memory, tensor) for spec, tensor in zip(runs.inputs, inputs, strict=True)
        }
        began = time.thread_time()
        results = runs.run(names, given)
        seconds = time.thread_time() - began
        try:
            parts = tensors.parts_of(results)
            if (needed := tensors.size_of(parts)) > size - start:
                return ["large", [needed]]
            return ["ran", [seconds, tensors.write(memory, parts, start)[0]]]
        finally:
            wipe_arrays(
                {str(index): result for index, result in enumerate(results) if type(result) is np.ndarray}
            )


def main(parent: int, descriptor: int, threads: int) -> None:
    """Become the child of a worker, and end with it.

    Args:
        parent: The worker's process id.
        descriptor: Of the socket.
        threads: How many runs there may be at once.
    """
    confinement.die_with(parent)
    server = _Server(socket.socket(fileno=descriptor))
    try:
        harden()
        start_runtime()
        confinement.close_files()
        for index in range(threads + SPARE - 1):
            threading.Thread(target=server.serve, name=f"run-{index}", daemon=True).start()
        confinement.filter_calls()
    except OSError:
        server.answer(0, ["failed", []])
        return
    server.answer(0, ["ready", []])
    server.serve()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))

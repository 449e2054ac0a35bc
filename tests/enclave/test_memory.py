"""Wiping: our own buffers, and what ONNX Runtime leaves of a strict model's request."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from cloister.enclave.memory import wipe

SIDE = 300_000  # elements of each intermediate result: 1.2 MB
SECRET, SHIFT, FACTOR = 1234.5, 1000.25, 3.0
CHILD = """
import os, sys
import numpy as np
from cloister.enclave.worker.session import build_session
graph = sys.stdin.buffer.read(int(sys.argv[1]))
session = build_session(memoryview(graph), memoryview(b""), strict=sys.argv[2] == "strict")
x = np.full((1, int(sys.argv[3])), float(sys.argv[4]), np.float32)
for _ in range(3):
    (total,) = session.run(None, {"x": x})
del x
print("ran", flush=True)
os.read(0, 1)
"""


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 200_000])
@pytest.mark.parametrize("kind", [bytearray, lambda data: memoryview(bytearray(data))])
def test_wiped(kind, size):
    buffer = kind(b"\xff" * size)
    wipe(buffer)
    assert bytes(buffer) == bytes(size)


def test_what_can_not_be_written_is_left_alone():
    view = memoryview(b"abc")
    wipe(view)
    assert bytes(view) == b"abc"


def graph() -> bytes:
    """``total = sum((x + SHIFT) * FACTOR)``: two intermediate results as large as the input."""

    def constant(name: str, value: float) -> TensorProto:
        return helper.make_tensor(name, TensorProto.FLOAT, [1], [value])

    made = helper.make_graph(
        [
            helper.make_node("Add", ["x", "shift"], ["a"]),
            helper.make_node("Mul", ["a", "factor"], ["b"]),
            helper.make_node("ReduceSum", ["b"], ["sum"], keepdims=0),
            helper.make_node("ReduceMax", ["a"], ["max"], keepdims=0),
            helper.make_node("Add", ["sum", "max"], ["total"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", SIDE])],
        [helper.make_tensor_value_info("total", TensorProto.FLOAT, [])],
        [constant("shift", SHIFT), constant("factor", FACTOR)],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString()


def left(pid: int, *values: float) -> int:
    """How often any of these numbers lies in another process's memory."""
    wanted, found = [np.float32(value) for value in values], 0
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            start, end, mode = re.match(r"(\w+)-(\w+) (\S+)", line).groups()
            if not mode.startswith("rw"):
                continue
            at, stop = int(start, 16), int(end, 16)
            while at < stop:
                memory.seek(at)
                try:
                    piece = memory.read(min(stop - at, 16 << 20))
                except OSError:
                    break
                words = np.frombuffer(piece, np.float32, len(piece) // 4)
                found += sum(int(np.count_nonzero(words == value)) for value in wanted)
                at += len(piece)
    return found


@pytest.mark.parametrize("isolation", ["shared", "strict"])
def test_nothing_is_left_of_a_strict_model_s_intermediate_results(isolation):
    raw = graph()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(len(raw)), isolation, str(SIDE), str(SECRET)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        child.stdin.write(raw)
        child.stdin.flush()
        assert child.stdout.readline() == b"ran\n"
        found = left(child.pid, SECRET + SHIFT, (SECRET + SHIFT) * FACTOR)
    finally:
        child.kill()
        child.communicate()
    if isolation == "shared":
        assert found > SIDE / 2  # the test finds what is there
    else:
        assert found < 1000  # what is in a register, a stack, or a block too small to be wiped

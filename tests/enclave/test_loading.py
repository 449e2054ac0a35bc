"""Sealed models in memory: nothing of a refused one is left, and nothing is freed under its session."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import hashlib
import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cloister.core.protocol.statement import SealedModel
from cloister.core.sealing import Section, seal
from cloister.core.sealing.header import SealedHeader
from cloister.core.sealing.unseal import Unsealer
from cloister.enclave.worker import loading, models
from cloister.enclave.worker import session as sessions
from cloister.enclave.worker.loading import Region, open_sealed
from cloister.enclave.worker.models import ModelCache, estimate, slot_name
from cloister.enclave.worker.session import Built, Opened, build, build_session
from cloister.errors import CloisterError, InvalidRequest, Overloaded, Tampered
from enclave.conftest import KEY, Sealed, hosting, onnx_model, restated, seal_model
from support.realm import MemoryHost

MIB = 1 << 20
X = np.arange(8, dtype=np.float32).reshape(2, 4)


def large_parts(size: int) -> tuple[bytes, bytes]:
    """Graph, and ``size`` more bytes of weights, none of them zero."""
    graph, weights = onnx_model()
    return graph, weights + b"\x01" * size


def large(size: int) -> Sealed:
    """A model of `large_parts`, in chunks of the usual size."""
    small = seal_model("large")
    graph, weights = large_parts(size)
    sealing = seal(
        [Section.of("graph", graph), Section.of("weights", weights)], model_id=small.model, key=KEY
    )
    blob = b"".join(bytes(piece) for piece in sealing)
    sealed = SealedModel(header=sealing.header.digest, blob=hashlib.sha256(blob).digest(), size=len(blob))
    made = restated(small, header=sealed.header, blob=sealed.blob, size=sealed.size)
    return dataclasses.replace(made, blob=blob, sealed=sealed)


@pytest.fixture(scope="module")
def big() -> Sealed:
    return large(20 * MIB)


@pytest.fixture
def regions(monkeypatch: pytest.MonkeyPatch) -> list[Region]:
    """Every region that is made; a released one keeps a view of its pages."""
    made: list[Region] = []

    class Kept(Region):
        __slots__ = ("seen",)

        def __init__(self, size: int) -> None:
            super().__init__(size)
            self.seen = self.view()
            made.append(self)

    monkeypatch.setattr(loading, "Region", Kept)
    monkeypatch.setattr(loading.mmap, "MADV_DONTNEED", loading.mmap.MADV_NORMAL)  # which would show zeros too
    return made


async def pieces(blob: bytes, size: int = MIB) -> AsyncIterator[memoryview]:
    """Pieces as a link gives them: each in the place of the one before."""
    buffer = memoryview(bytearray(size))
    for start in range(0, len(blob), size):
        part = blob[start : start + size]
        buffer[: len(part)] = part
        await asyncio.sleep(0)
        yield buffer[: len(part)]


async def opened(model: Sealed, blob: bytes | None = None, size: int = MIB) -> Opened:
    return await open_sealed(
        pieces(model.blob if blob is None else blob, size),
        key=model.live.key,
        digest=model.sealed.header,
        admit=lambda header: None,
    )


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith(("open", "unseal"))]


def altered(model: Sealed, offset: int) -> bytes:
    blob = bytearray(model.blob)
    blob[offset] ^= 1
    return bytes(blob)


async def gone(region: Region) -> bool:
    """Whether it is released before long."""
    for _ in range(2000):
        if region.released:
            return True
        await asyncio.sleep(0.001)
    return False


async def freed(cache: ModelCache) -> None:
    """Wait until the threads that free models are done."""
    if cache._freeing:
        await asyncio.wait(set(cache._freeing), timeout=5)


# -- refusals ------------------------------------------------------------------


@pytest.mark.parametrize("offset", [-1, -9 * MIB, -19 * MIB])
@pytest.mark.asyncio
async def test_a_refused_model_is_wiped(big: Sealed, offset: int, regions: list[Any]) -> None:
    with pytest.raises(Tampered):
        await opened(big, altered(big, offset))
    (region,) = regions
    assert region.released
    assert not np.frombuffer(region.seen, np.uint8).any()
    assert threads() == []


@pytest.mark.asyncio
async def test_what_was_opened_is_plaintext_until_it_is_released(big: Sealed, regions: list[Any]) -> None:
    """So that the tests that look for zeros can fail."""
    found = await opened(big)
    assert bytes(found.graph) == onnx_model()[0]
    assert np.frombuffer(regions[0].seen, np.uint8).any()
    found.region.release()
    found.region.release()
    assert not np.frombuffer(regions[0].seen, np.uint8).any()


@pytest.mark.asyncio
async def test_nothing_is_read_before_the_last_chunk_verified(
    big: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "require_safe", lambda graph: pytest.fail("a graph that isn't verified"))
    host = MemoryHost(blobs={big.sealed.blob: altered(big, -1)}, piece=MIB)
    cache = ModelCache(host, budget=1 << 30)  # type: ignore[arg-type]
    with pytest.raises(Tampered):
        async with cache.use(big.live):
            raise AssertionError
    assert cache.held == 0


@pytest.mark.parametrize(
    ("graph", "code"),
    [(b"no model", "model.format"), (onnx_model()[0].replace(b"Mul", b"Mol"), "model.load")],
)
@pytest.mark.asyncio
async def test_a_graph_that_is_refused_is_wiped(graph: bytes, code: str, regions: list[Any]) -> None:
    wrong = seal_model(sections={"graph": graph, "weights": b"\x01" * 16})
    with pytest.raises(CloisterError) as caught:
        await asyncio.to_thread(build, await opened(wrong))
    assert caught.value.code == code
    assert regions[0].released
    assert not np.frombuffer(regions[0].seen, np.uint8).any()


@pytest.mark.asyncio
async def test_a_header_that_is_refused_takes_no_memory(scale: Sealed, regions: list[Any]) -> None:
    def refuse(header: SealedHeader) -> None:
        raise Overloaded

    with pytest.raises(Overloaded):
        await open_sealed(pieces(scale.blob), key=KEY, digest=scale.sealed.header, admit=refuse)
    assert regions == []


@pytest.mark.asyncio
async def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(loading.mmap, "mmap", refuse)
    with pytest.raises(Overloaded) as caught:
        Region(MIB)
    assert caught.value.code == "overloaded.memory"


@pytest.mark.parametrize("after", [0, 1, 5, 21])
@pytest.mark.asyncio
async def test_a_cancelled_opening_leaves_nothing(big: Sealed, after: int, regions: list[Any]) -> None:
    reached, files = asyncio.Event(), len(os.listdir("/proc/self/fd"))

    async def stalled() -> AsyncIterator[memoryview]:
        count = 0
        async for piece in pieces(big.blob):
            if count == after:
                reached.set()
                await asyncio.sleep(3600)
            count += 1
            yield piece
        reached.set()
        await asyncio.sleep(3600)

    task = asyncio.ensure_future(
        open_sealed(stalled(), key=KEY, digest=big.sealed.header, admit=lambda header: None)
    )
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert threads() == []
    assert len(os.listdir("/proc/self/fd")) == files
    assert all(region.released for region in regions)
    assert not any(np.frombuffer(region.seen, np.uint8).any() for region in regions)


@pytest.mark.asyncio
async def test_a_thread_that_still_opens_is_waited_for_before_wiping(
    big: Sealed, monkeypatch: pytest.MonkeyPatch, regions: list[Any]
) -> None:
    feed, began, calls = Unsealer.feed, threading.Event(), []

    def slow(self: Unsealer, piece: Any) -> None:
        calls.append(len(piece))
        if len(calls) == 3:
            began.set()
            time.sleep(0.2)
        feed(self, piece)

    monkeypatch.setattr(Unsealer, "feed", slow)
    task = asyncio.ensure_future(opened(big))
    await asyncio.to_thread(began.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert regions[0].released
    assert not np.frombuffer(regions[0].seen, np.uint8).any()


@pytest.mark.asyncio
async def test_a_cancelled_build_is_counted_until_its_memory_is_back(
    scale: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go = threading.Event(), threading.Event()

    def slow(given: Opened, *, strict: bool) -> Built:
        began.set()
        go.wait(5)
        return build(given, strict=strict)

    monkeypatch.setattr(models, "build", slow)
    cache = ModelCache(hosting(scale), budget=1 << 30)  # type: ignore[arg-type]

    async def use() -> None:
        async with cache.use(scale.live):
            raise AssertionError

    task = asyncio.ensure_future(use())
    await asyncio.to_thread(began.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cache.held > 0
    go.set()
    for _ in range(2000):
        if not cache.held:
            break
        await asyncio.sleep(0.001)
    assert cache.held == 0


# -- opening -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, MIB - 1, MIB, MIB + 1, 3 * MIB])
@pytest.mark.asyncio
async def test_any_pieces_give_the_same_plaintext(big: Sealed, size: int) -> None:
    found = await opened(big, size=size)
    graph, weights = large_parts(20 * MIB)
    assert bytes(found.graph) == graph
    assert found.weights == weights
    found.region.release()
    assert threads() == []


@pytest.mark.asyncio
async def test_opening_is_not_done_on_the_loop(big: Sealed, monkeypatch: pytest.MonkeyPatch) -> None:
    feed, where, inside, most = Unsealer.feed, set(), [], [0]

    def watched(self: Unsealer, piece: Any) -> None:
        where.add(threading.get_ident())
        inside.append(piece)
        most[0] = max(most[0], len(inside))
        feed(self, piece)
        inside.pop()

    monkeypatch.setattr(Unsealer, "feed", watched)
    (await opened(big)).region.release()
    assert where
    assert threading.get_ident() not in where
    assert most[0] == 1


# -- the session and its region ------------------------------------------------


def tensor(**entries: str) -> TensorProto:
    made = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1024])
    made.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "weights", "offset": "0", "length": "4096", **entries}.items():
        made.external_data.add(key=key, value=value)
    return made


def giving_weights() -> bytes:
    """A graph whose outputs are its weights, as they are and reshaped."""
    shape = helper.make_tensor("s", TensorProto.INT64, [2], [32, 32])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["w"], ["same"]),
            helper.make_node("Reshape", ["w", "s"], ["square"]),
            helper.make_node("Add", ["x", "w"], ["sum"]),
        ],
        "g",
        [value("x", TensorProto.FLOAT, [1024])],
        [value(name, TensorProto.FLOAT, None) for name in ("w", "same", "square", "sum")],
        [tensor(), shape],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(made.SerializeToString())


@pytest.mark.asyncio
async def test_outputs_that_are_weights_outlive_the_model() -> None:
    weights = np.arange(1024, dtype=np.float32)
    model = seal_model(sections={"graph": giving_weights(), "weights": weights.tobytes()})
    cache = ModelCache(hosting(model), budget=1 << 30)  # type: ignore[arg-type]
    async with cache.use(model.live) as (loaded, _):
        region = loaded.region
        found = loaded.run({"x": np.zeros(1024, np.float32)}, ())
        del loaded
    cache.retain(set())
    assert region is not None
    assert await gone(region)
    for output in found.values():
        assert output.ravel().tolist() == weights.tolist()


@pytest.mark.asyncio
async def test_a_session_that_is_still_held_keeps_its_weights() -> None:
    """A request that was cancelled may still be running in its thread."""
    model = seal_model()
    cache = ModelCache(hosting(model), budget=1 << 30)  # type: ignore[arg-type]
    async with cache.use(model.live) as (loaded, _):
        session, region, memory = loaded.session, loaded.region, loaded.memory
        del loaded
    cache.retain(set())
    assert region is not None
    await freed(cache)
    assert not region.released
    assert cache.held == memory
    assert session.run(["y"], {"x": X})[0].tolist() == (X * 2).tolist()
    del session
    assert await gone(region)
    assert cache.held == 0


def test_weights_are_not_copied() -> None:
    """What runs read are the very bytes of the buffer."""
    weights = bytearray(np.full(1024, 2.0, np.float32).tobytes())
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1024])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1024])],
        [tensor()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = build_session(memoryview(made.SerializeToString()), memoryview(weights))
    weights[:4] = np.float32(5).tobytes()
    found = session.run(["y"], {"x": np.ones(1024, np.float32)})[0]
    assert found[:2].tolist() == [5.0, 2.0]


def multiplying() -> tuple[bytes, bytes]:
    """A matrix product, whose matrix ONNX Runtime prepacks."""
    matrix = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)
    weight = tensor(length=str(matrix.nbytes))
    weight.dims[:] = [64, 64]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
        [weight],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(made.SerializeToString()), matrix.tobytes()


def test_large_models_are_not_prepacked(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, weights = multiplying()
    x = np.random.default_rng(1).standard_normal((5, 64), dtype=np.float32)
    results = []
    for limit, setting in ((1 << 40, None), (1, "1")):
        monkeypatch.setattr(sessions, "PREPACK_LIMIT", limit)
        session = build_session(memoryview(graph), memoryview(weights))
        options = session.get_session_options()
        if setting:
            assert options.get_session_config_entry("session.disable_prepacking") == setting
        else:
            with pytest.raises(Exception, match="disable_prepacking"):
                options.get_session_config_entry("session.disable_prepacking")
        results.append(session.run(["y"], {"x": x})[0])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_small_models_answer_as_plain_onnx_runtime_does() -> None:
    import onnxruntime as ort

    graph, weights = multiplying()
    x = np.random.default_rng(1).standard_normal((5, 64), dtype=np.float32)
    ours = build_session(memoryview(graph), memoryview(weights)).run(["y"], {"x": x})[0]
    plain = onnx.load_model_from_string(graph)
    (matrix,) = plain.graph.initializer
    del matrix.external_data[:]
    matrix.data_location = TensorProto.DEFAULT
    matrix.raw_data = weights
    session = ort.InferenceSession(plain.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(["y"], {"x": x})[0].tobytes() == ours.tobytes()


@pytest.mark.parametrize(
    "location", ["../weights", "/proc/self/fd/0", "/dev/stdin", "weights/../x", "./weights"]
)
def test_a_path_is_refused_also_where_it_exists(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").write_bytes(bytes(4096))
    made = onnx.load_model_from_string(giving_weights())
    made.graph.initializer[0].external_data[0].value = location
    with pytest.raises(InvalidRequest) as caught:
        build_session(memoryview(made.SerializeToString()), memoryview(bytes(4096)))
    assert caught.value.code == "model.external-data"


def test_another_c_library_loads_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_GLIBC", False)
    assert sessions._allocated() == 0
    region = Region(16)
    graph, weights = onnx_model()
    region.view()[:] = weights
    built = build(Opened(region=region, graph=memoryview(graph), weights=region.view()))
    assert built.memory == 16
    assert built.session.run(["y"], {"x": X})[0].tolist() == (X * 2).tolist()


# -- the budget ----------------------------------------------------------------


@pytest.mark.asyncio
async def test_what_a_model_takes_is_counted() -> None:
    size = 8 * MIB
    model = large(size)
    cache = ModelCache(hosting(model), budget=64 * MIB)  # type: ignore[arg-type]
    async with cache.use(model.live) as (loaded, _):
        assert size < loaded.memory < size + 4 * MIB
        assert cache.held == loaded.memory


@pytest.mark.asyncio
async def test_a_model_that_turns_out_too_large_is_let_go_and_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def weigh(given: Opened, *, strict: bool) -> Built:
        return dataclasses.replace(build(given, strict=strict), memory=10 * MIB)

    monkeypatch.setattr(models, "build", weigh)
    model = seal_model()
    host = hosting(model)
    cache = ModelCache(host, budget=5 * MIB)  # type: ignore[arg-type]
    for _ in range(3):
        with pytest.raises(Overloaded) as caught:
            async with cache.use(model.live):
                raise AssertionError
        assert caught.value.code == "overloaded.model"
        del caught
    gc.collect()
    await freed(cache)
    assert host.fetched == 1
    assert cache.held == 0
    assert slot_name(model.live.statement) not in cache._slots


@pytest.mark.parametrize("size", [1, 100 * MIB, 256 * MIB, 550 * MIB])
def test_estimates_are_no_less_than_the_plaintext(size: int) -> None:
    assert size < estimate(size) <= 2 * size


def _resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError


@pytest.fixture
def fifty() -> Sealed:
    return large(50 * MIB)


@pytest.mark.asyncio
async def test_twenty_loads_and_evictions_leave_things_as_they_were(fifty: Sealed) -> None:
    host = hosting(fifty)
    host.piece = MIB
    cache = ModelCache(host, budget=1 << 30)  # type: ignore[arg-type]

    async def load_and_drop() -> None:
        async with cache.use(fifty.live) as (loaded, fresh):
            assert fresh
            assert loaded.run({"x": X}, ("y",))["y"].tolist() == (X * 2).tolist()
            region = loaded.region
        del loaded
        cache.retain(set())
        assert region is not None
        assert await gone(region)

    def state() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(threads())

    for _ in range(3):
        await load_and_drop()
    before, resident = state(), _resident()
    for _ in range(20):
        await load_and_drop()
    assert state() == before
    assert cache.held == 0
    assert _resident() < resident + 25 * MIB  # half of one model

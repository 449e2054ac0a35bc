"""Models in enclave memory: whatever the host serves in place of one is refused, and the budget holds."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import numpy as np
import pytest

from cloister.core.secret import Secret
from cloister.enclave.worker import models
from cloister.enclave.worker.models import ModelCache, slot_name
from cloister.enclave.worker.session import Built, Opened, build
from cloister.enclave.worker.specs import TensorSpec
from cloister.errors import (
    BindingRefused,
    CloisterError,
    FormatError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Tampered,
)
from enclave.conftest import Sealed, hosting, onnx_model, restated, seal_model
from support.realm import MemoryHost

pytestmark = pytest.mark.asyncio
MIB = 1 << 20
X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture(autouse=True)
def weighed(monkeypatch):
    """Models weigh their plaintext, so that budgets here can be exact; what sessions take varies."""

    def weigh(opened: Opened, *, strict: bool) -> Built:
        size = opened.region.size
        return dataclasses.replace(build(opened, strict=strict), memory=size)

    monkeypatch.setattr(models, "build", weigh)
    monkeypatch.setattr(models, "estimate", lambda size: size)


async def settled(cache: ModelCache) -> int:
    """What the cache holds once threads have freed what it dropped."""
    if cache._freeing:
        await asyncio.wait(set(cache._freeing), timeout=5)
    return cache.held


async def load(host: MemoryHost, model: Sealed, budget: int = MIB) -> ModelCache:
    cache = ModelCache(host, budget=budget)  # type: ignore[arg-type]
    async with cache.use(model.live) as (loaded, fresh):
        assert fresh
        assert loaded.run({"x": X}, ("y",))["y"].tolist() == (X * 2).tolist()
    return cache


async def refused(
    kind: type[CloisterError], code: str, host: MemoryHost, model: Sealed, budget: int = MIB
) -> None:
    cache = ModelCache(host, budget=budget)  # type: ignore[arg-type]
    for _ in range(2):  # and again: nothing of a failure is kept
        with pytest.raises(kind) as caught:
            async with cache.use(model.live):
                raise AssertionError("a model that must not load")
        assert caught.value.code == code, str(caught.value)
        assert cache.held == 0
        assert len(cache._slots) == 0


def serving(model: Sealed, blob: bytes, piece: int = 1000) -> MemoryHost:
    return MemoryHost(blobs={model.sealed.blob: blob}, piece=piece)


@pytest.mark.parametrize("piece", [1, 7, 64, 4096, 1 << 20])
async def test_a_model_in_any_pieces(scale, piece):
    host = hosting(scale)
    host.piece = piece
    cache = await load(host, scale)
    assert len(scale.blob) - 400 < cache.held <= len(scale.blob)
    async with cache.use(scale.live) as (_, fresh):
        assert not fresh
    assert host.fetched == 1


# -- what the host may serve instead -------------------------------------------


async def test_nothing(scale):
    await refused(NotFound, "not-found.host", MemoryHost(), scale)
    await refused(Tampered, "sealing.truncated", serving(scale, b""), scale)


@pytest.mark.parametrize("cut", [1, 11, 40, 300])
async def test_the_start_of_it(scale, cut):
    await refused(Tampered, "sealing.truncated", serving(scale, scale.blob[:cut]), scale)


async def test_all_but_its_end(scale):
    await refused(Tampered, "sealing.truncated", serving(scale, scale.blob[:-1]), scale)
    big = seal_model(size=9000)
    await refused(Tampered, "sealing.truncated", serving(big, big.blob[:-4112]), big)


async def test_more_than_it(scale):
    await refused(Tampered, "sealing.extended", serving(scale, scale.blob + b"x"), scale)


@pytest.mark.parametrize("offset", [-1, -17, -100])
async def test_an_altered_chunk(scale, offset):
    blob = bytearray(scale.blob)
    blob[offset] ^= 1
    await refused(Tampered, "sealing.chunk", serving(scale, bytes(blob)), scale)


async def test_swapped_chunks():
    big = seal_model(size=3 * 4096)
    start = len(big.blob) - (len(onnx_model(size=3 * 4096)[0]) + 16 + 3 * 4096)
    assert start > 0
    size = 4096 + 16
    head = len(big.blob) % size
    blob = bytearray(big.blob)
    one, two = slice(head, head + size), slice(head + size, head + 2 * size)
    blob[one], blob[two] = blob[two], blob[one]
    cache = ModelCache(serving(big, bytes(blob)), budget=MIB)  # type: ignore[arg-type]
    with pytest.raises(Tampered):
        async with cache.use(big.live):
            raise AssertionError


async def test_another_model(scale):
    other = seal_model("other")
    await refused(Tampered, "sealing.header", serving(scale, other.blob), scale)
    older = seal_model(scale=3.0)
    await refused(Tampered, "sealing.header", serving(scale, older.blob), scale)


@pytest.mark.parametrize("blob", [b"no sealed model" * 40, bytes(4000)])
async def test_something_else(scale, blob):
    cache = ModelCache(serving(scale, blob), budget=MIB)  # type: ignore[arg-type]
    with pytest.raises((FormatError, Tampered)):
        async with cache.use(scale.live):
            raise AssertionError


async def test_a_large_model_that_is_refused_leaves_no_thread():
    big = seal_model(size=5 << 20)
    budget = 2 * len(big.blob)
    await load(serving(big, big.blob, piece=MIB), big, budget)
    blob = bytearray(big.blob)
    blob[-1] ^= 1
    await refused(Tampered, "sealing.chunk", serving(big, bytes(blob), piece=MIB), big, budget)
    await refused(Tampered, "sealing.truncated", serving(big, big.blob[: 3 * MIB], piece=MIB), big, budget)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("unseal")]


async def test_an_altered_header(scale):
    """Every byte of the header is under its digest."""
    host = serving(scale, scale.blob)
    for offset in range(0, 200, 7):
        blob = bytearray(scale.blob)
        blob[offset] ^= 1
        host.blobs[scale.sealed.blob] = bytes(blob)
        cache = ModelCache(host, budget=MIB)  # type: ignore[arg-type]
        with pytest.raises((FormatError, Tampered)):
            async with cache.use(scale.live):
                raise AssertionError


async def test_a_statement_that_names_another_model_s_header(scale):
    """Headers are public: an owner may name another's in a statement of its own."""
    stolen = seal_model("stolen", label=scale.model)
    await refused(BindingRefused, "binding.model", hosting(stolen), stolen)


async def test_a_statement_of_another_size(scale):
    wrong = restated(scale, size=scale.sealed.size + 1)
    await refused(BindingRefused, "binding.size", hosting(wrong), wrong)


async def test_another_key(scale):
    wrong = dataclasses.replace(scale, live=dataclasses.replace(scale.live, key=Secret(bytes(32))))
    await refused(Tampered, "sealing.key", hosting(wrong), wrong)


# -- what an owner may have sealed ---------------------------------------------


@pytest.mark.parametrize(
    "names", [("graph",), ("weights",), ("graph", "weights", "more"), ("model", "weights")]
)
async def test_other_sections(names):
    graph, weights = onnx_model()
    wrong = seal_model(sections={name: weights if name == "weights" else graph for name in names})
    await refused(FormatError, "sealing.section", hosting(wrong), wrong)


@pytest.mark.parametrize(
    ("graph", "code"),
    [
        (b"no model at all", "model.format"),
        (b"\x08\x0a", "model.load"),
        (onnx_model()[0][:-20], "model.format"),
        (onnx_model()[0].replace(b"weights", b"secrets"), "model.external-data"),
        (onnx_model()[0].replace(b"Mul", b"Mol"), "model.load"),
    ],
    ids=["text", "empty", "cut", "file name", "unknown operator"],
)
async def test_a_graph_that_is_none(graph, code):
    wrong = seal_model(sections={"graph": graph, "weights": bytes(16)})
    await refused(CloisterError, code, hosting(wrong), wrong)


async def test_weights_that_are_too_short():
    wrong = seal_model(sections={"graph": onnx_model()[0], "weights": bytes(15)})
    await refused(InvalidRequest, "model.load", hosting(wrong), wrong)


# -- the budget ----------------------------------------------------------------


async def held(cache: ModelCache, *models: Sealed) -> list[bool]:
    return [slot_name(model.live.statement) in cache._slots for model in models]


async def test_least_recently_used_out_first():
    one, two, three = (seal_model(name) for name in ("one", "two", "three"))
    cache = ModelCache(hosting(one, two, three), budget=2 * one.sealed.size + 50)  # type: ignore[arg-type]
    for model in (one, two, one, three):
        async with cache.use(model.live):
            pass
    assert await held(cache, one, two, three) == [True, False, True]
    assert await settled(cache) <= 2 * one.sealed.size + 50


async def test_a_model_in_use_is_never_evicted():
    one, two = seal_model("one"), seal_model("two")
    cache = ModelCache(hosting(one, two), budget=one.sealed.size + 50)  # type: ignore[arg-type]
    async with cache.use(one.live):
        with pytest.raises(Overloaded) as caught:
            async with cache.use(two.live):
                raise AssertionError
        assert caught.value.code == "overloaded.memory"
        assert caught.value.retryable
    async with cache.use(two.live):
        pass
    assert await held(cache, one, two) == [False, True]


async def test_what_others_allocate_beside_a_load_is_not_held_against_a_model(monkeypatch):
    """The process has one count of its memory: a load beside runs once seemed 552 MiB large, for good."""
    model = seal_model("one")
    cache = ModelCache(hosting(model), budget=MIB)  # type: ignore[arg-type]
    beside = 2 * MIB

    def weigh(opened: Opened, *, strict: bool) -> Built:
        return dataclasses.replace(build(opened, strict=strict), memory=beside)

    monkeypatch.setattr(models, "build", weigh)
    for _ in range(2):
        with pytest.raises(Overloaded):
            await cache.use(model.live).__aenter__()
    beside = 5000
    monkeypatch.setattr(models, "REFUSED", 0.0)
    cache._known.update({name: (size, 0.0) for name, (size, _) in cache._known.items()})  # a minute later
    async with cache.use(model.live):
        assert await settled(cache) == 5000
    assert cache.drop(slot_name(model.live.statement))
    beside = MIB
    async with cache.use(model.live):
        assert await settled(cache) == 5000, "the least that was seen"


async def test_a_model_larger_than_the_budget():
    big = seal_model(size=9000)
    await refused(Overloaded, "overloaded.model", hosting(big), big, budget=9000)


async def test_models_that_are_being_loaded_count():
    one, two = seal_model("one"), seal_model("two")
    cache = ModelCache(hosting(one, two), budget=one.sealed.size + 50)  # type: ignore[arg-type]

    async def use(model: Sealed) -> None:
        async with cache.use(model.live):
            await asyncio.sleep(0)

    results = await asyncio.gather(use(one), use(two), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), Overloaded]


async def test_many_requests_load_a_model_once(scale):
    host = hosting(scale)
    cache = ModelCache(host, budget=MIB)  # type: ignore[arg-type]

    async def use() -> bool:
        async with cache.use(scale.live) as (_, fresh):
            await asyncio.sleep(0.001)
            return fresh

    assert sorted(await asyncio.gather(*(use() for _ in range(20)))) == [False] * 19 + [True]
    assert host.fetched == 1


async def test_a_failed_load_is_tried_again_by_those_who_wait(scale):
    host = MemoryHost(piece=1000)
    cache = ModelCache(host, budget=MIB)  # type: ignore[arg-type]

    async def use() -> None:
        async with cache.use(scale.live):
            pass

    first, second = asyncio.ensure_future(use()), asyncio.ensure_future(use())
    await asyncio.sleep(0)
    with pytest.raises(NotFound):
        await first
    host.blobs[scale.sealed.blob] = scale.blob
    results = await asyncio.gather(second, return_exceptions=True)
    assert isinstance(results[0], NotFound) or cache.held <= scale.sealed.size
    await use()
    assert 0 < cache.held <= scale.sealed.size


async def test_a_cancelled_load_leaves_nothing_behind(scale):
    host = hosting(scale)
    host.piece = 1
    cache = ModelCache(host, budget=MIB)  # type: ignore[arg-type]

    async def use() -> None:
        async with cache.use(scale.live):
            pass

    task = asyncio.ensure_future(use())
    await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cache.held == 0
    await use()


async def test_models_whose_statements_are_gone_are_dropped_when_idle():
    one, two = seal_model("one"), seal_model("two")
    cache = ModelCache(hosting(one, two), budget=MIB)  # type: ignore[arg-type]
    async with cache.use(one.live):
        async with cache.use(two.live):
            pass
        cache.retain(set())
        assert await held(cache, one, two) == [True, False]
    cache.retain({slot_name(one.live.statement)})
    assert await held(cache, one) == [True]
    cache.retain(set())
    assert await settled(cache) == 0


async def test_one_sealed_file_of_two_owners_is_two_models(scale):
    """A cached model is not handed to whoever names its public digests."""
    cache = await load(hosting(scale), scale)
    said = dataclasses.replace(scale.live.statement, model=f"{'a' * 64}/scale")
    other = dataclasses.replace(scale.live, statement=said, digest=said.digest)
    with pytest.raises(BindingRefused):
        async with cache.use(other):
            raise AssertionError


# -- inputs --------------------------------------------------------------------

SPEC = TensorSpec(name="x", datatype="FP32", shape=(-1, 4))


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.zeros((2, 4), np.float64), "request.datatype"),
        (np.zeros((2, 4), np.int32), "request.datatype"),
        (np.zeros((2, 4), object), "request.datatype"),
        (np.zeros((2, 5), np.float32), "request.shape"),
        (np.zeros(4, np.float32), "request.shape"),
        (np.zeros((1, 2, 4), np.float32), "request.shape"),
        (np.zeros((), np.float32), "request.shape"),
    ],
    ids=str,
)
async def test_inputs_of_another_type_or_shape(array, code):
    with pytest.raises(InvalidRequest) as caught:
        SPEC.require(array)
    assert caught.value.code == code


async def test_free_dimensions_and_text():
    for rows in (1, 9):
        SPEC.require(np.zeros((rows, 4), np.float32))
    text = TensorSpec(name="t", datatype="BYTES", shape=(-1,))
    assert text.require(np.array(["ä".encode(), b"b"], dtype=object)).tolist() == ["ä", "b"]
    with pytest.raises(InvalidRequest) as caught:
        text.require(np.array([b"\xff"], dtype=object))
    assert caught.value.code == "request.data"
    odd = TensorSpec(name="s", datatype="seq(tensor(float))", shape=())
    with pytest.raises(InvalidRequest):
        odd.require(np.zeros((), np.float32))


async def test_a_free_side_is_never_zero():
    """ONNX Runtime counts the axis of an input without elements, and answers with memory of others."""
    for shape, given in (((-1, 4), (0, 4)), ((-1, -1, 16), (0, 300, 16))):
        with pytest.raises(InvalidRequest) as caught:
            TensorSpec(name="past", datatype="FP32", shape=shape).require(np.zeros(given, np.float32))
        assert caught.value.code == "request.shape"
    with pytest.raises(InvalidRequest):
        TensorSpec(name="t", datatype="BYTES", shape=(-1,)).require(np.empty(0, dtype=object))
    kept = TensorSpec(name="unused", datatype="FP32", shape=(0, -1)).require(np.zeros((0, 3), np.float32))
    assert kept.shape == (0, 3), "a side that the model itself says is zero"


async def test_an_input_on_which_the_model_fails(scale):
    cache = await load(hosting(scale), scale)
    async with cache.use(scale.live) as (loaded, _):
        with pytest.raises(InvalidRequest) as caught:
            loaded.run({"x": np.zeros((2, 5), np.float32)}, ("y",))
        assert caught.value.code == "request.execution"
        assert caught.value.__suppress_context__
        assert loaded.run({"x": X}, ())["copy"].tolist() == X.tolist()

"""The durable log on a host that loses answers, cuts, swaps, joins and forges records."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.core.encoding import decode, encode
from cloister.core.protocol.head import TreeHead
from cloister.core.secret import Secret
from cloister.enclave.clock import HintedClock
from cloister.enclave.keyservice.entries import Entry
from cloister.enclave.keyservice.log import IDENTITY_TABLE, LOG_TABLE, MAX_UNCERTAIN, Log
from cloister.enclave.keyservice.state import State
from cloister.errors import AccessRefused, CloisterError, FormatError, Rollback, Tampered, Unavailable
from support.realm import NOW, Clock, MemoryHost, Realm, owner_key, statement

KEY = Secret(b"sealing key, thirty-two bytes ok")


async def opened(host: MemoryHost, clock: Clock | None = None, key: Secret = KEY) -> Log:
    return await Log.open(host, key, HintedClock(clock or Clock()))


async def filled(host: MemoryHost, count: int = 5) -> Log:
    log = await opened(host)
    for number in range(1, count + 1):
        assert await log.append("epoch", {"epoch": number}) == number - 1
    return log


def index(number: int) -> bytes:
    return number.to_bytes(8)


async def refused(code: str, host: MemoryHost, key: Secret = KEY) -> None:
    with pytest.raises(Tampered) as caught:
        await opened(host, key=key)
    assert caught.value.code == code


@pytest.fixture
def host() -> MemoryHost:
    return MemoryHost()


pytestmark = pytest.mark.asyncio


# -- what holds ----------------------------------------------------------------


async def test_restored_as_it_was(host):
    log = await filled(host)
    again = await opened(host)
    assert again.service == log.service
    assert again.state.epoch == 5
    assert len(again.tree) == 5
    assert again.tree.root() == log.tree.root()
    assert again.consistency(log.head()) == ()
    assert not again.contradicts(log.head())


async def test_nothing_readable_is_stored(host):
    log = await opened(host)
    await log.append("refusal", {"what": "readable text"}, Secret(b"a model key"))
    stored = b"".join(value for rows in host.records.values() for _, value in rows.values())
    for text in (b"readable", b"model key", b"refusal", log.identity.seed().reveal(), KEY.reveal()):
        assert text not in stored


async def test_secrets_enter_the_tree_as_commitments(host):
    entry = Entry(kind="statement", time=1, body={}, secret=Secret(b"K" * 32))
    assert b"K" * 8 not in entry.leaf
    assert b"K" * 32 in entry.to_bytes()
    other = Entry(kind="statement", time=1, body={}, secret=Secret(b"L" * 32))
    none = Entry(kind="statement", time=1, body={})
    assert len({entry.leaf, other.leaf, none.leaf}) == 3
    assert "KKK" not in repr(entry)


async def test_one_writer_at_a_time(host):
    log = await opened(host)
    indices = await asyncio.gather(*(log.append("epoch", {"epoch": n}) for n in range(20)))
    assert sorted(indices) == list(range(20))
    assert (await opened(host)).tree.root() == log.tree.root()


# -- a store that is away or loses answers -------------------------------------


async def test_a_refused_write_has_no_effect(host):
    log = await filled(host, 2)
    root = log.tree.root()
    host.writes = "refused"
    for _ in range(3):
        with pytest.raises(Unavailable) as caught:
            await log.append("epoch", {"epoch": 9})
        assert caught.value.code == "store.write"
        assert caught.value.retryable
    assert (log.state.epoch, len(log.tree), log.tree.root()) == (2, 2, root)
    host.writes = "ok"
    assert await log.append("epoch", {"epoch": 3}) == 2
    assert (await opened(host)).tree.root() == log.tree.root()


async def test_a_lost_answer_is_settled_before_the_next_write(host):
    log = await filled(host, 2)
    host.writes = "lost"
    with pytest.raises(Unavailable):
        await log.append("epoch", {"epoch": 3})
    assert log.state.epoch == 2  # not yet: nobody may rely on it
    host.writes = "ok"
    assert await log.append("epoch", {"epoch": 4}) == 3
    assert (log.state.epoch, len(log.tree)) == (4, 4)
    again = await opened(host)
    assert again.tree.root() == log.tree.root()


async def test_a_write_that_arrives_late_is_settled_too(host):
    """The host refuses two writes, and puts the first of them into the store afterwards."""
    log = await filled(host, 2)
    held: list[Any] = []
    apply = host.apply

    async def hold(writes: Any) -> None:
        held.append(writes)
        raise Unavailable("held back")

    host.apply = hold  # type: ignore[method-assign]
    for number in (3, 33):
        with pytest.raises(Unavailable):
            await log.append("epoch", {"epoch": number})
    host.apply = apply  # type: ignore[method-assign]
    await apply(held[0])
    assert await log.append("epoch", {"epoch": 4}) == 3
    assert (await opened(host)).tree.root() == log.tree.root()


async def test_an_entry_that_somebody_else_wrote(host):
    log = await filled(host, 2)
    host.writes = "refused"
    with pytest.raises(Unavailable):
        await log.append("epoch", {"epoch": 3})
    host.writes = "ok"
    host.records[LOG_TABLE][index(2)] = (1, b"x" * 60)
    with pytest.raises(Tampered) as caught:
        await log.append("epoch", {"epoch": 3})
    assert caught.value.code == "tampered.log"
    assert len(log.tree) == 2


async def test_a_cancelled_write_is_settled(host):
    log = await filled(host, 1)
    gate = asyncio.Event()
    apply = host.apply

    async def slow(writes: Any) -> None:
        await apply(writes)
        await gate.wait()

    host.apply = slow  # type: ignore[method-assign]
    task = asyncio.ensure_future(log.append("epoch", {"epoch": 2}))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    host.apply = apply  # type: ignore[method-assign]
    assert await log.append("epoch", {"epoch": 3}) == 2
    assert (await opened(host)).tree.root() == log.tree.root()


# -- a store that was tampered with --------------------------------------------


async def test_a_missing_record_in_the_middle(host):
    await filled(host)
    del host.records[LOG_TABLE][index(2)]
    await refused("tampered.log", host)


async def test_a_missing_first_record(host):
    await filled(host)
    del host.records[LOG_TABLE][index(0)]
    await refused("tampered.log", host)


@pytest.mark.parametrize(("one", "other"), [(0, 1), (1, 3), (3, 4)])
async def test_swapped_records(host, one, other):
    await filled(host)
    rows = host.records[LOG_TABLE]
    rows[index(one)], rows[index(other)] = rows[index(other)], rows[index(one)]
    await refused("sealing.record", host)


async def test_a_record_that_occurs_twice(host):
    await filled(host)
    host.records[LOG_TABLE][index(5)] = host.records[LOG_TABLE][index(4)]
    await refused("sealing.record", host)


@pytest.mark.parametrize("position", [0, 12, -1])
async def test_an_altered_record(host, position):
    await filled(host)
    version, sealed = host.records[LOG_TABLE][index(3)]
    altered = bytearray(sealed)
    altered[position] ^= 1
    host.records[LOG_TABLE][index(3)] = (version, bytes(altered))
    await refused("sealing.record", host)


@pytest.mark.parametrize("sealed", [b"", b"x", bytes(28), bytes(200)])
async def test_a_record_that_is_none(host, sealed):
    await filled(host)
    host.records[LOG_TABLE][index(4)] = (1, sealed)
    await refused("sealing.record", host)


@pytest.mark.parametrize("version", [0, 2, -1, 1 << 70])
async def test_a_record_of_another_version(host, version):
    await filled(host)
    host.records[LOG_TABLE][index(4)] = (version, host.records[LOG_TABLE][index(4)][1])
    await refused("tampered.log", host)


async def test_records_of_another_service(host):
    await filled(host)
    other = MemoryHost()
    await filled(other)
    host.records[LOG_TABLE] = other.records[LOG_TABLE]
    await refused("sealing.record", host)


async def test_two_lines_that_began_alike_are_not_joined(host):
    """A host that ran two copies of the store can't continue one with entries of the other."""
    await filled(host, 2)
    copy = MemoryHost(records={table: dict(rows) for table, rows in host.records.items()})
    one, two = await opened(host), await opened(copy)
    for log, number in ((one, 10), (two, 20)):
        await log.append("epoch", {"epoch": number})
        await log.append("epoch", {"epoch": number + 1})
    host.records[LOG_TABLE][index(3)] = copy.records[LOG_TABLE][index(3)]
    await refused("sealing.record", host)


async def test_another_sealing_key(host):
    await filled(host)
    await refused("sealing.record", host, Secret(bytes(32)))


async def test_another_measurement_of_a_real_key_service():
    first = await Realm.start()
    with pytest.raises(Tampered) as caught:
        await Realm.start(first.host, measurement=b"z" * 32)
    assert caught.value.code == "sealing.record"


async def test_an_altered_identity(host):
    await filled(host)
    version, sealed = host.records[IDENTITY_TABLE][b"service"]
    host.records[IDENTITY_TABLE][b"service"] = (version, sealed[:-1] + bytes([sealed[-1] ^ 1]))
    await refused("sealing.record", host)


async def test_a_lost_identity_is_another_service(host):
    """The host gets a new service, which no client pinned, and which does not write beside the old log."""
    log = await filled(host)
    del host.records[IDENTITY_TABLE]
    fresh = await opened(host)
    assert fresh.service != log.service
    assert len(fresh.tree) == 0
    with pytest.raises(Unavailable):
        await fresh.append("epoch", {"epoch": 1})
    with pytest.raises(Tampered):
        await fresh.append("epoch", {"epoch": 1})
    await refused("sealing.record", host)


async def test_a_cut_tail_is_known_by_the_first_newer_head(host):
    log = await filled(host)
    newest, older = log.head(), TreeHead.sign(log.identity, size=3, root=log.tree.root(3), time=NOW)
    for number in (4, 3):
        del host.records[LOG_TABLE][index(number)]
    restored = await opened(host)
    assert len(restored.tree) == 3
    assert restored.contradicts(newest)
    assert not restored.contradicts(older)
    assert restored.consistency(newest) == ()
    await restored.append("epoch", {"epoch": 40})
    await restored.append("epoch", {"epoch": 50})
    assert restored.contradicts(newest)  # as large again, but another line
    assert not restored.contradicts(older)


# -- time and entries ----------------------------------------------------------


async def test_time_never_runs_backwards_past_the_log(host):
    clock = Clock(NOW)
    log = await opened(host, clock)
    await log.append("epoch", {"epoch": 1})
    clock.time = NOW - 10_000
    await log.append("epoch", {"epoch": 2})
    assert log.state.time == NOW
    assert log.head().time == NOW
    again = await opened(host, Clock(NOW - 10_000))
    assert again.clock.now() == NOW


async def test_the_host_s_clock_is_a_hint():
    source = Clock(100.9)
    clock = HintedClock(source, floor=50)
    assert clock.now() == 100
    source.time = 7
    assert clock.now() == 100
    clock.raise_floor(300)
    clock.raise_floor(200)
    assert clock.now() == 300
    source.time = 301.5
    assert clock.now() == 301


async def test_entries_that_this_service_can_not_have_written():
    state = State()
    state.apply(Entry(kind="epoch", time=10, body={"epoch": 1}), 0)
    with pytest.raises(FormatError):
        state.apply(Entry(kind="epoch", time=9, body={"epoch": 2}), 1)
    realm = await Realm.start()
    await realm.create_pool()
    said = statement(realm.id)
    body = {"pool": realm.pool.id, "statement": realm.publication(said).statement.to_data()}
    with pytest.raises(FormatError):  # without a key
        realm.service.log.state.apply(Entry(kind="statement", time=NOW, body=body), 9)


@pytest.mark.parametrize(
    "change",
    [{"kind": "other"}, {"kind": 1}, {"time": 1.5}, {"body": []}, {"secret": "x"}, {"more": 1}],
    ids=str,
)
async def test_an_entry_that_is_none(change):
    data = decode(Entry(kind="epoch", time=1, body={}).to_bytes(), what="entry")
    with pytest.raises(FormatError):
        Entry.from_bytes(encode({**data, **change}))


async def test_entry_round_trip():
    for secret in (None, Secret(b"x")):
        entry = Entry(kind="release", time=5, body={"a": [1, {"b": b"c"}]}, secret=secret)
        assert Entry.from_bytes(entry.to_bytes()) == entry


def _any_entry(raw: bytes) -> None:
    try:
        Entry.from_bytes(raw)
    except CloisterError:
        return
    raise AssertionError


async def test_any_bytes_are_no_entry():
    given(st.binary(max_size=60))(_any_entry)()


# -- answers of the store that are lost -----------------------------------------


async def test_a_statement_whose_answer_was_lost_is_taken_once(host):
    realm = await Realm.start(host)
    await realm.create_pool()
    second = realm.next(await realm.publish(), grants={b"u" * 32: NOW})
    host.writes = "lost"
    with pytest.raises(Unavailable):
        await realm.publish(second, key=None)
    host.writes = "ok"
    await realm.publish(second, key=None)  # the owner runs the command again
    await realm.service.documents.rotate()
    again = await Realm.start(host, realm.clock)
    assert again.service.log.state.models[second.model].statement == second


async def test_a_pool_whose_answer_was_lost_is_created_once(host):
    realm = await Realm.start(host)
    host.writes = "lost"
    with pytest.raises(Unavailable):
        await realm.create_pool()
    host.writes = "ok"
    size = len(realm.service.log.tree)
    await realm.create_pool()
    assert len(realm.service.log.tree) == size + 1
    assert (await Realm.start(host, realm.clock)).service.log.state.pools == {realm.pool.id: realm.pool}


async def test_a_stranger_does_not_claim_a_pool_over_an_entry_of_uncertain_outcome(host):
    realm = await Realm.start(host)
    await realm.create_pool()
    one, other = owner_key("one"), owner_key("other")
    host.writes = "lost"
    with pytest.raises(Unavailable):
        await realm.publish(statement(realm.id, owner=one), owner=one)
    host.writes = "ok"
    with pytest.raises(AccessRefused) as caught:
        await realm.publish(statement(realm.id, owner=other), owner=other)
    assert caught.value.code == "access.pool"
    again = await Realm.start(host, realm.clock)
    assert again.service.log.state.owners == {realm.pool.id: one.thumbprint}


async def test_an_epoch_whose_answer_was_lost(host):
    realm = await Realm.start(host)
    host.writes = "lost"
    with pytest.raises(Unavailable):
        await realm.service.documents.rotate()
    host.writes = "ok"
    await realm.service.documents.rotate()
    assert (await Realm.start(host, realm.clock)).service.log.state.epoch > realm.service.log.state.epoch


async def test_what_could_not_be_replayed_is_never_written(host):
    """Whatever a caller checked before: the log looks again once it knows what is durable."""
    realm = await Realm.start(host)
    await realm.create_pool()
    said = await realm.publish()
    stale = realm.publication(realm.next(said, version=7))
    body = {"pool": stale.pool, "statement": stale.statement.to_data()}
    size = len(realm.service.log.tree)
    with pytest.raises(Rollback):
        await realm.service.log.append("statement", body)
    first = realm.publication(statement(realm.id, name="other"))
    with pytest.raises(FormatError):
        await realm.service.log.append("statement", {**body, "statement": first.statement.to_data()})
    assert len(realm.service.log.tree) == size
    await realm.publish(realm.next(said), key=None)


async def test_entries_without_an_answer_are_bounded(host):
    log = await filled(host)
    host.writes = "refused"
    for _ in range(MAX_UNCERTAIN + 3):
        with pytest.raises(Unavailable):
            await log.append("epoch", {"epoch": 9})
    assert len(log._uncertain) == MAX_UNCERTAIN

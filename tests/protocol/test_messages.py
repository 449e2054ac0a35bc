"""What holds for every message: one form, exact fields, and any bytes give a value or our error."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister.core.encoding import decode, encode
from cloister.core.protocol.exchange import MAX_BATCH, MAX_POOL, PoolCreation
from cloister.core.protocol.limits import (
    MAX_GRANTS,
    MAX_LEASE,
    MAX_LEASE_REQUESTS,
    MAX_MODELS,
    MAX_SEALED_MODEL,
)
from cloister.core.protocol.release import Release
from cloister.core.protocol.statement import ServingOptions
from cloister.core.secret import Secret
from cloister.enclave.keyservice.service import MAX_DOCUMENT_MODELS
from cloister.errors import CloisterError, FormatError, UsageError
from protocol.conftest import NAMES, Message

SHARED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 64), (1 << 64) - 1),
    st.floats(),
    st.binary(max_size=70),
    st.text(max_size=9),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3) | st.binary(max_size=3), st.integers(), max_size=2),
    st.sampled_from([[], {}, [[]], [{}], [None], [b""], [["a", b"b"]], "X-Wing", "worker", 1 << 63, -1]),
)


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested plain data."""
    found = [here] if here else []
    if isinstance(value, dict):
        for key, item in value.items():
            found += paths(item, (*here, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found += paths(item, (*here, index))
    return found


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value in one place; ``...`` takes it out."""
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) > 1:
        copy[path[0]] = changed(copy[path[0]], path[1:], new)
    elif new is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = new
    return copy


def test_round_trip(message: Message):
    raw = message.write(message.value)
    back = message.read(raw)
    assert back == message.value
    assert message.write(back) == raw


def test_every_truncation_is_refused(message: Message):
    raw = message.write(message.value)
    for length in {*range(min(len(raw), 64)), len(raw) // 2, len(raw) - 1}:
        with pytest.raises(FormatError):
            message.read(raw[:length])


def test_nothing_may_follow(message: Message):
    with pytest.raises(FormatError):
        message.read(message.write(message.value) + b"\x00")


def test_an_unknown_field_is_refused(message: Message):
    data = decode(message.write(message.value), what="message")
    with pytest.raises(UsageError):
        message.read(encode({**data, "unknown": 1}))
    with pytest.raises(UsageError):
        message.read(encode({**data, b"unknown": 1}))


def test_every_missing_field_is_refused(message: Message):
    data = decode(message.write(message.value), what="message")
    for name in data:
        with pytest.raises(UsageError):
            message.read(encode({other: item for other, item in data.items() if other != name}))


@pytest.mark.parametrize("other", [[], "", b"", 0, None, 1.5])
def test_something_else_than_a_map_is_refused(message: Message, other):
    with pytest.raises(UsageError):
        message.read(encode(other))


@pytest.mark.parametrize("wrong", [1.5, True, [1.5], {"a": 1.5}])
def test_every_field_of_another_type_is_refused(message: Message, wrong):
    """No message has a float; a truth value, a list or a map is none in most places."""
    data = decode(message.write(message.value), what="message")
    for path in paths(data):
        item = data
        for step in path:
            item = item[step]
        if type(item) is not type(wrong):
            with pytest.raises(UsageError):
                message.read(encode(changed(data, path, wrong)))


@SHARED
@given(st.data())
@pytest.mark.parametrize("name", NAMES)
def test_any_value_in_any_place_gives_a_value_or_our_error(messages, name, data):
    message = messages[name]
    plain = decode(message.write(message.value), what="message")
    path = data.draw(st.sampled_from(paths(plain)))
    new = data.draw(st.just(...) | ODD)
    try:
        value = message.read(encode(changed(plain, path, new)))
    except CloisterError:
        return
    message.write(value)


@SHARED
@given(st.binary(max_size=64))
@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_give_a_value_or_our_error(messages, name, raw):
    with pytest.raises(CloisterError):
        messages[name].read(raw)


@SHARED
@given(st.integers(0, 1 << 30), st.integers(1, 255))
@pytest.mark.parametrize("name", NAMES)
def test_any_altered_byte_gives_another_value_or_our_error(messages, name, position, change):
    message = messages[name]
    raw = bytearray(message.write(message.value))
    raw[position % len(raw)] ^= change
    try:
        value = message.read(bytes(raw))
    except CloisterError:
        return
    assert message.write(value) == raw
    assert value != message.value


# -- limits --------------------------------------------------------------------


def refused(message: Message, path: tuple[Any, ...], new: Any) -> CloisterError:
    data = decode(message.write(message.value), what="message")
    with pytest.raises(CloisterError) as caught:
        message.read(encode(changed(data, path, new)))
    return caught.value


@pytest.mark.parametrize(
    ("name", "path", "values"),
    [
        ("tree head", ("size",), [-1, 1 << 53]),
        ("statement", ("version",), [0, -1, 1 << 53]),
        (
            "statement",
            ("model",),
            ["", "x", "x/y", "/digits", f"{'a' * 64}", f"{'A' * 64}/m", f"{'a' * 63}/m"],
        ),
        (
            "statement",
            ("model",),
            [f"{'a' * 64}/", f"{'a' * 64}/A", f"{'a' * 64}/m/n", f"{'a' * 64}/{'m' * 129}"],
        ),
        ("sealed model", ("size",), [0, -1, MAX_SEALED_MODEL + 1]),
        ("serving options", ("slo_ms",), [-1, 3_600_001]),
        ("serving options", ("batching",), ["", "all"]),
        ("serving options", ("isolation",), ["", "none"]),
        ("served model", ("canary",), [-1, 1001]),
        ("lease", ("seconds",), [0, -1, MAX_LEASE + 1]),
        ("lease", ("requests",), [0, -1, MAX_LEASE_REQUESTS + 1]),
        ("possession", ("index",), [-1, 3, 1 << 60]),
        ("possession", ("size",), [0, 1, -3, MAX_BATCH + 1]),
        ("service document", ("epoch",), [-1, 1 << 60]),
        ("service document", ("not_after",), [-1, 1 << 60]),
        ("service document", ("not_before",), [-1, 1 << 60]),
        ("service document", ("threshold",), [-1, 1 << 60]),
        ("service document", ("keys",), [[], [b""], [1]]),
        ("service document", ("custodians",), [[b"short"], ["x" * 32]]),
        ("pool", ("name",), ["", "A", ".a", "a/b", "a b", "ä", "a" * 129, "a\n"]),
        ("pool", ("key_scope",), ["", "worker", "Pool"]),
        ("worker configuration", ("role",), ["", "key-service", "Worker"]),
        ("worker configuration", ("pool",), [None]),
        ("worker configuration", ("service",), [None]),
        ("key service configuration", ("service",), [b"s" * 32]),
        ("worker configuration", ("settings",), [{"queue": 0}, {"threads": 1 << 20}, {b"q": 1, "z": 2}]),
        ("worker configuration", ("settings", "lease_seconds"), [1, 3601, -5, None, "30"]),
        ("worker configuration", ("anchor_roots",), [b"", b"\x30\x00"]),
        ("attestation", ("keys",), [[["a"]], [["a", "b"]], [[b"a", b"b"]], [["a", b"b"]] * 9, [1]]),
        ("attestation", ("freshness",), [[], ["challenge"], ["challenge", "x"], [1, b"x"]]),
        ("publication", ("pool",), [b"", bytes(31)]),
        ("sealed release", ("statements",), [[b""], [1], [bytes(33)]]),
        ("challenge", ("challenge",), [b"", bytes(55), bytes(57)]),
        ("pool creation", ("owner",), [b"", bytes(31)]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_values_out_of_bounds(messages, name, path, values):
    for value in values:
        if name == "worker configuration" and path == ("anchor_roots",):
            made = refused_late(messages[name], path, value)
            assert made.code == "anchors.simulated-root"
        else:
            assert isinstance(refused(messages[name], path, value), UsageError)


def refused_late(message: Message, path: tuple[Any, ...], new: Any) -> CloisterError:
    """An anchor is looked at when it is used."""
    data = decode(message.write(message.value), what="message")
    with pytest.raises(CloisterError) as caught:
        _ = message.read(encode(changed(data, path, new))).anchors
    return caught.value


def test_too_many_grants(messages):
    grants = {index.to_bytes(32): 1 for index in range(MAX_GRANTS + 1)}
    assert refused(messages["statement"], ("grants",), grants).claim == "grants"
    assert refused(messages["statement"], ("grants",), {b"short": 1}).claim == "grants"
    assert refused(messages["statement"], ("grants",), {"u" * 32: 1}).claim == "grants"
    assert refused(messages["statement"], ("grants",), {bytes(32): "soon"}).claim == "grants"


def test_too_many_pools_and_models(messages):
    data = decode(messages["service document"].write(messages["service document"].value), what="message")
    assert refused(messages["service document"], ("pools",), data["pools"] * 257).claim == "pools"
    model = data["pools"][0]["models"][0]
    assert refused(messages["pool entry"], ("models",), [model] * 4097).claim == "models in a pool"


def test_a_document_of_as_many_models_as_a_service_takes_can_be_read(messages):
    message = messages["service document"]
    data = decode(message.write(message.value), what="message")
    pool = data["pools"][0]
    full = {**pool, "models": pool["models"] * MAX_MODELS}
    raw = encode({**data, "pools": [full] * (MAX_DOCUMENT_MODELS // MAX_MODELS)})
    assert len(message.read(raw).pools[-1].models) == MAX_MODELS


def test_a_statement_of_as_many_grants_as_an_owner_may_give_can_be_read(messages):
    message = messages["statement"]
    data = decode(message.write(message.value), what="message")
    grants = {index.to_bytes(32): 1 << 40 for index in range(MAX_GRANTS)}
    assert len(message.read(encode({**data, "grants": grants})).grants) == MAX_GRANTS


@pytest.mark.parametrize("name", ["possession", "challenge"])
def test_proofs_are_bounded(messages, name):
    for wrong in ([bytes(32)] * 65, [bytes(31)], ["x" * 32], [None]):
        assert refused(messages[name], ("consistency",), wrong).claim == "consistency proof"


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("tree head", 1024),
        ("head request", 8 << 10),
        ("possession", 8 << 10),
        ("challenge", 8 << 10),
        ("receipt", 8 << 10),
        ("statement query", 8 << 10),
        ("pool creation", MAX_POOL),
        ("worker configuration", 1 << 20),
        ("statement", 2 << 20),
        ("signed document", 4 << 20),
        ("service document", 4 << 20),
        ("release", 8 << 20),
        ("release request", 8 << 20),
        ("sealed release", 8 << 20),
        ("publication", 8 << 20),
    ],
)
def test_length_is_looked_at_first(messages, name, limit):
    with pytest.raises(FormatError) as caught:
        messages[name].read(b"\xff" * (limit + 1))
    assert caught.value.claim == "length"


def test_a_shared_pool_is_made_for_nobody(realm):
    with pytest.raises(FormatError):
        PoolCreation(pool=dataclasses.replace(realm.pool, shared=True), owner=bytes(32))


@pytest.mark.parametrize("slo", [True, 1.0, float("nan"), "1", None])
def test_a_latency_objective_is_a_whole_number(slo):
    with pytest.raises(UsageError):
        ServingOptions(slo_ms=slo)


def test_settings_are_whole_numbers(realm):
    for number in (30.0, True, "30", None, float("nan")):
        with pytest.raises(UsageError):
            realm.worker_configuration(settings={"lease_seconds": number})
    with pytest.raises(UsageError):
        realm.worker_configuration(settings={"debug": 1})


# -- secrets stay secret -------------------------------------------------------


@pytest.mark.parametrize("name", ["release", "pool key", "released model"])
def test_messages_with_keys_do_not_show_them(messages, name):
    value = messages[name].value
    shown = repr(value) + str(value) + f"{value}"
    assert "<Secret, 32 B>" in shown
    for secret in secrets(value):
        raw = secret.reveal()
        assert len(raw) == 32
        assert repr(raw) not in shown
        assert repr(raw)[2:20] not in shown
        assert raw.hex() not in shown


def secrets(value: Any) -> list[Secret]:
    if isinstance(value, Secret):
        return [value]
    if isinstance(value, tuple):
        return [found for item in value for found in secrets(item)]
    if dataclasses.is_dataclass(value):
        return [found for each in dataclasses.fields(value) for found in secrets(getattr(value, each.name))]
    return []


def test_a_release_has_secrets_where_they_are_looked_for(messages):
    value: Release = messages["release"].value
    assert len(secrets(value)) == len(value.pool_keys) + len(value.models) == 3

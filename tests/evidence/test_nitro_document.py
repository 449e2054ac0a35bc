"""Nitro documents: exact round trips, AWS's field rules, any bytes give a value or our error."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.core import encoding
from cloister.core.evidence.nitro import FIELDS, MAX_CABUNDLE, MAX_DOCUMENT, REQUIRED, NitroDocument
from cloister.core.verifier.certificates import NITRO
from cloister.errors import EvidenceError, FormatError
from cloister.sim.nitro import SimulatedNitro

NOW = 1_800_000_000
PROTECTED = cbor2.dumps({1: -35})
CONTENT = {
    "module_id": "i-0-enc0",
    "digest": "SHA384",
    "timestamp": NOW * 1000,
    "pcrs": {2: b"2" * 48, 0: b"0" * 32, 31: b"3" * 64},
    "certificate": b"leaf",
    "cabundle": [b"root", b"issuer"],
    "public_key": None,
    "user_data": b"",
    "nonce": b"n",
}


def build(content: object = None, /, **outer: object) -> bytes:
    """A document with this payload; ``outer`` replaces parts of COSE_Sign1."""
    parts = {"protected": PROTECTED, "unprotected": {}, "payload": None, "signature": b"s" * 96} | outer
    if parts["payload"] is None:
        parts["payload"] = cbor2.dumps(CONTENT if content is None else content)
    return cbor2.dumps(list(parts.values()))


def refused(data: bytes) -> EvidenceError:
    with pytest.raises(EvidenceError) as caught:
        NitroDocument.from_bytes(data)
    assert caught.value.code == "evidence.format"
    return caught.value


@pytest.fixture(scope="session")
def raw() -> bytes:
    simulated = SimulatedNitro.create(now=NOW)
    return simulated.document(report_data=b"r" * 64, pcrs={0: b"p" * 48}, now=NOW, nonce=b"n")


def test_round_trip(raw):
    document = NitroDocument.from_bytes(raw)
    assert document.to_bytes() == raw
    assert (document.user_data, document.nonce, document.public_key) == (b"r" * 64, b"n", None)
    assert document.pcrs[0] == b"p" * 48
    assert list(document.pcrs) == list(range(16))
    assert document.timestamp == NOW * 1000
    assert not document.debug


def test_tag_is_kept(raw):
    tagged = b"\xd2" + raw
    document = NitroDocument.from_bytes(tagged)
    assert document.tagged
    assert document.to_bytes() == tagged
    assert document.signed_bytes == NitroDocument.from_bytes(raw).signed_bytes


def test_order_is_kept():
    for names in (FIELDS, FIELDS[::-1], sorted(FIELDS)):
        data = build({name: CONTENT[name] for name in names})
        document = NitroDocument.from_bytes(data)
        assert document.fields == tuple(names)
        assert list(document.pcrs) == [2, 0, 31]
        assert document.to_bytes() == data


@pytest.mark.parametrize("name", ["public_key", "user_data", "nonce"])
def test_optional_field_that_is_null_or_left_out(name):
    for content in (
        CONTENT | {name: None},
        {key: value for key, value in CONTENT.items() if key != name},
    ):
        document = NitroDocument.from_bytes(build(content))
        assert getattr(document, name) is None
        assert document.to_bytes() == build(content)


def test_signed_bytes_are_those_of_cose():
    document = NitroDocument.from_bytes(build())
    assert document.signed_bytes == cbor2.dumps(["Signature1", PROTECTED, b"", cbor2.dumps(CONTENT)])


@pytest.mark.parametrize(
    ("pcrs", "debug"),
    [
        ({0: bytes(48), 1: bytes(48), 2: bytes(48), 3: b"x" * 48}, True),
        ({3: b"x" * 48}, True),
        ({0: bytes(48), 1: bytes(48), 2: bytes(47) + b"\1"}, False),
        ({0: b"x" * 48}, False),
    ],
)
def test_debug_mode(pcrs, debug):
    assert NitroDocument.from_bytes(build(CONTENT | {"pcrs": pcrs})).debug is debug


@pytest.mark.parametrize(
    ("outer", "claim"),
    [
        ({"protected": cbor2.dumps({1: -7})}, "protected header"),
        ({"protected": cbor2.dumps({1: -35, 4: b"kid"})}, "protected header"),
        ({"protected": b"\xa1\x18\x01\x38\x22"}, "protected header"),
        ({"protected": b""}, "protected header"),
        ({"protected": {1: -35}}, "protected header"),
        ({"unprotected": {4: b"kid"}}, "unprotected header"),
        ({"unprotected": []}, "unprotected header"),
        ({"payload": b""}, "payload"),
        ({"payload": "text"}, "payload"),
        ({"payload": 1 << 40}, "payload"),
        ({"payload": b"\x80"}, "payload"),
        ({"signature": b"s" * 95}, "signature"),
        ({"signature": b"s" * 97}, "signature"),
        ({"signature": None}, "signature"),
        ({"more": None}, "COSE_Sign1"),
    ],
)
def test_envelope_that_is_wrong(outer, claim):
    assert refused(build(**outer)).claim == claim


@pytest.mark.parametrize("data", [b"", b"\xd2", b"\x80", b"\xa0", b"\xf6", b"\x83\x40\xa0\x40"])
def test_bytes_that_are_no_envelope(data):
    refused(data)


@pytest.mark.parametrize("name", REQUIRED)
def test_required_field_that_is_missing(name):
    content = {key: value for key, value in CONTENT.items() if key != name}
    assert refused(build(content)).claim == "fields"


@pytest.mark.parametrize("key", ["more", "Nonce", 0, None, b"nonce", 1.5, True])
def test_field_that_is_unknown(key):
    assert refused(build(CONTENT | {key: 0})).claim == "fields"


@pytest.mark.parametrize(
    ("name", "value", "claim"),
    [
        ("module_id", "", "module_id"),
        ("module_id", "i" * 256, "module_id"),
        ("module_id", b"i-0", "module_id"),
        ("module_id", None, "module_id"),
        ("digest", "SHA256", "digest"),
        ("digest", b"SHA384", "digest"),
        ("digest", None, "digest"),
        ("timestamp", 0, "timestamp"),
        ("timestamp", -1, "timestamp"),
        ("timestamp", 1.5, "timestamp"),
        ("timestamp", True, "timestamp"),
        ("timestamp", None, "timestamp"),
        ("pcrs", {}, "pcrs"),
        ("pcrs", [], "pcrs"),
        ("pcrs", None, "pcrs"),
        ("pcrs", {index: bytes(48) for index in range(33)}, "pcrs"),
        ("pcrs", {32: bytes(48)}, "pcrs"),
        ("pcrs", {-1: bytes(48)}, "pcrs"),
        ("pcrs", {"0": bytes(48)}, "pcrs"),
        ("pcrs", {False: bytes(48)}, "pcrs"),
        ("pcrs", {0.0: bytes(48)}, "pcrs"),
        ("pcrs", {4: bytes(47)}, "pcr4"),
        ("pcrs", {4: bytes(0)}, "pcr4"),
        ("pcrs", {4: "0" * 48}, "pcr4"),
        ("certificate", b"", "certificate"),
        ("certificate", bytes(1025), "certificate"),
        ("certificate", None, "certificate"),
        ("cabundle", [], "cabundle"),
        ("cabundle", b"root", "cabundle"),
        ("cabundle", None, "cabundle"),
        ("cabundle", [b"c"] * (MAX_CABUNDLE + 1), "cabundle"),
        ("cabundle", [b"root", b""], "cabundle"),
        ("cabundle", [b"root", bytes(1025)], "cabundle"),
        ("cabundle", [b"root", "text"], "cabundle"),
        ("public_key", b"", "public_key"),
        ("public_key", bytes(1025), "public_key"),
        ("public_key", "key", "public_key"),
        ("user_data", bytes(513), "user_data"),
        ("user_data", "text", "user_data"),
        ("nonce", bytes(513), "nonce"),
        ("nonce", [], "nonce"),
    ],
)
def test_field_that_is_wrong(name, value, claim):
    assert refused(build(CONTENT | {name: value})).claim == claim


def test_longest_fields_fit():
    content = CONTENT | {
        "module_id": "i" * 255,
        "timestamp": (1 << 64) - 1,
        "pcrs": {index: bytes([index]) * 64 for index in range(32)},
        "certificate": bytes(1024),
        "cabundle": [bytes(1024)] * MAX_CABUNDLE,
        "public_key": bytes(1024),
        "user_data": bytes(512),
        "nonce": bytes(512),
    }
    data = build(content)
    assert len(data) < MAX_DOCUMENT
    assert NitroDocument.from_bytes(data).to_bytes() == data


def test_bundle_and_leaf_fit_the_chains_limit():
    assert NITRO.max_chain == MAX_CABUNDLE + 1


@pytest.mark.parametrize(
    "change",
    [
        {"timestamp": 1 << 64},
        {"fields": REQUIRED},
        {"fields": (*FIELDS, "nonce")},
        {"cabundle": [b"root"]},
    ],
)
def test_value_that_has_no_encoding(change):
    with pytest.raises(EvidenceError):
        replace(NitroDocument.from_bytes(build()), **change)


def patched(old: bytes, new: bytes) -> bytes:
    """A document whose payload has ``new`` in place of ``old``."""
    payload = cbor2.dumps(CONTENT)
    assert payload.count(old) == 1
    return build(payload=payload.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\xa9\x69module_id", b"\xbf\x69module_id"),  # a map of indefinite length, that nothing ends
        (b"\xa9\x69module_id", b"\xb8\x09\x69module_id"),  # lengths that aren't the shortest
        (b"\x68i-0-enc0", b"\x78\x08i-0-enc0"),
        (b"\x44leaf", b"\x58\x04leaf"),
        (b"\x44leaf", b"\x5f\x44leaf\xff"),
        (b"\x82\x44root", b"\x9f\x44root"),
        (b"\x44leaf", b"\xc2\x44leaf"),  # tags
        (b"\x44leaf", b"\xd8\x1c\x44leaf"),
        (b"\x68i-0-enc0", b"\x68\xff-0-enc0"),  # not UTF-8
    ],
)
def test_encoding_that_is_not_the_shortest(old, new):
    assert "payload" in refused(patched(old, new)).message


def test_map_of_indefinite_length():
    payload = cbor2.dumps(CONTENT)
    assert "CBOR" in refused(build(payload=b"\xbf" + payload[1:] + b"\xff")).message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\xa9\x69module_id", b"\xaa\x66digest\x66SHA384\x69module_id"),
        (b"\xa3\x02\x58\x30", b"\xa4\x00\x58\x20" + b"0" * 32 + b"\x02\x58\x30"),
        (b"\xa3\x02\x58\x30", b"\xa4\xf4\x58\x20" + b"0" * 32 + b"\x02\x58\x30"),  # False is 0 as well
    ],
)
def test_key_that_occurs_twice(old, new):
    assert "CBOR" in refused(patched(old, new)).message


@pytest.mark.parametrize(
    "spoil", [lambda raw: raw + b"\0", lambda raw: b"\xd2\xd2" + raw, lambda raw: raw * 2]
)
def test_document_that_is_extended(spoil, raw):
    refused(spoil(raw))


def test_payload_that_is_extended():
    refused(build(payload=cbor2.dumps(CONTENT) + b"\0"))


def test_document_that_is_too_long(raw):
    error = refused(raw + bytes(MAX_DOCUMENT))
    assert error.claim == "length"


@pytest.mark.parametrize(
    "payload", [b"\x81" * 2000, b"\x80" * 9000, b"\x9b" + b"\xff" * 8, b"\xbb" + b"\xff" * 8]
)
def test_nesting_and_counts_are_bounded(payload):
    refused(build(payload=payload))
    refused(payload)


def test_every_truncation(raw):
    for length in [*range(0, 200), *range(200, len(raw), 61), len(raw) - 1]:
        refused(raw[:length])


@given(st.binary(max_size=500))
def test_any_bytes_give_a_value_or_our_error(data):
    for document in (data, build(payload=data)):
        with contextlib.suppress(EvidenceError):
            assert NitroDocument.from_bytes(document).to_bytes() == document


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=80) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.integers(0, 33) | st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(FIELDS), PLAIN))
def test_any_content_gives_a_value_or_our_error(changes):
    data = build(CONTENT | changes)
    with contextlib.suppress(EvidenceError):
        assert NitroDocument.from_bytes(data).to_bytes() == data


@settings(max_examples=300)
@given(offset=st.integers(0, 1 << 16), value=st.binary(min_size=1, max_size=8))
def test_changed_document_round_trips_or_is_our_error(offset, value, raw):
    offset %= len(raw)
    changed = raw[:offset] + value + raw[offset + len(value) :]
    with contextlib.suppress(EvidenceError):
        assert NitroDocument.from_bytes(changed).to_bytes() == changed


def test_own_messages_take_no_foreign_form():
    """What `encoding` allows for documents, it refuses in our own messages."""
    for value in ({1: 2}, {"b": 1, "a": 2}):
        data = encoding.encode(value, foreign=True)
        assert encoding.decode(data, what="document", foreign=True) == value
        with pytest.raises(FormatError):
            encoding.decode(data, what="message")

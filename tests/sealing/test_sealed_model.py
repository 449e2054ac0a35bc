"""Sealed models: first what is refused, then what opens."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import os
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.core.encoding import decode, encode
from cloister.core.sealing import (
    PREFIX_SIZE,
    Opener,
    SealedHeader,
    Section,
    Unsealer,
    header_size,
    read_sections,
    seal,
)
from cloister.core.sealing.header import MAX_BODY, MAX_SIZE, PREFIX
from cloister.core.sealing.keys import ChunkTree, chunk_aad, chunk_cipher, chunk_nonce
from cloister.core.secret import Secret
from cloister.errors import CloisterError, FormatError, Tampered, UsageError

CHUNK = 4096
KEY = Secret(bytes(range(32)))
GRAPH, WEIGHTS = os.urandom(700), os.urandom(3 * CHUNK + 123)


def make(
    weights: bytes = WEIGHTS, *, key: Secret = KEY, graph: bytes = GRAPH
) -> tuple[SealedHeader, list[bytes]]:
    sealing = seal(
        [Section.of("graph", graph), Section.of("weights", weights)],
        model_id="o/m",
        key=key,
        chunk_size=CHUNK,
    )
    first, *chunks = sealing
    assert first == sealing.header.to_bytes()
    return sealing.header, chunks


@pytest.fixture(scope="module")
def sealed() -> tuple[SealedHeader, list[bytes]]:
    return make()


def opener(header: SealedHeader, key: Secret = KEY) -> Opener:
    return Opener(key, header, digest=header.digest)


def open_all(header: SealedHeader, chunks: list[bytes]) -> dict[str, memoryview]:
    unsealer = Unsealer(KEY, header, digest=header.digest)
    for chunk in chunks:
        unsealer.feed(chunk)
    return unsealer.finish()


def refused(code: str, header: SealedHeader, chunks: list[bytes]) -> None:
    with pytest.raises(Tampered) as caught:
        open_all(header, chunks)
    assert caught.value.code == code


# -- what is refused ------------------------------------------------------------


def test_wrong_key(sealed):
    with pytest.raises(Tampered) as caught:
        opener(sealed[0], Secret(bytes(32)))
    assert caught.value.code == "sealing.key"


def test_altered_commitment(sealed):
    header = dataclasses.replace(sealed[0], commitment=bytes(32))
    with pytest.raises(Tampered) as caught:
        opener(header)
    assert caught.value.code == "sealing.key"


@pytest.mark.parametrize(
    "change",
    [
        {"model_id": "o/other"},
        {"salt": bytes(32)},
        {"commitment": bytes(32)},
        {"root": bytes(32)},
        {"chunk_size": 2 * CHUNK},
    ],
    ids=lambda change: next(iter(change)),
)
def test_header_that_the_statement_does_not_name(sealed, change):
    with pytest.raises(Tampered) as caught:
        Opener(KEY, dataclasses.replace(sealed[0], **change), digest=sealed[0].digest)
    assert caught.value.code == "sealing.header"
    assert caught.value.expected == sealed[0].digest.hex()


@pytest.mark.parametrize(
    "change", [{"model_id": "o/other"}, {"root": bytes(32)}], ids=lambda change: next(iter(change))
)
def test_chunks_do_not_open_under_an_altered_header(sealed, change):
    refused("sealing.chunk", dataclasses.replace(sealed[0], **change), sealed[1])


@pytest.mark.parametrize("position", ["first", "middle", "last", "tag"])
@pytest.mark.parametrize("index", [0, 1, -1])
def test_flipped_bit(sealed, index, position):
    header, chunks = sealed[0], list(sealed[1])
    altered = bytearray(chunks[index])
    offset = {"first": 0, "middle": len(altered) // 2, "last": len(altered) - 17, "tag": len(altered) - 1}[
        position
    ]
    altered[offset] ^= 1
    chunks[index] = bytes(altered)
    refused("sealing.chunk", header, chunks)


def test_reordered_chunks(sealed):
    header, chunks = sealed
    refused("sealing.chunk", header, [chunks[1], chunks[0], *chunks[2:]])


def test_repeated_chunk(sealed):
    header, chunks = sealed
    refused("sealing.chunk", header, [chunks[0], chunks[0], *chunks[2:]])


def test_chunk_of_another_model(sealed):
    header, chunks = sealed
    _, others = make(os.urandom(len(WEIGHTS)))
    refused("sealing.chunk", header, [chunks[0], others[1], *chunks[2:]])


def test_chunk_of_the_same_model_sealed_again(sealed):
    header, chunks = sealed
    _, others = make()
    refused("sealing.chunk", header, [chunks[0], others[1], *chunks[2:]])


def test_missing_last_chunk(sealed):
    header, chunks = sealed
    refused("sealing.truncated", header, chunks[:-1])


def test_nothing_but_the_header(sealed):
    refused("sealing.truncated", sealed[0], [])


def test_cut_within_a_chunk(sealed):
    header, chunks = sealed
    refused("sealing.truncated", header, [*chunks[:-1], chunks[-1][:-1]])


def test_missing_middle_chunk(sealed):
    header, chunks = sealed
    refused("sealing.chunk", header, [chunks[0], *chunks[2:]])


def test_bytes_after_the_end(sealed):
    header, chunks = sealed
    refused("sealing.extended", header, [*chunks, b"\0"])


def test_chunk_after_the_end(sealed):
    header, chunks = sealed
    one = opener(header)
    out = bytearray(CHUNK)
    for chunk in chunks:
        one.open_into(chunk, out)
    with pytest.raises(Tampered) as caught:
        one.open_into(chunks[-1], out)
    assert caught.value.code == "sealing.extended"


@pytest.mark.parametrize(("change", "code"), [(-1, "sealing.truncated"), (1, "sealing.extended")])
def test_chunk_of_another_length(sealed, change, code):
    header, chunks = sealed
    chunk = chunks[0][:-1] if change < 0 else chunks[0] + b"\0"
    for call in (
        lambda: opener(header).open_into(chunk, bytearray(CHUNK)),
        lambda: opener(header).open_chunk(0, chunk),
    ):
        with pytest.raises(Tampered) as caught:
            call()
        assert caught.value.code == code


def test_shorter_model_with_its_own_final_chunk_only_as_itself():
    """The final flag: a model that is a prefix of another has other ciphertext for the chunk it ends with."""
    header, chunks = make(bytes(2 * CHUNK))
    key = chunk_cipher(KEY, header)
    plain = key.decrypt(chunk_nonce(2, last=True), chunks[2], chunk_aad(header.digest, 2))
    not_final = key.encrypt(chunk_nonce(2, last=False), plain, chunk_aad(header.digest, 2))
    refused("sealing.chunk", header, [*chunks[:2], not_final])


def test_chunk_forged_by_someone_who_has_the_key(sealed):
    """The Merkle root holds where the cipher can't: the header that the owner signed names one plaintext."""
    header, chunks = sealed
    forged = chunk_cipher(KEY, header).encrypt(
        chunk_nonce(1, last=False), bytes(CHUNK), chunk_aad(header.digest, 1)
    )
    refused("sealing.root", header, [chunks[0], forged, *chunks[2:]])


def test_refused_chunk_leaves_no_plaintext_and_can_be_tried_again(sealed):
    header, chunks = sealed
    one, out = opener(header), bytearray(b"\xff" * CHUNK)
    altered = bytearray(chunks[0])
    altered[-1] ^= 1
    with pytest.raises(Tampered):
        one.open_into(altered, out)
    assert out == bytes(CHUNK)
    assert one.open_into(chunks[0], out) == CHUNK
    assert out[: len(GRAPH)] == GRAPH
    assert one.opened == 1


def test_finish_before_the_last_chunk(sealed):
    header, chunks = sealed
    one = opener(header)
    for chunk in chunks[:-1]:
        one.open_into(chunk, bytearray(CHUNK))
    with pytest.raises(Tampered) as caught:
        one.finish()
    assert caught.value.code == "sealing.truncated"
    assert caught.value.actual == f"{len(chunks) - 1} chunks"


@pytest.mark.parametrize("room", [bytearray(CHUNK - 1), memoryview(bytes(CHUNK))], ids=["small", "read-only"])
def test_buffer_that_can_not_take_the_chunk(sealed, room):
    with pytest.raises(UsageError) as caught:
        opener(sealed[0]).open_into(sealed[1][0], room)
    assert caught.value.code == "sealing.buffer"


def test_buffer_that_can_not_take_the_model(sealed):
    header = sealed[0]
    for into in (bytearray(header.size - 1), memoryview(bytes(header.size))):
        with pytest.raises(UsageError) as caught:
            Unsealer(KEY, header, digest=header.digest, into=into)
        assert caught.value.code == "sealing.buffer"


def test_more_filled_than_there_was_room_for(sealed):
    unsealer = Unsealer(KEY, sealed[0], digest=sealed[0].digest)
    for count in (len(unsealer.room()) + 1, -1):
        with pytest.raises(UsageError) as caught:
            unsealer.filled(count)
        assert caught.value.code == "sealing.buffer"


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_key_of_another_length(sealed, size):
    key = Secret(bytes(size))
    for call in (lambda: opener(sealed[0], key), lambda: make(key=key)):
        with pytest.raises(UsageError) as caught:
            call()
        assert caught.value.code == "sealing.key-size"


@pytest.mark.parametrize("length", [2, 4])
def test_section_of_another_length_than_declared(length):
    section = Section(name="graph", length=3, read=lambda: [bytes(length)])
    with pytest.raises(UsageError) as caught:
        seal([section], model_id="o/m", key=KEY)
    assert caught.value.code == "sealing.source"


def test_section_that_grows_between_the_passes():
    reads = iter([[b"abc"], [b"abcd"]])
    sealing = seal([Section(name="graph", length=3, read=lambda: next(reads))], model_id="o/m", key=KEY)
    with pytest.raises(UsageError) as caught:
        list(sealing)
    assert caught.value.code == "sealing.source"


def test_section_that_changes_between_the_passes_opens_nowhere():
    reads = iter([[b"abc"], [b"abd"]])
    sealing = seal([Section(name="graph", length=3, read=lambda: next(reads))], model_id="o/m", key=KEY)
    refused("sealing.root", sealing.header, list(sealing)[1:])


def test_second_iteration_would_repeat_nonces():
    sealing = seal([Section.of("graph", b"abc")], model_id="o/m", key=KEY)
    next(iter(sealing))
    with pytest.raises(UsageError) as caught:
        next(iter(sealing))
    assert caught.value.code == "sealing.used"


@pytest.mark.parametrize(
    "arguments",
    [
        {"model_id": ""},
        {"model_id": "x" * 513},
        {"model_id": "a\nb"},
        {"model_id": " a"},
        {"model_id": b"a"},
        {"chunk_size": 4095},
        {"chunk_size": 6144},
        {"chunk_size": 2048},
        {"chunk_size": 32 << 20},
        {"sections": []},
        {"sections": [Section.of(str(number), b"") for number in range(17)]},
        {"sections": [Section.of("a", b""), Section.of("a", b"")]},
        {"sections": [Section.of("", b"")]},
        {"sections": [Section.of("x" * 65, b"")]},
        {"sections": [Section.of("é", b"")]},
        {"sections": [Section(name="a", length=-1, read=list)]},
        {"sections": [Section(name="a", length=MAX_SIZE + 1, read=list)]},
        {"sections": [Section(name="a", length=MAX_SIZE, read=list), Section(name="b", length=1, read=list)]},
    ],
    ids=str,
)
def test_names_and_sizes_out_of_bounds(arguments):
    with pytest.raises(FormatError) as caught:
        seal(**{"sections": [Section.of("a", b"")], "model_id": "o/m", "key": KEY, **arguments})
    assert caught.value.code == "sealing.format"


def fields_of(header: SealedHeader) -> dict:
    return decode(header.to_bytes()[PREFIX_SIZE:], what="header")


def with_fields(fields: object) -> bytes:
    body = encode(fields)
    return PREFIX.pack(b"CLSTSEAL", 1, len(body)) + body


BAD_FIELDS = [
    {"format": "cloister/sealed-model/v2"},
    {"size": 1},
    {"size": True},
    {"size": None},
    {"chunk_size": 5000},
    {"chunk_size": "4096"},
    {"chunk_size": True},
    {"salt": bytes(31)},
    {"salt": "x" * 32},
    {"commitment": bytes(33)},
    {"root": b""},
    {"root": None},
    {"model": 7},
    {"sections": []},
    {"sections": {}},
    {"sections": [["graph", 0]]},
    {"sections": ["abc"]},
    {"sections": [["graph", 1, 700], ["weights", 4096, len(WEIGHTS)]]},
    {"sections": [["graph", 0, 700], ["weights", 700, len(WEIGHTS)]]},
    {"sections": [["graph", 0, 700], ["weights", 8192, len(WEIGHTS)]]},
    {"sections": [["graph", 0, -1], ["weights", 4096, len(WEIGHTS)]]},
    {"sections": [[7, 0, 700], ["weights", 4096, len(WEIGHTS)]]},
    {"sections": [["graph", False, 700], ["weights", 4096, len(WEIGHTS)]]},
    {"sections": [["graph", 0, 700], ["weights", 4096.0, len(WEIGHTS)]]},
    {"size": float(4096 + len(WEIGHTS))},
    {"more": 1},
]


@pytest.mark.parametrize("change", BAD_FIELDS, ids=str)
def test_header_field_that_is_not_what_it_must_be(sealed, change):
    with pytest.raises(FormatError):
        SealedHeader.from_bytes(with_fields({**fields_of(sealed[0]), **change}))


@pytest.mark.parametrize(
    "name", ["format", "model", "size", "chunk_size", "salt", "commitment", "root", "sections"]
)
def test_header_without_a_field(sealed, name):
    fields = fields_of(sealed[0])
    del fields[name]
    with pytest.raises(FormatError):
        SealedHeader.from_bytes(with_fields(fields))


@pytest.mark.parametrize(
    ("prefix", "claim"),
    [
        (b"", "length"),
        (b"CLSTSEAL" + bytes(7), "length"),
        (PREFIX.pack(b"CLSTSEAM", 1, 10), "magic"),
        (PREFIX.pack(b"CLSTSEAL", 2, 10), "version"),
        (PREFIX.pack(b"CLSTSEAL", 1, MAX_BODY + 1), "header length"),
    ],
)
def test_prefix_of_something_else(prefix, claim):
    with pytest.raises(FormatError) as caught:
        header_size(prefix)
    assert (caught.value.code, caught.value.claim) == ("sealing.format", claim)


@pytest.mark.parametrize("change", [-1, 1])
def test_header_of_another_length_than_it_says(sealed, change):
    data = sealed[0].to_bytes()
    with pytest.raises(FormatError):
        SealedHeader.from_bytes(data[:-1] if change < 0 else data + b"\0")


def test_container_cut_within_its_header(sealed):
    with pytest.raises(Tampered) as caught:
        read_sections(sealed[0].to_bytes()[:-1], key=KEY, digest=sealed[0].digest)
    assert caught.value.code == "sealing.truncated"


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (0, 10**9), (10**9, 0)])
def test_range_outside_the_model(sealed, offset, length):
    with pytest.raises(FormatError) as caught:
        list(sealed[0].spans(offset, length))
    assert caught.value.code == "sealing.range"


@pytest.mark.parametrize("index", [-1, 5])
def test_chunk_that_is_not_there(sealed, index):
    header = sealed[0]
    assert header.chunks == 5
    for call in (
        header.chunk_length,
        header.chunk_range,
        lambda number: opener(header).open_chunk(number, b""),
    ):
        with pytest.raises(FormatError) as caught:
            call(index)
        assert caught.value.code == "sealing.range"


def test_section_that_is_not_there(sealed):
    with pytest.raises(FormatError) as caught:
        sealed[0].section("bias")
    assert (caught.value.code, caught.value.expected) == ("sealing.section", "graph, weights")


def test_no_error_and_no_repr_shows_the_key(sealed):
    assert KEY.reveal().hex() not in repr(sealed[0])
    with pytest.raises(Tampered) as caught:
        opener(sealed[0], Secret(b"k" * 32))
    assert "k" * 32 not in str(caught.value)
    assert (b"k" * 32).hex() not in str(caught.value.to_dict())


# -- what opens ------------------------------------------------------------


def test_round_trip(sealed):
    header, chunks = sealed
    sections = read_sections(b"".join([header.to_bytes(), *chunks]), key=KEY, digest=header.digest)
    assert list(sections) == ["graph", "weights"]
    assert (sections["graph"], sections["weights"]) == (GRAPH, WEIGHTS)
    assert all(section.readonly for section in sections.values())
    assert header.section("weights").offset == 4096
    assert header.container_size == len(header.to_bytes()) + sum(map(len, chunks))


def test_header_round_trip(sealed):
    data = sealed[0].to_bytes()
    assert SealedHeader.from_bytes(data) == sealed[0]
    assert SealedHeader.from_bytes(memoryview(data)).digest == hashlib.sha256(data).digest()
    assert header_size(data[:PREFIX_SIZE]) == len(data)


@pytest.mark.parametrize(
    ("graph", "weights", "chunks"),
    [
        (b"", b"", 1),
        (b"g", b"", 1),
        (b"", b"w", 1),
        (bytes(CHUNK), b"", 1),
        (bytes(CHUNK), b"w", 2),
        (bytes(CHUNK), bytes(CHUNK), 2),
    ],
)
def test_edges_of_chunks_and_sections(graph, weights, chunks):
    header, pieces = make(weights, graph=graph)
    assert header.chunks == len(pieces) == chunks
    sections = open_all(header, pieces)
    assert (sections["graph"], sections["weights"]) == (graph, weights)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3 * CHUNK), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 2 * CHUNK), min_size=1, max_size=5),
    into=st.booleans(),
)
def test_any_sections_in_any_pieces(sizes, cuts, into):
    contents = {f"s{number}": os.urandom(size) for number, size in enumerate(sizes)}
    source = [Section.of(name, *pieces_of(content, cuts)) for name, content in contents.items()]
    sealing = seal(source, model_id="o/m", key=KEY, chunk_size=CHUNK)
    stream = b"".join(list(sealing)[1:])
    buffer = bytearray(sealing.header.size + 5) if into else None
    unsealer = Unsealer(KEY, sealing.header, digest=sealing.header.digest, into=buffer)
    for piece in pieces_of(stream, cuts):
        unsealer.feed(piece)
    assert unsealer.finish() == contents


def pieces_of(content: bytes, cuts: list[int]) -> Iterator[bytes]:
    position = turn = 0
    while position < len(content):
        yield content[position : position + cuts[turn % len(cuts)]]
        position += cuts[turn % len(cuts)]
        turn += 1


def test_reading_straight_into_the_room(sealed):
    header, chunks = sealed
    unsealer = Unsealer(KEY, header, digest=header.digest)
    stream = memoryview(b"".join(chunks))
    while len(room := unsealer.room()):
        count = min(len(room), 1000)
        room[:count], stream = stream[:count], stream[count:]
        unsealer.filled(count)
    assert not stream
    assert unsealer.finish()["weights"] == WEIGHTS


def test_chunks_open_at_random_and_ranges_map_to_them(sealed):
    header, chunks = sealed
    container = b"".join([header.to_bytes(), *chunks])
    one = opener(header)
    plain = {
        index: one.open_chunk(index, container[slice(*header.chunk_range(index))])
        for index in (3, 0, 4, 2, 1)
    }
    whole = b"".join(plain[index] for index in range(5))
    assert whole[: len(GRAPH)] == GRAPH
    assert whole[len(GRAPH) : 4096] == bytes(4096 - len(GRAPH))
    assert whole[4096:] == WEIGHTS
    for offset, length in ((0, 0), (0, 1), (4095, 2), (100, 9000), (header.size - 1, 1), (0, header.size)):
        spans = list(header.spans(offset, length))
        parts = (
            one.open_chunk(s.index, container[s.start : s.stop])[s.skip : s.skip + s.take] for s in spans
        )
        assert b"".join(parts) == whole[offset : offset + length]


def test_same_model_sealed_twice_has_nothing_in_common(sealed):
    """The host can neither tell that two containers hold one model, nor confirm a guess of the model."""
    header, chunks = sealed
    again, others = make()
    for name in ("salt", "commitment", "root"):
        assert getattr(header, name) != getattr(again, name)
    assert not set(chunks) & set(others)
    assert header.root != make(key=Secret(bytes(32)))[0].root


def test_root_is_that_of_rfc_9162(sealed):
    """The recursive definition of RFC 9162, section 2.1.1, with our leaves, for every small number of
    chunks."""

    def root(leaves: list[bytes]) -> bytes:
        if len(leaves) == 1:
            return leaves[0]
        half = 1 << (len(leaves) - 1).bit_length() - 1
        return hashlib.sha256(b"\x01" + root(leaves[:half]) + root(leaves[half:])).digest()

    for count in range(1, 18):
        chunks = [bytes([number]) * number for number in range(count)]
        tree = ChunkTree(b"k" * 32)
        for chunk in chunks:
            tree.append(chunk)
        assert tree.root() == root([hmac.digest(b"k" * 32, chunk, "sha256") for chunk in chunks])


def test_format_does_not_change(monkeypatch):
    """A container of fixed salt: whoever changes its bytes needs a new version.

    Recorded from this implementation; regenerate by printing the two digests.
    """
    monkeypatch.setattr(os, "urandom", lambda size: b"\x07" * size)
    header, chunks = make(b"w" * 5000, graph=b"g" * 10)
    assert header.digest.hex() == "a379cbd00fa23f70dbf7d1e4d7ff13ed467b18d7ea77f309ed04e56a39dbcc22"
    assert (
        hashlib.sha256(b"".join(chunks)).hexdigest()
        == "e5d119f8ae136f4acdb4da0c723036737214ad35016462fb52c514296a4c3815"
    )


def test_format_by_hand(sealed):
    """The format as `header` and `keys` describe it, with nothing of ours but CBOR."""
    header, chunks = sealed

    def derive(*info: object) -> bytes:  # RFC 5869 for 32 bytes
        extracted = hmac.digest(header.salt, KEY.reveal(), "sha256")
        return hmac.digest(extracted, encode(["cloister/sealed-model/v1", *info]) + b"\x01", "sha256")

    digest = hashlib.sha256(header.to_bytes()).digest()
    cipher = AESGCM(derive("file", digest))
    plain = [
        cipher.decrypt(bytes(10) + bytes([n, n == len(chunks) - 1]), chunk, digest + n.to_bytes(8, "big"))
        for n, chunk in enumerate(chunks)
    ]
    assert b"".join(plain) == GRAPH + bytes(4096 - len(GRAPH)) + WEIGHTS
    assert derive("commitment") == header.commitment
    leaves = [hmac.digest(derive("leaf"), chunk, "sha256") for chunk in plain]
    a, b, c, d, e = leaves
    pair = [hashlib.sha256(b"\x01" + left + right).digest() for left, right in ((a, b), (c, d))]
    four = hashlib.sha256(b"\x01" + pair[0] + pair[1]).digest()
    assert hashlib.sha256(b"\x01" + four + e).digest() == header.root


# -- any bytes ------------------------------------------------------------


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_or_our_error(data):
    for candidate in (data, PREFIX.pack(b"CLSTSEAL", 1, len(data)) + data):
        try:
            header = SealedHeader.from_bytes(candidate)
        except CloisterError:
            continue
        assert header.to_bytes() == candidate


plain_data = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64 - 1)
    | st.binary(max_size=40)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    name=st.sampled_from(["model", "size", "chunk_size", "salt", "commitment", "root", "sections"]),
    value=plain_data,
)
def test_any_field_is_part_of_a_header_or_our_error(sealed, name, value):
    candidate = with_fields({**fields_of(sealed[0]), name: value})
    try:
        header = SealedHeader.from_bytes(candidate)
    except CloisterError:
        return
    assert header.to_bytes() == candidate


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_any_altered_container_is_refused(sealed, data):
    header, chunks = sealed
    container = bytearray(b"".join([header.to_bytes(), *chunks]))
    position = data.draw(st.integers(0, len(container) - 1))
    container[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises((Tampered, FormatError)):
        read_sections(container, key=KEY, digest=header.digest)

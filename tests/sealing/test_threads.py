"""Leaves hashed in threads: what is refused stays refused, the same bytes come out, and no thread stays."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from cloister.core.sealing import Opener, SealedHeader, Section, Unsealer, read_sections, seal
from cloister.core.sealing.keys import chunk_aad, chunk_cipher, chunk_nonce
from cloister.core.secret import Secret
from cloister.errors import Tampered, UsageError

CHUNK = 1 << 20
KEY = Secret(bytes(range(32)))
WEIGHTS = os.urandom(12 * CHUNK + 123)


@pytest.fixture(scope="module")
def sealed() -> tuple[SealedHeader, list[bytes]]:
    sealing = seal([Section.of("weights", WEIGHTS)], model_id="o/m", key=KEY, chunk_size=CHUNK)
    return sealing.header, list(sealing)[1:]


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def open_all(header: SealedHeader, chunks: list[bytes]) -> memoryview:
    with Unsealer(KEY, header, digest=header.digest) as unsealer:
        for chunk in chunks:
            unsealer.feed(chunk)
        return unsealer.finish()["weights"]


@pytest.mark.parametrize("index", [0, 5, 12])
def test_altered_chunk(sealed, index):
    header, chunks = sealed
    altered = bytearray(chunks[index])
    altered[7] ^= 1
    with pytest.raises(Tampered) as caught:
        open_all(header, [*chunks[:index], bytes(altered), *chunks[index + 1 :]])
    assert (caught.value.code, caught.value.claim) == ("sealing.chunk", f"chunk {index}")


@pytest.mark.parametrize("index", [0, 5, 12])
def test_chunk_forged_by_someone_who_has_the_key(sealed, index):
    header, chunks = sealed
    last = index == header.chunks - 1
    forged = chunk_cipher(KEY, header).encrypt(
        chunk_nonce(index, last=last), bytes(header.chunk_length(index)), chunk_aad(header.digest, index)
    )
    with pytest.raises(Tampered) as caught:
        open_all(header, [*chunks[:index], forged, *chunks[index + 1 :]])
    assert caught.value.code == "sealing.root"


def test_header_that_is_refused_starts_no_thread(sealed):
    header, _ = sealed
    for key, digest, into, error in (
        (Secret(bytes(32)), header.digest, None, Tampered),
        (KEY, bytes(32), None, Tampered),
        (KEY, header.digest, bytearray(1), UsageError),
    ):
        with pytest.raises(error):
            Unsealer(key, header, digest=digest, into=into)


def test_leaving_in_the_middle_ends_the_thread(sealed):
    header, chunks = sealed
    with Unsealer(KEY, header, digest=header.digest) as unsealer:
        for chunk in chunks[:6]:
            unsealer.feed(chunk)
        assert [one.name for one in threading.enumerate() if one.name.startswith("unseal")]


def test_chunk_refused_in_the_middle_can_be_tried_again(sealed):
    header, chunks = sealed
    altered = bytearray(chunks[3])
    altered[-1] ^= 1
    with Unsealer(KEY, header, digest=header.digest) as unsealer:
        for chunk in chunks[:3]:
            unsealer.feed(chunk)
        with pytest.raises(Tampered):
            unsealer.feed(altered)
        for chunk in chunks[3:]:
            unsealer.feed(chunk)
        assert unsealer.finish()["weights"] == WEIGHTS


def test_sections_outlive_the_thread(sealed):
    header, chunks = sealed
    assert open_all(header, chunks) == WEIGHTS
    container = b"".join([header.to_bytes(), *chunks])
    assert read_sections(container, key=KEY, digest=header.digest)["weights"] == WEIGHTS


@pytest.mark.parametrize("size", [64 << 10, CHUNK, 4 * CHUNK + 77])
def test_source_that_reuses_its_buffer(size):
    """A buffer keeps its content only until the next is asked for: every leaf has been hashed by then."""

    def read() -> Iterator[memoryview]:
        buffer = bytearray(size)
        for start in range(0, len(WEIGHTS), size):
            piece = WEIGHTS[start : start + size]
            buffer[: len(piece)] = piece
            yield memoryview(buffer)[: len(piece)]

    section = Section(name="weights", length=len(WEIGHTS), read=read)
    sealing = seal([section], model_id="o/m", key=KEY, chunk_size=CHUNK)
    assert open_all(sealing.header, list(sealing)[1:]) == WEIGHTS


def test_source_that_fails_ends_the_threads():
    def read() -> Iterator[bytes]:
        yield WEIGHTS
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        seal([Section(name="weights", length=2 * len(WEIGHTS), read=read)], model_id="o/m", key=KEY)


def test_threads_hash_what_one_alone_hashes(sealed):
    """The same root, opened a chunk at a time without threads."""
    header, chunks = sealed
    opener, plaintext = Opener(KEY, header, digest=header.digest), bytearray(header.size)
    position = 0
    for chunk in chunks:
        position += opener.open_into(chunk, memoryview(plaintext)[position:])
    opener.finish()
    assert plaintext == WEIGHTS

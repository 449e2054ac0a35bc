"""Requests that are sealed while they leave and opened while they arrive: same bytes, same refusals."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.core.ohttp import kem
from cloister.core.ohttp.bhttp import Request, Response
from cloister.core.ohttp.encapsulation import FIRST, MAX_HEAD, PIECE, Gateway, OpeningRequest, begin
from cloister.core.ohttp.hpke import (
    CHACHA20_POLY1305,
    EXPORT_ONLY,
    Suite,
    generate_private_key,
    setup_receiver,
    setup_sender,
)
from cloister.errors import BindingRefused, FormatError, Tampered, UsageError

KEY = generate_private_key(kem.XWING)
GATEWAY = Gateway([(1, KEY)])
CONFIGURATION = GATEWAY.configurations()[0]
PLAINTEXT = bytes(range(251)) * 1300  # 326,300 bytes, several pieces


def started(*parts: bytes):
    return begin(CONFIGURATION, CONFIGURATION.preferred_suite()).seal_parts(parts)


def opening(message: bytes, *steps: int) -> OpeningRequest:
    made = GATEWAY.begin(message)
    for step in steps:
        made.advance(step)
    return made


# --- what is refused


@pytest.mark.parametrize("place", [MAX_HEAD, MAX_HEAD + 70_000, -17, -1])
def test_an_altered_byte_anywhere(place):
    message = started(PLAINTEXT).whole()
    message[place] ^= 1
    made = opening(message, *range(MAX_HEAD, len(message), 50_000), len(message))
    with pytest.raises(Tampered) as caught:
        made.finish()
    assert caught.value.code == "ohttp.open"
    assert bytes(made._plaintext) == bytes(len(PLAINTEXT)), "nothing that was decrypted stays"


def test_a_request_that_did_not_arrive_to_its_end():
    message = started(PLAINTEXT).whole()
    with pytest.raises(Tampered):
        opening(message, MAX_HEAD + 1000).finish()
    cut = message[:-1]
    with pytest.raises(Tampered):
        opening(cut, len(cut)).finish()


def test_what_was_opened_of_a_request_whose_end_does_not_come_is_overwritten():
    message = started(PLAINTEXT).whole()
    made = opening(message, MAX_HEAD + 100_000)
    assert bytes(made._plaintext[:251]) == PLAINTEXT[:251]
    made.abandon()
    assert bytes(made._plaintext) == bytes(len(PLAINTEXT))


def test_bytes_that_changed_after_they_were_opened():
    """The host could only do so in memory that it shares; what was opened is what the tag is over."""
    message = started(PLAINTEXT).whole()
    made = opening(message, 100_000)
    message[MAX_HEAD + 5] ^= 1  # decrypted already, from what was there then
    made.advance(len(message))
    assert made.finish()[1] == PLAINTEXT


@pytest.mark.parametrize(("head", "error"), [(b"\1", FormatError), (b"\7" * 2000, BindingRefused)])
def test_a_front_that_is_none(head, error):
    with pytest.raises(error):
        GATEWAY.begin(head)


def test_an_encapsulation_seals_one_request():
    sealer = begin(CONFIGURATION, CONFIGURATION.preferred_suite())
    sealer.seal_parts((b"one",))
    with pytest.raises(UsageError) as caught:
        sealer.seal_parts((b"two",))
    assert caught.value.code == "ohttp.used"


@pytest.mark.parametrize(("aead", "code"), [(CHACHA20_POLY1305, "hpke.suite"), (EXPORT_ONLY, "hpke.suite")])
def test_suites_that_do_not_work_piecewise(aead, code):
    suite, key = Suite(kem_id=kem.XWING, kdf_id=1, aead_id=aead), generate_private_key(kem.XWING)
    enc, sender = setup_sender(suite, key.public_bytes, b"")
    for begins in (sender.seal_piecewise, setup_receiver(suite, key, enc, b"").open_piecewise):
        with pytest.raises(UsageError) as caught:
            begins()
        assert caught.value.code == code


# --- what holds


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 2 * PIECE), max_size=5),
    steps=st.lists(st.integers(0, 12 * PIECE), max_size=6),
)
def test_any_parts_in_any_steps(sizes, steps):
    parts = [bytes([number]) * size for number, size in enumerate(sizes)]
    sealing = started(*parts)
    pieces = [bytes(piece) for piece in sealing.pieces()]
    message = b"".join(pieces)
    assert len(message) == len(sealing)
    assert all(0 < len(piece) <= PIECE + MAX_HEAD + 16 for piece in pieces)
    made = opening(message, *(min(step, len(message)) for step in sorted(steps)), len(message))
    assert made.finish()[1] == b"".join(parts)


def test_asked_again_it_gives_the_same_bytes_and_goes_on():
    sealing = started(PLAINTEXT)
    first = sealing.pieces()
    begun = b"".join(bytes(next(first)) for _ in range(2))
    again = [bytes(piece) for piece in sealing.pieces()]
    assert again[0] == begun, "what is there already comes as it is, and at once"
    assert b"".join(again) == sealing.whole()
    assert begun + b"".join(map(bytes, first)) == sealing.whole()
    assert GATEWAY.open(sealing.whole())[1] == PLAINTEXT


def test_nothing_is_encrypted_before_it_is_asked_for():
    sealing = started(PLAINTEXT)
    pieces = sealing.pieces()
    first = next(pieces)
    assert FIRST < len(first) == sealing._made < FIRST + MAX_HEAD + 1, "a server can begin with little"
    given = len(first) + len(next(pieces))
    assert given == sealing._made <= len(first) + PIECE < len(sealing), "the rest waits until it is asked for"


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("indeterminate", [True, False])
@pytest.mark.parametrize("more", [(), (b"",), (b"b", b"cd")])
def test_a_body_in_several_parts_is_one_body(pad, indeterminate, more):
    whole = b"a" + b"".join(more)
    request = Request(method=b"POST", path=b"/", content=b"a", more=more)
    response = Response(status=200, content=b"a", more=more)
    for message in (request, response):
        encoded = message.to_bytes(pad=pad, indeterminate=indeterminate)
        joined = dataclasses.replace(message, content=whole, more=())
        assert encoded == joined.to_bytes(pad=pad, indeterminate=indeterminate)
        assert b"".join(message.to_parts(pad=pad, indeterminate=indeterminate)) == encoded
        assert type(message).from_bytes(encoded).content == whole

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import FormatError, UsageError
from cloister.net import http1
from cloister.net.messages import Answer, Limits

LIMITS = Limits(max_head=1024, max_fields=8)

# Every one of these has made two servers disagree about where a request ends, or could.
REFUSED = {
    "bare LF after the request line": b"POST / HTTP/1.1\nhost: a\r\n\r\n",
    "bare LF between fields": b"POST / HTTP/1.1\r\nhost: a\ncontent-length: 3\r\n\r\n",
    "bare CR in a value": b"POST / HTTP/1.1\r\nhost: a\rb\r\n\r\n",
    "NUL in a value": b"POST / HTTP/1.1\r\nhost: a\0b\r\n\r\n",
    "space before the colon": b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length : 3\r\n\r\n",
    "tab before the colon": b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length\t: 3\r\n\r\n",
    "space before the name": b"POST / HTTP/1.1\r\n host: a\r\n\r\n",
    "folded field": b"POST / HTTP/1.1\r\nhost: a\r\nx: 1\r\n 2\r\n\r\n",
    "field without a colon": b"POST / HTTP/1.1\r\nhost: a\r\nx\r\n\r\n",
    "field without a name": b"POST / HTTP/1.1\r\nhost: a\r\n: x\r\n\r\n",
    "underscored framing in non-ASCII": b"POST / HTTP/1.1\r\nhost: a\r\ncontent\xadlength: 3\r\n\r\n",
    "two equal lengths": b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\n",
    "two different lengths": b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\nContent-Length: 4\r\n\r\n",
    "a list of lengths": b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3, 3\r\n\r\n",
    "a signed length": b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +3\r\n\r\n",
    "a negative length": b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -3\r\n\r\n",
    "a hexadecimal length": b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0x3\r\n\r\n",
    "a length with an underscore": b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1_0\r\n\r\n",
    "a length in other digits": "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: ٣\r\n\r\n".encode(),
    "an empty length": b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length:\r\n\r\n",
    "a length of 16 digits": b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000000000000\r\n\r\n",
    "length beside chunks": b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n"
    b"transfer-encoding: chunked\r\n\r\n",
    "chunks twice": b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n"
    b"transfer-encoding: chunked\r\n\r\n",
    "an encoding that hides chunks": b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\n",
    "a list of encodings": b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
    "chunks in HTTP/1.0": b"POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n",
    "no host": b"POST / HTTP/1.1\r\nx: a\r\n\r\n",
    "two hosts": b"POST / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
    "a repeated pool": b"POST / HTTP/1.1\r\nhost: a\r\ncloister-pool: a\r\ncloister-pool: b\r\n\r\n",
    "absolute target": b"GET http://a/ HTTP/1.1\r\nhost: a\r\n\r\n",
    "authority target": b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n",
    "space in the target": b"GET /a b HTTP/1.1\r\nhost: a\r\n\r\n",
    "two spaces": b"GET  / HTTP/1.1\r\nhost: a\r\n\r\n",
    "lower-case method": b"get / HTTP/1.1\r\nhost: a\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\n",
    "HTTP/1.10": b"GET / HTTP/1.10\r\nhost: a\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "empty line first": b"\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n",
    "bytes after the head": b"GET / HTTP/1.1\r\nhost: a\r\n\r\nGET /",
    "no end": b"GET / HTTP/1.1\r\nhost: a\r\n",
    "too many fields": b"GET / HTTP/1.1\r\nhost: a\r\n"
    + b"".join(b"x%d: 1\r\n" % n for n in range(8))
    + b"\r\n",
    "too large": b"GET /" + b"a" * 1024 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
}


@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED.keys())
def test_refused_request(raw: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        http1.parse_request(raw, LIMITS)
    assert caught.value.code.startswith("http.")
    assert 400 <= http1.status_of(caught.value) < 500


RESPONSES_REFUSED = {
    "chunks": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\n",
    "status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "status 600": b"HTTP/1.1 600 OK\r\n\r\n",
    "bare LF": b"HTTP/1.1 200 OK\nx: 1\r\n\r\n",
    "HTTP/2": b"HTTP/2 200\r\n\r\n",
}


@pytest.mark.parametrize("raw", RESPONSES_REFUSED.values(), ids=RESPONSES_REFUSED.keys())
def test_refused_response(raw: bytes) -> None:
    with pytest.raises(FormatError):
        http1.parse_response(raw, LIMITS)


def test_a_long_run_of_blanks_takes_no_quadratic_time() -> None:
    raw = b"GET / HTTP/1.1\r\nhost: a\r\nx:" + b" " * 1_000_000 + b"\x01\r\n\r\n"
    with pytest.raises(FormatError):
        http1.parse_request(raw, Limits(max_head=1 << 21))


def test_request() -> None:
    raw = b"POST /ohttp?x=1 HTTP/1.1\r\nHost: a\r\nContent-Length: 12\r\n"
    raw += b"X-A: \t b c \t\r\nVia: 1\r\nVIA: 2\r\n\r\n"
    head = http1.parse_request(memoryview(raw), LIMITS)
    assert (head.method, head.target, head.length, head.chunked) == (b"POST", b"/ohttp?x=1", 12, False)
    assert head.fields == {b"host": b"a", b"content-length": b"12", b"x-a": b"b c", b"via": b"1, 2"}
    assert head.keep_alive


@pytest.mark.parametrize(
    "raw", [b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nhost: a\r\nConnection: x, Close\r\n\r\n"]
)
def test_closing_request(raw: bytes) -> None:
    assert not http1.parse_request(raw, LIMITS).keep_alive


def test_response() -> None:
    head = http1.parse_response(b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\n", LIMITS)
    assert (head.status, head.length, head.keep_alive) == (404, 3, True)
    assert http1.parse_response(b"HTTP/1.1 204\r\n\r\n", LIMITS).status == 204


@given(st.binary(max_size=400))
def test_any_bytes_give_a_head_or_our_error(raw: bytes) -> None:
    for parse in (http1.parse_request, http1.parse_response):
        for text in (raw, raw + b"\r\n\r\n"):
            with contextlib.suppress(FormatError):
                parse(text, LIMITS)


_TOKENS = st.from_regex(rb"[a-z][a-z0-9-]{0,10}", fullmatch=True).map(lambda name: b"x-" + name)
_VALUES = st.from_regex(rb"[!-~\x80-\xff]([ -~\x80-\xff]{0,20}[!-~\x80-\xff])?", fullmatch=True)


@given(st.dictionaries(_TOKENS, _VALUES, max_size=5), st.integers(0, 10**15 - 1))
def test_round_trip(fields: dict[bytes, bytes], length: int) -> None:
    raw = http1.format_request(b"POST", b"/ohttp", list(fields.items()), length)
    head = http1.parse_request(raw, LIMITS)
    assert head.length == length
    assert {name: value for name, value in head.fields.items() if name.startswith(b"x-")} == fields


@pytest.mark.parametrize(
    "field",
    [(b"x", b"a\r\nhost: b"), (b"x y", b"a"), (b"x:", b"\n"), (b"", b"a"), (b"Content-Length", b"1"),
     (b"transfer-encoding", b"chunked"), (b"connection", b"close")],
)  # fmt: skip
def test_no_field_is_written_that_changes_the_message(field: tuple[bytes, bytes]) -> None:
    with pytest.raises(UsageError):
        http1.format_request(b"GET", b"/", [field], None)
    with pytest.raises(UsageError):
        http1.format_answer(Answer(fields=[field]), keep_alive=True)


@pytest.mark.parametrize(
    ("method", "target"), [(b"GET ", b"/"), (b"GET", b"/ x"), (b"GET", b"x"), (b"GET", b"/\r\n")]
)
def test_no_request_line_is_written_that_is_two(method: bytes, target: bytes) -> None:
    with pytest.raises(UsageError):
        http1.format_request(method, target, (), None)


def test_answer_heads() -> None:
    raw = http1.format_answer(Answer(status=200, body=b"abc", content_type=b"a/b"), keep_alive=True)
    assert raw == b"HTTP/1.1 200 OK\r\ncontent-type: a/b\r\ncontent-length: 3\r\n\r\n"
    assert b"content-length" not in http1.format_answer(Answer(status=204), keep_alive=True)
    assert http1.format_answer(Answer(status=599), keep_alive=False).startswith(b"HTTP/1.1 599 \r\n")
    with pytest.raises(UsageError):
        http1.format_answer(Answer(status=100), keep_alive=True)

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.core.ohttp import bhttp, fields
from cloister.core.ohttp.bhttp import Request, Response, padded_size
from cloister.core.ohttp.reader import Reader, encode_varint, octets
from cloister.errors import FormatError

from . import vectors

REQUEST = Request(
    method=b"POST",
    path=b"/v2/models/m/infer",
    authority=b"model.example",
    fields=((b"content-type", b"application/json"), (b"x-a", b"1"), (b"x-a", b"2")),
    content=b"the content",
    trailers=((b"x-end", b"yes"),),
)
RESPONSE = Response(
    status=200,
    fields=((b"content-type", b"text/plain"),),
    content=b"the answer",
    trailers=((b"x-end", b"yes"),),
    informational=((102, ((b"running", b'"sleep 15"'),)), (103, ())),
)
both_forms = pytest.mark.parametrize("indeterminate", [False, True], ids=["known", "indeterminate"])


def refused(data: bytes, kind: type[Request] | type[Response] = Request, **limits: int) -> str:
    with pytest.raises(FormatError) as refusal:
        kind.from_bytes(data, **limits)
    assert refusal.value.code == "bhttp"
    return refusal.value.claim


def request_bytes(*sections: bytes, framing: bytes = b"\x00") -> bytes:
    """A request ``GET https /`` followed by the given octets."""
    return framing + b"\x03GET\x05https\x00\x01/" + b"".join(sections)


def line(name: bytes, value: bytes) -> bytes:
    return encode_varint(len(name)) + name + encode_varint(len(value)) + value


def section(*lines: bytes) -> bytes:
    body = b"".join(lines)
    return encode_varint(len(body)) + body


# --- refusals


@pytest.mark.parametrize("framing", [1, 3, 4, 63])
def test_a_request_with_another_framing_indicator_is_refused(framing: int) -> None:
    assert refused(request_bytes(framing=bytes([framing]))) == "framing indicator"


@pytest.mark.parametrize("framing", [0, 2, 4, 63])
def test_a_response_with_another_framing_indicator_is_refused(framing: int) -> None:
    assert refused(bytes([framing]) + b"\x40\xc8", Response) == "framing indicator"


def test_an_empty_message_is_refused() -> None:
    assert refused(b"") == "framing indicator"
    assert refused(b"", Response) == "framing indicator"


@pytest.mark.parametrize("tail", [b"\x40", b"\x80\x00\x00", b"\xc0\x00\x00\x00\x00\x00\x00"])
def test_a_malformed_varint_is_refused(tail: bytes) -> None:
    assert refused(request_bytes(tail)) == "field section"


@both_forms
def test_a_message_cut_off_anywhere_but_between_empty_parts_is_refused(indeterminate: bool) -> None:
    for message, kind in ((REQUEST, Request), (RESPONSE, Response)):
        data = bytes(message.to_bytes(pad=False, indeterminate=indeterminate))
        whole = 0
        for length in range(len(data)):
            try:
                cut: Any = kind.from_bytes(data[:length])
            except FormatError:
                continue
            # Where whole sections are missing at the end, RFC 9292 has them read as empty.
            whole += 1
            assert cut.trailers == ()
            assert cut.content in (b"", message.content)
            assert cut.fields in ((), message.fields)
        assert whole == 3


@pytest.mark.parametrize(
    "sections",
    [(b"\x05\x01a\x01b",), (b"\x00", b"\x05abcd"), (b"\x00", b"\x00", b"\x05\x01a\x01b")],
    ids=["fields", "content", "trailers"],
)
def test_a_length_past_the_end_is_refused(sections: tuple[bytes, ...]) -> None:
    refused(request_bytes(*sections))


def test_a_huge_length_is_refused_before_anything_is_allocated() -> None:
    assert refused(request_bytes(b"\x00", b"\xff" * 8)) == "content"
    assert refused(request_bytes(b"\xff" * 8)) == "field section"
    assert refused(b"\x00" + b"\xff" * 8) == "method"


def test_a_field_that_leaves_its_section_is_refused() -> None:
    assert refused(request_bytes(b"\x04\x01a\x05bcdef", b"\x00\x00")) == "field value"


@pytest.mark.parametrize("position", [0, 1, 40])
@both_forms
def test_padding_that_is_not_zero_is_refused(indeterminate: bool, position: int) -> None:
    for message, kind in ((REQUEST, Request), (RESPONSE, Response)):
        padding = bytearray(41)
        padding[position] = 1
        data = message.to_bytes(pad=False, indeterminate=indeterminate) + padding
        assert refused(bytes(data), kind) == "padding"


@pytest.mark.parametrize(
    "name",
    [
        b"",
        b"Content-Type",
        b"a b",
        b"a\x00",
        b"a\r\n",
        b"a:",
        b"\xe9",
        b'a"',
        b"a(",
        b":method",
        b":path",
        b":",
    ],
    ids=repr,
)
def test_a_forbidden_field_name_is_refused(name: bytes) -> None:
    assert refused(request_bytes(section(line(name, b"v")))) == "field name"
    with pytest.raises(FormatError):
        Request(method=b"GET", path=b"/", fields=((name, b"v"),))
    with pytest.raises(FormatError):
        Response(status=200, trailers=((name, b"v"),))
    with pytest.raises(FormatError):
        Response(status=200, informational=((100, ((name, b"v"),)),))


@pytest.mark.parametrize(
    "value", [b"a\x00b", b"a\rb", b"a\nb", b"\x7f", b"\x1b", b" a", b"a ", b"\ta", b"a\t", b" "], ids=repr
)
def test_a_forbidden_field_value_is_refused(value: bytes) -> None:
    assert refused(request_bytes(section(line(b"a", value)))) == "field value"
    with pytest.raises(FormatError):
        Request(method=b"GET", path=b"/", trailers=((b"a", value),))


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("method", [b"", b"GE T", b"GET\r\n", b"G\x00"]),
        ("scheme", [b"", b"1http", b"ht tp", b"http:"]),
        ("authority", [b"a b", b"a\r\n", b"\xe9"]),
        ("path", [b"", b"x", b"/a b", b"/\r\n", b"/\x00", b"//\xe9", b"*a"]),
    ],
)
def test_forbidden_control_data_is_refused(part: str, values: list[bytes]) -> None:
    good = {"method": b"GET", "scheme": b"https", "authority": b"", "path": b"/"}
    for value in values:
        parts = {**good, part: value}
        with pytest.raises(FormatError) as refusal:
            Request(**parts)  # type: ignore[arg-type]
        assert refusal.value.claim == part
        assert refused(b"\x00" + b"".join(encode_varint(len(v)) + v for v in parts.values())) == part


def test_control_data_beyond_the_limit_is_refused() -> None:
    path = b"/" + bytes(b"a" * bhttp.MAX_CONTROL)
    with pytest.raises(FormatError):
        Request(method=b"GET", path=path)
    assert refused(b"\x00\x03GET\x05https\x00" + encode_varint(len(path)) + path) == "path"


@pytest.mark.parametrize("status", [0, 99, 600, 16000])
def test_an_impossible_status_is_refused(status: int) -> None:
    assert refused(b"\x01" + encode_varint(status), Response) == "status"
    with pytest.raises(FormatError):
        Response(status=status)


def test_an_informational_status_is_not_final_and_a_final_one_not_informational() -> None:
    with pytest.raises(FormatError):
        Response(status=100)
    with pytest.raises(FormatError):
        Response(status=200, informational=((200, ()),))


@both_forms
def test_a_response_that_ends_after_an_informational_one_is_refused(indeterminate: bool) -> None:
    framing = b"\x03" if indeterminate else b"\x01"
    refused(framing + b"\x40\x66", Response)
    assert refused(framing + b"\x40\x66\x00", Response) == "status"


def test_too_many_informational_responses_are_refused() -> None:
    response = Response(status=200, informational=((102, ()),) * bhttp.MAX_INFORMATIONAL)
    data = bytes(response.to_bytes(pad=False))
    assert Response.from_bytes(data) == response
    assert refused(data[:1] + b"\x40\x66\x00" + data[1:], Response) == "informational responses"
    with pytest.raises(FormatError):
        Response(status=200, informational=((102, ()),) * (bhttp.MAX_INFORMATIONAL + 1))


@both_forms
def test_too_many_fields_are_refused(indeterminate: bool) -> None:
    lines = ((b"a", b""),) * fields.MAX_FIELDS
    data = Request(method=b"GET", path=b"/", fields=lines).to_bytes(pad=False, indeterminate=indeterminate)
    assert Request.from_bytes(data).fields == lines
    with pytest.raises(FormatError):
        Request(method=b"GET", path=b"/", fields=(*lines, (b"a", b"")))
    body = line(b"a", b"") * (fields.MAX_FIELDS + 1)
    encoded = body + b"\x00" if indeterminate else section(body)
    assert refused(request_bytes(encoded, framing=b"\x02" if indeterminate else b"\x00")) == "field section"


@both_forms
def test_a_field_section_beyond_the_limit_is_refused(indeterminate: bool) -> None:
    lines = ((b"a", b"v" * 40_000), (b"b", b"v" * 40_000))
    with pytest.raises(FormatError) as refusal:
        Request(method=b"GET", path=b"/", fields=lines).to_bytes(pad=False, indeterminate=indeterminate)
    assert refusal.value.claim == "field section"
    body = b"".join(line(*item) for item in lines)
    encoded = body + b"\x00" if indeterminate else section(body)
    assert refused(request_bytes(encoded, framing=b"\x02" if indeterminate else b"\x00")) == "field section"


@both_forms
def test_content_beyond_the_limit_is_refused(indeterminate: bool) -> None:
    data = bytes(REQUEST.to_bytes(pad=False, indeterminate=indeterminate))
    assert Request.from_bytes(data, max_content=11).content == b"the content"
    assert refused(data, max_content=10) == "content"


def test_chunks_beyond_the_limit_are_refused() -> None:
    chunks = b"\x06abcdef" * 2 + b"\x00"
    data = request_bytes(b"\x00", chunks, framing=b"\x02")
    assert Request.from_bytes(data, max_content=12).content == b"abcdefabcdef"
    assert refused(data, max_content=11) == "content"


def test_too_many_chunks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bhttp, "MAX_CHUNKS", 3)
    assert (
        Request.from_bytes(request_bytes(b"\x00", b"\x01a" * 3, b"\x00", framing=b"\x02")).content == b"aaa"
    )
    assert refused(request_bytes(b"\x00", b"\x01a" * 4, b"\x00", framing=b"\x02")) == "content chunks"


def test_a_buffer_that_is_not_contiguous_is_refused() -> None:
    for view in (memoryview(b"abcd")[::2], memoryview(bytes(8)).cast("H")[::2]):
        with pytest.raises(FormatError) as refusal:
            octets(view)
        assert refusal.value.code == "format.buffer"


def test_an_integer_that_no_varint_holds_is_refused() -> None:
    for value in (-1, 1 << 62):
        with pytest.raises(FormatError):
            encode_varint(value)


@given(data=st.binary(max_size=300))
@settings(deadline=None)
def test_any_bytes_give_a_value_or_our_error(data: bytes) -> None:
    for framing in range(4):
        for kind in (Request, Response):
            try:
                value: Any = kind.from_bytes(bytes([framing]) + data)
            except FormatError:
                continue
            assert kind.from_bytes(value.to_bytes(pad=False)) == value


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_an_altered_message_gives_a_value_or_our_error(data: st.DataObject) -> None:
    message, kind = data.draw(st.sampled_from([(REQUEST, Request), (RESPONSE, Response)]))
    encoded = message.to_bytes(pad=data.draw(st.booleans()), indeterminate=data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        kind.from_bytes(encoded)
    except FormatError:
        return


# --- published examples


def test_rfc_9292_requests() -> None:
    expected = Request(
        method=b"GET",
        path=b"/hello.txt",
        fields=(
            (b"user-agent", b"curl/7.16.3 libcurl/7.16.3 OpenSSL/0.9.7l zlib/1.2.3"),
            (b"host", b"www.example.com"),
            (b"accept-language", b"en, mi"),
        ),
    )
    known = bytes.fromhex(vectors.BHTTP_KNOWN_REQUEST)
    indeterminate = bytes.fromhex(vectors.BHTTP_INDETERMINATE_REQUEST)
    assert Request.from_bytes(known) == expected == Request.from_bytes(indeterminate)
    assert expected.to_bytes(pad=False) == known
    assert expected.to_bytes(pad=False, indeterminate=True) == indeterminate[:-10]


def test_rfc_9292_response() -> None:
    data = bytes.fromhex(vectors.BHTTP_RESPONSE)
    response = Response.from_bytes(data)
    assert response.status == 200
    assert [status for status, _ in response.informational] == [102, 103]
    assert response.informational[0][1] == ((b"running", b'"sleep 15"'),)
    assert [name for name, _ in response.informational[1][1]] == [b"link", b"link"]
    assert response.field(b"content-length") == b"51"
    assert response.content == b"Hello World! My content includes a trailing CRLF.\r\n"
    assert response.to_bytes(pad=False, indeterminate=True) == data


def test_rfc_9458_messages_without_their_empty_ends() -> None:
    request = Request.from_bytes(bytes.fromhex(vectors.OHTTP["request"]))
    assert request == Request(method=b"GET", authority=b"example.com", path=b"/")
    assert Response.from_bytes(bytes.fromhex(vectors.OHTTP["response"])) == Response(status=200)


# --- the rest


tokens = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=12).map(str.encode)
values = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20).map(str.encode)
sections = st.lists(st.tuples(tokens, values), max_size=5).map(tuple)
requests = st.builds(
    Request,
    method=tokens,
    path=values.map(b"/".__add__),
    authority=values,
    fields=sections,
    trailers=sections,
    content=st.binary(max_size=200),
)
responses = st.builds(
    Response,
    status=st.integers(200, 599),
    fields=sections,
    trailers=sections,
    content=st.binary(max_size=200),
    informational=st.lists(st.tuples(st.integers(100, 199), sections), max_size=3).map(tuple),
)


@given(message=requests | responses, pad=st.booleans(), indeterminate=st.booleans())
@settings(deadline=None)
def test_round_trip(message: Request | Response, pad: bool, indeterminate: bool) -> None:
    encoded = message.to_bytes(pad=pad, indeterminate=indeterminate)
    assert type(message).from_bytes(encoded) == message
    bare = message.to_bytes(pad=False, indeterminate=indeterminate)
    assert len(encoded) == (padded_size(len(bare)) if pad else len(bare))
    assert encoded[: len(bare)] == bare


@both_forms
def test_content_is_a_view_into_the_message(indeterminate: bool) -> None:
    data = bytearray(REQUEST.to_bytes(pad=True, indeterminate=indeterminate))
    content = Request.from_bytes(data).content
    assert isinstance(content, memoryview)
    data[data.index(b"the content")] = ord("T")
    assert content == b"The content"


def test_varints_of_any_length_are_read() -> None:
    assert Request.from_bytes(request_bytes(framing=b"\x40\x02")).path == b"/"
    data = request_bytes(b"\x00", b"\x80\x00\x00\x01x", b"\xc0" + bytes(7), framing=b"\x02")
    assert Request.from_bytes(data).content == b"x"


@given(value=st.integers(0, (1 << 62) - 1))
def test_varints_make_the_round_trip(value: int) -> None:
    encoded = encode_varint(value)
    assert Reader(encoded, code="x").varint("x") == value


@pytest.mark.parametrize(
    ("value", "encoded"),
    # RFC 9000, appendix A.1.
    [(151288809941952652, "c2197c5eff14e88c"), (494878333, "9d7f3e7d"), (15293, "7bbd"), (37, "25")],
)
def test_rfc_9000_varints(value: int, encoded: str) -> None:
    assert encode_varint(value).hex() == encoded
    assert Reader(bytes.fromhex(encoded), code="x").varint("x") == value


def test_fields_are_looked_up_by_name() -> None:
    assert REQUEST.field(b"content-type") == b"application/json"
    assert REQUEST.field(b"x-a") == b"1, 2"
    assert REQUEST.field(b"x-end") is None


def test_a_message_does_not_show_what_it_carries() -> None:
    assert "the content" not in repr(REQUEST)
    assert "application/json" not in repr(REQUEST)
    assert "the answer" not in repr(RESPONSE)


@pytest.mark.parametrize(
    ("size", "bucket"),
    # The definition of Padmé, worked by hand: 1000 = 0b1111101000 has exponent 9, keeps 4 + 1 bits.
    [(0, 0), (1, 1), (8, 8), (9, 10), (1000, 1024), (1025, 1088), (600_000, 606_208), (1 << 20, 1 << 20)],
)
def test_buckets(size: int, bucket: int) -> None:
    assert padded_size(size) == bucket


@given(size=st.integers(1, 1 << 40))
def test_a_bucket_holds_its_message_and_costs_an_eighth_at_most(size: int) -> None:
    bucket = padded_size(size)
    assert size <= bucket <= size + size // 8 + 1
    assert padded_size(bucket) == bucket


@given(sizes=st.tuples(st.integers(0, 1 << 30), st.integers(0, 1 << 30)))
def test_buckets_keep_order(sizes: tuple[int, int]) -> None:
    small, large = sorted(sizes)
    assert padded_size(small) <= padded_size(large)

"""Encapsulated requests and responses (RFC 9458, section 4).

A request is ``header || enc || ciphertext``; the header (key id and suite) and a label are HPKE's ``info``.
The response is ``nonce || ciphertext`` under a key that both sides export from the request's context.
Bodies are encrypted and decrypted straight into the message that leaves or the array that is handed on, piece
by piece where that helps: the first pieces of a request travel while the last are encrypted, and are opened
while the last travel. What was opened counts for nothing before the end verified.
"""

from __future__ import annotations

import mmap
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import AEADDecryptionContext, AEADEncryptionContext

from cloister.core.ohttp import hpke
from cloister.core.ohttp.hpke import WIRE_SUITES, PrivateKey, ReceiverContext, SenderContext, Suite
from cloister.core.ohttp.keyconfig import KeyConfiguration
from cloister.core.ohttp.reader import Bytes, Reader, octets
from cloister.errors import BindingRefused, Tampered, UsageError

MEDIA_TYPE_REQUEST: Final = "message/ohttp-req"
MEDIA_TYPE_RESPONSE: Final = "message/ohttp-res"

HEADER_SIZE: Final = 7  # bytes: key id, KEM, KDF, AEAD
MAX_HEAD: Final = HEADER_SIZE + max(suite.n_enc for suite in WIRE_SUITES)  # bytes before the ciphertext
_EAGER: Final = 1 << 20  # bytes up to which a plaintext takes its memory at once, which saves page faults
FIRST: Final = 8 << 10  # bytes that are encrypted and sent first: a server begins with them
PIECE: Final = 256 << 10  # bytes that are encrypted at a time then; each more wakes three processes once more

_REQUEST_LABEL: Final = b"message/bhttp request"
_RESPONSE_LABEL: Final = b"message/bhttp response"


class Encapsulation:
    """The client's end of one exchange: seals one request, opens its response."""

    __slots__ = ("_context", "_header", "_sealed", "enc", "key_id", "suite")

    enc: Final[bytes]  # known before anything is sealed, so that the content can sign it
    key_id: Final[int]
    suite: Final[Suite]

    def __init__(self, key_id: int, suite: Suite, enc: bytes, context: SenderContext) -> None:
        self.key_id = key_id
        self.suite = suite
        self.enc = enc
        self._header: Final = _header(key_id, suite)
        self._context: Final = context
        self._sealed = False

    def seal(self, plaintext: Bytes) -> bytearray:
        """The encapsulated request around ``plaintext`` (a binary HTTP request); works once.

        Raises:
            UsageError: called before (code ``ohttp.used``), or more than `hpke.MAX_MESSAGE` bytes.
        """
        return self.seal_parts((plaintext,)).whole()

    def seal_parts(self, parts: Sequence[Bytes]) -> SealedRequest:
        """`seal` around what the parts make together; they must not change before the whole is encrypted.

        Raises:
            UsageError: as `seal`.
        """
        if self._sealed:
            raise UsageError("an encapsulation seals one request", code="ohttp.used")
        plaintext = [view for view in map(octets, parts) if view.nbytes]
        hpke.require_size(sum(view.nbytes for view in plaintext))
        self._sealed = True
        return SealedRequest(self._header + self.enc, plaintext, self._context.seal_piecewise())

    def open(self, response: Bytes) -> memoryview:
        """The plaintext of the encapsulated response, in a new array that the caller may overwrite after use.

        Raises:
            UsageError: nothing was sealed yet (code ``ohttp.used``).
            FormatError: too short for a nonce and a tag (code ``ohttp.response``).
            Tampered: the answer to another request, or altered (code ``ohttp.open``).
        """
        if not self._sealed:
            raise UsageError("there is no response before a request", code="ohttp.used")
        size = _response_nonce_size(self.suite)
        reader = Reader(response, code="ohttp.response")
        if reader.remaining < size + hpke.N_TAG:
            raise reader.refusal(
                "encapsulated response",
                expected=f"at least {size + hpke.N_TAG} B",
                actual=f"{reader.remaining} B",
            )
        cipher, nonce = _response_key(
            self.suite, self._context, self.enc, bytes(reader.take(size, "response nonce"))
        )
        return memoryview(hpke.open_new(cipher, nonce, reader.rest(), b"", code="ohttp.open"))

    def __repr__(self) -> str:
        return f"<Encapsulation, key {self.key_id}, {self.suite}>"


class SealedRequest:
    """An encapsulated request that is encrypted while it is sent; `len` gives its size in bytes."""

    __slots__ = ("_encryptor", "_made", "_message", "_parts")

    def __init__(self, head: bytes, parts: list[memoryview], encryptor: AEADEncryptionContext) -> None:
        self._message = bytearray(len(head) + sum(part.nbytes for part in parts) + hpke.N_TAG)
        self._message[: len(head)] = head
        self._made = len(head)
        self._parts = parts[::-1]
        self._encryptor = encryptor

    def __len__(self) -> int:
        return len(self._message)

    def pieces(self) -> Iterator[memoryview]:
        """The message from its start, piece by piece; asked for again, it gives what is there as it is."""
        view, given = memoryview(self._message).toreadonly(), 0
        if self._made < FIRST:
            self._advance(FIRST)
        while given < len(view):
            if self._made == given:
                self._advance(PIECE)
            start, given = given, self._made
            yield view[start:given]

    def whole(self) -> bytearray:
        """The message, encrypted to its end."""
        while self._made < len(self._message):
            self._advance(PIECE)
        return self._message

    def _advance(self, room: int) -> None:
        """Encrypt the next ``room`` bytes, and with the last part the tag."""
        view = memoryview(self._message)
        while self._parts and room:
            part = self._parts.pop()
            if part.nbytes > room:
                self._parts.append(part[room:])
                part = part[:room]
            self._made += self._encryptor.update_into(part, view[self._made :])
            room -= part.nbytes
        if not self._parts and self._made < len(view):
            self._encryptor.finalize()
            view[self._made :] = self._encryptor.tag
            self._made = len(view)


class Decapsulation:
    """The server's end of one exchange: seals the one response."""

    __slots__ = ("_context", "_sealed", "enc", "key_id", "suite")

    enc: Final[bytes]
    key_id: Final[int]
    suite: Final[Suite]

    def __init__(self, key_id: int, suite: Suite, enc: bytes, context: ReceiverContext) -> None:
        self.key_id = key_id
        self.suite = suite
        self.enc = enc
        self._context: Final = context
        self._sealed = False

    def seal(self, plaintext: Bytes) -> bytearray:
        """The encapsulated response around ``plaintext`` (a binary HTTP response); works once.

        Raises:
            UsageError: called before (code ``ohttp.used``), or more than `hpke.MAX_MESSAGE` bytes.
        """
        if self._sealed:
            raise UsageError("a request has one response", code="ohttp.used")
        hpke.require_size(octets(plaintext).nbytes)
        self._sealed = True
        response_nonce = _response_nonce(self.suite)
        cipher, nonce = _response_key(self.suite, self._context, self.enc, response_nonce)
        start = len(response_nonce)
        message = bytearray(start + octets(plaintext).nbytes + hpke.N_TAG)
        message[:start] = response_nonce
        cipher.encrypt_into(nonce, plaintext, b"", memoryview(message)[start:])
        return message

    def __repr__(self) -> str:
        return f"<Decapsulation, key {self.key_id}, {self.suite}>"


class OpeningRequest:
    """An encapsulated request that is decrypted while it arrives; none of it is given out before `finish`."""

    __slots__ = ("_ciphertext", "_decryptor", "_done", "_exchange", "_plaintext", "_start")

    def __init__(
        self, exchange: Decapsulation, ciphertext: memoryview, decryptor: AEADDecryptionContext
    ) -> None:
        self._exchange = exchange
        self._ciphertext = ciphertext
        self._decryptor = decryptor
        size = ciphertext.nbytes - hpke.N_TAG
        # Who sent only the front of a large request takes no memory for the rest.
        self._plaintext = memoryview(mmap.mmap(-1, size) if size > _EAGER else bytearray(size))
        self._start = HEADER_SIZE + len(exchange.enc)
        self._done = 0

    def advance(self, received: int) -> None:
        """Decrypt what is there, when ``received`` bytes of the whole message are."""
        end = min(received - self._start, len(self._plaintext))
        if end > self._done:
            piece, out = self._ciphertext[self._done : end], self._plaintext[self._done :]
            self._done += self._decryptor.update_into(piece, out)

    def finish(self) -> tuple[Decapsulation, memoryview]:
        """The exchange and the plaintext, once the whole message was given to `advance`.

        Raises:
            Tampered: sealed to another key, or altered (code ``ohttp.open``).
        """
        try:
            self._decryptor.finalize_with_tag(bytes(self._ciphertext[len(self._plaintext) :]))
        except InvalidTag:
            self.abandon()
            raise Tampered(
                "the encapsulated request does not open",
                code="ohttp.open",
                claim="AEAD tag",
                expected="valid",
                actual="invalid",
                hint="It was altered, or sealed to a key of another epoch",
            ) from None
        return self._exchange, self._plaintext

    def abandon(self) -> None:
        """Overwrite what was decrypted of a request whose end didn't come, or didn't verify."""
        self._plaintext[: self._done] = bytes(self._done)


class Gateway:
    """Opens encapsulated requests to a set of keys; immutable, and safe to share between threads."""

    __slots__ = ("_keys",)

    def __init__(self, keys: Iterable[tuple[int, PrivateKey]]) -> None:
        """Take the private keys by key id.

        Raises:
            UsageError: two keys of one id (code ``ohttp.key-id``).
            FormatError: a key id that is not in 0..255 (code ``ohttp.keys``).
        """
        by_id: dict[int, PrivateKey] = {}
        for key_id, key in keys:
            KeyConfiguration.for_key(key_id, key)  # a key that could not be published is no use
            if key_id in by_id:
                raise UsageError("two keys of one id", code="ohttp.key-id", claim="key id", actual=key_id)
            by_id[key_id] = key
        self._keys: Final[Mapping[int, PrivateKey]] = MappingProxyType(by_id)

    def configurations(self) -> tuple[KeyConfiguration, ...]:
        """What to publish, the preferred suite first."""
        order = [suite.kem_id for suite in WIRE_SUITES]
        published = [KeyConfiguration.for_key(key_id, key) for key_id, key in self._keys.items()]
        return tuple(sorted(published, key=lambda c: order.index(c.kem_id)))

    def open(self, message: Bytes) -> tuple[Decapsulation, memoryview]:
        """Open one encapsulated request.

        Returns:
            The exchange, which seals the response, and the plaintext (a binary HTTP request) in a new array
            that the caller may overwrite after use.

        Raises:
            FormatError: too short (code ``ohttp.request``).
            BindingRefused: a key id that is not here, or a suite that is not that key's or not on the wire
                list (code ``ohttp.key``).
            Refused: ``enc`` is a point of low order (code ``hpke.kem``).
            Tampered: sealed to another key, or altered (code ``ohttp.open``).
        """
        opening = self.begin(message)
        opening.advance(octets(message).nbytes)
        return opening.finish()

    def begin(self, message: Bytes) -> OpeningRequest:
        """Begin to open a request that is still arriving in ``message``, which has its full length.

        The first `MAX_HEAD` bytes must be there, or all of a shorter message.

        Raises:
            FormatError, BindingRefused, Refused: as `open`.
        """
        reader = Reader(message, code="ohttp.request")
        header = bytes(reader.take(HEADER_SIZE, "header"))
        key_id, key, suite = self._lookup(header)
        enc = bytes(reader.take(suite.n_enc, "enc"))
        if reader.remaining < hpke.N_TAG:
            raise reader.refusal(
                "ciphertext", expected=f"at least {hpke.N_TAG} B", actual=f"{reader.remaining} B"
            )
        context = hpke.setup_receiver(suite, key, enc, _info(header))
        return OpeningRequest(
            Decapsulation(key_id, suite, enc, context), reader.rest(), context.open_piecewise()
        )

    def _lookup(self, header: bytes) -> tuple[int, PrivateKey, Suite]:
        key_id = header[0]
        key = self._keys.get(key_id)
        if key is None:
            known = ", ".join(map(str, sorted(self._keys)))
            raise BindingRefused(code="ohttp.key", claim="key id", expected=known, actual=key_id)
        allowed = [suite for suite in WIRE_SUITES if suite.kem_id == key.kem_id]
        for suite in allowed:
            if suite.to_bytes() == header[1:]:
                return key_id, key, suite
        raise BindingRefused(
            code="ohttp.key",
            claim="suite",
            expected=" or ".join(map(str, allowed)),
            actual="/".join(f"0x{header[i : i + 2].hex()}" for i in (1, 3, 5)),
        )


def begin(configuration: KeyConfiguration, suite: Suite) -> Encapsulation:
    """Start an exchange with the holder of a key.

    Raises:
        BindingRefused: ``suite`` is not on the wire list, or not the configuration's (code ``ohttp.key``).
        FormatError: not a public key of the KEM (code ``hpke.public-key``).
        Refused: a public key of low order (code ``hpke.kem``).
    """
    if suite not in WIRE_SUITES or not configuration.offers(suite):
        offered = [str(wire) for wire in WIRE_SUITES if configuration.offers(wire)]
        raise BindingRefused(code="ohttp.key", claim="suite", expected=" or ".join(offered), actual=suite)
    info = _info(_header(configuration.key_id, suite))
    enc, context = hpke.setup_sender(suite, configuration.public_key, info)
    return Encapsulation(configuration.key_id, suite, enc, context)


def _header(key_id: int, suite: Suite) -> bytes:
    return key_id.to_bytes(1, "big") + suite.to_bytes()


def _info(header: bytes) -> bytes:
    return _REQUEST_LABEL + b"\x00" + header


def _response_nonce_size(suite: Suite) -> int:
    return max(hpke.N_NONCE, suite.n_key)


def _response_nonce(suite: Suite) -> bytes:
    return secrets.token_bytes(_response_nonce_size(suite))


def _response_key(
    suite: Suite, context: SenderContext | ReceiverContext, enc: bytes, response_nonce: bytes
) -> tuple[hpke.Cipher, bytes]:
    """The key and nonce of the response (RFC 9458, section 4.4)."""
    kdf = suite.kdf
    secret = context.export(_RESPONSE_LABEL, _response_nonce_size(suite))
    prk = kdf.extract(enc + response_nonce, secret)
    return suite.cipher(kdf.expand(prk, b"key", suite.n_key)), kdf.expand(prk, b"nonce", hpke.N_NONCE)

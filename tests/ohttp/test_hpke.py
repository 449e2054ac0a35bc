from __future__ import annotations

import pickle
from typing import Any

import pytest
from cryptography.hazmat.primitives import hpke as oracle
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st
from pyhpke import AEADId, CipherSuite, KDFId, KEMId, KEMKey

from cloister.core.ohttp import hpke, kem
from cloister.core.ohttp.hpke import (
    AES_128_GCM,
    AES_256_GCM,
    CHACHA20_POLY1305,
    EXPORT_ONLY,
    WIRE_SUITES,
    X25519_HKDF_SHA256_AES256GCM,
    XWING_HKDF_SHA256_AES256GCM,
    PrivateKey,
    Suite,
    generate_private_key,
    open_from,
    seal_to,
    setup_receiver,
    setup_sender,
)
from cloister.errors import CloisterError, FormatError, Refused, Tampered, UsageError

from . import vectors

X25519, XWING = kem.X25519_HKDF_SHA256, kem.XWING
KEYS = {kem_id: generate_private_key(kem_id) for kem_id in (X25519, XWING)}
LOW_ORDER = [
    bytes(32),
    b"\x01" + bytes(31),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
]
wire_suite = pytest.mark.parametrize("suite", WIRE_SUITES, ids=["x-wing", "x25519"])


def x25519_suite(aead_id: int) -> Suite:
    return Suite(kem_id=X25519, kdf_id=0x0001, aead_id=aead_id)


def pair(suite: Suite) -> tuple[hpke.SenderContext, hpke.ReceiverContext]:
    key = KEYS[suite.kem_id]
    enc, sender = setup_sender(suite, key.public_bytes, b"info")
    return sender, setup_receiver(suite, key, enc, b"info")


# --- refusals


@wire_suite
def test_another_info_is_refused(suite: Suite) -> None:
    message = seal_to(suite, KEYS[suite.kem_id].public_bytes, b"x", info=b"one")
    with pytest.raises(Tampered) as refusal:
        open_from(suite, KEYS[suite.kem_id], message, info=b"two")
    assert refusal.value.code == "hpke.open"


@wire_suite
def test_another_aad_is_refused(suite: Suite) -> None:
    message = seal_to(suite, KEYS[suite.kem_id].public_bytes, b"x", info=b"", aad=b"one")
    with pytest.raises(Tampered):
        open_from(suite, KEYS[suite.kem_id], message, info=b"", aad=b"two")


@wire_suite
def test_another_private_key_is_refused(suite: Suite) -> None:
    message = seal_to(suite, KEYS[suite.kem_id].public_bytes, b"x", info=b"")
    with pytest.raises(Tampered):
        open_from(suite, generate_private_key(suite.kem_id), message, info=b"")


@wire_suite
def test_every_part_of_a_message_is_authenticated(suite: Suite) -> None:
    key = KEYS[suite.kem_id]
    message = seal_to(suite, key.public_bytes, b"plaintext", info=b"")
    # Not the top bit of the X25519 point: RFC 7748 has it ignored (yet enc enters the DHKEM secret).
    for position in (0, suite.n_enc // 2, suite.n_enc - 2, suite.n_enc, len(message) - 1):
        altered = bytearray(message)
        altered[position] ^= 1
        with pytest.raises(Tampered):
            open_from(suite, key, altered, info=b"")


@wire_suite
def test_a_message_out_of_order_is_refused_and_does_not_count(suite: Suite) -> None:
    sender, receiver = pair(suite)
    first, second = sender.seal(b"first"), sender.seal(b"second")
    with pytest.raises(Tampered):
        receiver.open(second)
    assert receiver.open(first) == b"first"
    with pytest.raises(Tampered):
        receiver.open(first)
    assert receiver.open(second) == b"second"


@wire_suite
def test_a_message_too_short_for_enc_is_refused(suite: Suite) -> None:
    with pytest.raises(FormatError) as refusal:
        open_from(suite, KEYS[suite.kem_id], bytes(suite.n_enc - 1), info=b"")
    assert refusal.value.code == "hpke.enc"


@wire_suite
def test_a_message_too_short_for_a_tag_is_refused(suite: Suite) -> None:
    message = seal_to(suite, KEYS[suite.kem_id].public_bytes, b"", info=b"")
    with pytest.raises(FormatError) as refusal:
        open_from(suite, KEYS[suite.kem_id], message[:-1], info=b"")
    assert refusal.value.code == "hpke.length"


@pytest.mark.parametrize("point", LOW_ORDER, ids=["zero", "one", "minus one"])
def test_a_public_key_of_low_order_is_refused(point: bytes) -> None:
    with pytest.raises(Refused) as refusal:
        setup_sender(X25519_HKDF_SHA256_AES256GCM, point, b"")
    assert refusal.value.code == "hpke.kem"


@pytest.mark.parametrize("point", LOW_ORDER, ids=["zero", "one", "minus one"])
@wire_suite
def test_an_enc_of_low_order_is_refused(suite: Suite, point: bytes) -> None:
    enc, _ = setup_sender(suite, KEYS[suite.kem_id].public_bytes, b"")
    with pytest.raises(Refused) as refusal:
        setup_receiver(suite, KEYS[suite.kem_id], enc[:-32] + point, b"")
    assert refusal.value.code == "hpke.kem"


@pytest.mark.parametrize("change", [-1, 1])
@wire_suite
def test_a_public_key_of_another_length_is_refused(suite: Suite, change: int) -> None:
    public = (KEYS[suite.kem_id].public_bytes + b"\x00")[: len(KEYS[suite.kem_id].public_bytes) + change]
    with pytest.raises(FormatError) as refusal:
        setup_sender(suite, public, b"")
    assert refusal.value.code == "hpke.public-key"


def test_an_ml_kem_public_key_with_coefficients_out_of_range_is_refused() -> None:
    public = b"\xff" * 1184 + KEYS[XWING].public_bytes[-32:]
    with pytest.raises(FormatError) as refusal:
        setup_sender(XWING_HKDF_SHA256_AES256GCM, public, b"")
    assert refusal.value.code == "hpke.public-key"


@pytest.mark.parametrize("length", [0, 31, 33])
@pytest.mark.parametrize("kem_id", [X25519, XWING])
def test_a_private_key_of_another_length_is_refused(kem_id: int, length: int) -> None:
    with pytest.raises(FormatError) as refusal:
        PrivateKey.from_bytes(kem_id, bytes(length))
    assert refusal.value.code == "hpke.private-key"


def test_a_private_key_of_another_kem_is_refused() -> None:
    enc, _ = setup_sender(X25519_HKDF_SHA256_AES256GCM, KEYS[X25519].public_bytes, b"")
    with pytest.raises(UsageError) as refusal:
        setup_receiver(X25519_HKDF_SHA256_AES256GCM, KEYS[XWING], enc, b"")
    assert refusal.value.code == "hpke.private-key"


@pytest.mark.parametrize("ids", [(0x0010, 1, 2), (X25519, 9, 2), (X25519, 1, 9)], ids=["KEM", "KDF", "AEAD"])
def test_an_unknown_algorithm_is_refused(ids: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError) as refusal:
        Suite(kem_id=ids[0], kdf_id=ids[1], aead_id=ids[2])
    assert refusal.value.code == "hpke.suite"


def test_a_private_key_of_an_unknown_kem_is_refused() -> None:
    with pytest.raises(UsageError) as refusal:
        generate_private_key(0x0010)
    assert refusal.value.code == "hpke.suite"


def test_an_export_only_suite_neither_seals_nor_opens() -> None:
    sender, receiver = pair(x25519_suite(EXPORT_ONLY))
    for call in (sender.seal, receiver.open):
        with pytest.raises(UsageError) as refusal:
            call(bytes(32))
        assert refusal.value.code == "hpke.export-only"


def test_a_used_up_context_is_refused() -> None:
    sender, receiver = pair(X25519_HKDF_SHA256_AES256GCM)
    sender._sequence = receiver._sequence = (1 << 96) - 2
    assert receiver.open(sender.seal(b"last")) == b"last"
    with pytest.raises(Refused) as refusal:
        sender.seal(b"one more")
    assert refusal.value.code == "hpke.message-limit"
    with pytest.raises(Refused):
        receiver.open(bytes(32))


@pytest.mark.parametrize("length", [-1, 0, 255 * 32 + 1])
def test_an_export_of_an_impossible_length_is_refused(length: int) -> None:
    with pytest.raises(UsageError) as refusal:
        pair(X25519_HKDF_SHA256_AES256GCM)[0].export(b"", length)
    assert refusal.value.code == "hpke.export"


def test_a_plaintext_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpke, "MAX_MESSAGE", 8)
    sender, _ = pair(X25519_HKDF_SHA256_AES256GCM)
    assert len(sender.seal(bytes(8))) == 24
    with pytest.raises(UsageError) as refusal:
        sender.seal(bytes(9))
    assert refusal.value.code == "hpke.length"


@pytest.mark.parametrize("kem_id", [X25519, XWING])
def test_a_private_key_hides_itself(kem_id: int) -> None:
    key = KEYS[kem_id]
    secret = key.to_secret().reveal()
    assert secret.hex() not in repr(key) + str(key)
    with pytest.raises(TypeError):
        pickle.dumps(key)


@given(message=st.binary(max_size=1400))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_refused_by_an_error_of_ours(message: bytes) -> None:
    for suite in WIRE_SUITES:
        with pytest.raises(CloisterError):
            open_from(suite, KEYS[suite.kem_id], message, info=b"")


# --- published vectors


@pytest.mark.parametrize("vector", [vectors.A1, vectors.A2, vectors.A7], ids=["A.1.1", "A.2.1", "A.7.1"])
def test_rfc_9180_vectors(vector: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ephemeral = X25519PrivateKey.from_private_bytes(bytes.fromhex(vector["sk_e"]))
    monkeypatch.setattr(kem, "_ephemeral", lambda: ephemeral)
    suite, info = x25519_suite(vector["aead"]), bytes.fromhex(vectors.INFO)
    key = PrivateKey.from_bytes(X25519, bytes.fromhex(vector["sk_r"]))
    assert key.public_bytes.hex() == vector["pk_r"]
    assert key.decapsulate(bytes.fromhex(vector["enc"])).hex() == vector["shared_secret"]
    enc, sender = setup_sender(suite, key.public_bytes, info)
    assert enc.hex() == vector["enc"]
    receiver = setup_receiver(suite, key, enc, info)
    plaintext = bytes.fromhex(vectors.PLAINTEXT)
    for context in (sender, receiver):
        assert context._exporter_secret.hex() == vector["exporter_secret"]
        assert context._base_nonce == int(vector["base_nonce"] or "0", 16)
        for exporter_context, value in vector["exports"].items():
            assert context.export(bytes.fromhex(exporter_context), 32).hex() == value
    for sequence in range(max(vector["ciphertexts"], default=-1) + 1):
        aad = f"Count-{sequence}".encode()
        ciphertext = sender.seal(plaintext, aad)
        if sequence in vector["ciphertexts"]:
            assert ciphertext.hex() == vector["ciphertexts"][sequence]
        assert receiver.open(ciphertext, aad) == plaintext


def test_x_wing_vector() -> None:
    key = PrivateKey.from_bytes(XWING, bytes.fromhex(vectors.XWING_SK))
    assert len(key.public_bytes) == 1216
    assert key.public_bytes[:32].hex() == vectors.XWING_PK_START
    assert key.public_bytes[-32:].hex() == vectors.XWING_PK_END
    assert key.decapsulate(bytes.fromhex(vectors.XWING_CT)).hex() == vectors.XWING_SS


# --- other implementations


ORACLE_AEADS = {
    AES_128_GCM: oracle.AEAD.AES_128_GCM,
    AES_256_GCM: oracle.AEAD.AES_256_GCM,
    CHACHA20_POLY1305: oracle.AEAD.CHACHA20_POLY1305,
}


def oracle_suite(suite: Suite) -> oracle.Suite:
    mechanism = oracle.KEM.X25519 if suite.kem_id == X25519 else oracle.KEM.MLKEM768_X25519
    return oracle.Suite(mechanism, oracle.KDF.HKDF_SHA256, ORACLE_AEADS[suite.aead_id])


@pytest.mark.parametrize("aead_id", ORACLE_AEADS)
@pytest.mark.parametrize("kem_id", [X25519, XWING])
def test_cryptographys_hpke_agrees_in_both_directions(kem_id: int, aead_id: int) -> None:
    suite, key = Suite(kem_id=kem_id, kdf_id=1, aead_id=aead_id), KEYS[kem_id]
    if kem_id == X25519:
        theirs: Any = X25519PrivateKey.from_private_bytes(key.to_secret().reveal())
        public: Any = X25519PublicKey.from_public_bytes(key.public_bytes)
    else:
        assert key._mlkem is not None
        theirs = oracle.MLKEM768X25519PrivateKey(key._mlkem, key._x25519)
        public = oracle.MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(key.public_bytes[:1184]),
            X25519PublicKey.from_public_bytes(key.public_bytes[1184:]),
        )
    message = oracle_suite(suite).encrypt(b"theirs", public, b"info")
    assert open_from(suite, key, message, info=b"info") == b"theirs"
    message = seal_to(suite, key.public_bytes, b"ours", info=b"info")
    assert oracle_suite(suite).decrypt(message, theirs, b"info") == b"ours"


@pytest.mark.parametrize("kdf_id", [1, 2, 3])
@pytest.mark.parametrize("aead_id", [AES_128_GCM, AES_256_GCM, CHACHA20_POLY1305])
def test_pyhpke_agrees_in_both_directions(aead_id: int, kdf_id: int) -> None:
    suite, key = Suite(kem_id=X25519, kdf_id=kdf_id, aead_id=aead_id), KEYS[X25519]
    theirs = CipherSuite.new(KEMId.DHKEM_X25519_HKDF_SHA256, KDFId(kdf_id), AEADId(aead_id))
    private = KEMKey.from_pyca_cryptography_key(key._x25519)
    public = KEMKey.from_pyca_cryptography_key(key._x25519.public_key())

    enc, sender = setup_sender(suite, key.public_bytes, b"info")
    recipient = theirs.create_recipient_context(enc, private, info=b"info")
    for number in range(3):
        assert recipient.open(sender.seal(b"ours %d" % number, b"aad"), b"aad") == b"ours %d" % number
    assert recipient.export(b"context", 100) == sender.export(b"context", 100)

    enc, their_sender = theirs.create_sender_context(public, info=b"info")
    receiver = setup_receiver(suite, key, enc, b"info")
    for number in range(3):
        assert (
            receiver.open(their_sender.seal(b"theirs %d" % number, b"aad"), b"aad") == b"theirs %d" % number
        )
    assert receiver.export(b"context", 100) == their_sender.export(b"context", 100)


# --- the rest


@given(plaintext=st.binary(max_size=300), aad=st.binary(max_size=30), info=st.binary(max_size=30))
@settings(max_examples=30, deadline=None)
def test_round_trip(plaintext: bytes, aad: bytes, info: bytes) -> None:
    for suite in WIRE_SUITES:
        key = PrivateKey.from_bytes(suite.kem_id, KEYS[suite.kem_id].to_secret().reveal())
        message = seal_to(suite, key.public_bytes, plaintext, info=info, aad=aad)
        assert len(message) == suite.n_enc + len(plaintext) + 16
        assert open_from(suite, key, memoryview(message), info=info, aad=aad) == plaintext


def test_wiping_a_given_out_secret_leaves_the_key_usable() -> None:
    key = generate_private_key(XWING)
    given_out = key.to_secret()
    given_out.wipe()
    again = PrivateKey.from_bytes(XWING, key.to_secret().reveal())
    assert again.public_bytes == key.public_bytes
    assert given_out != key.to_secret()


def test_the_wire_list_prefers_the_post_quantum_hybrid() -> None:
    assert [str(suite) for suite in WIRE_SUITES] == ["0x647a/0x0001/0x0002", "0x0020/0x0001/0x0002"]

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.core.ohttp import encapsulation, hpke, kem, keyconfig
from cloister.core.ohttp.encapsulation import Gateway, begin
from cloister.core.ohttp.hpke import AES_128_GCM, PrivateKey, Suite, generate_private_key
from cloister.core.ohttp.keyconfig import KeyConfiguration
from cloister.errors import BindingRefused, CloisterError, FormatError, Refused, Tampered, UsageError

from . import vectors

KEYS = [(1, generate_private_key(kem.X25519_HKDF_SHA256)), (2, generate_private_key(kem.XWING))]
GATEWAY = Gateway(KEYS)
CONFIGURATIONS = GATEWAY.configurations()
AES_128 = Suite(kem_id=kem.X25519_HKDF_SHA256, kdf_id=1, aead_id=AES_128_GCM)
each_suite = pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=["x-wing", "x25519"])


def sealed(configuration: KeyConfiguration, plaintext: bytes = b"request") -> bytearray:
    return begin(configuration, configuration.preferred_suite()).seal(plaintext)


# --- refusals at the gateway


@each_suite
def test_an_unknown_key_id_is_refused(configuration: KeyConfiguration) -> None:
    with pytest.raises(BindingRefused) as refusal:
        GATEWAY.open(sealed(replace(configuration, key_id=9)))
    assert refusal.value.to_dict() == {
        "error": "ohttp.key",
        "message": "key id refused",
        "claim": "key id",
        "expected": "1, 2",
        "actual": "9",
    }


@pytest.mark.parametrize(
    "ids", ["002000010001", "002000010003", "002000020002", "001000010002", "647a00010002"]
)
def test_a_suite_that_is_not_the_keys_is_refused(ids: str) -> None:
    message = sealed(CONFIGURATIONS[1])
    message[1:7] = bytes.fromhex(ids)
    with pytest.raises(BindingRefused) as refusal:
        GATEWAY.open(message)
    assert (refusal.value.code, refusal.value.claim) == ("ohttp.key", "suite")
    assert refusal.value.expected == "0x0020/0x0001/0x0002"


@each_suite
def test_a_truncated_request_is_refused(configuration: KeyConfiguration) -> None:
    shortest = 7 + configuration.preferred_suite().n_enc + 16
    message = sealed(configuration, b"")
    assert len(message) == shortest
    for length in (0, 1, 6, 7, 38, shortest - 17, shortest - 16, shortest - 1):
        with pytest.raises(FormatError) as refusal:
            GATEWAY.open(message[:length])
        assert refusal.value.code == "ohttp.request"
    with pytest.raises(Tampered):
        GATEWAY.open(sealed(configuration, b"more")[:-1])


@each_suite
def test_an_altered_request_is_refused(configuration: KeyConfiguration) -> None:
    message = sealed(configuration)
    for position in (7, 7 + configuration.preferred_suite().n_enc, len(message) - 1):
        altered = bytearray(message)
        altered[position] ^= 1
        with pytest.raises(Tampered) as refusal:
            GATEWAY.open(altered)
        assert refusal.value.code == "ohttp.open"
        assert refusal.value.__cause__ is None


@each_suite
def test_a_request_moved_to_another_key_id_is_refused(configuration: KeyConfiguration) -> None:
    key = dict(KEYS)[configuration.key_id]
    message = sealed(configuration)
    message[0] = 7
    with pytest.raises(Tampered) as refusal:
        Gateway([(7, key)]).open(message)
    assert refusal.value.code == "ohttp.open"


@each_suite
def test_a_request_to_the_key_of_another_epoch_is_refused(configuration: KeyConfiguration) -> None:
    gateway = Gateway([(configuration.key_id, generate_private_key(configuration.kem_id))])
    with pytest.raises(Tampered) as refusal:
        gateway.open(sealed(configuration))
    assert refusal.value.code == "ohttp.open"


def test_an_enc_of_low_order_is_refused() -> None:
    message = sealed(CONFIGURATIONS[1])
    message[7:39] = bytes(32)
    with pytest.raises(Refused) as refusal:
        GATEWAY.open(message)
    assert refusal.value.code == "hpke.kem"


def test_two_keys_of_one_id_are_refused() -> None:
    with pytest.raises(UsageError) as refusal:
        Gateway([(1, KEYS[0][1]), (1, KEYS[1][1])])
    assert refusal.value.code == "ohttp.key-id"


def test_a_key_id_beyond_a_byte_is_refused() -> None:
    with pytest.raises(FormatError):
        Gateway([(256, KEYS[0][1])])


def test_a_second_response_is_refused() -> None:
    exchange, _ = GATEWAY.open(sealed(CONFIGURATIONS[0]))
    exchange.seal(b"response")
    with pytest.raises(UsageError) as refusal:
        exchange.seal(b"response")
    assert refusal.value.code == "ohttp.used"


@given(message=st.binary(max_size=1300))
@settings(deadline=None, max_examples=60)
def test_any_bytes_are_refused_by_an_error_of_ours(message: bytes) -> None:
    for start in (b"", *(bytes(sealed(c)[:7]) for c in CONFIGURATIONS)):
        with pytest.raises(CloisterError):
            GATEWAY.open(start + message)


# --- refusals at the client


def test_a_suite_off_the_wire_list_is_refused() -> None:
    weak = replace(CONFIGURATIONS[1], symmetric=((1, 1), (1, 2)))
    with pytest.raises(BindingRefused) as refusal:
        begin(weak, AES_128)
    assert (refusal.value.code, refusal.value.claim) == ("ohttp.key", "suite")
    assert refusal.value.expected == "0x0020/0x0001/0x0002"
    assert refusal.value.actual == "0x0020/0x0001/0x0001"


def test_a_suite_that_the_configuration_does_not_offer_is_refused() -> None:
    with pytest.raises(BindingRefused) as refusal:
        begin(CONFIGURATIONS[1], CONFIGURATIONS[0].preferred_suite())
    assert refusal.value.code == "ohttp.key"


def test_a_configuration_with_a_key_of_low_order_is_refused() -> None:
    configuration = replace(CONFIGURATIONS[1], public_key=bytes(32))
    with pytest.raises(Refused) as refusal:
        begin(configuration, configuration.preferred_suite())
    assert refusal.value.code == "hpke.kem"


def test_a_second_request_is_refused() -> None:
    client = begin(CONFIGURATIONS[0], CONFIGURATIONS[0].preferred_suite())
    client.seal(b"request")
    with pytest.raises(UsageError) as refusal:
        client.seal(b"request")
    assert refusal.value.code == "ohttp.used"


def test_a_response_before_the_request_is_refused() -> None:
    client = begin(CONFIGURATIONS[0], CONFIGURATIONS[0].preferred_suite())
    with pytest.raises(UsageError) as refusal:
        client.open(bytes(100))
    assert refusal.value.code == "ohttp.used"


@each_suite
def test_an_altered_response_is_refused(configuration: KeyConfiguration) -> None:
    client = begin(configuration, configuration.preferred_suite())
    response = GATEWAY.open(client.seal(b"request"))[0].seal(b"response")
    for position in (0, 31, 32, len(response) - 1):
        altered = bytearray(response)
        altered[position] ^= 1
        with pytest.raises(Tampered) as refusal:
            client.open(altered)
        assert refusal.value.code == "ohttp.open"
    with pytest.raises(Tampered):
        client.open(response[:-1])
    assert client.open(response) == b"response"


@each_suite
def test_the_response_to_another_request_is_refused(configuration: KeyConfiguration) -> None:
    clients = [begin(configuration, configuration.preferred_suite()) for _ in range(2)]
    exchanges = [GATEWAY.open(client.seal(b"request"))[0] for client in clients]
    with pytest.raises(Tampered) as refusal:
        clients[0].open(exchanges[1].seal(b"response"))
    assert refusal.value.code == "ohttp.open"


@pytest.mark.parametrize("length", [0, 31, 32, 47])
def test_a_response_that_is_too_short_is_refused(length: int) -> None:
    client = begin(CONFIGURATIONS[0], CONFIGURATIONS[0].preferred_suite())
    client.seal(b"request")
    with pytest.raises(FormatError) as refusal:
        client.open(bytes(length))
    assert refusal.value.code == "ohttp.response"


def test_a_plaintext_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    client = begin(CONFIGURATIONS[0], CONFIGURATIONS[0].preferred_suite())
    exchange, _ = GATEWAY.open(sealed(CONFIGURATIONS[0]))
    monkeypatch.setattr(hpke, "MAX_MESSAGE", 8)
    for seal in (client.seal, exchange.seal):
        with pytest.raises(UsageError) as refusal:
            seal(bytes(9))
        assert refusal.value.code == "hpke.length"


# --- the published exchange


def test_rfc_9458_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """AES-128-GCM is not on the wire list, so the list is another one while this test runs."""
    monkeypatch.setattr(encapsulation, "WIRE_SUITES", (AES_128,))
    monkeypatch.setattr(keyconfig, "WIRE_SUITES", (AES_128,))
    ephemeral = X25519PrivateKey.from_private_bytes(bytes.fromhex(vectors.OHTTP["sk_e"]))
    monkeypatch.setattr(kem, "_ephemeral", lambda: ephemeral)
    response_nonce = bytes.fromhex(vectors.OHTTP["response_nonce"])
    monkeypatch.setattr(encapsulation, "_response_nonce", lambda suite: response_nonce)
    configuration = KeyConfiguration.from_bytes(bytes.fromhex(vectors.OHTTP["configuration"]))
    gateway = Gateway([(1, PrivateKey.from_bytes(0x0020, bytes.fromhex(vectors.OHTTP["sk_r"])))])
    assert gateway.configurations()[0].public_key == configuration.public_key

    client = begin(configuration, AES_128)
    request = client.seal(bytes.fromhex(vectors.OHTTP["request"]))
    assert request.hex() == vectors.OHTTP["encapsulated_request"]
    exchange, plaintext = gateway.open(request)
    assert plaintext.hex() == vectors.OHTTP["request"]
    response = exchange.seal(bytes.fromhex(vectors.OHTTP["response"]))
    assert response.hex() == vectors.OHTTP["encapsulated_response"]
    assert client.open(response).hex() == vectors.OHTTP["response"]


# --- the rest


@each_suite
@pytest.mark.parametrize("size", [0, 1, 600_000])
def test_an_exchange(configuration: KeyConfiguration, size: int) -> None:
    suite = configuration.preferred_suite()
    client = begin(configuration, suite)
    enc = client.enc
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)
    request = client.seal(memoryview(body))
    assert len(request) == 7 + suite.n_enc + size + 16
    exchange, plaintext = GATEWAY.open(memoryview(request))
    assert plaintext == body
    assert (exchange.enc, exchange.key_id, exchange.suite) == (enc, configuration.key_id, suite)
    assert (client.key_id, client.suite) == (exchange.key_id, exchange.suite)
    response = exchange.seal(bytearray(body))
    assert len(response) == 32 + size + 16
    answer = client.open(memoryview(response))
    assert answer == body
    plaintext[:] = bytes(size)  # both are arrays of their own, which the caller may wipe
    answer[:] = bytes(size)
    assert client.open(response) == body


def test_no_two_messages_are_alike() -> None:
    requests = [sealed(CONFIGURATIONS[0]) for _ in range(2)]
    assert requests[0][7:] != requests[1][7:]
    responses = [GATEWAY.open(requests[0])[0].seal(b"response") for _ in range(2)]
    assert responses[0][:32] != responses[1][:32]
    assert responses[0][32:] != responses[1][32:]


def test_configurations_are_published_preferred_first() -> None:
    assert [c.kem_id for c in CONFIGURATIONS] == [kem.XWING, kem.X25519_HKDF_SHA256]
    assert [c.key_id for c in CONFIGURATIONS] == [2, 1]


def test_exchanges_show_no_keys() -> None:
    client = begin(CONFIGURATIONS[0], CONFIGURATIONS[0].preferred_suite())
    exchange, _ = GATEWAY.open(client.seal(b"request"))
    assert repr(client) == "<Encapsulation, key 2, 0x647a/0x0001/0x0002>"
    assert repr(exchange) == "<Decapsulation, key 2, 0x647a/0x0001/0x0002>"
    assert repr(exchange._context) == "<ReceiverContext, 0x647a/0x0001/0x0002>"

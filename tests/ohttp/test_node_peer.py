"""Exchanges with an OHTTP peer of other authorship: npm's @hpke/core and bhttp-js, in ``node/peer.mjs``."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloister.core.ohttp import kem
from cloister.core.ohttp.bhttp import Request, Response
from cloister.core.ohttp.encapsulation import Gateway, begin
from cloister.core.ohttp.hpke import generate_private_key
from cloister.core.ohttp.keyconfig import KeyConfiguration
from cloister.errors import Tampered

HERE = Path(__file__).parent / "node"
BUILD = Path(__file__).parents[2] / "build" / "ohttp-node"
KEYS = [(1, generate_private_key(kem.X25519_HKDF_SHA256)), (2, generate_private_key(kem.XWING))]
GATEWAY = Gateway(KEYS)
CONFIGURATIONS = GATEWAY.configurations()
CONTENT = bytes(range(256)) * 64
each_suite = pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=["x-wing", "x25519"])


def install() -> Path:
    """The folder with the peer and its packages, which stays for the next run."""
    files = [HERE / name for name in ("package.json", "package-lock.json", "peer.mjs")]
    folder = BUILD / hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    if (folder / "complete").exists():
        return folder
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(file, folder)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("npm could not install the peer's packages in a minute")
    if done.returncode:
        pytest.skip("npm could not install the peer's packages (no registry within reach?)")
    (folder / "complete").touch()
    return folder


class Peer:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def __call__(self, command: str, **parameters: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"command": command, **parameters}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    process = subprocess.Popen(
        [node, "peer.mjs"],
        cwd=install(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        yield Peer(process)
        assert process.stdin is not None
        process.stdin.close()


@each_suite
def test_their_client_our_gateway(peer: Peer, configuration: KeyConfiguration) -> None:
    sent = peer(
        "request",
        configuration=configuration.to_bytes().hex(),
        method="POST",
        url="https://model.example/v2/models/m/infer",
        headers={"content-type": "application/octet-stream", "x-number": "1"},
        content=CONTENT.hex(),
    )
    exchange, plaintext = GATEWAY.open(bytes.fromhex(sent["message"]))
    request = Request.from_bytes(plaintext)
    assert (request.method, request.scheme, request.authority) == (b"POST", b"https", b"model.example")
    assert request.path == b"/v2/models/m/infer"
    assert request.field(b"content-type") == b"application/octet-stream"
    assert request.field(b"x-number") == b"1"
    assert request.content == CONTENT

    response = Response(status=404, fields=((b"x-answer", b"yes"),), content=CONTENT[::-1])
    got = peer("response", message=exchange.seal(response.to_bytes(pad=True)).hex())
    assert got == {"status": 404, "headers": {"x-answer": "yes"}, "content": CONTENT[::-1].hex()}


@each_suite
def test_our_client_their_gateway(peer: Peer, configuration: KeyConfiguration) -> None:
    request = Request(
        method=b"POST",
        authority=b"model.example",
        path=b"/v2/models/m/infer",
        fields=((b"content-type", b"application/octet-stream"),),
        content=CONTENT,
    )
    client = begin(configuration, configuration.preferred_suite())
    got = peer(
        "serve",
        privateKey=dict(KEYS)[configuration.key_id].to_secret().reveal().hex(),
        publicKey=configuration.public_key.hex(),
        message=client.seal(request.to_bytes(pad=True)).hex(),
        status=200,
        headers={"x-answer": "yes"},
        content=CONTENT[::-1].hex(),
    )
    assert got["method"] == "POST"
    assert got["url"] == "https://model.example/v2/models/m/infer"
    assert got["headers"]["content-type"] == "application/octet-stream"
    assert got["content"] == CONTENT.hex()
    response = Response.from_bytes(client.open(bytes.fromhex(got["response"])))
    assert (response.status, response.field(b"x-answer")) == (200, b"yes")
    assert response.content == CONTENT[::-1]


@each_suite
def test_their_gateway_refuses_what_we_altered(peer: Peer, configuration: KeyConfiguration) -> None:
    client = begin(configuration, configuration.preferred_suite())
    message = client.seal(Request(method=b"GET", path=b"/").to_bytes(pad=True))
    message[-1] ^= 1
    key = dict(KEYS)[configuration.key_id]
    got = peer(
        "serve",
        privateKey=key.to_secret().reveal().hex(),
        publicKey=configuration.public_key.hex(),
        message=message.hex(),
    )
    assert "OpenError" in got["error"]
    with pytest.raises(Tampered):
        GATEWAY.open(message)

"""Valid inputs to begin with, made by the simulated platform, and real evidence where there is some."""

from __future__ import annotations

import asyncio
import base64
import importlib
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from cloister.core import encoding
from cloister.core.bfloat16 import bfloat16
from cloister.core.evidence.bundle import Collateral, Evidence
from cloister.core.evidence.dcap import Quote
from cloister.core.evidence.vek import ARC
from cloister.core.identity import SigningKey
from cloister.core.ohttp.bhttp import Request, Response
from cloister.core.ohttp.encapsulation import Encapsulation, Gateway, begin
from cloister.core.ohttp.hpke import WIRE_SUITES, PrivateKey
from cloister.core.ohttp.keyconfig import encode_list
from cloister.core.oip import encode_request, encode_response
from cloister.core.protocol import problem
from cloister.core.protocol.authorization import RequestAuthorization, RequestContext
from cloister.core.protocol.repository import NONCE_SIZE, join_nonces
from cloister.core.protocol.stages import BOUNDS, STAGES, Figures, Histogram
from cloister.core.sealing import Section, seal
from cloister.core.sealing.records import seal_record
from cloister.core.secret import Secret
from cloister.core.verifier import TrustAnchors
from cloister.core.verifier.certificates import AMD, DCAP, NITRO, load_certificate, read_pem
from cloister.errors import EvidenceRefused
from cloister.sim.authority import SimulatedAuthority
from cloister.sim.nitro import SimulatedNitro
from cloister.sim.pki import sgx_extension
from cloister.sim.snp import SimulatedAmd, SnpFlaws

ROOT: Final = Path(__file__).resolve().parents[1]
VECTORS: Final = ROOT.parent / "shared" / "vectors"
NOW: Final = 1_800_000_000
KEY: Final = Secret(bytes(range(32)))  # opens what is sealed here, in every process
RECORD: Final[dict[str, Any]] = {"service": b"s" * 32, "table": "pools", "record_key": b"k", "version": 7}
PROFILES: Final = (DCAP, AMD, NITRO)  # the first byte of a certificate or list under test chooses one


@cache
def authority() -> SimulatedAuthority:
    """Intel's place."""
    with tempfile.TemporaryDirectory() as folder:
        return SimulatedAuthority.create(Path(folder), now=NOW)


@cache
def amd() -> SimulatedAmd:
    """AMD's place."""
    return SimulatedAmd.create(now=NOW)


@cache
def nitro() -> SimulatedNitro:
    """AWS's place."""
    return SimulatedNitro.create(now=NOW)


@cache
def anchors() -> TrustAnchors:
    """The roots of all three."""
    return TrustAnchors.simulated(roots())


def roots() -> bytes:
    """The same in DER."""
    return authority().root_der + amd().root_der + nitro().root_der


@cache
def messages() -> dict[str, Any]:
    """Every message of the protocol, as the tests of `cloister.core.protocol` make them."""
    _, made = asyncio.run(_conftest()._make())
    return dict(made)


def message_names() -> Sequence[str]:
    """Their names."""
    return list(_conftest().NAMES)


def _conftest() -> Any:
    if (tests := str(ROOT / "tests")) not in sys.path:
        sys.path.append(tests)
    return importlib.import_module("protocol.conftest")


# -- evidence ------------------------------------------------------------------


@cache
def quotes() -> list[bytes]:
    """SGX and TDX quotes."""
    maker = authority()
    values: dict[str, Any] = {"report_data": bytes(range(64)), "now": NOW}
    sgx = maker.quote(mr_enclave=b"e" * 32, mr_signer=b"s" * 32, isv_prod_id=1, isv_svn=2, **values)
    tdx = [
        maker.td_quote(mr_td=b"t" * 48, version=version, td_version=td_version, **values)
        for version, td_version in ((4, "1.0"), (5, "1.0"), (5, "1.5"))
    ]
    return [sgx, *tdx]


def documents() -> list[bytes]:
    """Nitro documents, one with a tag."""
    plain = nitro().document(report_data=b"r" * 64, pcrs={0: b"p" * 48}, now=NOW, nonce=b"n", public_key=b"k")
    return [plain, b"\xd2" + nitro().document(report_data=None, pcrs={}, now=NOW)]


def reports() -> list[bytes]:
    """SNP reports."""
    values: dict[str, Any] = {"report_data": bytes(64), "measurement": b"m" * 48}
    return [amd().report(version=version, **values) for version in (2, 3, 5)]


@cache
def collateral(tee: str) -> Collateral:
    """DCAP collateral."""
    return authority().collateral(NOW, tee=tee)


def evidence() -> list[bytes]:
    """Evidence of each kind with its collateral, encoded."""
    sgx, tdx, *_ = quotes()
    found = [
        Evidence(tee="sgx", quote=sgx, collateral=collateral("sgx")),
        Evidence(tee="tdx", quote=tdx, collateral=collateral("tdx")),
        Evidence(tee="snp", quote=reports()[0], collateral=amd().collateral(NOW)),
        Evidence(tee="nitro", quote=documents()[0], collateral=None),
    ]
    return [encoding.encode(item.to_data()) for item in found]


def pck_extensions() -> list[bytes]:
    """The SGX extension of a PCK certificate."""
    return [sgx_extension(authority()._platform)]


def vek_extensions() -> list[bytes]:
    """AMD's extensions of VCEK and VLEK, as a map in CBOR."""
    return [encoding.encode(_vek_values(der)) for der in (_amd_chain()[0], _amd_chain(vlek=True)[0])]


def _vek_values(der: bytes) -> dict[str, bytes]:
    return {
        extension.oid.dotted_string.removeprefix(ARC): extension.value.public_bytes()
        for extension in load_certificate(der, AMD).parsed.extensions
        if extension.oid.dotted_string.startswith(ARC)
    }


def _amd_chain(*, vlek: bool = False) -> list[bytes]:
    return read_pem(amd().collateral(NOW, flaws=SnpFlaws(vlek=vlek)).certificates, most=3)


def chains() -> list[bytes]:
    """PEM chains, with their profile's number before them."""
    intel = Quote.from_bytes(quotes()[0]).signature.certification_data
    return [b"\0" + intel, b"\1" + amd().collateral(NOW).certificates]


def certificates() -> list[bytes]:
    """Certificates, with their profile's number before them."""
    intel = read_pem(chains()[0][1:], most=3)
    return [
        *(b"\0" + der for der in intel),
        *(b"\1" + der for der in _amd_chain()),
        b"\2" + nitro().root_der,
    ]


def revocation_lists() -> list[bytes]:
    """Revocation lists, with their profile's number before them."""
    intel = collateral("sgx")
    return [b"\0" + intel.pck_crl, b"\0" + intel.root_ca_crl, b"\1" + amd().collateral(NOW).crl]


# -- encapsulation, sealing, requests ------------------------------------------


@cache
def gateway() -> Gateway:
    """The holder of one key of each kind; the same in every process."""
    return Gateway((index, PrivateKey(suite.kem_id, KEY)) for index, suite in enumerate(WIRE_SUITES))


@cache
def exchanges() -> tuple[tuple[Encapsulation, bytes], ...]:
    """A client's ends of exchanges, each with the answer that it awaits: others in every process."""
    found = []
    for key in gateway().configurations():
        exchange = begin(key, key.preferred_suite())
        answering, _ = gateway().open(exchange.seal(b"question"))
        found.append((exchange, bytes(answering.seal(b"answer"))))
    return tuple(found)


def encapsulated_requests() -> list[bytes]:
    """Requests that `gateway` opens."""
    return [bytes(begin(key, key.preferred_suite()).seal(b"question")) for key in gateway().configurations()]


def encapsulated_responses() -> list[bytes]:
    """The answers that `exchanges` await."""
    return [answer for _, answer in exchanges()]


def key_configurations() -> list[bytes]:
    """Key configurations, one each."""
    return [key.to_bytes() for key in gateway().configurations()]


def key_lists() -> list[bytes]:
    """Lists of key configurations."""
    return [encode_list(gateway().configurations()), b""]


def requests() -> list[bytes]:
    """Binary HTTP requests of both forms."""
    made = Request(
        method=b"POST",
        scheme=b"https",
        authority=b"",
        path=b"/v2/models/m/infer",
        fields=((b"content-type", b"application/json"), (b"a", b"")),
        content=b"content",
        trailers=((b"t", b"1"),),
    )
    return [bytes(made.to_bytes(pad=pad, indeterminate=not pad)) for pad in (True, False)]


def responses() -> list[bytes]:
    """Binary HTTP responses of both forms."""
    made = Response(
        status=200,
        fields=((b"content-type", b"application/json"),),
        content=b"content",
        informational=((103, ((b"link", b"x"),)),),
    )
    return [bytes(made.to_bytes(pad=pad, indeterminate=not pad)) for pad in (True, False)]


@cache
def containers() -> list[bytes]:
    """Sealed models."""
    sections = [Section.of("graph", b"graph"), Section.of("weights", b"w" * 5000)]
    return [b"".join(seal(sections, model_id="o/m", key=KEY, chunk_size=4096))]


def headers() -> list[bytes]:
    """Headers of sealed models."""
    sections = [Section.of("graph", b"graph"), Section.of("weights", b"")]
    return [seal(sections, model_id="o/m", key=KEY, chunk_size=4096).header.to_bytes()]


def records() -> list[bytes]:
    """Sealed records."""
    return [seal_record(KEY, plaintext=text, **RECORD) for text in (b"", b"plaintext")]


def inference_requests() -> list[bytes]:
    """Inference requests, with the value of their length field in a line before them."""
    tensors = {
        "x": np.arange(6, dtype=np.float32).reshape(2, 3),
        "words": np.array([b"a", b"bc"], dtype=object),
        "halves": bfloat16(np.array([1.5, -2.0])),
        "flags": np.array([True, False]),
    }
    header, buffers = encode_request(tensors, outputs=("y",), request_id="1")
    text = {
        "inputs": [
            {"name": "x", "shape": [2], "datatype": "INT64", "data": [1, 2]},
            {"name": "z", "shape": [1, 2], "datatype": "BF16", "data": [[1, 2.5]]},
        ],
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
    }
    return [with_length(header, buffers), b"\n" + json.dumps(text).encode()]


def inference_responses() -> list[bytes]:
    """Inference responses likewise."""
    tensors = {"y": np.ones((1, 2), dtype=np.float32)}
    return [
        with_length(*encode_response("m", tensors, binary=True)),
        b"\n" + encode_response("m", tensors, binary=False)[0],
    ]


def with_length(header: bytes, buffers: Sequence[memoryview]) -> bytes:
    """An inference message as the targets take it."""
    return b"%d\n" % len(header) + header + b"".join(buffers)


def authorizations() -> list[bytes]:
    """Fields that sign a request."""
    context = RequestContext(service=b"s" * 32, pool=b"p" * 32, epoch=1, model="m", enc=b"c" * 32)
    made = RequestAuthorization.sign(
        SigningKey(KEY), context, statement=b"t" * 32, request_id=b"r" * 16, expiry=NOW
    )
    return [made.to_field()]


def nonces() -> list[bytes]:
    """Fields with nonces."""
    return [join_nonces([b"n" * NONCE_SIZE]), join_nonces([bytes(NONCE_SIZE), b"\xff" * NONCE_SIZE])]


def figures() -> list[bytes]:
    """What a worker tells of its stages."""
    counted = Histogram([0] * (len(BOUNDS) + 1), 0.0)
    counted.counts[1], counted.seconds = 3, 0.25
    return [json.dumps(Figures(age=1.5, stages=dict.fromkeys(STAGES, counted)).to_data()).encode()]


def problems() -> list[bytes]:
    """Errors as they travel."""
    return [problem.to_bytes(EvidenceRefused(code="evidence.root", claim="root", expected="a", actual="b"))]


def policies() -> list[bytes]:
    """Appraisal policies as files."""
    return [messages()["appraisal policy"].value.to_toml().encode()]


def user_policies() -> list[bytes]:
    """Policies of users as files."""
    policy = policies()[0].decode()
    text = f'service = "{"5a" * 32}"\n[key_service]\n{policy}\n[worker]\n{policy}\n[consent]\n'
    return [f"{text}allow_shared_pools = true\n".encode()]


# -- real evidence -------------------------------------------------------------


def vectors(name: str) -> list[bytes]:
    """Real evidence for a target; none where the folder is missing."""
    found = _READERS.get(name, list)() if VECTORS.is_dir() else []
    return [data for data in found if data]


def _files(pattern: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(VECTORS.glob(pattern)) if path.stat().st_size < 1 << 20]


def _collateral(part: str) -> list[bytes]:
    texts = [json.loads(data)[part] for data in _files("dcap/*/collateral.json")]
    return [bytes.fromhex(text) if part.endswith("crl") else text.encode() for text in texts]


def _documents() -> list[bytes]:
    encoded = _files("nitro/*/test-data/*-base64")
    return [base64.b64decode(text) for text in encoded] + _files("nitro/*/test-data/beta/*-bytes")


_READERS: Final[dict[str, Any]] = {
    "dcap-quote": lambda: _files("dcap/*/quote.bin"),
    "dcap-key": lambda: _files("dcap/*/quote.bin"),
    "collateral-json": lambda: _files("dcap/*/collateral.json"),
    "tcb-info": lambda: _collateral("tcb_info"),
    "qe-identity": lambda: _collateral("qe_identity"),
    "revocation-list": lambda: (
        [b"\0" + crl for crl in _collateral("pck_crl") + _collateral("root_ca_crl")]
        + [b"\1" + crl for crl in _files("snp/*/*crl.der")]
    ),
    "certificate": lambda: [b"\1" + der for der in _files("snp/trustee-snp/*.der")],
    "chain": lambda: [b"\1" + pem for pem in _files("snp/_amd-roots/*.pem")],
    "snp-report": lambda: [data for data in _files("snp/*/*.bin") if len(data) == 1184],
    "nitro-document": _documents,
    "verify-nitro": _documents,
}

"""The targets: what reads untrusted bytes, what it is tried with, and what must hold."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Final

from cloister.core import encoding, oip
from cloister.core.evidence.bundle import Collateral, Evidence
from cloister.core.evidence.dcap import Quote
from cloister.core.evidence.nitro import NitroDocument
from cloister.core.evidence.pck import PckExtension
from cloister.core.evidence.snp import SnpReport
from cloister.core.evidence.snp_table import CertificateTable
from cloister.core.evidence.vek import VekExtensions
from cloister.core.ohttp.bhttp import Request, Response
from cloister.core.ohttp.keyconfig import KeyConfiguration, decode_list, encode_list
from cloister.core.protocol import problem
from cloister.core.protocol.authorization import RequestAuthorization
from cloister.core.protocol.repository import split_nonces
from cloister.core.protocol.stages import Figures
from cloister.core.protocol.trust import UserPolicy
from cloister.core.sealing import SealedHeader, header_size, read_sections
from cloister.core.sealing.records import open_record
from cloister.core.verifier import TrustAnchors, verify
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.core.verifier.certificates import load_certificate, load_chain, load_crl
from cloister.core.verifier.collateral_key import DcapKey
from cloister.core.verifier.qe import QeIdentity
from cloister.core.verifier.tcb import TcbInfo
from cloister.errors import CloisterError, FormatError
from fuzz import seeds


class Broken(Exception):
    """What must hold doesn't."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One parser, or a check that begins with one.

    Attributes:
        name: On the command line, and of its folders.
        parse: Takes any bytes; gives something, or raises a `CloisterError`; raises `Broken` if its value
            isn't written as the bytes that it was read from.
        seeds: Makes valid inputs.
        most: Longest input that is tried, bytes.
        seconds: Most time of a processor that one input may take.
        covers: Functions of ``cloister.core`` that this target reaches, as ``module.name``.
    """

    name: str
    parse: Callable[[bytes], object]
    seeds: Callable[[], Sequence[bytes]]
    most: int = 16 << 10
    seconds: float = 1.0
    covers: tuple[str, ...] = ()


def check(target: Target, data: bytes) -> None:
    """Try one input.

    Raises:
        Broken: it took too long, or the parser's value isn't written as it was read.
        Exception: whatever else but a `CloisterError` the parser let out.
    """
    started = time.thread_time()
    try:
        target.parse(data)
    except CloisterError as error:
        str(error), error.to_dict()
    spent = time.thread_time() - started
    if spent > target.seconds:
        raise Broken(f"{len(data)} B took {spent:.1f} s, more than {target.seconds} s")


def exact(read: Callable[[bytes], Any], write: Callable[[Any], bytes], data: bytes) -> object:
    """Read, and see that what was read is written the same."""
    value = read(data)
    if bytes(write(value)) != data:
        raise Broken("another text is written than was read")
    return value


def _exact(kind: Any) -> Callable[[bytes], object]:
    return partial(exact, kind.from_bytes, kind.to_bytes)


def _encoding(data: bytes, *, foreign: bool) -> object:
    read = partial(encoding.decode, what="value", foreign=foreign)
    return exact(read, partial(encoding.encode, foreign=foreign), data)


def _evidence(data: bytes) -> Evidence:
    return Evidence.from_data(encoding.decode(data, what="evidence"))


def _verify(data: bytes) -> object:
    return verify(_evidence(data), anchors=seeds.anchors(), now=seeds.NOW).to_dict()


def _verify_nitro(data: bytes) -> object:
    evidence = Evidence(tee="nitro", quote=data, collateral=None)
    return verify(evidence, anchors=seeds.anchors(), now=seeds.NOW).to_dict()


def _text(read: Callable[[str], object], data: bytes) -> object:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None  # whoever reads a file finds that out
    return read(text)


def _collateral(text: str) -> object:
    made = Collateral.from_json(text)
    try:
        if Collateral.from_json(made.to_json()) != made:
            raise Broken("another collateral is written than was read")
    except CloisterError:
        pass
    return made


def _policy(kind: Any, text: str) -> object:
    policy = kind.from_toml(text)
    if kind.from_toml(policy.to_toml()) != policy:
        raise Broken("another policy is written than was read")
    return policy


def _profiled(read: Callable[..., object], data: bytes) -> object:
    return read(data[1:], seeds.PROFILES[data[0] % len(seeds.PROFILES)]) if data else None


def _vek(data: bytes) -> object:
    values = encoding.decode(data, what="extensions")
    if type(values) is not dict or not all(type(value) is bytes for value in values.values()):
        raise FormatError("no extensions")
    return VekExtensions.from_values(values)


def _http(kind: Any, data: bytes) -> object:
    """Several encodings have one meaning, so what was read is written and read again."""
    made = kind.from_bytes(data)
    again = kind.from_bytes(bytes(made.to_bytes(pad=True)))
    if again != made:
        raise Broken("another message is written than was read")
    return made


def _keys(data: bytes) -> object:
    """Keys of unknown KEMs are left out, so what was read is written and read again."""
    made = decode_list(data)
    if decode_list(encode_list(made)) != made:
        raise Broken("other keys are written than were read")
    return made


def _answer(data: bytes) -> object:
    (first, _), *others = seeds.exchanges()
    for exchange, _ in others:
        try:
            return exchange.open(data)
        except CloisterError:
            continue
    return first.open(data)


def _container(data: bytes) -> object:
    digest = hashlib.sha256(data[: header_size(data)]).digest()
    return read_sections(data, key=seeds.KEY, digest=digest)


def _record(data: bytes) -> object:
    return open_record(seeds.KEY, sealed=data, **seeds.RECORD)


def _inference(read: Callable[[memoryview, bytes | None], object], data: bytes) -> object:
    length, _, content = data.partition(b"\n")
    return read(memoryview(content), length or None)


def _figures(data: bytes) -> object:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    figures = Figures.from_data(value)
    if Figures.from_data(figures.to_data()).to_data() != figures.to_data():
        raise Broken("figures don't survive being written")
    return figures


def _problem(data: bytes) -> object:
    error = problem.from_bytes(data)
    if not isinstance(error, CloisterError):
        raise Broken("no error of ours")
    return problem.to_bytes(error)


def _message(name: str, data: bytes) -> object:
    message = seeds.messages()[name]
    return exact(message.read, message.write, data)


def _message_seeds(name: str) -> list[bytes]:
    message = seeds.messages()[name]
    return [message.write(message.value)]


def _messages() -> list[Target]:
    return [
        Target(
            name=f"message-{name.replace(' ', '-')}",
            parse=partial(_message, name),
            seeds=partial(_message_seeds, name),
            most=32 << 10,
        )
        for name in seeds.message_names()
    ]


def _encoded() -> list[bytes]:
    return [*seeds.evidence()[-1:], *(_message_seeds(name)[0] for name in ("release", "statement", "pool"))]


TARGETS: Final = MappingProxyType(
    {
        target.name: target
        for target in (
            Target(name="encoding", parse=partial(_encoding, foreign=False), seeds=_encoded),
            Target(
                name="encoding-foreign",
                parse=partial(_encoding, foreign=True),
                seeds=lambda: [NitroDocument.from_bytes(raw).payload for raw in seeds.documents()],
            ),
            Target(
                name="dcap-quote",
                parse=_exact(Quote),
                seeds=seeds.quotes,
                covers=(
                    "evidence.dcap.Header.from_bytes",
                    "evidence.dcap.QuoteSignature.from_bytes",
                    "evidence.dcap.Quote.from_bytes",
                    "evidence.sgx.SgxReportBody.from_bytes",
                    "evidence.tdx.TdReport.from_bytes",
                ),
            ),
            Target(
                name="dcap-key",
                parse=DcapKey.from_quote,
                seeds=seeds.quotes,
                covers=("verifier.collateral_key.DcapKey.from_quote",),
            ),
            Target(
                name="pck-extension",
                parse=PckExtension.from_bytes,
                seeds=seeds.pck_extensions,
                most=4096,
                covers=("evidence.pck.PckExtension.from_bytes",),
            ),
            Target(
                name="snp-report",
                parse=_exact(SnpReport),
                seeds=seeds.reports,
                most=2048,
                covers=("evidence.snp.SnpReport.from_bytes",),
            ),
            Target(
                name="snp-table",
                parse=_exact(CertificateTable),
                seeds=lambda: [seeds.amd().certificate_table()],
                covers=("evidence.snp_table.CertificateTable.from_bytes",),
            ),
            Target(
                name="snp-extensions",
                parse=_vek,
                seeds=seeds.vek_extensions,
                most=2048,
                covers=("evidence.vek.VekExtensions.from_values",),
            ),
            Target(
                name="nitro-document",
                parse=_exact(NitroDocument),
                seeds=seeds.documents,
                covers=("evidence.nitro.NitroDocument.from_bytes",),
            ),
            Target(
                name="evidence",
                parse=partial(exact, _evidence, lambda made: encoding.encode(made.to_data())),
                seeds=seeds.evidence,
                most=64 << 10,
                covers=(
                    "evidence.bundle.Evidence.from_data",
                    "evidence.bundle.Collateral.from_data",
                    "evidence.bundle.AmdCollateral.from_data",
                ),
            ),
            Target(
                name="collateral-json",
                parse=partial(_text, _collateral),
                seeds=lambda: [seeds.collateral(tee).to_json().encode() for tee in ("sgx", "tdx")],
                most=64 << 10,
                covers=("evidence.bundle.Collateral.from_json",),
            ),
            Target(
                name="certificate",
                parse=partial(_profiled, load_certificate),
                seeds=seeds.certificates,
                most=5000,
                covers=("verifier.certificates.load_certificate",),
            ),
            Target(
                name="chain",
                parse=partial(_profiled, load_chain),
                seeds=seeds.chains,
                covers=("verifier.certificates.load_chain", "verifier.certificates.read_pem"),
            ),
            Target(
                name="revocation-list",
                parse=partial(_profiled, load_crl),
                seeds=seeds.revocation_lists,
                covers=("verifier.certificates.load_crl",),
            ),
            Target(
                name="tcb-info",
                parse=TcbInfo.from_bytes,
                seeds=lambda: [seeds.collateral(tee).tcb_info for tee in ("sgx", "tdx")],
                covers=("verifier.tcb.TcbInfo.from_bytes", "verifier.tcb.IsvLevel.from_document"),
            ),
            Target(
                name="qe-identity",
                parse=QeIdentity.from_bytes,
                seeds=lambda: [seeds.collateral(tee).qe_identity for tee in ("sgx", "tdx")],
                covers=("verifier.qe.QeIdentity.from_bytes",),
            ),
            Target(
                name="trust-anchors",
                parse=TrustAnchors.simulated,
                seeds=lambda: [seeds.roots(), seeds.authority().root_der],
                covers=("verifier.anchors.split_certificates",),
            ),
            Target(name="verify", parse=_verify, seeds=seeds.evidence, most=64 << 10),
            Target(name="verify-nitro", parse=_verify_nitro, seeds=seeds.documents),
            Target(
                name="policy-toml",
                parse=partial(_text, partial(_policy, AppraisalPolicy)),
                seeds=seeds.policies,
                covers=(
                    "verifier.policy.AppraisalPolicy.from_toml",
                    "verifier.policy.load_toml",
                    "verifier.policy.AppraisalPolicy.from_table",
                ),
            ),
            Target(
                name="user-policy-toml",
                parse=partial(_text, partial(_policy, UserPolicy)),
                seeds=seeds.user_policies,
                covers=("protocol.trust.UserPolicy.from_toml", "protocol.trust.load_table"),
            ),
            Target(
                name="http-request",
                parse=partial(_http, Request),
                seeds=seeds.requests,
                covers=("ohttp.bhttp.Request.from_bytes", "ohttp.fields.read_section"),
            ),
            Target(
                name="http-response",
                parse=partial(_http, Response),
                seeds=seeds.responses,
                covers=("ohttp.bhttp.Response.from_bytes",),
            ),
            Target(
                name="key-configuration",
                parse=_exact(KeyConfiguration),
                seeds=seeds.key_configurations,
                covers=("ohttp.keyconfig.KeyConfiguration.from_bytes",),
            ),
            Target(
                name="key-list",
                parse=_keys,
                seeds=seeds.key_lists,
                covers=("ohttp.keyconfig.decode_list",),
            ),
            Target(
                name="encapsulated-request",
                parse=lambda data: seeds.gateway().open(data)[0],
                seeds=seeds.encapsulated_requests,
            ),
            Target(name="encapsulated-response", parse=_answer, seeds=seeds.encapsulated_responses),
            Target(
                name="sealed-header",
                parse=_exact(SealedHeader),
                seeds=seeds.headers,
                covers=("sealing.header.SealedHeader.from_bytes",),
            ),
            Target(
                name="sealed-model",
                parse=_container,
                seeds=seeds.containers,
                covers=("sealing.unseal.read_sections",),
            ),
            Target(
                name="sealed-record",
                parse=_record,
                seeds=seeds.records,
                covers=("sealing.records.open_record",),
            ),
            Target(
                name="inference-request",
                parse=partial(_inference, oip.decode_request),
                seeds=seeds.inference_requests,
                covers=("oip.decode_request",),
            ),
            Target(
                name="inference-response",
                parse=partial(_inference, oip.decode_response),
                seeds=seeds.inference_responses,
                covers=("oip.decode_response",),
            ),
            Target(
                name="authorization",
                parse=RequestAuthorization.from_field,
                seeds=seeds.authorizations,
                most=2048,
                covers=("protocol.authorization.RequestAuthorization.from_field",),
            ),
            Target(
                name="nonces",
                parse=split_nonces,
                seeds=seeds.nonces,
                most=4096,
                covers=("protocol.repository.split_nonces",),
            ),
            Target(
                name="figures",
                parse=_figures,
                seeds=seeds.figures,
                most=4096,
                covers=("protocol.stages.Figures.from_data",),
            ),
            Target(
                name="problem",
                parse=_problem,
                seeds=seeds.problems,
                covers=("protocol.problem.from_bytes",),
            ),
            *_messages(),
        )
    }
)

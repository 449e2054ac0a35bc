"""Collateral from a PCS and a KDS over HTTP: what fits is kept as signed, what doesn't is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from cloister.core.evidence.pem import to_pem
from cloister.core.evidence.snp import SnpTcb
from cloister.core.verifier.certificates import AMD, load_chain, load_crl
from cloister.core.verifier.collateral_key import DcapKey, SnpKey
from cloister.errors import CloisterError, EvidenceRefused, FormatError, NotFound, Unavailable, UsageError
from cloister.host.collateral import Service, fetch_dcap, fetch_snp, fetch_snp_crl
from cloister.host.collateral.pcs import INTEL_ROOT_CRL, require_coherent, signed_member
from cloister.host.collateral.service import require_url
from cloister.sim import pki
from cloister.sim.authority import FMSPC, SimulatedAuthority
from cloister.sim.pki import raw_sign
from cloister.sim.snp import SimulatedAmd, SnpFlaws
from support.vendors import NOW, Answer, VendorServer

SGX = DcapKey(tee="sgx", fmspc=FMSPC, ca="processor")
TDX = DcapKey(tee="tdx", fmspc=FMSPC, ca="processor")


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as made:
        yield made


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> SimulatedAuthority:
    return SimulatedAuthority.create(tmp_path_factory.mktemp("other"), now=NOW)


def chip(amd: SimulatedAmd) -> SnpKey:
    return SnpKey(chip_id=amd.chip_id, tcb=amd.tcb.to_bytes())


@pytest.mark.parametrize("key", [SGX, TDX], ids=["sgx", "tdx"])
@pytest.mark.parametrize("hex_lists", [False, True])
def test_dcap_collateral_arrives_byte_for_byte(
    vendors: VendorServer, service: Service, key: DcapKey, hex_lists: bool
) -> None:
    vendors.hex_lists = hex_lists
    said: list[str] = []
    fetched = fetch_dcap(service, key, now=NOW, pcs=vendors.url, say=said.append)
    expected = vendors.collateral[key.tee]
    lists = vendors.collateral["sgx"]
    assert fetched == replace(expected, root_ca_crl=lists.root_ca_crl, pck_crl=lists.pck_crl)
    assert said == ["TCB info", "QE identity", "PCK CRL", "root CRL"]
    assert f"/{key.tee}/certification/v4/tcb?fmspc=53494D534758&update=standard" in vendors.asked


def test_intels_own_service_has_its_root_crl_elsewhere() -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(200, stream=httpx.ByteStream(b"{}"))

    with Service(transport=httpx.MockTransport(answer)) as mocked, pytest.raises(FormatError):
        fetch_dcap(mocked, SGX, now=NOW)
    assert asked[0].startswith("https://api.trustedservices.intel.com/sgx/certification/v4/tcb?fmspc=")
    assert asked[3] == INTEL_ROOT_CRL


def test_the_root_crl_may_come_from_elsewhere(vendors: VendorServer, service: Service) -> None:
    elsewhere = f"{vendors.url}/tdx/certification/v4/rootcacrl"
    fetched = fetch_dcap(service, SGX, now=NOW, pcs=vendors.url, root_crl=elsewhere)
    assert fetched.root_ca_crl == vendors.collateral["tdx"].root_ca_crl
    assert "/sgx/certification/v4/rootcacrl" not in vendors.asked


def test_tcb_info_may_be_the_early_one(vendors: VendorServer, service: Service) -> None:
    fetch_dcap(service, SGX, now=NOW, pcs=vendors.url, update="early")
    assert vendors.asked[0].endswith("update=early")
    with pytest.raises(UsageError):
        fetch_dcap(service, SGX, now=NOW, pcs=vendors.url, update="late")


def test_an_unknown_family_is_not_found(vendors: VendorServer, service: Service) -> None:
    with pytest.raises(NotFound) as caught:
        fetch_dcap(service, replace(SGX, fmspc=bytes(6)), now=NOW, pcs=vendors.url)
    assert caught.value.code == "collateral.unknown"


def test_another_ca_is_not_found(vendors: VendorServer, service: Service) -> None:
    with pytest.raises(NotFound):
        fetch_dcap(service, replace(SGX, ca="platform"), now=NOW, pcs=vendors.url)


PATHS = [
    "/sgx/certification/v4/tcb",
    "/sgx/certification/v4/qe/identity",
    "/sgx/certification/v4/pckcrl",
    "/sgx/certification/v4/rootcacrl",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("status", [302, 401, 429, 500, 503])
def test_a_service_that_refuses_is_unavailable(
    vendors: VendorServer, service: Service, path: str, status: int
) -> None:
    vendors.replaced[path] = status
    with pytest.raises(Unavailable) as caught:
        fetch_dcap(service, SGX, now=NOW, pcs=vendors.url)
    assert (caught.value.code, caught.value.actual) == ("collateral.service", str(status))
    assert ("try later" in caught.value.hint) == (status == 429)


def body(change: bytes | None = None, *, header: str | None = None, drop: bool = False) -> object:
    """An answer like the proper one, with another body or header."""

    def replaced(proper: Answer) -> Answer:
        status, fields, content = proper
        if drop:
            fields = {}
        elif header is not None:
            fields = dict.fromkeys(fields, header)
        return status, fields, content if change is None else change

    return replaced


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "content", [b"", b"null", b"{}", b"30zz", b"\x30\x00", b'{"tcbInfo":{},"signature":""}']
)
def test_another_body_is_refused(vendors: VendorServer, service: Service, path: str, content: bytes) -> None:
    vendors.replaced[path] = body(content)  # type: ignore[assignment]
    with pytest.raises(FormatError):
        fetch_dcap(service, SGX, now=NOW, pcs=vendors.url)


@pytest.mark.parametrize("path", PATHS[:3])
def test_another_issuer_chain_is_refused(vendors: VendorServer, service: Service, path: str) -> None:
    vendors.replaced[path] = body(drop=True)  # type: ignore[assignment]
    with pytest.raises(FormatError) as caught:
        fetch_dcap(service, SGX, now=NOW, pcs=vendors.url)
    assert caught.value.claim == "header field"
    vendors.replaced[path] = body(header="no%20chain")  # type: ignore[assignment]
    with pytest.raises(FormatError):
        fetch_dcap(service, SGX, now=NOW, pcs=vendors.url)


def test_a_body_without_end_is_cut_off(vendors: VendorServer, service: Service) -> None:
    vendors.replaced[PATHS[3]] = body(bytes((512 << 10) + 1))  # type: ignore[assignment]
    with pytest.raises(FormatError) as caught:
        fetch_dcap(service, SGX, now=NOW, pcs=vendors.url)
    assert (caught.value.code, caught.value.claim) == ("collateral.format", "root CRL")


def test_a_service_that_drips_is_given_up(vendors: VendorServer) -> None:
    vendors.pause = 0.02
    began = time.monotonic()
    with Service(deadline=0.3) as service, pytest.raises(Unavailable):
        fetch_dcap(service, SGX, now=NOW, pcs=vendors.url)
    assert time.monotonic() - began < 5


def test_a_head_that_drips_is_given_up(vendors: VendorServer) -> None:
    vendors.head_pause = 0.02
    began = time.monotonic()
    with Service(deadline=0.3) as service, pytest.raises(Unavailable) as caught:
        fetch_dcap(service, SGX, now=NOW, pcs=vendors.url)
    assert (caught.value.code, time.monotonic() - began < 5) == ("collateral.service", True)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(vendors: VendorServer, service: Service, status: int) -> None:
    elsewhere = PATHS[3].replace("sgx", "tdx")
    vendors.replaced[PATHS[3]] = lambda proper: (status, {"Location": elsewhere}, b"")
    with pytest.raises(Unavailable) as caught:
        fetch_dcap(service, SGX, now=NOW, pcs=vendors.url)
    assert (caught.value.code, caught.value.actual) == ("collateral.service", str(status))
    assert elsewhere not in vendors.asked


def test_a_service_that_is_away_is_unavailable(vendors: VendorServer, service: Service) -> None:
    vendors.close()
    with pytest.raises(Unavailable) as caught:
        fetch_dcap(service, SGX, now=NOW, pcs=vendors.url)
    assert caught.value.actual == "ConnectError"


@pytest.mark.parametrize(
    "url",
    [
        "http://pcs.example",
        "ftp://localhost",
        "pcs.example",
        "https://",
        "http://[",
        "",
        "file:///etc/passwd",
    ],
)
def test_an_unprotected_url_is_refused_before_anything_is_sent(service: Service, url: str) -> None:
    with pytest.raises(UsageError) as caught:
        fetch_dcap(service, SGX, now=NOW, pcs=url)
    assert caught.value.code == "collateral.url"


def test_urls_lose_their_last_slash() -> None:
    assert require_url("https://pcs.example/base/") == "https://pcs.example/base"


def test_a_file_without_certificates_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("none")
    for name in ("ca.pem", "missing.pem"):
        with pytest.raises(UsageError) as caught:
            Service(tls_ca=str(tmp_path / name))
        assert caught.value.code == "collateral.tls"


def test_tls_is_verified(vendors: VendorServer, service: Service) -> None:
    with pytest.raises(Unavailable):
        service.get(vendors.url.replace("http:", "https:"), {}, limit=10, what="anything")


class TestCoherence:
    """Collateral that is genuine, and still not what was asked for."""

    def refused(
        self,
        vendors: VendorServer,
        kind: type[CloisterError],
        key: DcapKey = SGX,
        now: int = NOW,
        **changes: bytes,
    ) -> CloisterError:
        with pytest.raises(kind) as caught:
            require_coherent(replace(vendors.collateral["sgx"], **changes), key, now=now)
        return caught.value

    def test_flawless_collateral_is_coherent(self, vendors: VendorServer) -> None:
        require_coherent(vendors.collateral["sgx"], SGX, now=NOW)

    def test_of_another_family(self, vendors: VendorServer) -> None:
        error = self.refused(vendors, FormatError, replace(SGX, fmspc=bytes(6)))
        assert (error.code, error.claim) == ("collateral.foreign", "TCB info")

    def test_of_another_tee(self, vendors: VendorServer) -> None:
        assert self.refused(vendors, FormatError, TDX).claim == "TCB info"
        other = vendors.collateral["tdx"]
        error = self.refused(
            vendors,
            FormatError,
            qe_identity=other.qe_identity,
            qe_identity_signature=other.qe_identity_signature,
        )
        assert (error.code, error.claim) == ("collateral.foreign", "QE identity")

    def test_of_another_ca(self, vendors: VendorServer) -> None:
        error = self.refused(vendors, FormatError, replace(SGX, ca="platform"))
        assert (error.code, error.claim) == ("collateral.foreign", "issuer of the PCK CRL")

    @pytest.mark.parametrize("part", ["tcb_info", "qe_identity"])
    def test_with_another_signature(self, vendors: VendorServer, part: str) -> None:
        error = self.refused(vendors, EvidenceRefused, **{f"{part}_signature": bytes(63) + b"\x01"})
        assert error.code == "collateral.signature"
        text = getattr(vendors.collateral["sgx"], part)
        error = self.refused(vendors, EvidenceRefused, **{part: text.replace(b":", b": ", 1)})
        assert error.code == "collateral.signature"

    @pytest.mark.parametrize("part", ["tcb_info", "qe_identity"])
    def test_of_another_root(self, vendors: VendorServer, other: SimulatedAuthority, part: str) -> None:
        foreign = other.collateral(NOW)
        changes = {name: getattr(foreign, name) for name in (part, f"{part}_signature")}
        chain = f"{part}_issuer_chain"
        error = self.refused(vendors, FormatError, **changes, **{chain: getattr(foreign, chain)})
        assert error.code == "collateral.foreign"
        assert error.claim == f"root of the {'TCB info' if part == 'tcb_info' else 'QE identity'}"
        assert error.expected != error.actual

    @pytest.mark.parametrize("part", ["tcb_info", "qe_identity"])
    def test_with_a_longer_chain(self, vendors: VendorServer, intel: SimulatedAuthority, part: str) -> None:
        """A verifier takes a signer under the root itself only."""
        chain = to_pem(intel._pck.certificate.public_bytes(Encoding.DER)).encode()
        chain += vendors.collateral["sgx"].pck_crl_issuer_chain
        text = getattr(vendors.collateral["sgx"], part)
        signature = {f"{part}_signature": raw_sign(intel._pck.key, text)}
        error = self.refused(vendors, FormatError, **{f"{part}_issuer_chain": chain}, **signature)
        assert (error.code, error.expected, error.actual) == ("collateral.foreign", "2 certificates", "3")

    def test_with_a_shorter_issuer_chain(self, vendors: VendorServer) -> None:
        """A root that is called like the CA."""
        key = ec.generate_private_key(ec.SECP256R1())
        dates = {"not_before": NOW - 9, "not_after": NOW + 9}
        root = pki.issue(
            pki.PCK_CA_NAME, key.public_key(), issuer=None, issuer_key=key, path_length=1, **dates
        )
        crl = pki.revoke([], issuer=root, issuer_key=key, issued=NOW, next_update=NOW + 9, number=1)
        error = self.refused(
            vendors,
            FormatError,
            pck_crl_issuer_chain=root.public_bytes(Encoding.PEM),
            root_ca_crl=crl,
            pck_crl=crl,
        )
        assert (error.code, error.claim) == ("collateral.foreign", "PCK CRL issuer chain")
        assert (error.expected, error.actual) == ("2 certificates", "1")

    def test_with_the_lists_exchanged(self, vendors: VendorServer) -> None:
        collateral = vendors.collateral["sgx"]
        error = self.refused(
            vendors, EvidenceRefused, pck_crl=collateral.root_ca_crl, root_ca_crl=collateral.pck_crl
        )
        assert error.code == "collateral.crl"

    def test_with_a_chain_in_disorder(self, vendors: VendorServer) -> None:
        collateral = vendors.collateral["sgx"]
        error = self.refused(vendors, EvidenceRefused, tcb_info_issuer_chain=collateral.pck_crl_issuer_chain)
        assert error.code == "collateral.chain"

    @pytest.mark.parametrize("days", [40, 4000])
    def test_that_has_expired(self, vendors: VendorServer, days: int) -> None:
        error = self.refused(vendors, EvidenceRefused, now=NOW + days * 86400)
        assert error.code == "evidence.expired"

    def test_whose_tcb_info_alone_has_expired(self, vendors: VendorServer, intel: SimulatedAuthority) -> None:
        later = intel.collateral(NOW + 20 * 86400)
        error = self.refused(
            vendors,
            FormatError,
            now=NOW + 40 * 86400,
            root_ca_crl=later.root_ca_crl,
            pck_crl=later.pck_crl,
        )
        assert (error.code, error.claim) == ("collateral.foreign", "validity of the TCB info")


class TestSignedMember:
    """The text that was signed is cut out, never written anew."""

    def test_text_keeps_its_spaces_and_escapes(self) -> None:
        text = '{ "a" : "\\u0041}\\"", "b":[1, 2] }'
        raw = f' {{ "tcbInfo" :\n{text} , "signature":"{"ab" * 64}"}} \n'.encode()
        assert signed_member(raw, "tcbInfo") == (text.encode(), b"\xab" * 64)

    def test_members_may_come_in_another_order(self) -> None:
        raw = f'{{"signature":"{"00" * 64}","enclaveIdentity":{{}}}}'.encode()
        assert signed_member(raw, "enclaveIdentity") == (b"{}", bytes(64))

    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b"[]",
            b"{",
            b"{}",
            b"\xff",
            b'{"tcbInfo"',
            b'{"tcbInfo":',
            b'{"tcbInfo":{}}',
            b'{1:2,"signature":""}',
            b'{"tcbInfo":{},"signature":7}',
            b'{"tcbInfo":{},"signature":"zz"}',
            b'{"tcbInfo":{},"signature":"00"}',
            b'{"tcbInfo":{},"tcbInfo":{},"signature":"00"}',
            b'{"tcbInfo":{},"signature":"' + b"00" * 64 + b'"} more',
            b'{"tcbInfo":{},"signature":"' + b"00" * 64 + b'","more":1}',
            b'{"tcbInfo":' + b"[" * 100_000,
        ],
    )
    def test_anything_else_is_refused(self, raw: bytes) -> None:
        with pytest.raises(FormatError) as caught:
            signed_member(raw, "tcbInfo")
        assert caught.value.code == "collateral.format"

    @given(text=st.recursive(st.none() | st.integers() | st.text(), lambda each: st.lists(each, max_size=3)))
    def test_any_value_comes_back_as_it_stood(self, text: object) -> None:
        written = json.dumps(text, ensure_ascii=False, indent=1)
        raw = f'{{"tcbInfo":{written},"signature":"{"00" * 64}"}}'.encode()
        assert signed_member(raw, "tcbInfo")[0] == written.encode()

    @given(raw=st.binary(max_size=200))
    def test_any_bytes_give_our_error(self, raw: bytes) -> None:
        with pytest.raises(FormatError):
            signed_member(raw, "tcbInfo")


def test_snp_certificates_and_list_arrive(vendors: VendorServer, service: Service, amd: SimulatedAmd) -> None:
    certificates, shared = fetch_snp(service, chip(amd), "Genoa", now=NOW, kds=vendors.url)
    assert certificates == vendors.amd_collateral.certificates
    assert shared.crl == vendors.amd_collateral.crl
    assert [each.der for each in load_chain(certificates, AMD)[1:]] == [shared.ask, shared.ark]
    load_crl(shared.crl, AMD)


def test_turins_service_knows_eight_bytes_and_an_fmc(intel: SimulatedAuthority, service: Service) -> None:
    turin = SimulatedAmd.create(now=NOW, product="Turin")
    vendors = VendorServer(intel, turin, NOW)
    try:
        fetch_snp(service, chip(turin), "Turin", now=NOW, kds=vendors.url)
    finally:
        vendors.close()
    asked = vendors.asked[-1]
    assert f"/vcek/v1/Turin/{turin.chip_id[:8].hex()}?" in asked
    assert "fmcSPL=" in asked


def test_the_list_alone_needs_no_chip(vendors: VendorServer, service: Service) -> None:
    shared = fetch_snp_crl(service, "Genoa", now=NOW, kds=vendors.url)
    assert shared.crl == vendors.amd_collateral.crl
    assert len(vendors.asked) == 2


def test_an_unknown_chip_or_tcb_is_not_found(
    vendors: VendorServer, service: Service, amd: SimulatedAmd
) -> None:
    for changes in ({"chip_id": b"\x01" * 64}, {"tcb": bytes(8)}):
        with pytest.raises(NotFound):
            fetch_snp(service, replace(chip(amd), **changes), "Genoa", now=NOW, kds=vendors.url)


def test_a_masked_chip_can_not_be_fetched_for(
    vendors: VendorServer, service: Service, amd: SimulatedAmd
) -> None:
    with pytest.raises(UsageError) as caught:
        fetch_snp(service, replace(chip(amd), chip_id=bytes(64)), "Genoa", now=NOW, kds=vendors.url)
    assert caught.value.code == "collateral.masked"
    assert not vendors.asked


@pytest.mark.parametrize("product", ["", "Rome", "../.."])
def test_an_unknown_product_is_refused(vendors: VendorServer, service: Service, product: str) -> None:
    with pytest.raises(UsageError) as caught:
        fetch_snp_crl(service, product, now=NOW, kds=vendors.url)
    assert caught.value.code == "collateral.product"
    assert not vendors.asked


@pytest.mark.parametrize("what", ["cert_chain", "crl", "vcek"])
@pytest.mark.parametrize("content", [b"", b"no certificate", b"\x30\x03abc"])
def test_another_answer_of_the_kds_is_refused(
    vendors: VendorServer, service: Service, amd: SimulatedAmd, what: str, content: bytes
) -> None:
    name = amd.chip_id.hex() if what == "vcek" else what
    vendors.replaced[f"/vcek/v1/Genoa/{name}"] = body(content)  # type: ignore[assignment]
    with pytest.raises(FormatError):
        fetch_snp(service, chip(amd), "Genoa", now=NOW, kds=vendors.url)


def test_certificates_of_another_root_are_refused(
    vendors: VendorServer, service: Service, amd: SimulatedAmd
) -> None:
    other = SimulatedAmd.create(now=NOW, product="Genoa").collateral(NOW)
    path = f"/vcek/v1/Genoa/{amd.chip_id.hex()}"
    vendors.replaced[path] = body(load_chain(other.certificates, AMD)[0].der)  # type: ignore[assignment]
    with pytest.raises(EvidenceRefused) as caught:
        fetch_snp(service, chip(amd), "Genoa", now=NOW, kds=vendors.url)
    assert caught.value.code == "collateral.chain"
    vendors.replaced = {"/vcek/v1/Genoa/crl": body(other.crl)}  # type: ignore[dict-item]
    with pytest.raises(EvidenceRefused) as caught:
        fetch_snp(service, chip(amd), "Genoa", now=NOW, kds=vendors.url)
    assert caught.value.code == "collateral.crl"


def test_an_ask_of_another_root_is_refused(
    vendors: VendorServer, service: Service, amd: SimulatedAmd
) -> None:
    """Also where no VCEK is fetched, whose chain would show it."""
    stranger = SimulatedAmd.create(now=NOW, product="Genoa")
    pem = to_pem(stranger._ask.der) + to_pem(amd.root_der)
    vendors.replaced["/vcek/v1/Genoa/cert_chain"] = body(pem.encode())  # type: ignore[assignment]
    with pytest.raises(EvidenceRefused) as caught:
        fetch_snp_crl(service, "Genoa", now=NOW, kds=vendors.url)
    assert caught.value.code == "collateral.chain"


@pytest.mark.parametrize(
    "flaws",
    [
        SnpFlaws(tcb=SnpTcb(bootloader=10, tee=0, snp=22, microcode=200)),
        SnpFlaws(chip_id=b"c" * 64),
        SnpFlaws(chip_id=b""),
    ],
    ids=["tcb", "chip", "no chip"],
)
def test_a_vcek_of_another_chip_or_tcb_is_refused(
    vendors: VendorServer, service: Service, amd: SimulatedAmd, flaws: SnpFlaws
) -> None:
    foreign = load_chain(amd.collateral(NOW, flaws=flaws).certificates, AMD)[0].der
    vendors.replaced[f"/vcek/v1/Genoa/{amd.chip_id.hex()}"] = body(foreign)  # type: ignore[assignment]
    with pytest.raises(FormatError) as caught:
        fetch_snp(service, chip(amd), "Genoa", now=NOW, kds=vendors.url)
    error = caught.value
    assert (error.code, error.claim) == ("collateral.foreign", "TCB" if flaws.tcb else "chip")
    assert error.expected != error.actual


def test_another_products_chain_is_refused(vendors: VendorServer, service: Service) -> None:
    milan = SimulatedAmd.create(now=NOW, product="Milan").collateral(NOW).certificates
    at = milan.index(b"-----BEGIN", 1)
    for content in (milan[at:], milan[milan.index(b"-----BEGIN", at + 1) :]):
        vendors.replaced["/vcek/v1/Genoa/cert_chain"] = body(content)  # type: ignore[assignment]
        with pytest.raises(FormatError) as caught:
            fetch_snp_crl(service, "Genoa", now=NOW, kds=vendors.url)
        assert caught.value.code == "collateral.foreign"

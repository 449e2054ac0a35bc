"""AMD's certificates and revocation list out of the files in which people have them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from cloister.core.evidence.bundle import AmdCollateral
from cloister.core.evidence.snp import PRODUCTS, VCEK, VLEK, SnpReport
from cloister.core.evidence.snp_table import CertificateTable, make_collateral
from cloister.core.verifier.certificates import AMD, Certificate, load_certificate, load_crl, read_pem
from cloister.core.verifier.collateral_key import SnpKey, crl_file
from cloister.core.verifier.roots import amd
from cloister.core.verifier.roots.amd_intermediates import INTERMEDIATES
from cloister.errors import EvidenceError
from cloister.party import file_kinds
from cloister.party.collateral_folders import CollateralFolders, fetch_hint
from cloister.party.file_kinds import GivenFile, json_object, text_field

_VLEK_ISSUER: Final = "SEV-VLEK"  # in the name of whoever issues VLEKs
_OTHERS: Final = "certificates of other keys"
_ARKS: Final = {"Milan": amd.MILAN_ARK, "Genoa": amd.GENOA_ARK, "Turin": amd.TURIN_ARK}
_EXPECTED: Final = (
    "certificates (PEM or DER), a revocation list (DER), a certificate table, "
    "or JSON with certificates and crl"
)


def read_amd_collateral(
    report: SnpReport, table: bytes, files: Iterable[GivenFile], folders: CollateralFolders
) -> AmdCollateral:
    """What a report needs: from the files and its own table, and from the folders what those lack.

    Raises:
        EvidenceError: a file is of another kind, or doesn't parse.
        UsageError: the signer's leaf is nowhere; or folders were given, and the revocation list is nowhere.
    """
    certificates, crl = _from_files(files, table, folders.hint)
    signer = report.signer or VCEK
    vek = _leaf(certificates, signer)
    if vek is None:
        what = f"the {signer} certificate of the report's signer"
        name = SnpKey(chip_id=report.chip_id, tcb=report.reported_tcb).file
        if certificates and not folders.paths:
            raise folders.lacking(name, what, _OTHERS)
        more = read_pem(folders.take(name, what, file_kinds.PEM), most=3)
        certificates += [load_certificate(each, AMD) for each in more]
        vek = _leaf(certificates, signer)
        if vek is None:
            raise folders.lacking(name, what, _OTHERS)
    ask, ark = _issuers(vek, certificates)
    if not crl and folders.paths:
        product = next((each for each in PRODUCTS if each in ark.common_name), "PRODUCT")
        crl = folders.take(
            crl_file(ark.der),
            f"the revocation list of {ark.common_name}",
            file_kinds.CRL,
            fetch_hint(folders.paths, "--product", product),
        )
    made = make_collateral(vek=vek.der, ask=ask.der, ark=ark.der, crl=crl)
    if made.crl:
        load_crl(made.crl, AMD)
    return made


def _from_files(files: Iterable[GivenFile], table: bytes, hint: str) -> tuple[list[Certificate], bytes]:
    certificates: list[bytes] = []
    crl = b""
    tables = [table] if table else []
    for file in files:
        match file.kind:
            case file_kinds.AMD_JSON:
                more, found = _from_json(file.content)
                certificates += more
                crl = crl or found
            case file_kinds.PEM:
                certificates += read_pem(file.content, most=8)
            case file_kinds.CERTIFICATE:
                certificates.append(file.content)
            case file_kinds.CRL:
                crl = file.content
            case file_kinds.TABLE:
                tables.append(file.content)
            case _:
                raise file.not_as(_EXPECTED, hint)
    for each in tables:
        more, found = _from_table(each)
        certificates += more
        crl = crl or found
    return [load_certificate(each, AMD) for each in certificates], crl


def _from_json(data: bytes) -> tuple[list[bytes], bytes]:
    value = json_object(data)
    pem, crl = text_field(value, "certificates", "PEM"), text_field(value, "crl", "hex digits")
    try:
        return read_pem(pem.encode("ascii", "replace"), most=3), bytes.fromhex(crl)
    except ValueError as error:
        raise EvidenceError(
            "the revocation list is not hex", code="evidence.collateral", claim="crl"
        ) from error


def _from_table(table: bytes) -> tuple[list[bytes], bytes]:
    parsed = CertificateTable.from_bytes(table)
    entries = [entry for entry in map(parsed.find, ("VCEK", "VLEK", "ASK", "ARK")) if entry]
    ders = [entry if entry[:1] == b"\x30" else read_pem(entry, most=1)[0] for entry in entries]
    return ders, parsed.find("CRL")


def _leaf(certificates: Iterable[Certificate], signer: str) -> Certificate | None:
    """The first end entity of the signer's kind, which its issuer's name tells: a table may have both."""
    for each in certificates:
        if each.path_length < 0 and (_VLEK_ISSUER in each.parsed.issuer.rfc4514_string()) == (signer == VLEK):
            return each
    return None


def _issuers(leaf: Certificate, certificates: Iterable[Certificate]) -> tuple[Certificate, Certificate]:
    """Intermediate and root; AMD's own where they are missing."""
    others = [each for each in certificates if each.path_length >= 0]
    asks = [each for each in others if each.parsed.subject == leaf.parsed.issuer]
    ask = asks[0] if asks else _known(leaf, INTERMEDIATES.values())
    arks = [each for each in others if each.parsed.subject == ask.parsed.issuer]
    return ask, arks[0] if arks else _known(ask, _ARKS.values())


def _known(subject: Certificate, candidates: Iterable[bytes]) -> Certificate:
    for der in candidates:
        candidate = load_certificate(der, AMD)
        if candidate.parsed.subject == subject.parsed.issuer:
            return candidate
    raise EvidenceError(
        "no issuer of a certificate is at hand",
        code="evidence.certificate",
        claim=f"issuer of {subject.common_name}",
        expected="among the given certificates, or one of AMD's",
        actual=subject.parsed.issuer.rfc4514_string(),
    )

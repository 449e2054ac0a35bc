"""Verification of TDX quotes: what is accepted, one test per refusal, and a second opinion."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import dcap_qvl
import pytest

from cloister.core.evidence import Evidence
from cloister.core.evidence.dcap import Quote
from cloister.core.evidence.tdx import TdReport, TdReport15
from cloister.core.verifier import TrustAnchors
from cloister.core.verifier.dcap import verify
from cloister.errors import EvidenceError, EvidenceRefused
from cloister.sim.authority import FLAWLESS, FMSPC, Flaws
from cloister.sim.pki import raw_sign
from cloister.sim.quote import QuotingEnclave, report
from cloister.sim.tcb import MR_SIGNER_SEAM, TEE_TCB_SVN, TdxReference

LAUNCHED_BY_OLD = bytes((2, 1, 3)) + bytes(13)
VALUES = {"report_data": bytes(range(64)), "mr_td": b"m" * 48, "mr_config_id": b"c" * 48}
RTMRS = tuple(bytes([number]) * 48 for number in range(4))


@pytest.fixture
def make(authority, now):
    """``make(flaws=, tee=, quote=, collateral={field: value}, **values of td_quote)``."""

    def td_evidence(*, flaws: Flaws = FLAWLESS, tee: str = "tdx", quote=None, collateral=None, **values):
        raw = quote or authority.td_quote(**{**VALUES, "rtmrs": RTMRS, "now": now, **values})
        found = replace(authority.collateral(now, tee=tee, flaws=flaws), **(collateral or {}))
        return Evidence(tee="tdx", quote=raw, collateral=found)

    return td_evidence


@pytest.fixture
def refusal(anchors, now):
    def check(evidence) -> tuple[str, str]:
        with pytest.raises(EvidenceRefused) as caught:
            verify(evidence, anchors=anchors, now=now)
        assert caught.value.expected != caught.value.actual
        return caught.value.code, caught.value.claim

    return check


@pytest.fixture
def edited(authority, now):
    """TCB info of TDX that ``change`` edited, signed again, as parts of collateral."""

    def make_parts(change, field="tcb_info") -> dict[str, bytes]:
        document = json.loads(getattr(authority.collateral(now, tee="tdx"), field))
        change(document)
        text = json.dumps(document).encode()
        return {field: text, f"{field}_signature": raw_sign(authority._tcb_signing.key, text)}

    return make_parts


def second_opinion(evidence: Evidence, now: int, root: bytes) -> tuple[str, list[str]] | str:
    collateral = dcap_qvl.QuoteCollateralV3.from_json(evidence.collateral.to_json())
    try:
        found = dcap_qvl.verify_with_root_ca(evidence.quote, collateral, root, now)
    except ValueError as error:
        return str(error)
    return found.status, sorted(found.advisory_ids)


# What is accepted


@pytest.mark.parametrize(("version", "td_version"), [(4, "1.0"), (5, "1.0"), (5, "1.5")])
def test_simulated_evidence(version, td_version, make, anchors, authority, now):
    evidence = make(version=version, td_version=td_version)
    result = verify(evidence, anchors=anchors, now=now)
    assert (result.tee, result.simulated, result.debug) == ("tdx", True, False)
    assert (result.tcb_status, result.advisories) == ("UpToDate", ())
    assert result.platform.fmspc == FMSPC
    assert result.report_data == VALUES["report_data"]
    assert result.measurements["mr_td"] == VALUES["mr_td"]
    assert result.measurements["mr_config_id"] == VALUES["mr_config_id"]
    assert [result.measurements[f"rtmr{number}"] for number in range(4)] == list(RTMRS)
    assert result.measurements["mr_signer_seam"] == MR_SIGNER_SEAM
    names = {*TdReport.__dataclass_fields__} - {"report_data", "SIZE", "FIELDS"}
    if td_version == "1.5":
        names |= {"tee_tcb_svn2", "mr_service_td"}
    assert set(result.measurements) == names
    assert [int(step.name.split()[0]) for step in result.steps] == list(
        range(1, 14 if td_version == "1.5" else 13)
    )
    assert second_opinion(evidence, now, authority.root_der) == ("UpToDate", [])


def test_steps_are_named(make, anchors, now):
    names = [
        step.name.split(maxsplit=1)[1] for step in verify(make(version=5), anchors=anchors, now=now).steps
    ]
    assert names == [
        "quote",
        "root certificate",
        "PCK chain",
        "collateral chains",
        "revocation",
        "TCB info",
        "QE identity",
        "attestation key",
        "quoting enclave",
        "quote signature",
        "TDX module",
        "TCB level",
        "relaunch",
    ]


@pytest.mark.parametrize("version", [4, 5])
def test_enclave_in_a_newer_quote(version, authority, anchors, now):
    body = report(
        cpu_svn=bytes(16),
        attributes=bytes([5]) + bytes(15),
        mr_enclave=b"e" * 32,
        mr_signer=b"s" * 32,
        isv_prod_id=0,
        isv_svn=0,
        report_data=bytes(64),
    )
    evidence = Evidence(
        tee="sgx",
        quote=authority._quoting_enclave.sign(body, version=version),
        collateral=authority.collateral(now),
    )
    result = verify(evidence, anchors=anchors, now=now)
    assert (result.tee, result.measurements["mr_enclave"]) == ("sgx", b"e" * 32)
    assert result.steps[0].detail.startswith(f"SGX version {version}")


@pytest.mark.parametrize("values", [{"debug": True}, {"td_attributes": bytes.fromhex("2000001000000000")}])
def test_td_that_is_open_to_a_debugger_or_profiler_says_so(values, make, anchors, now):
    assert verify(make(**values), anchors=anchors, now=now).debug


def test_service_td_and_missing_sept_ve_disable_are_visible(make, anchors, now):
    evidence = make(version=5, mr_service_td=b"s" * 48, td_attributes=bytes(8))
    result = verify(evidence, anchors=anchors, now=now)
    assert result.measurements["mr_service_td"] == b"s" * 48
    assert result.measurements["td_attributes"] == bytes(8)


def test_marks_differ_from_those_of_sgx(make, make_evidence, anchors, now):
    tdx = verify(make(), anchors=anchors, now=now).collateral
    sgx = verify(make_evidence(), anchors=anchors, now=now).collateral
    family = f"{FMSPC.hex()}-0000"
    assert {f"TDX TCB info {family}", "TDX QE identity"} == set(tdx) - set(sgx)
    assert {f"TCB info {family}", "QE identity"} == set(sgx) - set(tdx)


def test_advisories_and_dates_of_every_part_count(make, edited, anchors, now):
    def change_info(document):
        document["tcbLevels"][0] |= {"tcbDate": "2025-03-01T00:00:00Z", "advisoryIDs": ["INTEL-SA-3"]}
        level = document["tdxModuleIdentities"][0]["tcbLevels"][0]
        level |= {"tcbDate": "2025-02-01T00:00:00Z", "advisoryIDs": ["INTEL-SA-2", "INTEL-SA-3"]}

    def change_identity(document):
        document["tcbLevels"][0] |= {"tcbDate": "2025-04-01T00:00:00Z", "advisoryIDs": ["INTEL-SA-1"]}

    parts = edited(change_info) | edited(change_identity, "qe_identity")
    result = verify(make(collateral=parts), anchors=anchors, now=now)
    assert result.advisories == ("INTEL-SA-1", "INTEL-SA-2", "INTEL-SA-3")
    assert result.tcb_date == 1_738_368_000  # 2025-02-01


# Steps 1, 6 and 7: which TEE


def test_quote_of_another_tee(make, make_evidence, refusal):
    sgx = make_evidence().quote
    assert refusal(make(quote=sgx)) == ("evidence.tee", "TEE of the quote")
    as_sgx = replace(make(), tee="sgx")
    assert refusal(as_sgx) == ("evidence.tee", "TEE of the quote")


def test_collateral_of_sgx(make, authority, refusal, now):
    assert refusal(make(tee="sgx")) == ("evidence.tcb-info", "TCB info id")
    sgx = authority.collateral(now)
    parts = {"qe_identity": sgx.qe_identity, "qe_identity_signature": sgx.qe_identity_signature}
    assert refusal(make(collateral=parts)) == ("evidence.qe-identity", "QE identity id")


def test_enclave_with_collateral_of_tdx(make_evidence, authority, refusal, now):
    tdx = authority.collateral(now, tee="tdx")
    info = {"tcb_info": tdx.tcb_info, "tcb_info_signature": tdx.tcb_info_signature}
    assert refusal(make_evidence(**info)) == ("evidence.tcb-info", "TCB info id")
    identity = {"qe_identity": tdx.qe_identity, "qe_identity_signature": tdx.qe_identity_signature}
    assert refusal(make_evidence(**identity)) == ("evidence.qe-identity", "QE identity id")


@pytest.mark.parametrize(
    ("flaws", "claim"), [(Flaws(fmspc=b"OTHER!"), "FMSPC"), (Flaws(pce_id=b"\x00\x01"), "PCEID")]
)
def test_tcb_info_of_another_platform(flaws, claim, make, refusal):
    assert refusal(make(flaws=flaws)) == ("evidence.tcb-info", claim)


@pytest.mark.parametrize(("field", "code"), [("tcb_info", "tcb-info"), ("qe_identity", "qe-identity")])
def test_another_format_version(field, code, make, edited, refusal):
    parts = edited(lambda document: document.update(version=9), field)
    assert refusal(make(collateral=parts)) == (
        f"evidence.{code}",
        f"{code.replace('-', ' ')} version".replace("tcb info", "TCB info").replace(
            "qe identity", "QE identity"
        ),
    )


# Steps 9 and 10


def test_quoting_enclave_of_sgx(make, authority, refusal, now):
    """The SGX quoting enclave may not sign for TDs, though the same platform vouches for it."""
    sgx = Quote.from_bytes(
        authority.quote(
            report_data=bytes(64),
            mr_enclave=bytes(32),
            mr_signer=bytes(32),
            isv_prod_id=0,
            isv_svn=0,
            now=now,
        )
    ).signature
    tdx = Quote.from_bytes(make().quote)
    enclave = authority._quoting_enclave
    assert isinstance(enclave, QuotingEnclave)
    signature = replace(sgx, signature=tdx.signature.signature)
    assert sgx.attestation_key == tdx.signature.attestation_key
    error = refusal(make(quote=replace(tdx, signature=signature).to_bytes()))
    assert error == ("evidence.qe", "ISVPRODID of the quoting enclave")


@pytest.mark.parametrize("name", [name for name, _size in TdReport15.FIELDS])
def test_field_that_was_changed(name, make, refusal):
    quote = Quote.from_bytes(make(version=5).quote)
    value = getattr(quote.body, name)
    changed = replace(quote.body, **{name: value[:-1] + bytes([value[-1] ^ 0x80])})
    evidence = make(quote=replace(quote, body=changed).to_bytes())
    assert refusal(evidence) == ("evidence.quote-signature", "signature of the quote")


def test_report_in_another_version_of_the_quote(make, refusal):
    """The body descriptor is signed, too."""
    quote = Quote.from_bytes(make(version=5, td_version="1.0").quote)
    older = replace(quote, header=replace(quote.header, version=4))
    assert refusal(make(quote=older.to_bytes())) == ("evidence.quote-signature", "signature of the quote")


# Step 11: the TDX module


@pytest.mark.parametrize(
    ("reference", "claim"),
    [
        (TdxReference(version=3), "TDX module"),
        (TdxReference(mr_signer=bytes(48)), "MRSIGNERSEAM"),
        (TdxReference(attributes=b"\x01" + bytes(7)), "attributes of the TDX module"),
    ],
)
def test_another_module(reference, claim, make, refusal):
    assert refusal(make(flaws=Flaws(tdx=reference))) == ("evidence.tdx-module", claim)


def test_module_in_debug_mode(make, authority, refusal):
    body = replace(Quote.from_bytes(make().quote).body, seam_attributes=b"\x01" + bytes(7))
    evidence = make(quote=authority._quoting_enclave.sign(body, version=4))
    assert refusal(evidence) == ("evidence.tdx-module", "SEAMATTRIBUTES")


def test_module_below_every_level(make, refusal):
    evidence = make(tee_tcb_svn=bytes((1, 1, 3)) + bytes(13))
    assert refusal(evidence) == ("evidence.tcb-level", "ISVSVN of the TDX module")
    evidence = make(flaws=Flaws(tdx=TdxReference(least_svn=6)))
    assert refusal(evidence) == ("evidence.tcb-level", "ISVSVN of the TDX module")


def test_module_of_a_platform_without_identities(make, edited, refusal, anchors, now):
    """TCB info from before TDX 1.5 knows the module of TDX 1.0 only."""
    parts = edited(lambda document: document.pop("tdxModuleIdentities"))
    assert refusal(make(collateral=parts)) == ("evidence.tdx-module", "TDX module")
    first = make(collateral=parts, tee_tcb_svn=bytes((5, 0, 3)) + bytes(13))
    assert verify(first, anchors=anchors, now=now).tcb_status == "UpToDate"


def test_signer_of_the_first_module(make, edited, refusal):
    parts = edited(lambda document: document["tdxModule"].update(mrsigner="00" * 48))
    evidence = make(collateral=parts, tee_tcb_svn=bytes((5, 0, 3)) + bytes(13))
    assert refusal(evidence) == ("evidence.tdx-module", "MRSIGNERSEAM")


def test_module_id_in_lower_case(make, edited, anchors, now):
    """Intel's QVL compares in upper case."""
    parts = edited(lambda document: document["tdxModuleIdentities"][0].update(id="tdx_01"))
    assert verify(make(collateral=parts), anchors=anchors, now=now).tcb_status == "UpToDate"


# Step 12: the TCB level


def test_td_below_every_level(make, refusal):
    evidence = make(flaws=Flaws(tdx=TdxReference(least_loader=4)))
    assert refusal(evidence) == ("evidence.tcb-level", "TDX TCB level")


def test_platform_below_every_level(make, edited, refusal):
    def change(document):
        document["tcbLevels"] = document["tcbLevels"][:1]
        document["tcbLevels"][0]["tcb"]["sgxtcbcomponents"][15]["svn"] = 255

    assert refusal(make(collateral=edited(change))) == ("evidence.tcb-level", "TCB level")


def test_td_may_reach_a_lower_level_than_its_platform(make, anchors, now):
    result = verify(make(tee_tcb_svn=bytes((5, 1, 2)) + bytes(13)), anchors=anchors, now=now)
    detail = result.steps[-1].detail
    assert detail.startswith("platform UpToDate, TD OutOfDate, ")
    assert result.tcb_status == "OutOfDate"


@pytest.mark.parametrize(
    ("svn", "version", "status"),
    [(5, 0, "UpToDate"), (4, 0, "OutOfDate"), (5, 1, "UpToDate"), (9, 1, "UpToDate"), (4, 1, "OutOfDate")],
)
def test_first_components_count_for_the_first_module_only(svn, version, status, make, anchors, now):
    evidence = make(tee_tcb_svn=bytes((svn, version, 3)) + bytes(13))
    result = verify(evidence, anchors=anchors, now=now)
    assert result.tcb_status == status
    assert ("TD OutOfDate" in result.steps[-1].detail) == ((svn, version) == (4, 0))


@pytest.mark.parametrize(
    ("flaws", "part"),
    [
        (Flaws(tcb_status="Revoked"), "platform"),
        (Flaws(qe_status="Revoked"), "quoting enclave"),
        (Flaws(tdx=TdxReference(status="Revoked")), "TDX module"),
    ],
)
def test_revoked_part(flaws, part, make, refusal):
    assert refusal(make(flaws=flaws)) == ("evidence.tcb-revoked", f"TCB status of the {part}")


def test_revoked_level_of_the_td(make, edited, refusal):
    parts = edited(lambda document: document["tcbLevels"][1].update(tcbStatus="Revoked"))
    evidence = make(collateral=parts, tee_tcb_svn=bytes((5, 1, 2)) + bytes(13))
    assert refusal(evidence) == ("evidence.tcb-revoked", "TCB status of the TD")


def test_merged_status_gets_the_same_second_opinion(make, authority, anchors, now):
    statuses = (
        "UpToDate",
        "SWHardeningNeeded",
        "ConfigurationNeeded",
        "ConfigurationAndSWHardeningNeeded",
        "OutOfDate",
        "OutOfDateConfigurationNeeded",
    )
    for platform, module, qe in product(statuses, ("UpToDate", "OutOfDate"), ("UpToDate", "OutOfDate")):
        flaws = Flaws(
            tcb_status=platform,
            advisories=("INTEL-SA-1",),
            qe_status=qe,
            tdx=TdxReference(status=module, advisories=("INTEL-SA-2",)),
        )
        evidence = make(flaws=flaws)
        result = verify(evidence, anchors=anchors, now=now)
        opinion = second_opinion(evidence, now, authority.root_der)
        assert (result.tcb_status, list(result.advisories)) == opinion, flaws


# Step 13: relaunch

ADVISED = {
    "UpToDate": "TDRelaunchAdvised",
    "SWHardeningNeeded": "TDRelaunchAdvised",
    "ConfigurationNeeded": "TDRelaunchAdvisedConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded": "TDRelaunchAdvisedConfigurationNeeded",
    "OutOfDate": "OutOfDate",
    "OutOfDateConfigurationNeeded": "OutOfDateConfigurationNeeded",
}


@pytest.mark.parametrize(("platform", "status"), ADVISED.items())
def test_relaunch_is_advised(platform, status, make, authority, anchors, now):
    """An old module launched the TD, a current one runs it."""
    evidence = make(flaws=Flaws(tcb_status=platform), version=5, tee_tcb_svn=LAUNCHED_BY_OLD)
    result = verify(evidence, anchors=anchors, now=now)
    assert result.tcb_status == status
    assert result.steps[-1].name == "13 relaunch"
    assert f"(TEE_TCB_SVN2 {TEE_TCB_SVN.hex()}): {status}" in result.steps[-1].detail
    assert second_opinion(evidence, now, authority.root_der) == (status, [])


@pytest.mark.parametrize(
    ("running", "advised"),
    [  # ISVSVN and major version of the module, version of its loader
        ((5, 1, 3), True),
        ((6, 1, 4), True),
        ((4, 1, 3), False),  # that module is out of date as well
        ((5, 1, 2), False),  # its SEAM loader is
        ((5, 0, 3), True),  # the module of TDX 1.0, by the level's first component
        ((4, 0, 3), False),
    ],
)
def test_relaunch_depends_on_the_module_that_runs(running, advised, make, authority, anchors, now):
    evidence = make(version=5, tee_tcb_svn=LAUNCHED_BY_OLD, tee_tcb_svn2=bytes(running) + bytes(13))
    result = verify(evidence, anchors=anchors, now=now)
    assert result.tcb_status == ("TDRelaunchAdvised" if advised else "OutOfDate")
    assert second_opinion(evidence, now, authority.root_der) == (result.tcb_status, [])


@pytest.mark.parametrize(
    ("flaws", "values", "status"),
    [
        (Flaws(qe_status="OutOfDate"), {"version": 5}, "OutOfDate"),
        (FLAWLESS, {"version": 4}, "OutOfDate"),
        (FLAWLESS, {"version": 5, "td_version": "1.0"}, "OutOfDate"),
        (FLAWLESS, {"version": 5, "tee_tcb_svn": TEE_TCB_SVN, "tee_tcb_svn2": bytes(16)}, "UpToDate"),
        (Flaws(tdx=TdxReference(status="OutOfDate")), {"version": 5}, "OutOfDate"),
    ],
)
def test_relaunch_is_not_enough(flaws, values, status, make, authority, anchors, now):
    """The quoting enclave is out of date, the report is silent on what runs, or the launch was no worse."""
    evidence = make(flaws=flaws, **{"tee_tcb_svn": LAUNCHED_BY_OLD, **values})
    result = verify(evidence, anchors=anchors, now=now)
    assert result.tcb_status == status
    assert second_opinion(evidence, now, authority.root_der) == (status, [])


@pytest.mark.parametrize("launched", [(5, 1, 2), (4, 0, 3)])
def test_relaunch_is_advised_for_an_old_loader_as_well(launched, make, authority, anchors, now):
    evidence = make(version=5, tee_tcb_svn=bytes(launched) + bytes(13))
    assert verify(evidence, anchors=anchors, now=now).tcb_status == "TDRelaunchAdvised"
    assert second_opinion(evidence, now, authority.root_der) == ("TDRelaunchAdvised", [])


def test_advisories_of_launch_and_running_module_count(make, edited, anchors, now):
    def change(document):
        new, old = document["tdxModuleIdentities"][0]["tcbLevels"]
        new |= {"advisoryIDs": ["INTEL-SA-NEW"], "tcbDate": "2025-02-01T00:00:00Z"}
        old |= {"advisoryIDs": ["INTEL-SA-OLD"], "tcbDate": "2025-01-01T00:00:00Z"}

    evidence = make(version=5, collateral=edited(change), tee_tcb_svn=LAUNCHED_BY_OLD)
    result = verify(evidence, anchors=anchors, now=now)
    assert result.advisories == ("INTEL-SA-NEW", "INTEL-SA-OLD")
    assert result.tcb_date == 1_735_689_600  # 2025-01-01


@pytest.mark.parametrize(
    ("running", "refused"),
    [
        ((9, 9, 9), ("evidence.tdx-module", "TDX module")),
        ((1, 1, 3), ("evidence.tcb-level", "ISVSVN of the TDX module that runs now")),
    ],
)
def test_running_module_that_nobody_lists(running, refused, make, refusal):
    evidence = make(version=5, tee_tcb_svn=LAUNCHED_BY_OLD, tee_tcb_svn2=bytes(running) + bytes(13))
    assert refusal(evidence) == refused


def test_running_module_that_is_revoked(make, refusal):
    flaws = Flaws(tdx=TdxReference(status="Revoked"))
    evidence = make(flaws=flaws, version=5, tee_tcb_svn=LAUNCHED_BY_OLD)
    assert refusal(evidence) == ("evidence.tcb-revoked", "TCB status of the TDX module that runs now")


def test_td_at_a_good_level_below_a_revoked_one(make, refusal):
    """Intel's QVL would call it out of date; a platform that reaches a revoked level is no good here."""
    evidence = make(flaws=Flaws(tcb_status="Revoked"), tee_tcb_svn=bytes((5, 1, 2)) + bytes(13))
    assert refusal(evidence) == ("evidence.tcb-revoked", "TCB status of the platform")


def test_every_launch_and_running_module_gets_the_same_second_opinion(make, authority, anchors, now):
    versions = [bytes(each) + bytes(13) for each in ((5, 1, 3), (2, 1, 3), (5, 1, 2), (5, 0, 3), (4, 0, 3))]
    for platform, module, launched, running in product(
        ("UpToDate", "ConfigurationNeeded", "OutOfDate"),
        ("UpToDate", "OutOfDate", "Revoked"),
        versions,
        versions,
    ):
        flaws = Flaws(tcb_status=platform, tdx=TdxReference(status=module))
        evidence = make(flaws=flaws, version=5, tee_tcb_svn=launched, tee_tcb_svn2=running)
        opinion = second_opinion(evidence, now, authority.root_der)
        try:
            found: object = (verify(evidence, anchors=anchors, now=now).tcb_status, [])
        except EvidenceRefused as error:
            found = f"Verification failed: TCB status is invalid: {error.actual}"
        assert found == opinion, (flaws, launched, running)


# Malformed TCB info, and the other anchors


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.pop("tdxModule"),
        lambda document: document.update(tdxModuleIdentities=[]),
        lambda document: document.update(tdxModuleIdentities={}),
        lambda document: document["tdxModuleIdentities"][0].update(tcbLevels=[]),
        lambda document: document["tdxModuleIdentities"][0].update(mrsigner="00" * 32),
        lambda document: document["tdxModuleIdentities"][0].update(attributes="00"),
        lambda document: document["tdxModuleIdentities"][0].update(id=1),
        lambda document: document["tdxModuleIdentities"][0]["tcbLevels"][0]["tcb"].update(isvsvn=256),
        lambda document: document["tdxModuleIdentities"][0]["tcbLevels"][0].update(
            tcbStatus="SWHardeningNeeded"
        ),
        lambda document: document["tcbLevels"][0].update(tcbStatus="TDRelaunchAdvised"),
        lambda document: document["tcbLevels"][0]["tcb"].pop("tdxtcbcomponents"),
        lambda document: document["tcbLevels"][0]["tcb"].update(tdxtcbcomponents=[{"svn": 0}] * 15),
        lambda document: document["tcbLevels"][0]["tcb"].update(tdxtcbcomponents=[{"svn": 0}] * 17),
        lambda document: document["tcbLevels"][0]["tcb"].update(tdxtcbcomponents=[{"svn": 256}] * 16),
    ],
)
def test_tcb_info_that_is_malformed(change, make, edited, anchors, now):
    with pytest.raises(EvidenceError) as caught:
        verify(make(collateral=edited(change)), anchors=anchors, now=now)
    assert caught.value.code == "evidence.collateral"


def test_simulated_td_under_vendor_anchors(make, now):
    with pytest.raises(EvidenceRefused) as caught:
        verify(make(), anchors=TrustAnchors.vendor(), now=now)
    assert (caught.value.code, caught.value.claim) == ("evidence.simulated", "simulated")

"""Policies for each TEE, claim by claim: what they admit, what they refuse, and which admits more."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest

from cloister.core import encoding
from cloister.core.verifier.appraisal import AllOf, AnyOf, AppraisalPolicy, appraise
from cloister.core.verifier.claims import CLAIMS
from cloister.core.verifier.forms import FORMS
from cloister.core.verifier.result import (
    DcapPlatform,
    NitroPlatform,
    SnpPlatform,
    Step,
    VerifiedEvidence,
)
from cloister.errors import AppraisalRefused, BindingRefused, UsageError

NOW = 1_800_000_000
A, B, C = b"a" * 48, b"b" * 48, b"c" * 48
SEPT_VE_DISABLE = (1 << 28).to_bytes(8, "little")
DCAP = {"allowed_tcb": frozenset({"UpToDate", "SWHardeningNeeded"}), "any_platform": True}
POLICIES: dict[str, dict[str, Any]] = {
    "tdx": {
        "mr_td": frozenset({A}),
        **{f"rtmr{index}": frozenset({B}) for index in range(4)},
        "mr_config_id": frozenset({C}),
        "td_attributes": SEPT_VE_DISABLE,
        "td_attributes_mask": b"\xff" * 8,
        **DCAP,
    },
    "snp": {
        "measurement": frozenset({A}),
        "guest_policy": 0x30000,
        "guest_policy_mask": 0x1FFFFFF,
        "min_snp": 8,
        "min_microcode": 100,
        "any_platform": True,
    },
    "nitro": {f"pcr{index}": frozenset({A, B}) for index in range(3)},
}
EVIDENCE: dict[str, dict[str, Any]] = {
    "tdx": {
        "measurements": {
            "mr_td": A,
            **{f"rtmr{index}": B for index in range(4)},
            "mr_config_id": C,
            "mr_owner": bytes(48),
            "mr_owner_config": bytes(48),
            "mr_seam": A,
            "td_attributes": SEPT_VE_DISABLE,
            "xfam": b"\xe7" + bytes(7),
            "tee_tcb_svn": bytes([3, 1, 2] + [0] * 13),
            "mr_service_td": bytes(48),
        },
        "platform": DcapPlatform(
            fmspc=b"fmspc6",
            pce_id=bytes(2),
            ppid=bytes(16),
            platform_instance_id=b"",
            tcb_components=(1,) * 16,
            pce_svn=1,
            sgx_type=0,
        ),
        "tcb_status": "UpToDate",
        "tcb_date": 1,
        "tcb_evaluation_number": 17,
        "advisories": ("INTEL-SA-00001",),
    },
    "snp": {
        "measurements": {
            "measurement": A,
            "guest_policy": 0x30000,
            "vmpl": 0,
            "guest_svn": 2,
            "host_data": b"h" * 32,
            "family_id": b"f" * 16,
            "image_id": b"i" * 16,
            "id_key_digest": B,
            "author_key_digest": C,
            "platform_info": 5,
            "reported_tcb": bytes([3, 0, 0, 0, 0, 0, 8, 115]),
            "launch_tcb": bytes([3, 0, 0, 0, 0, 0, 8, 110]),
            "committed_tcb": bytes([3, 0, 0, 0, 0, 0, 8, 105]),
        },
        "platform": SnpPlatform(
            product="Milan",
            signer="VCEK",
            chip_id=b"c" * 64,
            csp_id="",
            tcb={"bootloader": 3, "tee": 0, "snp": 8, "microcode": 115},
            platform_info=5,
        ),
        "tcb_status": None,
        "tcb_date": None,
        "tcb_evaluation_number": None,
        "advisories": (),
    },
    "nitro": {
        "measurements": {"pcr0": A, "pcr1": B, "pcr2": A, "pcr3": C, "pcr4": bytes(48), "pcr8": B},
        "platform": NitroPlatform(module_id="i-1", timestamp=NOW - 60),
        "tcb_status": None,
        "tcb_date": None,
        "tcb_evaluation_number": None,
        "advisories": (),
    },
}


def policy(tee: str, **changes: Any) -> AppraisalPolicy:
    return AppraisalPolicy(tee=tee, **{**POLICIES[tee], **changes})


def evidence(tee: str, measurements: dict[str, Any] | None = None, **changes: Any) -> VerifiedEvidence:
    """What a policy of `POLICIES` accepts, but for what is said."""
    found = {**EVIDENCE[tee], "collateral_issued": NOW - 100, **changes}
    found["measurements"] = MappingProxyType({**found["measurements"], **(measurements or {})})
    return VerifiedEvidence(
        **{
            "tee": tee,
            "anchors_digest": policy(tee).anchors.digest,
            "simulated": False,
            "debug": False,
            "report_data": bytes(64),
            "collateral": MappingProxyType({}),
            "not_after": NOW + 1000,
            "steps": (),
            **found,
        }
    )


def refused(found: VerifiedEvidence, wanted: AppraisalPolicy) -> AppraisalRefused:
    with pytest.raises(AppraisalRefused) as caught:
        appraise(found, wanted, now=NOW)
    error = caught.value
    assert error.claim
    assert error.expected
    assert error.actual
    return error


TEES = sorted(POLICIES)


@pytest.mark.parametrize("tee", TEES)
def test_what_fits_is_accepted(tee):
    result = appraise(evidence(tee), policy(tee), now=NOW)
    named = {step.name for step in result.steps}
    assert {"simulated", "trust anchors", "tee", "debug", "expired", "max age"} <= named
    assert len(result.steps) >= len(CLAIMS[tee])
    assert result.not_after == NOW + 1000


@pytest.mark.parametrize("tee", TEES)
def test_debug_is_refused_whatever_the_policy_says(tee):
    assert refused(evidence(tee, debug=True), policy(tee)).code == "appraisal.debug"


@pytest.mark.parametrize(
    ("tee", "measurements"),
    [("tdx", {"td_attributes": b"\x01\0\0\x10" + bytes(4)}), ("snp", {"guest_policy": 0xB0000})],
)
def test_debug_that_only_the_bits_show(tee, measurements):
    assert refused(evidence(tee, measurements), policy(tee)).code == "appraisal.debug"


@pytest.mark.parametrize("tee", TEES)
@pytest.mark.parametrize("other", ["sgx", *TEES])
def test_evidence_of_another_tee(tee, other):
    if other != tee:
        assert refused(replace(evidence(tee), tee=other), policy(tee)).code == "appraisal.tee"


WRONG: list[tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    # TEE, claim, measurements, other parts of the evidence, changes of the policy
    *(("tdx", name, {name: b"x" * 48}, {}, {}) for name in ("mr_td", "rtmr0", "rtmr3", "mr_config_id")),
    *(("tdx", name, {}, {}, {name: frozenset({b"x" * 48})}) for name in ("mr_owner", "mr_owner_config")),
    ("tdx", "mr_seam", {}, {}, {"mr_seam": frozenset({B})}),
    ("tdx", "sept_ve_disable", {"td_attributes": bytes(8)}, {}, {}),
    ("tdx", "td_attributes", {"td_attributes": b"\0\0\0\x30" + bytes(4)}, {}, {}),
    ("tdx", "mr_service_td", {"mr_service_td": A}, {}, {}),
    ("tdx", "mr_service_td", {"mr_service_td": A}, {}, {"mr_service_td": frozenset({B})}),
    ("tdx", "xfam", {}, {}, {"xfam": b"\x02" + bytes(7), "xfam_mask": b"\x06" + bytes(7)}),
    ("tdx", "tee_tcb_svn", {}, {}, {"min_tee_tcb_svn": bytes([0, 0, 3] + [0] * 13)}),
    ("tdx", "tcb status", {}, {"tcb_status": "OutOfDate"}, {}),
    ("tdx", "advisories", {}, {}, {"denied_advisories": frozenset({"INTEL-SA-00001"})}),
    ("tdx", "advisories", {}, {}, {"denied_advisories": frozenset({"intel-sa-00001"})}),
    ("tdx", "tcb evaluation", {}, {}, {"min_tcb_evaluation": 18}),
    ("tdx", "platform", {}, {}, {"any_platform": False, "platforms": frozenset({b"fmspc7"})}),
    ("snp", "measurement", {"measurement": B}, {}, {}),
    ("snp", "guest_policy", {"guest_policy": 0x20000}, {}, {}),
    ("snp", "vmpl", {"vmpl": 1}, {}, {}),
    ("snp", "vmpl", {"vmpl": 3}, {}, {"max_vmpl": 2}),
    ("snp", "guest_svn", {}, {}, {"min_guest_svn": 3}),
    ("snp", "host_data", {}, {}, {"host_data": frozenset({b"x" * 32})}),
    ("snp", "family_id", {}, {}, {"family_id": frozenset({b"x" * 16})}),
    ("snp", "image_id", {}, {}, {"image_id": frozenset({b"x" * 16})}),
    ("snp", "id_key_digest", {}, {}, {"id_key_digest": frozenset({A})}),
    ("snp", "author_key_digest", {}, {}, {"author_key_digest": frozenset({A})}),
    ("snp", "platform_info", {}, {}, {"platform_info": 0, "platform_info_mask": 1}),
    ("snp", "tcb", {}, {}, {"min_microcode": 116}),
    ("snp", "tcb", {}, {}, {"min_fmc": 1}),
    ("snp", "launch tcb", {"committed_tcb": bytes([9] * 8)}, {}, {"min_microcode": 111}),
    ("snp", "committed tcb", {}, {}, {"min_microcode": 106}),
    ("snp", "launch tcb", {"launch_tcb": b"short"}, {}, {}),
    ("snp", "platform", {}, {}, {"any_platform": False, "products": frozenset({"Genoa", "Turin"})}),
    ("snp", "chip_id", {}, {}, {"chip_ids": frozenset({b"x" * 64})}),
    ("snp", "revocation list", {}, {"collateral_issued": None}, {}),
    ("nitro", "pcr0", {"pcr0": C}, {}, {}),
    ("nitro", "pcr2", {"pcr2": C}, {}, {}),
    *(("nitro", name, {}, {}, {name: frozenset({A})}) for name in ("pcr3", "pcr4", "pcr8")),
    *((tee, "max age", {}, {"collateral_issued": NOW - 40 * 86400}, {}) for tee in TEES),
    *((tee, "expired", {}, {"not_after": NOW - 1}, {}) for tee in TEES),
    *((tee, "simulated", {}, {"simulated": True}, {}) for tee in TEES),
    *((tee, "trust anchors", {}, {"anchors_digest": bytes(32)}, {}) for tee in TEES),
]


@pytest.mark.parametrize(("tee", "claim", "measurements", "parts", "changes"), WRONG)
def test_what_does_not_fit_is_refused_by_name(tee, claim, measurements, parts, changes):
    error = refused(evidence(tee, measurements, **parts), policy(tee, **changes))
    assert (error.claim, error.code) == (claim, f"appraisal.{claim.replace(' ', '-')}")


@pytest.mark.parametrize(
    ("tee", "name"),
    [
        *(("tdx", name) for name in ("mr_td", "rtmr1", "td_attributes", "tee_tcb_svn")),
        *(("snp", name) for name in ("measurement", "guest_policy", "vmpl", "guest_svn")),
        *(("nitro", f"pcr{index}") for index in range(3)),
    ],
)
def test_a_measurement_that_is_absent_fits_nothing(tee, name):
    found = evidence(tee)
    rest = {each: value for each, value in found.measurements.items() if each != name}
    refused(replace(found, measurements=MappingProxyType(rest)), policy(tee, **_demands(name)))


def _demands(name: str) -> dict[str, Any]:
    return {"min_tee_tcb_svn": bytes([1] + [0] * 15)} if name == "tee_tcb_svn" else {}


def test_a_report_of_td_1_0_has_no_service_td():
    found = evidence("tdx")
    rest = {name: value for name, value in found.measurements.items() if name != "mr_service_td"}
    appraise(replace(found, measurements=MappingProxyType(rest)), policy("tdx"), now=NOW)


def test_a_service_td_that_the_policy_lists():
    appraise(evidence("tdx", {"mr_service_td": B}), policy("tdx", mr_service_td=frozenset({B})), now=NOW)


def test_flags_let_things_pass_and_say_so():
    vlek = replace(EVIDENCE["snp"]["platform"], signer="VLEK", csp_id="aws")
    found = evidence("snp", platform=vlek, collateral_issued=None)
    assert refused(found, policy("snp", allow_missing_crl=True)).claim == "signer"
    wanted = policy("snp", allow_vlek=True, allow_missing_crl=True, min_snp=0, min_microcode=0, any_tcb=True)
    result = appraise(found, wanted, now=NOW)
    noted = {step.name: step.detail for step in result.steps if step.outcome == "note"}
    assert "VLEK" in noted["signer"]
    assert "none" in noted["revocation list"]
    assert "microcode 115" in noted["tcb"]
    assert result.not_after == NOW + 1000
    assert appraise(evidence("snp"), wanted, now=NOW).steps  # what needs no flag passes as well


# -- policies that say too little or too much -----------------------------------


def invalid(tee: str, **changes: Any) -> str:
    with pytest.raises(UsageError) as caught:
        policy(tee, **changes)
    return caught.value.code


@pytest.mark.parametrize(
    ("tee", "names"),
    [
        ("tdx", ["mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "mr_config_id", "allowed_tcb"]),
        ("snp", ["measurement"]),
        ("nitro", ["pcr0", "pcr1", "pcr2"]),
    ],
)
def test_complete_reference_values_are_demanded(tee, names):
    for name in names:
        assert invalid(tee, **{name: frozenset()}) == f"policy.{name}"


@pytest.mark.parametrize(
    ("tee", "code", "changes"),
    [
        ("tdx", "td_attributes", {"td_attributes": b""}),
        ("tdx", "td_attributes_mask", {"td_attributes_mask": b"\xfe" + b"\xff" * 7}),
        ("tdx", "td_attributes", {"td_attributes": b"\x01" + SEPT_VE_DISABLE[1:]}),
        ("tdx", "td_attributes", {"td_attributes_mask": b"\x01\0\0\x20" + bytes(4)}),
        ("tdx", "td_attributes_mask", {"td_attributes_mask": b"\xff\xff\xff\xdf" + b"\xff" * 4}),
        ("tdx", "td_attributes", {"td_attributes": b"\0\0\0\x30" + bytes(4)}),
        ("tdx", "xfam", {"xfam": b"\x01" + bytes(7)}),
        ("tdx", "platforms", {"any_platform": False}),
        ("tdx", "platforms", {"platforms": frozenset({b"fmspc6"})}),
        ("tdx", "mr_enclave", {"mr_enclave": frozenset({b"e" * 32})}),
        ("snp", "guest_policy_mask", {"guest_policy_mask": 0x30000}),
        ("snp", "guest_policy", {"guest_policy": 0x80000}),
        ("snp", "guest_policy", {"guest_policy": 0x40000}),
        ("snp", "guest_policy", {"guest_policy": 1 << 64}),
        ("snp", "max_vmpl", {"max_vmpl": 4}),
        ("snp", "min_snp", {"min_snp": 0, "min_microcode": 0}),
        ("snp", "min_snp", {"any_tcb": True}),
        ("snp", "min_snp", {"min_snp": 256}),
        ("snp", "products", {"any_platform": False}),
        ("snp", "products", {"any_platform": False, "products": frozenset({"Rome"})}),
        ("snp", "chip_ids", {"chip_ids": frozenset({b"short"})}),
        ("snp", "allow_vlek", {"allow_vlek": 1}),
        ("snp", "allowed_tcb", {"allowed_tcb": frozenset({"UpToDate"})}),
        ("nitro", "pcr0", {"pcr0": frozenset({b"x" * 32})}),
        ("nitro", "any_platform", {"any_platform": True}),
        ("nitro", "tee", {"tee": "sev"}),
    ],
)
def test_values_that_are_wrong(tee, code, changes):
    with pytest.raises(UsageError) as caught:
        AppraisalPolicy(**{"tee": tee, **POLICIES[tee], **changes})
    assert caught.value.code == f"policy.{code}"


def test_every_field_has_a_form_and_every_form_a_field():
    claimed = {name for claims in CLAIMS.values() for claim in claims for name in claim.fields}
    assert claimed | {"max_age", "dangerous_simulated_roots"} == set(FORMS)


# -- forms -----------------------------------------------------------------------

FULL = [
    policy("tdx", mr_owner=frozenset({A, B}), min_tcb_evaluation=17, denied_advisories=frozenset({"X-1"})),
    policy("snp", products=frozenset({"Milan"}), any_platform=False, host_data=frozenset({b"h" * 32})),
    policy("nitro", pcr8=frozenset({C}), max_age=300),
    AnyOf(policy("tdx"), policy("snp"), policy("nitro")),
    AllOf(policy("snp"), policy("snp", max_age=60)),
    AnyOf(policy("tdx"), AllOf(policy("snp"), policy("snp", max_age=60))),
]


@pytest.mark.parametrize("each", FULL)
def test_forms_that_policies_travel_in(each):
    assert AppraisalPolicy.from_toml(each.to_toml()) == each
    assert AppraisalPolicy.from_data(encoding.decode(encoding.encode(each.to_data()), what="policy")) == each
    assert len(each.digest) == 32
    assert len({one.digest for one in FULL}) == len(FULL)


@pytest.mark.parametrize("each", FULL)
def test_a_policy_as_a_section_of_a_file(each):
    import tomllib

    table = tomllib.loads("before = 1\n" + each.to_toml("worker") + "\n[after]\nx = 1\n")
    assert AppraisalPolicy.from_table(table["worker"]) == each


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"kind": "another"},
        {**policy("nitro").to_data(), "mr_td": []},
        {**policy("nitro").to_data(), "pcr0": [B, A]},
        {**policy("nitro").to_data(), "pcr0": [A, A]},
        {**policy("nitro").to_data(), "pcr0": A},
        {**policy("nitro").to_data(), "tee": "sev"},
        {**policy("nitro").to_data(), "tee": 1},
        {**policy("nitro").to_data(), "dangerous_simulated_roots": 1},
        {**policy("nitro").to_data(), "max_age": True},
        {**policy("tdx").to_data(), "td_attributes": SEPT_VE_DISABLE.hex()},
        {"kind": "cloister/v1/appraisal-policy", "any_of": []},
        {"kind": "cloister/v1/appraisal-policy", "any_of": [policy("nitro").to_data()]},
        {"kind": "cloister/v1/appraisal-policy", "any_of": "x"},
        {"kind": "cloister/v1/appraisal-policy", "all_of": [{}, {}]},
        {"kind": "cloister/v1/appraisal-policy", "any_of": [policy("nitro").to_data()] * 17},
    ],
)
def test_data_that_is_no_policy(data):
    with pytest.raises(UsageError) as caught:
        AppraisalPolicy.from_data(data)
    assert caught.value.code.startswith("policy.")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("any_of = 1", "policy.any_of"),
        ("any_of = [1, 2]", "policy.empty"),
        ("any_of = [1]", "policy.any_of"),
        ("[[any_of]]\n[[any_of]]", "policy.empty"),
        ('tee = "nitro"\nmr_td = []', "policy.unknown-key"),
        ('tee = "snp"\nguest_policy = "30000"', "policy.guest_policy"),
        ('tee = "snp"\nproducts = [1]', "policy.products"),
        ('tee = "tdx"\ntd_attributes = "0000"', "policy.td_attributes"),
    ],
)
def test_files_that_are_no_policy(text, code):
    with pytest.raises(UsageError) as caught:
        AppraisalPolicy.from_toml(text)
    assert caught.value.code == code


def test_policies_join_so_deep_and_no_deeper():
    joined = policy("nitro")
    for depth in range(3):
        joined = AnyOf(joined, policy("snp", max_age=depth + 1))
    assert AppraisalPolicy.from_toml(joined.to_toml()) == joined
    for make in (
        lambda: AnyOf(joined, policy("tdx")),
        lambda: AppraisalPolicy.from_toml(deeper(joined.to_toml())),
        lambda: AppraisalPolicy.from_data(
            {**joined.to_data(), "any_of": [joined.to_data(), policy("tdx").to_data()]}
        ),
    ):
        with pytest.raises(UsageError) as caught:
            make()
        assert caught.value.code == "policy.any_of"


def deeper(text: str) -> str:
    """The same policy as a member of another, twice."""
    nested = text.replace("[[any_of", "[[any_of.any_of")
    return f"[[any_of]]\n{nested}\n[[any_of]]\n{nested}"


def test_a_nitro_document_that_is_a_little_ahead_of_our_clock():
    """Verification bounds by how much."""
    appraise(evidence("nitro", collateral_issued=NOW + 100), policy("nitro"), now=NOW)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AnyOf(policy("tdx")),
        lambda: AllOf(policy("tdx"), AppraisalPolicy()),
        lambda: AppraisalPolicy(any_of=[policy("tdx")] * 2),
        lambda: AppraisalPolicy(any_of=(policy("tdx"), "x")),
        lambda: AppraisalPolicy(any_of=(policy("tdx"),) * 17),
        lambda: AppraisalPolicy(any_of=(policy("tdx"),) * 2, max_age=5),
        lambda: AppraisalPolicy(any_of=(policy("tdx"),) * 2, all_of=(policy("tdx"),) * 2),
        lambda: AppraisalPolicy(any_of=(policy("tdx"),) * 2, tee="tdx"),
    ],
)
def test_policies_that_do_not_join(make):
    with pytest.raises(UsageError) as caught:
        make()
    assert caught.value.code.startswith("policy.")


def test_policies_under_other_anchors_do_not_join(policy):
    with pytest.raises(UsageError) as caught:
        AnyOf(policy, replace(policy, dangerous_simulated_roots=None))
    assert caught.value.code == "policy.any_of"


# -- joined policies ---------------------------------------------------------------


def test_any_of_accepts_what_one_accepts():
    either = AnyOf(policy("tdx"), policy("snp"))
    for number, tee in enumerate(("tdx", "snp"), start=1):
        result = appraise(evidence(tee), either, now=NOW)
        outcomes = {step.name: step.outcome for step in result.steps if step.name.startswith("any_of")}
        assert outcomes.pop(f"any_of[{number}]") == "ok"
        assert set(outcomes.values()) <= {"note"}
        assert result.policy_digest == either.digest
    assert refused(evidence("nitro"), either).claim == "tee"


def test_any_of_names_the_claim_of_the_policy_that_comes_closest():
    either = AnyOf(policy("tdx"), policy("snp"))
    assert refused(evidence("snp", {"measurement": B}), either).claim == "measurement"


def test_any_of_names_each_of_its_policies_and_the_claim_that_refused():
    steps: list[Step] = []
    either = AnyOf(policy("tdx"), AllOf(policy("snp"), policy("snp", host_data=frozenset({A[:32]}))))
    with pytest.raises(AppraisalRefused) as caught:
        appraise(evidence("snp"), either, now=NOW, steps=steps)
    assert "any_of[1] by tee, any_of[2] by host_data" in caught.value.message
    assert "in any_of[2], host_data" in caught.value.message
    assert (caught.value.code, caught.value.claim) == ("appraisal.host_data", "host_data")
    assert [(step.name, step.outcome) for step in steps[-2:]] == [
        ("any_of[1]", "note"),
        ("any_of[2]", "note"),
    ]
    assert steps[-2].detail == "refused by tee: expected tdx, found snp"


def test_a_refusal_shows_the_comparisons_that_were_passed():
    steps: list[Step] = []
    with pytest.raises(AppraisalRefused):
        appraise(evidence("tdx", {"rtmr1": C}), policy("tdx"), now=NOW, steps=steps)
    assert [step.name for step in steps] == [
        "simulated",
        "trust anchors",
        "tee",
        "debug",
        "sept_ve_disable",
        "mr_td",
        "rtmr0",
    ]


def test_the_comparisons_follow_what_the_caller_has_already():
    steps = [Step(name="before", outcome="ok", detail="")]
    result = appraise(evidence("tdx"), policy("tdx"), now=NOW, steps=steps)
    assert (steps[0].name, tuple(steps[1:])) == ("before", result.steps)
    assert result.steps == appraise(evidence("tdx"), policy("tdx"), now=NOW).steps


@pytest.mark.parametrize(
    ("applying", "detail"),
    [((), "none applies"), (("X-1", "X-2"), "none that is denied; what applies: X-1, X-2")],
)
def test_advisories_that_apply_are_shown_though_none_is_denied(applying, detail):
    result = appraise(
        replace(evidence("tdx"), advisories=applying),
        policy("tdx", denied_advisories=frozenset({"X-3"})),
        now=NOW,
    )
    assert [step.detail for step in result.steps if step.name == "advisories"] == [detail]


def test_report_data_of_another():
    found = evidence("nitro")
    found.require_report_data(found.report_data)
    for tee, claim in (("nitro", "user_data"), ("snp", "REPORTDATA")):
        with pytest.raises(BindingRefused) as caught:
            evidence(tee).require_report_data(b"another")
        assert (caught.value.code, caught.value.claim) == ("binding.report-data", claim)
        assert caught.value.expected == b"another".hex()


def test_all_of_accepts_what_all_accept():
    both = AllOf(policy("snp"), policy("snp", max_age=200, host_data=frozenset({b"h" * 32})))
    assert appraise(evidence("snp"), both, now=NOW).not_after == NOW + 100
    assert refused(evidence("snp", {"host_data": bytes(32)}), both).claim == "host_data"
    assert refused(evidence("snp", {"measurement": B}), both).claim == "measurement"


# -- one policy admits another ------------------------------------------------------


def narrower_than(broader: AppraisalPolicy, narrower: AppraisalPolicy) -> str:
    """The claim where the second admits more; empty where it doesn't."""
    try:
        broader.admits(narrower)
    except AppraisalRefused as error:
        return error.claim if error.code == "appraisal.not-subset" else f"another error: {error.code}"
    return ""


@pytest.mark.parametrize("tee", TEES)
def test_a_policy_admits_itself(tee):
    policy(tee).admits(policy(tee))


NARROWER: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    # TEE, claim, changes of the broader one, changes of the narrower one
    ("tdx", "mr_td", {"mr_td": frozenset({A, B})}, {}),
    ("tdx", "mr_owner", {}, {"mr_owner": frozenset({A})}),
    ("tdx", "mr_service_td", {"mr_service_td": frozenset({A})}, {}),
    ("tdx", "td_attributes", {"td_attributes_mask": b"\x01\0\0\x30" + bytes(4)}, {}),
    ("tdx", "xfam", {}, {"xfam": b"\x02" + bytes(7), "xfam_mask": b"\x06" + bytes(7)}),
    ("tdx", "min_tee_tcb_svn", {}, {"min_tee_tcb_svn": bytes([0, 1] + [0] * 14)}),
    ("tdx", "platforms", {}, {"any_platform": False, "platforms": frozenset({b"fmspc6"})}),
    ("tdx", "allowed_tcb", {}, {"allowed_tcb": frozenset({"UpToDate"})}),
    ("tdx", "denied_advisories", {}, {"denied_advisories": frozenset({"X-1"})}),
    ("tdx", "min_tcb_evaluation", {}, {"min_tcb_evaluation": 3}),
    ("snp", "max_vmpl", {"max_vmpl": 2}, {}),
    ("snp", "guest_policy", {"guest_policy_mask": 0xF0000}, {}),
    ("snp", "min_guest_svn", {}, {"min_guest_svn": 1}),
    ("snp", "tcb", {}, {"min_fmc": 1}),
    ("snp", "allow_vlek", {"allow_vlek": True}, {}),
    ("snp", "allow_missing_crl", {"allow_missing_crl": True}, {}),
    ("snp", "products", {}, {"any_platform": False, "products": frozenset({"Milan"})}),
    ("snp", "chip_ids", {}, {"chip_ids": frozenset({b"c" * 64})}),
    ("nitro", "pcr8", {}, {"pcr8": frozenset({A})}),
    *((tee, "max_age", {}, {"max_age": 60}) for tee in TEES),
]


@pytest.mark.parametrize(("tee", "claim", "broad", "narrow"), NARROWER)
def test_which_policy_admits_more(tee, claim, broad, narrow):
    broader, narrower = policy(tee, **broad), policy(tee, **narrow)
    assert narrower_than(broader, narrower) == ""
    assert narrower_than(narrower, broader) == claim


def test_policies_for_different_tees_do_not_admit_each_other():
    for tee in TEES:
        for other in TEES:
            assert (narrower_than(policy(tee), policy(other)) == "") == (tee == other)


def test_joined_policies_compare():
    tdx, snp = policy("tdx"), policy("snp")
    older, stricter = policy("snp", max_age=3600), policy("snp", max_age=60)
    either = AnyOf(tdx, snp)
    assert narrower_than(either, tdx) == narrower_than(either, stricter) == ""
    assert narrower_than(either, AnyOf(stricter, tdx)) == ""
    assert narrower_than(tdx, either) == "tee"
    assert narrower_than(either, policy("snp", measurement=frozenset({B}))) == "measurement"
    assert narrower_than(either, policy("nitro")) == "tee"
    assert narrower_than(snp, AllOf(policy("snp", measurement=frozenset({A, B})), older)) == ""
    assert narrower_than(AllOf(snp, older), stricter) == ""
    assert narrower_than(AllOf(snp, older), snp) == "max_age"
    assert narrower_than(AllOf(older, snp), AllOf(stricter, snp)) == ""
    assert narrower_than(snp, AllOf(tdx, policy("nitro"))) == "tee"
    assert narrower_than(snp, AppraisalPolicy()) == narrower_than(AppraisalPolicy(), snp) == "policy"


def test_measurement_names_the_code_in_32_bytes():
    names = {"tdx": "rtmr3", "snp": "measurement", "nitro": "pcr2"}
    for tee, name in names.items():
        one, other = evidence(tee), evidence(tee, {name: C})
        assert len(one.measurement) == 32
        assert one.measurement != other.measurement
    assert evidence("snp", {"host_data": bytes(32)}).measurement == evidence("snp").measurement

"""Attestation: evidence serves one purpose, role, service, pool, set of keys, freshness and configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.core.protocol.attestation import Attestation, Attested, Binding, verify_attestation
from cloister.core.protocol.configuration import EnclaveConfiguration
from cloister.core.protocol.pool import Pool
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.errors import AppraisalRefused, BindingRefused, CloisterError, EvidenceRefused, FormatError
from support.realm import KEY_SERVICE, NOW, STRANGER, WORKER, authority, configuration, evidence, policy

POOL = Pool(name="pool", policy=policy(WORKER))
SERVICE = b"S" * 32
CONFIGURATION = configuration("worker", service=SERVICE, pool=POOL, key_service=policy(KEY_SERVICE))
BINDING = Binding(
    purpose="release",
    role="worker",
    service=SERVICE,
    pool=POOL.id,
    keys=(("X-Wing", b"x" * 1216), ("Ed25519", b"e" * 32)),
    freshness=("challenge", b"c" * 56),
    configuration=CONFIGURATION.digest,
)
DEMANDED: dict[str, Any] = {
    "policy": policy(WORKER),
    "now": NOW,
    "purpose": "release",
    "role": "worker",
    "service": SERVICE,
    "pool": POOL.id,
    "freshness": ("challenge", b"c" * 56),
}


def attest(
    binding: Binding = BINDING,
    *,
    measurement: bytes = WORKER,
    config: EnclaveConfiguration = CONFIGURATION,
    text: bytes | None = None,
    **options: Any,
) -> Attestation:
    binding = dataclasses.replace(binding, configuration=config.digest)
    proof = evidence(binding.report_data, measurement, **options)
    return Attestation(evidence=proof, configuration=text or config.to_bytes(), binding=binding)


def travelled(attestation: Attestation, **changes: Any) -> Attestation:
    """As the peer reads it, with fields of the message altered on the way."""
    return Attestation.from_data({**attestation.to_data(), **changes})


def check(attestation: Attestation, **demanded: Any) -> Attested:
    return verify_attestation(travelled(attestation), **{**DEMANDED, **demanded})


def refused(kind: type[CloisterError], code: str, attestation: Attestation, **demanded: Any) -> CloisterError:
    with pytest.raises(kind) as caught:
        check(attestation, **demanded)
    assert caught.value.code == code, str(caught.value)
    return caught.value


# -- what the verifier demands -------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("purpose", "service-document"),
        ("role", "key-service"),
        ("service", b"T" * 32),
        ("pool", b"P" * 32),
        ("pool", None),
        ("freshness", ("challenge", b"d" * 56)),
        ("freshness", ("epoch", b"c" * 56)),
        ("freshness", ("epoch", (1).to_bytes(8))),
    ],
)
def test_evidence_made_for_something_else(name, wanted):
    refused(BindingRefused, f"binding.{name}", attest(), **{name: wanted})


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("purpose", "service-document", "binding.purpose"),
        ("role", "key-service", "binding.role"),
        ("service", b"T" * 32, "binding.service"),
        ("pool", b"P" * 32, "binding.pool"),
        ("pool", None, "binding.pool"),
        ("freshness", ["challenge", b"d" * 56], "binding.freshness"),
        ("freshness", ["epoch", b"c" * 56], "binding.freshness"),
        ("keys", [["X-Wing", b"y" * 1216], ["Ed25519", b"e" * 32]], "binding.report-data"),
        ("keys", [["X-Wing", b"x" * 1216], ["Ed25519", b"f" * 32]], "binding.report-data"),
        ("keys", [["Ed25519", b"e" * 32], ["X-Wing", b"x" * 1216]], "binding.report-data"),
        ("keys", [["X-Wing", b"x" * 1216]], "binding.report-data"),
        ("keys", [], "binding.report-data"),
        ("keys", [["X-Wing", b"x" * 1216], ["Ed25519", b"e" * 32], ["x", b""]], "binding.report-data"),
    ],
)
def test_every_altered_field_of_the_message_is_refused(field, value, code):
    """A verifier that demands the altered value is told so by REPORTDATA."""
    altered = travelled(attest(), **{field: value})
    refused(BindingRefused, code, altered)
    if field != "keys":
        wanted = tuple(value) if isinstance(value, list) else value
        demanded = {field: wanted}
        if field == "role":
            return  # then the configuration is another role's: see below
        refused(BindingRefused, "binding.report-data", altered, **demanded)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"lease_seconds": 3600}},
        {"service": b"T" * 32},
        {"pool": Pool(name="other", policy=policy(WORKER))},
        {"key_service": policy(STRANGER)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_configuration_text_other_than_the_attested_one(change):
    text = dataclasses.replace(CONFIGURATION, **change).to_bytes()
    refused(BindingRefused, "binding.report-data", travelled(attest(), configuration=text))


def test_absent_configuration():
    with pytest.raises(FormatError):
        check(travelled(attest(), configuration=b""))


def test_configuration_of_another_role():
    config = configuration("key-service")
    refused(BindingRefused, "binding.configuration", attest(config=config))


def test_configuration_chosen_by_the_host_with_another_anchor():
    """Genuine measurement, genuine evidence; but its host had it trust the host's own root."""
    other = authority("host").roots_der
    config = EnclaveConfiguration(
        role="worker",
        anchor_roots=other,
        service=SERVICE,
        pool=Pool(name="pool", policy=policy(WORKER, root="host")),
        key_service=policy(KEY_SERVICE, root="host"),
    )
    error = refused(AppraisalRefused, "appraisal.anchor", attest(config=config))
    assert error.claim == "trust anchor"


def test_configuration_whose_policies_trust_another_root_than_it_declares():
    config = dataclasses.replace(CONFIGURATION, key_service=policy(KEY_SERVICE, root="host"))
    refused(AppraisalRefused, "appraisal.anchor", attest(config=config))
    config = dataclasses.replace(CONFIGURATION, pool=Pool(name="pool", policy=policy(WORKER, root="host")))
    refused(AppraisalRefused, "appraisal.anchor", attest(config=config))


def test_simulated_enclave_under_a_production_policy():
    refused(AppraisalRefused, "appraisal.simulated", attest(), policy=policy(WORKER, root=None))


def test_configuration_for_the_vendors_roots_under_a_simulated_policy():
    config = EnclaveConfiguration(
        role="worker",
        anchor_roots=None,
        service=SERVICE,
        pool=Pool(name="pool", policy=policy(WORKER, root=None)),
        key_service=policy(KEY_SERVICE, root=None),
    )
    refused(AppraisalRefused, "appraisal.simulated", attest(config=config))


def test_production_configuration_with_simulated_evidence():
    """The configuration may lie about what it trusts; the evidence still has the simulated root."""
    config = EnclaveConfiguration(
        role="worker",
        anchor_roots=None,
        service=SERVICE,
        pool=Pool(name="pool", policy=policy(WORKER, root=None)),
        key_service=policy(KEY_SERVICE, root=None),
    )
    with pytest.raises(EvidenceRefused):
        check(attest(config=config), policy=policy(WORKER, root=None))


def test_evidence_under_another_root():
    with pytest.raises(EvidenceRefused):
        check(attest(root="host"))


def test_other_measurement_debug_and_time():
    refused(AppraisalRefused, "appraisal.mr_enclave", attest(measurement=STRANGER))
    refused(AppraisalRefused, "appraisal.debug", attest(debug=True))
    with pytest.raises(EvidenceRefused):
        check(attest(), now=NOW + 40 * 86400)
    refused(AppraisalRefused, "appraisal.max-age", attest(), policy=policy(WORKER, max_age=60))


def test_an_empty_policy_refuses_everything():
    with pytest.raises(AppraisalRefused):
        check(attest(), policy=AppraisalPolicy())


def test_evidence_of_another_exchange():
    other = attest(dataclasses.replace(BINDING, freshness=("challenge", b"d" * 56)))
    mixed = dataclasses.replace(attest(), evidence=other.evidence)
    refused(BindingRefused, "binding.report-data", mixed)


# -- the binding itself --------------------------------------------------------


def test_each_part_of_the_binding_changes_report_data():
    variants = [
        BINDING,
        dataclasses.replace(BINDING, purpose="service-document"),
        dataclasses.replace(BINDING, role="key-service"),
        dataclasses.replace(BINDING, service=b"T" * 32),
        dataclasses.replace(BINDING, pool=None),
        dataclasses.replace(BINDING, pool=b""),
        dataclasses.replace(BINDING, keys=()),
        dataclasses.replace(BINDING, keys=BINDING.keys[::-1]),
        dataclasses.replace(BINDING, keys=(("X-Wing", b"x" * 1216 + b"e"), ("Ed25519", b"e" * 31))),
        dataclasses.replace(BINDING, freshness=("epoch", b"c" * 56)),
        dataclasses.replace(BINDING, freshness=("challenge", b"")),
        dataclasses.replace(BINDING, configuration=bytes(32)),
    ]
    digests = {variant.report_data for variant in variants}
    assert len(digests) == len(variants)
    assert {len(digest) for digest in digests} == {64}


@pytest.mark.parametrize("keys", [(), (("a", b"1"), ("a", b"2")), (("b", b"1"),)])
def test_exactly_one_key_of_an_algorithm(keys):
    with pytest.raises(FormatError):
        dataclasses.replace(BINDING, keys=keys).key("a")


@given(st.integers(0, 511))
def test_each_bit_of_report_data_counts(bit):
    wrong = bytearray(BINDING.report_data)
    wrong[bit // 8] ^= 1 << bit % 8
    made = dataclasses.replace(attest(), evidence=evidence(bytes(wrong), WORKER))
    refused(BindingRefused, "binding.report-data", made)


def test_what_holds():
    attested = check(attest())
    assert attested.binding == BINDING
    assert attested.configuration == CONFIGURATION
    assert attested.evidence.measurements["mr_enclave"] == WORKER
    names = [step.name for step in attested.steps]
    assert names[-2:] == ["configuration", "binding"]
    assert all(step.outcome in ("ok", "note") for step in attested.steps)
    assert "simulated anchor" in attested.steps[-2].detail

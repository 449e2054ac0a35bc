"""Trust anchors: immutable, of one kind, and never one's own invention."""

from __future__ import annotations

import copy
import hashlib
import pickle

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.core import encoding
from cloister.core.verifier import TrustAnchors
from cloister.core.verifier.certificates import AMD, load_certificate
from cloister.core.verifier.chain import verify_chain
from cloister.core.verifier.roots import amd, aws, intel
from cloister.core.verifier.roots.amd_intermediates import INTERMEDIATES
from cloister.errors import UsageError
from cloister.sim import pki


def self_signed(name: str, path_length: int | None, signing_key=None) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = pki.issue(
        name,
        key.public_key(),
        issuer=None,
        issuer_key=signing_key or key,
        not_before=0,
        not_after=1,
        path_length=path_length,
    )
    return certificate.public_bytes(Encoding.DER)


def test_embedded_roots_are_the_vendors():
    assert hashlib.sha256(intel.INTEL_SGX_ROOT).digest() == intel.FINGERPRINT
    assert hashlib.sha256(aws.AWS_NITRO_ROOT).digest() == aws.FINGERPRINT
    arks = {"Milan": amd.MILAN_ARK, "Genoa": amd.GENOA_ARK, "Turin": amd.TURIN_ARK}
    assert {name: hashlib.sha256(ark).digest() for name, ark in arks.items()} == amd.FINGERPRINTS
    roots = TrustAnchors.vendor().roots
    assert {kind: tuple(root.der for root in each) for kind, each in roots.items()} == {
        "dcap": (intel.INTEL_SGX_ROOT,),
        "snp": tuple(arks.values()),
        "nitro": (aws.AWS_NITRO_ROOT,),
    }


def test_embedded_root_equals_the_published_one(vectors):
    assert (vectors / "_intel-root" / "TrustedRootCA.der").read_bytes() == intel.INTEL_SGX_ROOT


def test_constructor_is_private():
    with pytest.raises(TypeError):
        TrustAnchors()


def test_anchors_do_not_change(anchors):
    with pytest.raises(AttributeError):
        anchors.is_simulated = False
    with pytest.raises(AttributeError):
        anchors.roots = {}
    with pytest.raises(AttributeError):
        del anchors.roots
    with pytest.raises(TypeError):
        anchors.roots["dcap"] = ()


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_anchors_are_not_copied(duplicate, anchors):
    with pytest.raises(TypeError):
        duplicate(anchors)


def test_digest_names_kind_and_root(anchors, authority):
    roots = (authority.root_der, authority.amd.root_der, authority.nitro.root_der)
    fingerprints = [hashlib.sha256(root).digest() for root in roots]
    assert anchors.digest == encoding.digest(["cloister/v1/trust-anchors", "simulated", fingerprints])
    assert len(TrustAnchors.vendor().digest) == 32
    assert anchors != TrustAnchors.vendor()
    assert anchors == TrustAnchors.simulated(authority.roots_der)
    assert hash(anchors) == hash(TrustAnchors.simulated(authority.roots_der))
    assert (anchors.is_simulated, TrustAnchors.vendor().is_simulated) == (True, False)


@pytest.mark.parametrize(
    "root",
    [
        pytest.param(lambda: intel.INTEL_SGX_ROOT, id="vendor"),
        pytest.param(lambda: self_signed("Some Root CA", 1), id="unmarked"),
        pytest.param(lambda: self_signed("Simulated leaf", None), id="no-ca"),
        pytest.param(lambda: self_signed("Simulated CA", 0), id="short-path"),
        pytest.param(
            lambda: self_signed("Simulated CA", 1, ec.generate_private_key(ec.SECP256R1())),
            id="not-self-signed",
        ),
        pytest.param(lambda: b"", id="empty"),
        pytest.param(lambda: b"\x30" * 100, id="garbage"),
    ],
)
def test_what_is_no_simulated_root(root):
    with pytest.raises(UsageError) as caught:
        TrustAnchors.simulated(root())
    assert caught.value.code == "anchors.simulated-root"


@pytest.mark.parametrize(("product", "signer"), INTERMEDIATES)
def test_embedded_intermediates_are_amds(product, signer):
    """They are no anchors; each is its product's ARK's own, and of its kind."""
    (ark,) = [each for each in TrustAnchors.vendor().roots["snp"] if product in each.common_name]
    made = load_certificate(INTERMEDIATES[product, signer], AMD)
    name = f"SEV-{product}" if signer == "VCEK" else f"SEV-VLEK-{product}"
    assert made.common_name == name
    at = (max(made.not_before, ark.not_before) + min(made.not_after, ark.not_after)) // 2
    verify_chain((made, ark), now=at, code="evidence.snp-chain", what="ASK chain", leaf_is_ca=True)

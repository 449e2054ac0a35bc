"""A user's policy file, and what it makes of a pool."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.core.protocol.document import PoolEntry
from cloister.core.protocol.pool import Pool
from cloister.core.protocol.trust import Consent, UserPolicy
from cloister.core.verifier.policy import MAX_POLICY
from cloister.errors import AccessRefused, AppraisalRefused, UsageError
from support.realm import KEY_SERVICE, STRANGER, WORKER, policy

POLICY = UserPolicy(
    service=b"s" * 32,
    key_service=policy(KEY_SERVICE),
    worker=policy(WORKER),
    consent=Consent(allow_outside_stages=True),
)
TEXT = POLICY.to_toml()


def refused(text: str, code: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        UserPolicy.from_toml(text)
    assert caught.value.code == code, str(caught.value)
    return caught.value


def test_round_trip():
    assert UserPolicy.from_toml(TEXT) == POLICY
    assert UserPolicy.from_toml(TEXT.split("[consent]")[0]).consent == Consent()
    assert POLICY.trust.service == b"s" * 32
    assert POLICY.trust.key_service == policy(KEY_SERVICE)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "policy.keys"),
        ("[", "policy.format"),
        ("\0", "policy.format"),
        ("a = " + "[" * 5000, "policy.format"),
        ("a = " + "1" * 5000, "policy.format"),
        ("a = 1\na = 2", "policy.format"),
        ("x" * (MAX_POLICY + 1), "policy.format"),
        ("a." * 200 + "a = 1", "policy.format"),
        (TEXT + "[other]\n", "policy.keys"),
        ("other = 1\n" + TEXT, "policy.keys"),
        (TEXT.replace("[worker]", "[workers]"), "policy.keys"),
        ('service = "x"\nkey_service = 1\nworker = 1', "policy.service"),
        (f'service = "{"a" * 64}"\nkey_service = 1\nworker = 1', "policy.format"),
        (TEXT.replace("73" * 32, "73" * 31), "policy.service"),
        (TEXT.replace("73" * 32, "zz" * 32), "policy.service"),
        (TEXT.replace('"' + "73" * 32 + '"', "7"), "policy.service"),
        (TEXT.replace("allow_outside_stages = true", "allow_outside_stages = 1"), "policy.consent"),
        (TEXT.replace("allow_outside_stages", "allow_everything"), "policy.consent"),
        (TEXT.split("[consent]")[0] + "consent = 1", "policy.unknown-key"),
        (TEXT.replace("max_age = ", "max_age = nan #"), "policy.max_age"),
        (TEXT.replace("max_age = ", "max_age = -"), "policy.max_age"),
        (TEXT.replace("isv_prod_id = 0", "isv_prod_id = 0.0"), "policy.isv_prod_id"),
        (TEXT.replace('tee = "sgx"', 'tee = "other"'), "policy.tee"),
        (TEXT.replace("any_platform = true", "any_platform = false"), "policy.platforms"),
        (TEXT.replace("6b" * 32, "6b" * 31), "policy.mr_enclave"),
        (TEXT.replace("[worker]\n", "[worker]\nunknown = 1\n"), "policy.unknown-key"),
    ],
)
def test_a_file_that_is_no_policy(text, code):
    refused(text, code)


def test_an_empty_table_is_no_policy():
    refused(f'service = "{"a" * 64}"\n[key_service]\n[worker]\n', "policy.empty")


@given(st.text(max_size=60))
def test_any_text_gives_our_error(text):
    with pytest.raises(UsageError):
        UserPolicy.from_toml(text)


def entry(made: Pool) -> PoolEntry:
    return PoolEntry(pool=made, owner=None, epoch=1, not_after=1, keys=(), models=())


def test_pools_are_accepted_only_where_every_worker_is():
    POLICY.require_pool(entry(Pool(name="p", policy=policy(WORKER))))
    wide = dataclasses.replace(POLICY, worker=policy(WORKER, STRANGER))
    wide.require_pool(entry(Pool(name="p", policy=policy(WORKER))))
    for other in (
        policy(STRANGER),
        policy(WORKER, STRANGER),
        policy(WORKER, root="host"),
        policy(WORKER, root=None),
        policy(WORKER, allowed_tcb=frozenset({"UpToDate", "OutOfDate"})),
        policy(WORKER, max_age=366 * 86400),
    ):
        with pytest.raises(AppraisalRefused) as caught:
            POLICY.require_pool(entry(Pool(name="p", policy=other)))
        assert caught.value.code == "appraisal.not-subset"


def test_shared_pools_need_consent():
    shared = entry(Pool(name="p", policy=policy(WORKER), shared=True))
    with pytest.raises(AccessRefused) as caught:
        POLICY.require_pool(shared)
    assert caught.value.code == "access.shared-pool"
    dataclasses.replace(POLICY, consent=Consent(allow_shared_pools=True)).require_pool(shared)


def test_a_pool_is_named_by_all_that_it_is():
    pool = Pool(name="p", policy=policy(WORKER))
    others = [
        Pool(name="q", policy=policy(WORKER)),
        Pool(name="p", policy=policy(WORKER, STRANGER)),
        Pool(name="p", policy=policy(WORKER), shared=True),
    ]
    assert len({pool.id, *(other.id for other in others)}) == 4
    assert Pool.from_data(pool.to_data()).id == pool.id

"""Workers that attest as TDX, SEV-SNP or Nitro (simulated): each joins a pool whose policy asks for that."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from cloister.cli.site import reference_policy
from cloister.cli.up import create_pool
from cloister.core.protocol.conversation import Trust
from cloister.core.protocol.exchange import PoolCreation
from cloister.core.protocol.pool import Pool
from cloister.core.verifier.appraisal import AnyOf, AppraisalPolicy
from cloister.errors import AppraisalRefused
from cloister.owner.policy import ModelPolicy
from cloister.party.carry import Carrier
from cloister.sim.authority import SimulatedAuthority
from cloister.sim.measurement import measure
from e2e.world import DAY, MODELS, World, world

TEES: Final = ("tdx", "snp", "nitro")


@pytest.fixture(scope="module")
def mixed(shared_root: Path) -> Iterator[World]:
    """A service whose key service is SGX, with a pool of one worker for each other TEE."""
    with world(shared_root / "m", workers=1, models=()) as made:
        for tee in TEES:
            pool = add_pool(made, tee, reference(made, tee))
            add_worker(made, tee, tee)
            publish(made, tee, pool)
        yield made


def reference(made: World, tee: str) -> AppraisalPolicy:
    roots = SimulatedAuthority.open(made.site.authority).roots_der
    return reference_policy(measure("worker"), roots, tee)


def add_pool(made: World, name: str, policy: AppraisalPolicy) -> Pool:
    pool = Pool(name=name, policy=policy)
    user = made.user_policy
    trust, carrier = Trust(service=user.service, key_service=user.key_service), Carrier(made.url)
    try:
        create_pool(made.site, carrier, trust, PoolCreation(pool=pool, owner=made.desk.owner))
    finally:
        carrier.close()
    made.site.write_pool(pool)
    return pool


def add_worker(made: World, name: str, tee: str) -> None:
    settings = json.dumps(made.settings)
    made.service.start(name, "worker", "--name", name, "--pool", name, "--tee", tee, "--settings", settings)


def publish(made: World, name: str, pool: Pool) -> None:
    made.seal(name, MODELS / "digits.onnx")
    policy = ModelPolicy(release=pool.policy, key_service=made.user_policy.key_service)
    with made.publisher() as publisher:
        publisher.publish(name, policy, made.sealed(name), pool=pool.id)
        publisher.grant(name, made.user.user_id(made.desk.owner), int(time.time()) + DAY)


@pytest.mark.parametrize("tee", TEES)
def test_a_worker_of_each_tee_serves(mixed: World, tee: str) -> None:
    either = AnyOf(*(reference(mixed, each) for each in TEES))
    inputs = mixed.sample("digits", seed=1)
    with mixed.client(policy=replace(mixed.user_policy, worker=either)) as client:
        assert mixed.right("digits", inputs, client.infer(mixed.model(tee), inputs))


@pytest.mark.parametrize("tee", TEES)
def test_a_user_who_accepts_another_tee_only_is_refused(mixed: World, tee: str) -> None:
    other = TEES[TEES.index(tee) - 1]
    policy = replace(mixed.user_policy, worker=reference(mixed, other))
    with mixed.client(policy=policy) as client, pytest.raises(AppraisalRefused) as caught:
        client.infer(mixed.model(tee), mixed.sample("digits", seed=1))
    assert (caught.value.code, caught.value.claim) == ("appraisal.not-subset", "tee")


def test_an_owner_does_not_publish_to_a_pool_of_another_tee(mixed: World) -> None:
    mixed.seal("elsewhere", MODELS / "digits.onnx")
    policy = ModelPolicy(release=reference(mixed, "tdx"), key_service=mixed.user_policy.key_service)
    with mixed.publisher() as publisher, pytest.raises(AppraisalRefused) as caught:
        publisher.publish("elsewhere", policy, mixed.sealed("elsewhere"), pool=mixed.site.read_pool("snp").id)
    assert caught.value.claim == "tee"


def test_a_worker_of_another_tee_than_the_pool_asks_for_gets_nothing(mixed: World) -> None:
    wanted = replace(reference(mixed, "snp"), max_age=86400)  # a pool of its own, under another id
    add_pool(mixed, "strict", wanted)
    add_worker(mixed, "strict", "tdx")
    log, until = mixed.site.run_dir("strict") / "enclave.log", time.monotonic() + 30
    while time.monotonic() < until:
        if log.exists() and "appraisal.tee" in log.read_text(errors="replace"):
            break
        time.sleep(0.1)
    else:
        raise AssertionError(log.read_text(errors="replace")[-500:] if log.exists() else "it didn't start")

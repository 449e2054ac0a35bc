"""A host that joins parts of two histories, names another's model, or chooses anchors."""

import asyncio
import copy

import pytest

from cloister.core.encoding import MAX_ITEMS, decode, encode
from cloister.core.protocol.configuration import require_one_anchor
from cloister.core.protocol.pool import Pool
from cloister.core.protocol.release import release_info
from cloister.core.protocol.statement import SealedModel
from cloister.core.sealing import Section, seal
from cloister.core.secret import Secret
from cloister.enclave.worker.membership import LiveModel
from cloister.enclave.worker.models import ModelCache
from cloister.errors import AppraisalRefused, CloisterError, FormatError, Overloaded, Tampered, TransportError
from cloister.owner.model import load_model
from support.realm import WORKER, MemoryHost, Realm, owner_key, policy, statement


def test_an_entry_of_a_fork_does_not_open_in_the_main_line() -> None:
    async def main() -> None:
        realm = await Realm.start()
        await realm.create_pool()
        fork = copy.deepcopy(realm.host.records)
        await realm.publish()

        stranger = owner_key("stranger")
        branched = await Realm.start(MemoryHost(records=fork))
        await branched.publish(statement(branched.id, owner=stranger, name="steal"), owner=stranger)
        row = len(fork["log"]) - 1
        main_line = realm.host.records
        while len(main_line["log"]) < row:
            await realm.service.documents.rotate()
        assert len(main_line["log"]) == row
        await Realm.start(MemoryHost(records=copy.deepcopy(main_line)))  # so far it is whole

        main_line["log"][row.to_bytes(8)] = fork["log"][row.to_bytes(8)]
        with pytest.raises(Tampered) as refused:
            await Realm.start(MemoryHost(records=main_line))
        assert refused.value.code == "sealing.record"

    asyncio.run(main())


def test_a_late_write_of_our_own_is_taken_for_what_it_is() -> None:
    async def main() -> None:
        realm = await Realm.start()
        before = len(realm.service.log.tree)
        host = realm.host
        host.writes = "refused"
        with pytest.raises(CloisterError):
            await realm.service.log.append(
                "refusal", {"code": "x", "pool": b"", "suppressed": 0, "what": "y"}
            )
        host.writes = "ok"
        ((sealed, _),) = realm.service.log._uncertain
        await host.apply([("log", before.to_bytes(8), 0, sealed)])  # the write lands after all
        index = await realm.service.log.append(
            "refusal", {"code": "z", "pool": b"", "suppressed": 0, "what": "y"}
        )
        assert index == before + 1
        again = await Realm.start(MemoryHost(records=realm.host.records))
        assert again.service.log.tree.root(before + 2) == realm.service.log.tree.root(before + 2)

    asyncio.run(main())


def test_a_failed_attestation_leaves_the_epoch_as_it_was() -> None:
    async def main() -> None:
        realm = await Realm.start()
        epoch, raw = realm.service.documents.epochs.current.number, realm.service.documents.raw
        attester = realm.service.documents._attester
        real = attester.evidence

        def fail(_: bytes) -> None:
            raise TransportError("no device")

        attester.evidence = fail  # type: ignore[assignment,method-assign]
        with pytest.raises(TransportError):
            await realm.service.documents.rotate()
        attester.evidence = real  # type: ignore[method-assign]
        assert realm.service.documents.epochs.current.number == epoch
        assert realm.service.documents.raw == raw
        realm.service.documents.sign()
        realm.document()
        await realm.service.documents.rotate()
        assert realm.document().document.epoch > epoch

    asyncio.run(main())


def _sealed(model: str, key: Secret, host: MemoryHost) -> SealedModel:
    import hashlib
    from pathlib import Path

    split = load_model(Path(__file__).parents[2] / "examples" / "models" / "diagnosis.onnx")
    sealing = seal(
        [Section.of("graph", split.graph), Section.of("weights", split.weights)], model_id=model, key=key
    )
    raw = b"".join(sealing)
    blob = hashlib.sha256(raw).digest()
    host.blobs[blob] = raw
    return SealedModel(header=sealing.header.digest, blob=blob, size=len(raw))


def _live(said: object, key: Secret) -> LiveModel:
    return LiveModel(statement=said, digest=said.digest, key=key)  # type: ignore[attr-defined,arg-type]


def test_a_cached_model_is_not_served_under_a_strangers_statement() -> None:
    async def main() -> None:
        host, key = MemoryHost(), Secret(b"k" * 32)
        mine = statement(bytes(32), name="diagnosis")
        sealed = _sealed(mine.model, key, host)
        mine = statement(bytes(32), name="diagnosis", sealed_model=sealed)
        theirs = statement(bytes(32), owner=owner_key("stranger"), name="steal", sealed_model=sealed)
        cache = ModelCache(host, budget=1 << 20)  # type: ignore[arg-type]
        async with cache.use(_live(mine, key)):
            pass
        with pytest.raises(CloisterError) as refused:
            async with cache.use(_live(theirs, Secret(b"x" * 32))):
                pass
        assert refused.value.code == "binding.model"
        async with cache.use(_live(mine, key)) as (_, fresh):
            assert not fresh

    asyncio.run(main())


def test_models_that_are_being_loaded_count_against_the_budget() -> None:
    async def main() -> None:
        host, key = MemoryHost(), Secret(b"k" * 32)
        first, second = (statement(bytes(32), name=name) for name in ("one", "two"))
        first = statement(bytes(32), name="one", sealed_model=_sealed(first.model, key, host))
        second = statement(bytes(32), name="two", sealed_model=_sealed(second.model, key, host))
        async with ModelCache(host, budget=1 << 30).use(_live(first, key)) as (loaded, _):  # type: ignore[arg-type]
            budget = loaded.memory * 3 // 2
        cache = ModelCache(host, budget=budget)  # type: ignore[arg-type]

        async def use(said: object) -> str:
            try:
                async with cache.use(_live(said, key)):
                    await asyncio.sleep(0.05)
                    return "ok"
            except Overloaded as error:
                return error.code

        assert sorted(await asyncio.gather(use(first), use(second))) == ["ok", "overloaded.memory"]
        assert cache.held <= budget
        assert await use(second) == "ok"

    asyncio.run(main())


def test_a_worker_whose_policies_trust_another_root_than_it_declares_gets_nothing() -> None:
    async def main() -> None:
        realm = await Realm.start()
        await realm.create_pool()
        config = realm.worker_configuration(key_service=policy(b"e" * 32, root="other"))
        with pytest.raises(AppraisalRefused) as refused:
            require_one_anchor(config)
        assert refused.value.code == "appraisal.anchor"
        with pytest.raises(AppraisalRefused) as refused:
            await realm.service.release(realm.release_request(config=config))
        assert refused.value.code == "appraisal.anchor"

    asyncio.run(main())


def test_a_worker_that_would_follow_another_key_service_gets_nothing() -> None:
    async def main() -> None:
        realm = await Realm.start()
        await realm.create_pool()
        config = realm.worker_configuration(key_service=policy(b"e" * 32))
        with pytest.raises(AppraisalRefused) as refused:
            await realm.service.release(realm.release_request(config=config))
        assert refused.value.code == "appraisal.mr_enclave"

    asyncio.run(main())


def test_a_message_of_very_many_items_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(FormatError) as refused:
        decode(b"\x9a" + (MAX_ITEMS + 1).to_bytes(4) + b"\x80" * (MAX_ITEMS + 1), what="message")
    assert refused.value.claim == "items"
    assert decode(encode([b"x" * 70_000, "y" * 300, list(range(1000))]), what="message")[2][-1] == 999


def test_a_repeated_wish_gives_the_first_ones_receipt() -> None:
    async def main() -> None:
        realm = await Realm.start()
        await realm.create_pool()
        said = await realm.publish()
        published = await realm.service.publish(realm.publication(said))
        await realm.service.documents.rotate()
        again = await realm.service.publish(realm.publication(said))
        assert again.index == published.index < len(realm.service.log.tree) - 1

    asyncio.run(main())


def test_info_covers_every_part() -> None:
    async def main() -> None:
        realm = await Realm.start()
        await realm.create_pool()
        request = realm.release_request()
        infos = {
            release_info(request, pool=realm.pool.id, statements=()),
            release_info(request, pool=Pool(name="other", policy=policy(WORKER)).id, statements=()),
            release_info(request, pool=realm.pool.id, statements=(bytes(32),)),
            release_info(realm.release_request(), pool=realm.pool.id, statements=()),
        }
        assert len(infos) == 4

    asyncio.run(main())

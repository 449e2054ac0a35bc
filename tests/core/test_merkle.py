"""Merkle trees against the definitions of RFC 9162, section 2.1, written down here once more, recursively."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cloister.core.merkle import EMPTY_ROOT, MAX_PROOF, MerkleTree, verify_consistency, verify_inclusion
from cloister.errors import Rollback, Tampered

ENTRIES = [bytes([index]) * (index % 5) + b"%d" % index for index in range(40)]


def split(n: int) -> int:
    k = 1
    while k * 2 < n:
        k *= 2
    return k


def mth(d: list[bytes]) -> bytes:
    """MTH of RFC 9162, 2.1.1."""
    if not d:
        return hashlib.sha256().digest()
    if len(d) == 1:
        return hashlib.sha256(b"\x00" + d[0]).digest()
    k = split(len(d))
    return hashlib.sha256(b"\x01" + mth(d[:k]) + mth(d[k:])).digest()


def path(m: int, d: list[bytes]) -> list[bytes]:
    """PATH of RFC 9162, 2.1.3.1."""
    if len(d) == 1:
        return []
    k = split(len(d))
    return [*path(m, d[:k]), mth(d[k:])] if m < k else [*path(m - k, d[k:]), mth(d[:k])]


def subproof(m: int, d: list[bytes], b: bool) -> list[bytes]:
    """SUBPROOF of RFC 9162, 2.1.4.1."""
    if m == len(d):
        return [] if b else [mth(d)]
    k = split(len(d))
    if m <= k:
        return [*subproof(m, d[:k], b), mth(d[k:])]
    return [*subproof(m - k, d[k:], False), mth(d[:k])]


def test_roots_are_the_definition():
    tree = MerkleTree(ENTRIES)
    assert tree.root(0) == EMPTY_ROOT == mth([])
    for size in range(1, len(ENTRIES) + 1):
        assert MerkleTree(ENTRIES[:size]).root() == tree.root(size) == mth(ENTRIES[:size])


def test_known_root_of_certificate_transparency():
    """The eight inputs and root of the test suite of Google's Certificate Transparency log (and RFC 6962)."""
    inputs = [
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    ]
    tree = MerkleTree(map(bytes.fromhex, inputs))
    assert tree.root().hex() == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"


def test_proofs_are_the_definition_and_verify():
    tree = MerkleTree(ENTRIES[:33])
    for size in range(1, 34):
        d = ENTRIES[:size]
        for index in range(size):
            proof = tree.inclusion_proof(index, size)
            assert proof == path(index, d)
            verify_inclusion(mth(d), size, index, d[index], proof)
        for first in range(1, size + 1):
            proof = tree.consistency_proof(first, size)
            assert proof == subproof(first, d, True)
            verify_consistency(first, mth(d[:first]), size, mth(d), proof)


def refused_inclusion(*arguments: object) -> None:
    with pytest.raises(Tampered) as caught:
        verify_inclusion(*arguments)
    assert caught.value.code == "tampered.inclusion"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 13])
def test_every_altered_inclusion_proof_is_refused(size):
    d = ENTRIES[:size]
    tree, root = MerkleTree(d), mth(d)
    for index in range(size):
        proof = tree.inclusion_proof(index)
        for other in range(size):
            if other != index:
                refused_inclusion(root, size, other, d[index], proof)
                refused_inclusion(root, size, index, d[other], proof)
        refused_inclusion(bytes(32), size, index, d[index], proof)
        refused_inclusion(root, size, index, d[index], [*proof, bytes(32)])
        refused_inclusion(root, size, index, d[index], [bytes(32), *proof])
        refused_inclusion(root, size, index, b"\x01" + d[index], proof)
        for position in range(len(proof)):
            refused_inclusion(root, size, index, d[index], proof[:position] + proof[position + 1 :])
            altered = bytes([proof[position][0] ^ 1]) + proof[position][1:]
            refused_inclusion(
                root, size, index, d[index], [*proof[:position], altered, *proof[position + 1 :]]
            )
        if len(proof) > 1:
            refused_inclusion(root, size, index, d[index], proof[::-1])


@pytest.mark.parametrize(("size", "index"), [(0, 0), (3, 3), (3, -1), (-1, 0), (3, 1 << 70)])
def test_an_index_outside_the_tree(size, index):
    refused_inclusion(mth(ENTRIES[:3]), size, index, ENTRIES[0], [])


def test_an_inner_node_is_no_leaf():
    """Leaves and nodes are hashed apart: the concatenation of two hashes can't be shown as an entry."""
    d = ENTRIES[:4]
    left = mth(d[:1]) + mth(d[1:2])
    refused_inclusion(mth(d), 2, 0, left, [mth(d[2:])])


def test_a_proof_that_is_too_long_is_refused_early():
    refused_inclusion(bytes(32), 1 << 70, 1, b"x", [bytes(32)] * (MAX_PROOF + 1))


def refused_consistency(code: str, *arguments: object) -> None:
    with pytest.raises(Rollback) as caught:
        verify_consistency(*arguments)
    assert caught.value.code == code


@pytest.mark.parametrize("second", [2, 3, 7, 8, 13])
def test_every_altered_consistency_proof_is_refused(second):
    d = ENTRIES[:second]
    tree = MerkleTree(d)
    for first in range(1, second):
        old, new, proof = mth(d[:first]), mth(d), tree.consistency_proof(first)
        fork = mth([*d[: first - 1], b"another"])
        refused_consistency("rollback.fork", first, fork, second, new, proof)
        refused_consistency("rollback.fork", first, old, second, bytes(32), proof)
        refused_consistency("rollback.fork", first, old, second, new, [])
        refused_consistency("rollback.fork", first, old, second, new, [*proof, bytes(32)])
        for position in range(len(proof)):
            refused_consistency(
                "rollback.fork", first, old, second, new, proof[:position] + proof[position + 1 :]
            )
            altered = bytes([proof[position][-1] ^ 1])
            wrong = [*proof[:position], proof[position][:-1] + altered, *proof[position + 1 :]]
            refused_consistency("rollback.fork", first, old, second, new, wrong)
        for other in range(1, second):
            if other != first:
                refused_consistency("rollback.fork", other, old, second, new, proof)


def test_a_smaller_tree_is_a_rollback():
    refused_consistency("rollback.head", 5, mth(ENTRIES[:5]), 4, mth(ENTRIES[:4]), [])


def test_two_trees_of_one_size_are_the_same():
    verify_consistency(5, mth(ENTRIES[:5]), 5, mth(ENTRIES[:5]), [])
    refused_consistency("rollback.fork", 5, mth(ENTRIES[:5]), 5, mth(ENTRIES[1:6]), [])
    refused_consistency("rollback.fork", 5, mth(ENTRIES[:5]), 5, mth(ENTRIES[:5]), [bytes(32)])


def test_everything_extends_the_empty_tree_and_nothing_else_does():
    verify_consistency(0, EMPTY_ROOT, 5, mth(ENTRIES[:5]), [])
    refused_consistency("rollback.fork", 0, bytes(32), 5, mth(ENTRIES[:5]), [])
    refused_consistency("rollback.fork", 0, EMPTY_ROOT, 5, mth(ENTRIES[:5]), [bytes(32)])


@pytest.mark.parametrize(
    "call",
    [
        lambda tree: tree.root(4),
        lambda tree: tree.root(-1),
        lambda tree: tree.inclusion_proof(3),
        lambda tree: tree.inclusion_proof(-1),
        lambda tree: tree.inclusion_proof(0, 9),
        lambda tree: tree.consistency_proof(0),
        lambda tree: tree.consistency_proof(4),
        lambda tree: tree.consistency_proof(2, 9),
    ],
)
def test_proofs_of_what_is_not_there(call):
    with pytest.raises(ValueError, match=r"tree|leaf|proof"):
        call(MerkleTree(ENTRIES[:3]))


@settings(max_examples=60)
@given(st.lists(st.binary(max_size=8), min_size=1, max_size=70), st.data())
def test_any_tree(d, data):
    tree = MerkleTree()
    assert [tree.append(entry) for entry in d] == list(range(len(d)))
    index = data.draw(st.integers(0, len(d) - 1))
    first = data.draw(st.integers(1, len(d)))
    assert tree.root() == mth(d)
    verify_inclusion(mth(d), len(d), index, d[index], tree.inclusion_proof(index))
    verify_consistency(first, mth(d[:first]), len(d), mth(d), tree.consistency_proof(first))


@given(
    st.integers(-2, 40),
    st.integers(-2, 40),
    st.lists(st.binary(min_size=32, max_size=32), max_size=8),
    st.binary(min_size=32, max_size=32),
)
def test_made_up_proofs_give_our_errors(size, index, proof, root):
    refused_inclusion(root, size, index, b"entry", proof)
    assume(root != bytes(32))
    with pytest.raises(Rollback):
        verify_consistency(index, root, size, bytes(32), proof)

"""Merkle trees of RFC 9162, section 2.1: heads, inclusion proofs and consistency proofs.

`MerkleTree` keeps every complete subtree's hash, so that appending costs O(1) hashes on average and each
proof O(log n).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final

from cloister.errors import Rollback, Tampered

HASH_SIZE: Final = 32  # bytes
MAX_PROOF: Final = 64  # hashes in a proof; a tree has fewer than 2**63 leaves
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()


def leaf_hash(entry: bytes) -> bytes:
    """Hash of a leaf (32 bytes)."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of an inner node (32 bytes)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class MerkleTree:
    """An append-only tree over leaf hashes, held in memory."""

    __slots__ = ("_levels",)

    def __init__(self, entries: Iterable[bytes] = ()) -> None:
        self._levels: list[list[bytes]] = [[]]
        for entry in entries:
            self.append(entry)

    def __len__(self) -> int:
        return len(self._levels[0])

    def append(self, entry: bytes) -> int:
        """Add an entry; returns its index."""
        node, level = leaf_hash(entry), 0
        index = len(self)
        while True:
            row = self._levels[level]
            row.append(node)
            if len(row) % 2:
                return index
            node, level = node_hash(row[-2], row[-1]), level + 1
            if level == len(self._levels):
                self._levels.append([])

    def root(self, size: int | None = None) -> bytes:
        """Root over the first ``size`` leaves, by default over all (32 bytes)."""
        size = len(self) if size is None else size
        return self._range(0, self._checked(size)) if size else EMPTY_ROOT

    def inclusion_proof(self, index: int, size: int | None = None) -> list[bytes]:
        """Path from leaf ``index`` to the root over ``size`` leaves (RFC 9162, 2.1.3.1)."""
        size = self._checked(len(self) if size is None else size)
        if not 0 <= index < size:
            raise ValueError(f"no leaf {index} in a tree of {size}")
        path: list[bytes] = []
        start, stop = 0, size
        while stop - start > 1:
            split = start + _split(stop - start)
            if index < split:
                path.append(self._range(split, stop))
                stop = split
            else:
                path.append(self._range(start, split))
                start = split
        return path[::-1]

    def consistency_proof(self, first: int, second: int | None = None) -> list[bytes]:
        """Proof that the tree of ``second`` leaves extends the tree of ``first`` (RFC 9162, 2.1.4.1)."""
        second = self._checked(len(self) if second is None else second)
        if not 0 < first <= second:
            raise ValueError(f"no proof from {first} to {second} leaves")
        path: list[bytes] = []
        start, stop, whole = 0, second, True
        while first != stop:
            split = start + _split(stop - start)
            if first <= split:
                path.append(self._range(split, stop))
                stop = split
            else:
                path.append(self._range(start, split))
                start, whole = split, False
        if not whole:
            path.append(self._range(start, stop))
        return path[::-1]

    def _checked(self, size: int) -> int:
        if not 0 <= size <= len(self):
            raise ValueError(f"no tree of {size} leaves in one of {len(self)}")
        return size

    def _range(self, start: int, stop: int) -> bytes:
        width = stop - start
        if width & (width - 1) == 0 and start % width == 0:
            return self._levels[width.bit_length() - 1][start // width]
        split = start + _split(width)
        return node_hash(self._range(start, split), self._range(split, stop))


def verify_inclusion(root: bytes, size: int, index: int, entry: bytes, path: Sequence[bytes]) -> None:
    """Check that ``entry`` is leaf ``index`` of the tree (RFC 9162, 2.1.3.2).

    Raises:
        Tampered: the path does not lead to the root.
    """
    valid = 0 <= index < size and len(path) <= MAX_PROOF
    node, position, last = leaf_hash(entry), index, size - 1
    for sibling in path if valid else ():
        if last == 0:
            valid = False
            break
        if position % 2 or position == last:
            node = node_hash(sibling, node)
            while position % 2 == 0 and position:
                position, last = position >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        position, last = position >> 1, last >> 1
    if not valid or last or node != root:
        raise Tampered(
            code="tampered.inclusion",
            claim="inclusion in the tree",
            expected=root.hex(),
            actual="another root",
        )


def verify_consistency(
    first: int, first_root: bytes, second: int, second_root: bytes, path: Sequence[bytes]
) -> None:
    """Check that the second tree extends the first (RFC 9162, 2.1.4.2).

    Raises:
        Rollback: the second tree is smaller, or is not an extension of the first.
    """
    if second < first:
        raise Rollback(code="rollback.head", claim="tree size", expected=f"at least {first}", actual=second)
    if not _is_consistent(first, first_root, second, second_root, path):
        raise Rollback(
            "the log was rewritten",
            code="rollback.fork",
            claim=f"consistency with the tree head of size {first}",
            expected=first_root.hex(),
            actual="a tree that does not extend it",
        )


def _is_consistent(
    first: int, first_root: bytes, second: int, second_root: bytes, path: Sequence[bytes]
) -> bool:
    if first == second:
        return first_root == second_root and not path
    if first == 0:
        return first_root == EMPTY_ROOT and not path
    proof = list(path)
    if first & (first - 1) == 0:
        proof.insert(0, first_root)
    if not proof or len(proof) > MAX_PROOF:
        return False
    position, last = first - 1, second - 1
    while position % 2:
        position, last = position >> 1, last >> 1
    older = newer = proof[0]
    for sibling in proof[1:]:
        if last == 0:
            return False
        if position % 2 or position == last:
            older, newer = node_hash(sibling, older), node_hash(sibling, newer)
            while position % 2 == 0 and position:
                position, last = position >> 1, last >> 1
        else:
            newer = node_hash(newer, sibling)
        position, last = position >> 1, last >> 1
    return last == 0 and older == first_root and newer == second_root


def _split(size: int) -> int:
    """The largest power of two smaller than ``size``."""
    return 1 << (size - 1).bit_length() - 1

"""Challenges that cost no memory until used: nonce, expiry, MAC; each is good once (DESIGN, 4.2 and 4.5)."""

from __future__ import annotations

import hmac
import os
from collections import OrderedDict
from typing import Final

from cloister.core.secret import Secret
from cloister.errors import BindingRefused, Overloaded, Replayed

LIFETIME: Final = 60  # seconds
MAX_SPENT: Final = 100_000


class Challenges:
    """Issues challenges and takes each back once. Its key lives and dies with this object."""

    def __init__(self) -> None:
        self._key = Secret(os.urandom(32))
        self._spent: OrderedDict[bytes, int] = OrderedDict()

    def issue(self, now: int) -> bytes:
        """A fresh challenge (56 bytes), good for a minute."""
        head = os.urandom(16) + (now + LIFETIME).to_bytes(8)
        return head + self._mac(head)

    def require(self, challenge: bytes, now: int) -> None:
        """Refuse a challenge that isn't ours or isn't fresh; costs one MAC.

        Raises:
            BindingRefused: not issued by this object, which dies with its enclave, or expired.
            Replayed: spent already.
        """
        head, mac = challenge[:24], challenge[24:]
        if not hmac.compare_digest(mac, self._mac(head)):
            raise BindingRefused(
                code="binding.challenge",
                claim="challenge",
                expected="one of this start",
                actual="another",
            )
        expiry = int.from_bytes(head[16:])
        if expiry < now:
            raise BindingRefused(
                code="binding.challenge-expired",
                claim="challenge expiry",
                expected=f"at least {now}",
                actual=expiry,
            )
        if challenge in self._spent:
            raise Replayed(
                code="replayed.challenge", claim="challenge", expected="unused", actual="used before"
            )

    def spend(self, challenge: bytes, now: int) -> None:
        """Take a challenge back; raises as `require` does, and Overloaded where too many are outstanding."""
        self.require(challenge, now)
        while self._spent and next(iter(self._spent.values())) < now:
            self._spent.popitem(last=False)
        if len(self._spent) >= MAX_SPENT:
            raise Overloaded(
                claim="challenges spent in a minute", expected=f"at most {MAX_SPENT}", actual=len(self._spent)
            )
        self._spent[challenge] = int.from_bytes(challenge[16:24])

    def _mac(self, head: bytes) -> bytes:
        return hmac.digest(self._key.reveal(), head, "sha256")

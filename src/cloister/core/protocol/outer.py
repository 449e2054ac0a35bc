"""Header fields of the outer ``POST /ohttp``. The host reads, sets and may forge them: they decide nothing.

They route a request, or keep strangers from what costs an enclave work; what an enclave tells apart by them
is only who may waste its time.
"""

from __future__ import annotations

from typing import Final

POOL: Final = b"cloister-pool"  # pool id in hex, or KEY_SERVICE
KEY_SERVICE: Final = b"key-service"
MODEL: Final = b"cloister-model"  # hint
DEADLINE: Final = b"cloister-deadline"  # hint
SENDER: Final = b"cloister-sender"  # set by the gateway, by the socket that a request came through
OPERATOR: Final = b"operator"
ENCLAVE: Final = b"enclave"

"""Stand-ins for what these tests don't test: the authority behind the device, and the enclave's program."""

from __future__ import annotations

import shutil
from pathlib import Path

from cloister.core.encoding import encode
from cloister.core.evidence.bundle import Collateral
from cloister.core.secret import Secret
from cloister.sim.image import installed_source

# An enclave whose configuration is its program: each test writes what its enclave does.
MAIN = """
import os, sys
from pathlib import Path
role, run_dir = sys.argv[1], Path(sys.argv[2])
exec(compile((run_dir / "configuration").read_text(), "configuration", "exec"))
"""

# Answers GET /healthz with 200 until SIGTERM.
SERVER = """
import asyncio, signal
async def answer(reader, writer):
    await reader.readuntil(b"\\r\\n\\r\\n")
    writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n")
    writer.close()
async def serve():
    end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end.set)
    server = await asyncio.start_unix_server(answer, str(run_dir / "enclave.sock"))
    await end.wait()
    print("ended in order", flush=True)
asyncio.run(serve())
"""


def fake_source(folder: Path) -> Path:
    """A copy of the installed package whose enclave runs `MAIN`."""
    real, source = installed_source(), folder / "cloister"
    ignore = shutil.ignore_patterns("__pycache__")
    for part in ("core", "net"):
        shutil.copytree(real / part, source / part, ignore=ignore)
    shutil.copytree(real / "enclave" / "attester", source / "enclave" / "attester", ignore=ignore)
    shutil.copy(real / "errors.py", source / "errors.py")
    (source / "__init__.py").write_text("")
    (source / "enclave" / "__init__.py").write_text("")
    (source / "enclave" / "__main__.py").write_text(MAIN)
    return source


class FakeAuthority:
    """Its quotes are the plain values, so that a test can read what would have been signed."""

    def collateral(self, now: int) -> Collateral:
        part = str(now).encode()
        return Collateral(
            pck_crl_issuer_chain=part,
            root_ca_crl=part,
            pck_crl=part,
            tcb_info_issuer_chain=part,
            tcb_info=part,
            tcb_info_signature=bytes(64),
            qe_identity_issuer_chain=part,
            qe_identity=part,
            qe_identity_signature=bytes(64),
        )

    def quote(
        self,
        *,
        report_data: bytes,
        mr_enclave: bytes,
        mr_signer: bytes,
        isv_prod_id: int,
        isv_svn: int,
        debug: bool = False,
        now: int,
    ) -> bytes:
        return encode([report_data, mr_enclave, mr_signer, isv_prod_id, isv_svn, debug, now])

    def sealing_key(self, mr_enclave: bytes) -> Secret:
        return Secret(bytes(reversed(mr_enclave)))

"""A real HTTP server on this machine that plays Intel's PCS and AMD's KDS, with simulated wares."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from cloister.core.evidence.bundle import AmdCollateral, Collateral
from cloister.core.evidence.pem import to_pem
from cloister.core.verifier.certificates import AMD, load_chain
from cloister.sim.authority import SimulatedAuthority
from cloister.sim.snp import SimulatedAmd

NOW = int(time.time())  # commands have no other clock
Answer = tuple[int, dict[str, str], bytes]


class VendorServer:
    """Serves until closed.

    Attributes:
        asked: Path and query of every request.
        replaced: For a path, the answer that it gets instead: a status, or a function of the proper answer.
        pause: Seconds between two bytes of a body, for a service that drips.
        head_pause: Seconds between two header fields, of which there are very many.
        hex_lists: Whether revocation lists come as hex text, as from a PCCS.
    """

    def __init__(self, intel: SimulatedAuthority, amd: SimulatedAmd, now: int) -> None:
        self.collateral: dict[str, Collateral] = {
            tee: intel.collateral(now, tee=tee) for tee in ("sgx", "tdx")
        }
        self.amd, self.amd_collateral = amd, amd.collateral(now)
        self.asked: list[str] = []
        self.replaced: dict[str, int | Callable[[Answer], Answer]] = {}
        self.pause = self.head_pause = 0.0
        self.hex_lists = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.asked.append(self.path)
                if outer.head_pause:
                    self.drip_head()
                    return
                status, fields, body = outer.answer(self.path)
                self.send_response(status)
                for name, value in fields.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                try:
                    if outer.pause:
                        for at in range(len(body)):
                            time.sleep(outer.pause)
                            self.wfile.write(body[at : at + 1])
                    else:
                        self.wfile.write(body)
                except OSError:
                    self.close_connection = True  # the client has given up

            def drip_head(self) -> None:
                self.close_connection = True
                with contextlib.suppress(OSError):  # the client has given up
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                    for number in range(500):
                        time.sleep(outer.head_pause)
                        self.wfile.write(b"x-%d: y\r\n" % number)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, target: str) -> Answer:
        parts = urlsplit(target)
        replaced = self.replaced.get(parts.path)
        if isinstance(replaced, int):
            return replaced, {}, b"{}"
        proper = self._answer(parts.path, {name: value[0] for name, value in parse_qs(parts.query).items()})
        return replaced(proper) if replaced else proper

    def _answer(self, path: str, query: dict[str, str]) -> Answer:
        steps = path.strip("/").split("/")
        if steps[1:3] == ["certification", "v4"] and steps[0] in self.collateral:
            return self._pcs(self.collateral[steps[0]], "/".join(steps[3:]), query)
        if steps[:2] == ["vcek", "v1"] and steps[2] == self.amd.product:
            return self._kds(self.amd_collateral, steps[3], query)
        return 404, {}, b""

    def _pcs(self, collateral: Collateral, what: str, query: dict[str, str]) -> Answer:
        if what == "tcb":
            fmspc = json.loads(collateral.tcb_info)["fmspc"]
            if query.get("fmspc") != fmspc or query.get("update") not in ("standard", "early"):
                return 404, {}, b""
            field = {"TCB-Info-Issuer-Chain": _encoded(collateral.tcb_info_issuer_chain)}
            return 200, field, _signed("tcbInfo", collateral.tcb_info, collateral.tcb_info_signature)
        if what == "qe/identity":
            field = {"SGX-Enclave-Identity-Issuer-Chain": _encoded(collateral.qe_identity_issuer_chain)}
            body = _signed("enclaveIdentity", collateral.qe_identity, collateral.qe_identity_signature)
            return 200, field, body
        if what == "pckcrl" and query == {"ca": "processor", "encoding": "der"}:
            field = {"SGX-PCK-CRL-Issuer-Chain": _encoded(collateral.pck_crl_issuer_chain)}
            return 200, field, self._list(collateral.pck_crl)
        if what == "rootcacrl":
            return 200, {}, self._list(collateral.root_ca_crl)
        return 404, {}, b""

    def _list(self, der: bytes) -> bytes:
        return der.hex().encode() if self.hex_lists else der

    def _kds(self, collateral: AmdCollateral, what: str, query: dict[str, str]) -> Answer:
        vcek, ask, ark = load_chain(collateral.certificates, AMD)
        if what == "cert_chain":
            return 200, {}, (to_pem(ask.der) + to_pem(ark.der)).encode()
        if what == "crl":
            return 200, {}, collateral.crl
        tcb = self.amd.tcb
        wanted = {"blSPL": tcb.bootloader, "teeSPL": tcb.tee, "snpSPL": tcb.snp, "ucodeSPL": tcb.microcode}
        if tcb.fmc is not None:
            wanted["fmcSPL"] = tcb.fmc
        chip = self.amd.chip_id[:8] if self.amd.product == "Turin" else self.amd.chip_id
        if what == chip.hex() and query == {name: str(value) for name, value in wanted.items()}:
            return 200, {}, vcek.der
        return 404, {}, b""


def _encoded(pem: bytes) -> str:
    return quote(pem.decode(), safe="")


def _signed(name: str, text: bytes, signature: bytes) -> bytes:
    return b'{"' + name.encode() + b'":' + text + b',"signature":"' + signature.hex().encode() + b'"}'

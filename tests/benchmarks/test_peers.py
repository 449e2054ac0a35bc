"""Peers: measured in turns with Cloister where they serve, reported with the reason where they don't."""

from __future__ import annotations

import json
import shutil
import stat
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.peers import Peer  # noqa: E402

from benchmarks import peers  # noqa: E402

GOOD = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from bare import PORT, Bare

model = Bare()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        answer = model.run(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
"""


@pytest.fixture
def envs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Environments of three peers: one that serves, one that ends at once, one that isn't there."""
    servers = tmp_path / "servers"
    servers.mkdir()
    shutil.copy(peers.SERVERS / "bare.py", servers)
    (servers / "good.py").write_text(GOOD)
    (servers / "dead.py").write_text("raise SystemExit('this peer needs another kernel')")
    known = {name: Peer(file=f"{name}.py", packages=("numpy",)) for name in ("good", "dead", "absent")}
    monkeypatch.setattr(peers, "SERVERS", servers)
    monkeypatch.setattr(peers, "PEERS", known)
    folder = tmp_path / "envs"
    for name in ("good", "dead"):
        python = folder / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        (folder / name / "installed").write_text("numpy")
    return folder


def test_a_peer_is_measured_or_the_reason_is_told(envs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--model", "digits", "--clients", "1", "4", "--runs", "1", "--seconds", "0.3", "--no-install"]
    peers.run([*short, "--envs", str(envs)]).show()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["peers"].keys() == {"good"}
    for clients in ("1", "4"):
        measured = found["peers"]["good"][clients]
        assert measured["peer_rps"] > 0
        assert measured["cloister_rps"] > 0
        assert measured["peer_errors"] == measured["cloister_errors"] == {}
        ratio = measured["cloister_rps"] / measured["peer_rps"]
        assert found["ratio_to_best"][clients] == pytest.approx(ratio, rel=1e-2)
    assert "this peer needs another kernel" in found["not_measured"]["dead"]
    assert found["not_measured"]["absent"] == "not installed, and --no-install was given"


def test_what_installs_wrongly_is_told_without_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "PEERS", {"odd": Peer(file="odd.py", packages=("./no-such-folder/odd",))})
    with pytest.raises(peers.NotMeasured, match=r"not installed: .*odd") as told:
        peers._environment("odd", tmp_path, install=True)
    assert "://" not in str(told.value)
    assert not (tmp_path / "odd" / "installed").exists()


def test_an_environment_of_other_packages_is_not_used(envs: Path) -> None:
    (envs / "good" / "installed").write_text("numpy something-else")
    with pytest.raises(peers.NotMeasured):
        peers._environment("good", envs, install=False)


def test_every_peer_has_its_server() -> None:
    for peer in peers.PEERS.values():
        text = (peers.SERVERS / peer.file).read_text()
        assert "Settings: " in text
        compile(text, peer.file, "exec")

"""The command line with real processes: what scripts see, and what is left when it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cloister
from cloister.cli import main
from e2e.malicious import eventually
from e2e.world import MODELS, World, processes_of

SOURCE = Path(cloister.__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Ran:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object that it printed."""
        (line,) = self.out.strip().splitlines()
        return dict(json.loads(line))


def run(*arguments: object, source: Path | None = None, cwd: Path | None = None) -> Ran:
    """Run ``cloister`` with arguments."""
    environment = dict(os.environ)
    if source is not None:
        environment["PYTHONPATH"] = str(source)
    done = subprocess.run(
        [sys.executable, "-m", "cloister.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        cwd=cwd,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return Ran(done.returncode, done.stdout, done.stderr)


Here = Callable[..., Ran]


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """Runs ``cloister`` in this process, as its entry point does: for what needs no process of its own."""

    def run_here(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["cloister", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
            raise SystemExit(0)
        out, err = capsys.readouterr()
        return Ran(int(ended.value.code or 0), out, err)

    return run_here


def refused(*arguments: object) -> dict[str, Any]:
    """The error that a command reports with ``--json``; without it, it is one line."""
    plain = run(*arguments)
    assert plain.code == 1
    assert plain.out == ""
    assert len(plain.err.strip().splitlines()) == 1
    scripted = run(*arguments, "--json")
    assert scripted.code == 1
    assert scripted.json["error"] in plain.err
    return scripted.json


@dataclass(frozen=True, slots=True)
class Desk:
    """Files of an owner and a user who use the command line only."""

    world: World
    root: Path

    @property
    def desk(self) -> tuple[str, Path]:
        return "--desk", self.root / "desk"

    @property
    def user(self) -> tuple[str, Path]:
        return "--identity", self.root / "user.identity"

    @property
    def owner_side(self) -> tuple[object, ...]:
        return (*self.desk, "--service-policy", self.world.site.user_policy)

    @property
    def user_side(self) -> tuple[object, ...]:
        return (*self.user, "--policy", self.world.site.user_policy)


@pytest.fixture(scope="module")
def desk(shared_root: Path, service: World) -> Desk:
    return Desk(service, shared_root / "cli")


@pytest.fixture(scope="module")
def image(shared_root: Path, service: World) -> Path:
    path = shared_root / "image.npy"
    np.save(path, service.sample("digits", 5)["image"])
    return path


# A whole session, as an owner and a user would have it.


def test_an_owner_and_a_user_get_from_nothing_to_an_answer(desk: Desk, service: World, image: Path) -> None:
    pool = service.new_pool("of-the-command-line").id.hex()
    from e2e.malicious import MaliciousHost

    owner = run("owner", "init", *desk.desk, "--json").json["owner"]
    sealed = run("owner", "seal", "digits", MODELS / "digits.onnx", *desk.desk, "--json").json
    assert sealed["model"] == f"{owner}/digits"
    assert run("user", "init", *desk.user, "--json").code == 0
    user = run("user", "id", owner, *desk.user, "--json").json["user"]
    assert run("user", "id", owner, *desk.user).out.strip() == user
    published = run(
        *("owner", "publish", "digits", service.url, *desk.owner_side, "--pool", pool),
        *("--policy", service.site.model_policy, "--json"),
    ).json
    assert published["version"] == 1
    infer = ("infer", service.url, f"{owner}/digits", "--input", f"image={image}", *desk.user_side)
    with MaliciousHost() as host:  # honest here: it only runs the pool's worker
        host.worker(service.site, "cli-1", pool="of-the-command-line").start()
        assert refused(*infer)["error"] == "access.grant"
        assert (
            run("owner", "grant", "digits", user, service.url, *desk.owner_side, "--json").json["grants"] == 1
        )
        answered = run(*infer, "--json").json
        inputs = {"image": np.load(image)}
        outputs = {name: np.array(value, dtype=np.float32) for name, value in answered["outputs"].items()}
        assert service.right("digits", inputs, outputs)
        assert set(answered["stages_ms"]) >= {"decrypt", "run", "enclave"}
        assert "probabilities" in run(*infer).out
        written = desk.root / "out.npz"
        assert run(*infer, "--output", written).code == 0
        assert service.right("digits", inputs, dict(np.load(written)))
        assert (
            run("owner", "revoke", "digits", user, service.url, *desk.owner_side, "--json").json["grants"]
            == 0
        )
        assert refused(*infer)["error"] == "access.grant"
        assert (
            refused("owner", "revoke", "digits", user, service.url, *desk.owner_side)["error"]
            == "not-found.grant"
        )


def test_verify_prints_every_step(service: World) -> None:
    record = run("verify", service.url, "--policy", service.site.user_policy, "--json").json
    assert record["simulated"] is True
    assert record["service"] == service.user_policy.service.hex()
    names = [step["name"] for step in record["steps"]]
    assert {"simulated", "mr_enclave", "possession", "audit log", "configuration"} <= set(names)
    shown = run("verify", service.url, "--policy", service.site.user_policy)
    assert shown.code == 0
    assert "simulated" in shown.out


# Refusals: exit status 1, one line or one JSON object.


def test_commands_refuse_bad_files_by_name(here: Here, service: World, image: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\xff = nan")
    absent = tmp_path / "absent"
    url, model = service.url, service.model("digits")
    fresh = ("--desk", tmp_path / "desk")
    assert here("owner", "init", *fresh).code == 0
    user = ("--identity", tmp_path / "u.identity")
    assert here("user", "init", *user).code == 0
    policy = ("--policy", service.site.user_policy)
    nan = tmp_path / "nan.toml"
    nan.write_text(re.sub(r"max_age = \d+", "max_age = nan", service.site.user_policy.read_text()))
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    for code, *arguments in (
        ("file.read", "verify", url, "--policy", absent),
        ("file.read", "verify", url, "--policy", broken),
        ("policy.keys", "verify", url, "--policy", empty),
        ("policy.max_age", "verify", url, "--policy", nan),
        ("owner.desk", "owner", "init", *fresh),
        ("owner.key", "owner", "seal", "x", MODELS / "digits.onnx", "--desk", absent),
        ("model.format", "owner", "seal", "x", broken, *fresh),
        ("identity.file", "user", "init", *user),
        ("identity.file", "user", "id", "00" * 32, "--identity", absent),
        ("policy.owner", "user", "id", "xyz", *user),
        ("infer.input", "infer", url, model, "--input", f"image={broken}", *policy, *user),
        ("infer.input", "infer", url, model, "--input", f"image={absent}", *policy, *user),
        ("infer.input", "infer", url, model, "--input", "image", *policy, *user),
        ("identity.file", "infer", url, model, "--input", f"image={image}", *policy, "--identity", absent),
        ("access.grant", "infer", url, model, "--input", f"image={image}", *policy, *user),
        ("format", "infer", url, "no-model", "--input", f"image={image}", *policy, *user),
        ("transport", "verify", "http://127.0.0.1:9", *policy),
        (
            "owner.model",
            "owner",
            "grant",
            "x",
            "00" * 32,
            url,
            *fresh,
            "--service-policy",
            service.site.user_policy,
        ),
    ):
        error = here(*arguments, "--json")
        assert error.code == 1, (code, error)
        assert error.json["error"].startswith(code), (code, error)
    assert refused("verify", url, "--policy", nan)["claim"] == "max_age"


def test_an_unreadable_key_file_is_refused(tmp_path: Path) -> None:
    """Unreadable to everyone, also to root: a folder stands in its place."""
    (tmp_path / "user.identity").mkdir()
    error = refused("user", "id", "00" * 32, "--identity", tmp_path / "user.identity")
    assert error["error"] == "identity.file"


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("verify",),
        ("up", "--workers", "0"),
        ("up", "--workers", "many"),
        ("up", "--port", "70000"),
        ("owner", "nonsense"),
        ("owner", "grant", "x"),
        ("infer", "http://127.0.0.1:9"),
        ("measure", "--nonsense"),
        ("user", "id"),
    ],
)
def test_wrong_usage_exits_2(here: Here, arguments: tuple[str, ...]) -> None:
    ran = here(*arguments)
    assert ran.code == 2
    assert ran.out == ""


# Reference values.


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Another copy of the source, elsewhere."""
    target = tmp_path / "elsewhere" / "src"
    shutil.copytree(SOURCE, target / "cloister", ignore=shutil.ignore_patterns("__pycache__"))
    return target


def test_measure_is_the_same_for_the_same_source_elsewhere(here: Here, copy: Path) -> None:
    ours = here("measure", "--json").json
    assert here("measure", "--json", "--source", copy / "cloister").json == ours
    assert run("measure", "--json", source=copy, cwd=copy).json == ours
    assert ours["worker"]["mr_enclave"] != ours["key-service"]["mr_enclave"]


@pytest.mark.parametrize("name", ["core/merkle.py", "enclave/worker/routes.py", "net/http1.py", "errors.py"])
def test_measure_differs_after_one_changed_byte(here: Here, copy: Path, name: str) -> None:
    before = here("measure", "--json", "--source", copy / "cloister").json
    path = copy / "cloister" / name
    path.write_bytes(path.read_bytes().replace(b"e", b"E", 1))
    after = here("measure", "--json", "--source", copy / "cloister").json
    for role in ("worker", "key-service"):
        assert after[role]["mr_enclave"] != before[role]["mr_enclave"]


def test_measure_does_not_depend_on_what_is_not_measured(here: Here, copy: Path) -> None:
    before = here("measure", "--json", "--source", copy / "cloister").json
    path = copy / "cloister" / "cli" / "up.py"
    path.write_bytes(path.read_bytes() + b"\n")
    assert here("measure", "--json", "--source", copy / "cloister").json == before


def test_measure_refuses_a_folder_that_is_no_source(tmp_path: Path) -> None:
    assert refused("measure", "--source", tmp_path)["error"].startswith("measurement.")


# ``cloister up``.


def test_up_serves_and_leaves_no_process_behind(folder: Callable[[str], Path]) -> None:
    data = folder("up") / "site"
    command = [
        *(sys.executable, "-m", "cloister.cli", "up", "--json"),
        *("--data", str(data), "--port", "0", "--workers", "1", "--memory-mib", "64"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            facts = json.loads(process.stdout.readline())
            assert facts["data"] == str(data)
            verified = run("verify", facts["url"], "--policy", data / "user-policy.toml", "--json").json
            assert verified["service"] == facts["service"]
            assert [pool["pool"] for pool in verified["pools"]] == [facts["pool"]]
            assert len(processes_of(data)) >= 4
        finally:
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in out + err
    eventually(lambda: not processes_of(data), "every process ended")
    assert not list(data.rglob("*.sock"))
    _restarts_on_its_store(command, data, facts)


def _restarts_on_its_store(command: list[str], data: Path, facts: dict[str, str]) -> None:
    """The same data directory is the same service; killing `up` outright leaves nothing behind either."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        again = json.loads(process.stdout.readline())
        assert (again["service"], again["pool"]) == (facts["service"], facts["pool"])
        process.kill()
        process.wait()
    eventually(lambda: not processes_of(data), "the roles followed their parent")


def test_up_interrupted_while_it_starts_leaves_no_process_behind(folder: Callable[[str], Path]) -> None:
    data = folder("early") / "site"
    command = [sys.executable, "-m", "cloister.cli", "up", "--json", "--data", str(data), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        eventually(lambda: len(processes_of(data)) >= 3, "it starts its roles")
        process.terminate()
        _, err = process.communicate(timeout=30)
    assert "Traceback" not in err
    eventually(lambda: not processes_of(data), "every process ended")


def test_up_refuses_a_port_that_is_taken(service: World, folder: Callable[[str], Path]) -> None:
    data = folder("taken") / "site"
    port = service.url.rpartition(":")[2]
    started = time.monotonic()
    error = run("up", "--json", "--data", data, "--port", port)
    assert error.code == 1
    assert error.json["error"] == "up.start"
    assert time.monotonic() - started < 20
    eventually(lambda: not processes_of(data), "every process ended")


def test_up_refuses_a_data_directory_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "site"
    path.write_text("")
    assert run("up", "--json", "--data", path).json["error"] == "site.directory"

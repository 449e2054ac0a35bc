"""The command line with real processes: what scripts see, and what is left when it ends."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cloister
from cloister.cli import _COMMANDS, _EXTRAS, _how_to_install, main
from cloister.cli.output import report, table
from cloister.cli.owner import _user_id
from cloister.cli.up import SETTING_HELP
from cloister.core.evidence.pem import to_pem
from cloister.core.protocol.configuration import SETTINGS
from cloister.core.protocol.trust import UserPolicy
from cloister.core.verifier.anchors import split_certificates
from cloister.errors import AppraisalRefused, UsageError
from cloister.owner.policy import ModelPolicy
from cloister.sim.authority import SimulatedAuthority
from e2e.malicious import eventually
from e2e.world import MODELS, World, processes_of

SOURCE = Path(cloister.__file__).resolve().parent
ROOT = SOURCE.parents[1]


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
    assert refused("verify", url, "--policy", nan)["claim"] == "[key_service].max_age"


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
        ("up", "--lease-seconds", "1"),
        ("up", "--worker-tee", "abacus"),
        ("gateway", "--port", "-1"),
        ("pool", "create"),
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


def test_measure_says_with_which_python(here: Here) -> None:
    version = f"CPython {platform.python_version()} on "
    assert here("measure", "--json").json["python"].startswith(version)
    lines = here("measure").out.splitlines()
    assert any(version in line and "differ between Python versions" in line for line in lines)


ID = "5a" * 32


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Roots of a simulated platform (PEM)."""
    folder = tmp_path_factory.mktemp("authority")
    made = SimulatedAuthority.create(folder, now=int(time.time())).roots_der
    path = folder / "roots.pem"
    path.write_text("".join(map(to_pem, split_certificates(made))))
    return path


def measured_policies(here: Here, *arguments: object) -> tuple[str, str]:
    """The user policy and the model policy that `measure --policy` prints."""
    out = here("measure", "--policy", *arguments).out
    nothing, user, model = re.split(r"^# ---- .*-policy\.toml; .* ----\n\n", out, flags=re.MULTILINE)
    assert nothing == ""
    return user, model


def test_measure_prints_policies_that_only_lack_the_service_id(here: Here, roots: Path) -> None:
    user, model = measured_policies(here, "--root", roots)
    assert user.count("SERVICE ID") == 1
    read = UserPolicy.from_toml(re.sub(r'"SERVICE ID[^"]*"', f'"{ID}"', user))
    again = measured_policies(here, "--service", ID, "--root", roots)[0]
    assert again.rstrip() == read.to_toml().rstrip()
    measured = here("measure", "--json").json
    assert read.worker.mr_enclave == {bytes.fromhex(measured["worker"]["mr_enclave"])}
    assert read.key_service.mr_enclave == {bytes.fromhex(measured["key-service"]["mr_enclave"])}
    assert read.worker.anchors.is_simulated
    owner = ModelPolicy.from_toml(model)
    assert (owner.release, owner.key_service) == (read.worker, read.key_service)


def test_measure_prints_policies_under_a_simulated_root(here: Here, tmp_path: Path) -> None:
    roots = SimulatedAuthority.create(tmp_path, now=int(time.time())).roots_der
    path = tmp_path / "roots.pem"
    path.write_text("".join(map(to_pem, split_certificates(roots))))
    printed = here("measure", "--policy", "--json", "--service", ID, "--root", path).json
    assert UserPolicy.from_toml(printed["user_policy"]).worker.dangerous_simulated_roots == roots
    assert ModelPolicy.from_toml(printed["model_policy"]).release.dangerous_simulated_roots == roots
    path.write_text("no certificate")
    assert here("measure", "--policy", "--root", path, "--json").code == 1


def test_measure_prints_no_policies_that_nothing_could_meet(here: Here) -> None:
    """What is measured here is the simulated platform's, and under the vendors' roots there is none."""
    for arguments in ((), ("--service", ID), ("--tee", "tdx")):
        error = here("measure", "--policy", "--json", *arguments)
        assert error.code == 1
        assert (error.json["error"], error.json["claim"]) == ("measure.roots", "--root")
        assert "deploy/README.md" in error.json["hint"]


def test_measure_refuses_a_service_id_that_is_none(here: Here, roots: Path) -> None:
    error = here("measure", "--policy", "--service", "5a", "--root", roots, "--json").json
    assert error["error"] == "policy.service"


def test_measure_compares_a_policy(here: Here, roots: Path, tmp_path: Path) -> None:
    """What it says in which case, tests/owner/test_compare.py has."""
    printed = here("measure", "--policy", "--json", "--root", roots, "--service", ID).json
    path = tmp_path / "policy.toml"
    path.write_text(printed["user_policy"])
    matching = here("measure", "--compare", path)
    assert matching.code == 0
    assert matching.out.startswith("match: ")
    path.write_text(printed["user_policy"].replace("max_age = 2678400", "max_age = 31622400"))
    weaker = here("measure", "--compare", path)
    assert weaker.code == 1
    assert weaker.out.startswith("Weaker than the reference policy\n")
    assert weaker.err.startswith("measure.weaker: ")
    assert here("measure", "--compare", path, "--json").json["error"] == "measure.weaker"
    path.write_text("= no TOML")
    assert here("measure", "--compare", path, "--json").json["error"] == "policy.format"


def test_measure_refuses_a_folder_that_is_no_source(tmp_path: Path) -> None:
    assert refused("measure", "--source", tmp_path)["error"].startswith("measurement.")


# The command line itself.


def test_version(here: Here) -> None:
    assert here("--version").out == f"cloister {cloister.__version__}\n"


def begin(before: str, *arguments: str) -> Ran:
    """Run ``cloister`` after some lines of Python, as a plain process."""
    code = (
        f"import sys\n{before}\nsys.argv = ['cloister', *{arguments}]\nfrom cloister.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stdout + done.stderr
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_its_packages_the_command_line_says_what_to_install(package: str) -> None:
    missing = f"sys.modules['{package}'] = None"
    ran = begin(missing, "--help")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("usage.extra: ")
    assert len(ran.err.strip().splitlines()) == 1
    assert begin(missing, "measure", "--json").json["expected"] == package


@pytest.mark.parametrize("package", ["numpy", "httpx", "onnxruntime", "onnx", "starlette"])
def test_help_needs_none_of_the_heavy_packages(package: str) -> None:
    assert begin(f"sys.modules['{package}'] = None", "--help").code == 0


def test_a_command_without_its_package_says_what_to_install(tmp_path: Path) -> None:
    arguments = ("infer", "http://127.0.0.1:9", "m", "--input", "a=b", "--policy", "p", "--identity", "i")
    ran = begin("sys.modules['httpx'] = None", *arguments, "--json")
    assert (ran.code, ran.json["error"], ran.json["expected"]) == (1, "usage.extra", "httpx")
    assert "'.[client]'" in ran.json["hint"]


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("owner", "onnx", "owner"),
        ("measure", "uvloop", "enclave"),
        ("proxy", "grpc", "proxy"),
        ("up", "x", ""),
    ],
)
def test_the_hint_names_the_one_extra_that_lacks(command: str, package: str, extra: str) -> None:
    hint = _how_to_install(package, command=command)
    assert hint.endswith(f"'.[{extra}]'" if extra else "pip install .")


def test_the_extras_of_hints_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert _EXTRAS.keys() | {"all"} == project["optional-dependencies"].keys()
    assert set(_COMMANDS.values()) <= _EXTRAS.keys()


def test_no_hint_leads_to_a_registry() -> None:
    for path in (*SOURCE.rglob("*.py"), *(ROOT / "examples").rglob("*.py"), *(ROOT / "docs").rglob("*.md")):
        assert "cloister[" not in path.read_text(), path


def test_a_proxy_has_one_place_for_rest(here: Here, tmp_path: Path) -> None:
    arguments = ("--unix", tmp_path / "s", "--rest-port", "0", "--policy", "p", "--identity", "i")
    ran = here("proxy", "http://127.0.0.1:9", *arguments, "--json")
    assert (ran.code, ran.json["error"]) == (1, "proxy.unix")


def test_a_user_id_that_is_none_says_who_prints_it() -> None:
    with pytest.raises(UsageError) as caught:
        _user_id("not hex")
    assert caught.value.code == "policy.user"
    assert "cloister user id OWNER" in caught.value.hint


def test_sealing_again_says_what_it_replaces(here: Here, tmp_path: Path) -> None:
    desk = ("--desk", tmp_path / "desk")
    assert here("owner", "init", *desk).code == 0
    seal = ("owner", "seal", "digits", MODELS / "digits.onnx", *desk)
    assert "replaces" not in here(*seal).out
    assert "replaces the sealed file" in here(*seal).out
    assert "statement" in here("owner", "list", *desk).out.splitlines()[1].split()


def test_an_interrupt_while_it_loads_leaves_no_traceback() -> None:
    ran = begin(
        "class Hurry:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Hurry())",
        "--help",
    )
    assert (ran.code, ran.out, ran.err) == (130, "", "")


def test_a_table_that_nobody_looks_at_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    table("Title", ("name", "value", "last"), [("a", "x" * 300, "1"), ("longer", "[red]\ny", "")])
    assert capsys.readouterr().out.splitlines() == [
        "Title",
        f"name    value{' ' * 297}last",
        f"a       {'x' * 300}  1",
        "longer  [red] y",
    ]


def test_ranges_stand_in_the_help(here: Here) -> None:
    shown = run("up", "--help").out
    for name in SETTING_HELP:
        _, least, most = SETTINGS[name]
        assert f"{least}<=x<={most}" in re.sub(r"\s+", "", shown), name


# Policies: file, section, what was meant.


def test_an_error_of_a_policy_names_file_and_section(here: Here, roots: Path, tmp_path: Path) -> None:
    printed = here("measure", "--policy", "--json", "--service", ID, "--root", roots).json
    user, model = printed["user_policy"], printed["model_policy"]
    path = tmp_path / "policy.toml"
    worker = user.index("[worker]")
    for text, code, claim, words in (
        (
            user.replace("max_age", "max_agee", 1),
            "policy.unknown-key",
            "[key_service].max_agee",
            "mean max_age ",
        ),
        (
            user[:worker] + user[worker:].replace("max_age = ", "max_age = -"),
            "policy.max_age",
            "[worker].max_age",
            "1 to ",
        ),
        (user.replace("service = ", "servce = ", 1), "policy.keys", "keys", "mean service "),
        (
            user.replace("allow_shared", "alow_shared"),
            "policy.consent",
            "[consent].alow_shared_pools",
            "mean allow_shared_pools ",
        ),
        (
            user[:worker] + re.sub(r'(mr_enclave = \[")..', r"\1", user[worker:]),
            "policy.mr_enclave",
            "[worker].mr_enclave",
            "expected 64 hex digits, found 62 characters: ",
        ),
    ):
        path.write_text(text)
        error = here("verify", "http://127.0.0.1:9", "--policy", path)
        assert error.code == 1
        assert error.err.startswith(f"{code}: {path}: ")
        assert claim in error.err
        assert words in error.err
    desk = ("--desk", tmp_path / "desk")
    assert here("owner", "init", *desk).code == 0
    for text, words in (
        (model.replace("slo_ms = 0", 'slo_ms = "0"'), "found '0'"),
        (model.replace('"none"', '"all"'), 'expected "none" or "same-user" or "cross-user"'),
        (model.replace("slo_ms", "slo"), "mean slo_ms "),
    ):
        path.write_text(text)
        error = here(
            "owner", "publish", "x", "http://127.0.0.1:9", "--policy", path, "--service-policy", path, *desk
        )
        assert error.err.startswith(f"policy.options: {path}: [options].")
        assert words in error.err


def test_other_code_is_pointed_out(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    for code, claim, hinted in (
        ("appraisal.mr_enclave", "mr_enclave", True),
        ("appraisal.not-subset", "mr_enclave", True),
        ("appraisal.pcr0", "pcr0", True),
        ("appraisal.not-subset", "max_age", False),
        ("appraisal.isv_svn", "isv_svn", False),
    ):
        report(AppraisalRefused(code=code, claim=claim), as_json=False)
        assert ("cloister measure" in capsys.readouterr().err) is hinted


def test_a_connection_error_says_where_and_why(here: Here, roots: Path, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(
        here("measure", "--policy", "--json", "--root", roots, "--service", ID).json["user_policy"]
    )
    error = here("verify", "http://127.0.0.1:9", "--policy", path, "--json").json
    assert error["expected"] == "an answer from http://127.0.0.1:9"
    assert error["actual"] == "connection refused"


def test_an_array_of_objects_is_named(here: Here, roots: Path, tmp_path: Path) -> None:
    path, policy = tmp_path / "objects.npy", tmp_path / "policy.toml"
    np.save(path, np.array([{}], dtype=object))
    policy.write_text(
        here("measure", "--policy", "--json", "--root", roots, "--service", ID).json["user_policy"]
    )
    arguments = ("--policy", policy, "--identity", tmp_path / "none")
    error = here("infer", "http://127.0.0.1:9", "m", "--input", f"a={path}", *arguments, "--json").json
    assert "dtype object" in error["actual"]
    assert ".astype" in error["hint"]


def test_a_folder_is_no_model(here: Here, tmp_path: Path) -> None:
    desk = ("--desk", tmp_path / "desk")
    assert here("owner", "init", *desk).code == 0
    error = here("owner", "seal", "d", ".", *desk, "--json").json
    assert (error["error"], error["actual"]) == ("model.file", str(Path.cwd()))


# Roles and pools.


def test_a_role_refuses_a_directory_where_no_service_is(here: Here, tmp_path: Path) -> None:
    for arguments in (("worker",), ("pool", "list"), ("pool", "create", "x")):
        error = run(*arguments, "--data", tmp_path / "typo")
        assert error.code == 1
        assert error.err.startswith("site.service: ")
        assert "Check --data" in error.err
        assert not (tmp_path / "typo").exists()
    error = run("worker", "--settings", '{"lease_seconds": 1}', "--data", tmp_path / "typo")
    assert error.code == 1
    assert "lease_seconds" in error.err


def test_a_second_process_of_a_role_is_refused(service: World) -> None:
    data = ("--data", service.site.root)
    for arguments in (("gateway", "--port", "0"), ("keyservice",), ("worker", "--name", "worker-2")):
        error = run(*arguments, *data)
        assert error.code == 1
        assert error.err.startswith("roles.running: ")
    assert run("worker", "--name", "new", "--pool", "absent", *data).err.startswith("file.read: ")


def test_roles_say_that_they_are_ready(service: World) -> None:
    def log(name: str) -> str:
        return (service.site.root / "logs" / f"{name}.log").read_text()

    assert f"gateway ready at {service.url}\n" in log("gateway")
    eventually(
        lambda: f"key service ready: service {service.user_policy.service.hex()}\n" in log("key-service"),
        "it",
    )
    assert f"worker-2 ready: registered in pool default ({service.pool.hex()})\n" in log("worker-2")


def test_the_operator_makes_a_pool_for_a_second_owner(service: World, tmp_path: Path) -> None:
    data = ("--data", service.site.root)
    desk = ("--desk", tmp_path / "desk")
    owner = run("owner", "init", *desk, "--json").json["owner"]
    before = service.site.user_policy.read_text()
    made = run("pool", "create", "of-the-second", "--owner", owner, *data, "--json").json
    assert made == {"pool": made["pool"], "name": "of-the-second", "owner": owner, "shared": False}
    assert run("pool", "create", "of-the-second", "--owner", owner, *data, "--json").json == made
    assert service.site.user_policy.read_text() == before
    pools = {pool["name"]: pool for pool in run("pool", "list", *data, "--json").json["pools"]}
    assert pools["of-the-second"] == {**made, "tee": "sgx", "models": [], "workers": 0}
    assert pools["default"]["workers"] == 2
    assert pools["default"]["owner"] == service.desk.owner.hex()
    assert made["pool"] in run("pool", "list", *data).out
    assert run("owner", "seal", "digits", MODELS / "digits.onnx", *desk).code == 0
    sealed = run("owner", "list", *desk, "--json").json["models"]
    assert [(each["name"], each["version"], each["grants"]) for each in sealed] == [("digits", None, [])]
    policy = ("--policy", service.site.model_policy, "--service-policy", service.site.user_policy)
    assert run("owner", "publish", "digits", service.url, *policy, *desk).code == 0  # to its own pool
    (published,) = run("owner", "list", *desk, "--json").json["models"]
    assert (published["pool"], published["version"]) == (made["pool"], 1)
    assert published["service"] == service.user_policy.service.hex()


def test_the_owner_sees_loads_and_unloads_models(service: World) -> None:
    owner = ("--desk", service.desk.directory, "--service-policy", service.site.user_policy)
    model = f"{service.desk.owner.hex()}/digits"

    def states() -> set[str]:  # of the worker that answers: there may be several
        found = run("owner", "index", service.url, *owner, "--json").json
        assert found["owner"] == service.desk.owner.hex()
        return {each["state"] for each in found["models"] if each["name"] == model}

    loaded = run("owner", "load", "digits", service.url, *owner, "--json").json
    assert loaded == {"model": model, "state": "READY"}
    eventually(lambda: states() == {"READY"}, "a worker with the model")
    lines = run("owner", "index", service.url, *owner).out.splitlines()
    assert lines[1].split() == ["name", "version", "state", "reason"]
    assert any(line.split()[:2] == [model, "1"] for line in lines[2:])
    assert run("owner", "unload", "digits", service.url, *owner).out.split() == [
        *("model", model),
        *("state", "UNAVAILABLE"),
    ]
    eventually(lambda: states() == {"UNAVAILABLE"}, "a worker without the model")
    unknown = refused("owner", "load", "nonesuch", service.url, *owner)
    assert unknown["error"] == "not-found.model"


def test_owner_list_shows_grants_and_when_they_end(service: World) -> None:
    desk = ("--desk", service.desk.directory)
    models = {each["name"]: each for each in run("owner", "list", *desk, "--json").json["models"]}
    user = service.user.user_id(service.desk.owner).hex()
    assert user in [grant["user"] for grant in models["digits"]["grants"]]
    lines = run("owner", "list", *desk).out.splitlines()
    assert any(re.search(rf"^digits +{user} +20\d\d-\d\d-\d\dT\S+Z +granted$", line) for line in lines)


def test_describe_names_inputs_and_outputs(service: World) -> None:
    arguments = ("--policy", service.site.user_policy, "--identity", service.root / "user" / "user.identity")
    found = run("describe", service.url, service.model("digits"), *arguments, "--json").json
    assert found["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]
    assert [each["name"] for each in found["outputs"]] == ["probabilities"]
    shown = run("describe", service.url, service.model("digits"), *arguments).out
    assert re.search(r"^image +FP32 +float32 +any x 1 x 8 x 8$", shown, re.MULTILINE)


def test_another_datatype_is_named_as_numpy_does(service: World, tmp_path: Path) -> None:
    path = tmp_path / "double.npy"
    np.save(path, np.zeros((1, 1, 8, 8)))
    arguments = ("--policy", service.site.user_policy, "--identity", service.root / "user" / "user.identity")
    error = run(
        "infer", service.url, service.model("digits"), "--input", f"image={path}", *arguments, "--json"
    )
    assert error.json["expected"] == "float32 (FP32)"
    assert error.json["actual"] == "float64"
    assert '.astype("float32")' in error.json["hint"]


def test_verify_shows_dates_and_words(service: World) -> None:
    out = run("verify", service.url, "--policy", service.site.user_policy).out
    date = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    assert re.search(rf"^valid until +ok +{date}$", out, re.MULTILINE)
    assert re.search(rf"^validity +ok +{date} to {date}$", out, re.MULTILINE)
    assert re.search(r"^simulated +ok +yes$", out, re.MULTILINE)
    assert re.search(r"^debug +ok +no$", out, re.MULTILINE)


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
    assert error.json["error"] == "net.listen"
    assert "--port 0" in error.json["hint"]
    assert time.monotonic() - started < 20
    assert not processes_of(data)
    assert not data.exists()


def test_up_refuses_a_data_directory_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "site"
    path.write_text("")
    assert run("up", "--json", "--data", path).json["error"] == "site.directory"

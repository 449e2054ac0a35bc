"""The documents are true of the code: links resolve, the example runs, the tables are complete."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

import cloister
from cloister.cli.site import reference_policy
from cloister.core.evidence.bundle import Collateral
from cloister.core.evidence.pem import to_pem
from cloister.core.protocol.trust import Consent, UserPolicy
from cloister.core.verifier.anchors import split_certificates
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.core.verifier.claims import CLAIMS
from cloister.core.verifier.collateral_key import DcapKey
from cloister.core.verifier.forms import FORMS, Number, Octets, OctetSet
from cloister.owner.policy import OPTIONS, ModelPolicy
from cloister.sim import tees
from cloister.sim.authority import SimulatedAuthority
from cloister.sim.measurement import measure

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(cloister.__file__).resolve().parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE_ROW = re.compile(r"^\| `([a-z0-9_.-]+)` \|", re.MULTILINE)
_DEPENDENCY_ROW = re.compile(r"^\| `([A-Za-z0-9_.-]+)` \| (.*) \|$", re.MULTILINE)
_PORT = "8440"


def prose(path: Path) -> str:
    """A document without its code blocks."""
    return _BLOCK.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """What a link into a document may name: its headings as a forge spells them."""
    headings = re.findall(r"^#{1,6} (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path: Path) -> None:
    for link in _LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def test_the_readme_leads_to_every_document() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in (
        "architecture",
        "protocol",
        "policies",
        "evidence",
        "threat-model",
        "dependencies",
        "errors",
    ):
        assert f"(docs/{name}.md)" in readme
    for name in ("LIMITATIONS.md", "SECURITY.md", "CHANGELOG.md", "LICENSE"):
        assert f"({name})" in readme


def test_every_decision_stands_in_the_index() -> None:
    folder = ROOT / "docs" / "adr"
    index = (folder / "README.md").read_text(encoding="utf-8")
    for path in folder.glob("[0-9]*.md"):
        assert f"({path.name})" in index
        text = path.read_text(encoding="utf-8")
        assert all(f"\n## {part}\n" in text for part in ("Context", "Decision", "Consequences")), path.name


def test_the_make_targets_that_the_readme_names_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rules = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test", "lint", "bench"} <= set(re.findall(r"\bmake ([a-z]+)", readme)) <= rules


# Dependencies


def dependencies() -> set[str]:
    """Names of everything that pyproject.toml asks for directly."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = table["project"]
    lists = [
        project["dependencies"],
        *project["optional-dependencies"].values(),
        table["build-system"]["requires"],
    ]
    lists += table["dependency-groups"].values()
    found = {
        re.split(r"[\[<>=!~ ;]", item, maxsplit=1)[0] for each in lists for item in each if type(item) is str
    }
    return found - {project["name"]}


def test_every_dependency_has_its_line_and_every_line_its_dependency() -> None:
    rows = dict(_DEPENDENCY_ROW.findall((ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")))
    assert rows.keys() == dependencies()
    for name, row in rows.items():
        cells = [cell.strip() for cell in row.split(" | ")]
        assert len(cells) == 3, name
        assert all(cells), name
        assert cells[2].split()[0] in ("yes", "no", "worker"), f"{name}: inside an enclave or not?"


def test_what_enclaves_are_made_of_is_marked() -> None:
    from cloister.sim.image import ROLES

    rows = dict(_DEPENDENCY_ROW.findall((ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")))
    service = set(ROLES["key-service"].distributions)
    worker = set(ROLES["worker"].distributions)
    for name, row in rows.items():
        wanted = "yes" if name in service else "worker" if name in worker else "no"
        assert row.split(" | ")[-1].split()[0] == wanted, name


# Error codes


def trees() -> Iterator[ast.Module]:
    for path in SOURCE.rglob("*.py"):
        yield ast.parse(path.read_text(encoding="utf-8"))


def literals() -> set[str]:
    """Every string in the source, and the constant parts of formatted ones."""
    return {
        node.value
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def raised() -> set[str]:
    """Codes that the source gives literally: ``code="..."`` and the classes' defaults."""
    found: set[str] = set()
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "code":
                values = (
                    [node.value.body, node.value.orelse]
                    if isinstance(node.value, ast.IfExp)
                    else [node.value]
                )
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "default_code":
                values = [node.value]
            else:
                continue
            found |= {value.value for value in values if isinstance(value, ast.Constant) and value.value}
    return found


def exists(code: str, strings: set[str]) -> bool:
    """Whether the source can give this code: literally, or made of a claim, a policy's field or a status."""
    if code in strings:
        return True
    family, _, rest = code.partition(".")
    if family == "policy":
        return rest in {field.name for field in fields(AppraisalPolicy)} | strings
    if family == "appraisal" and rest in FORMS:
        return True
    if family in ("appraisal", "binding"):
        return any(text.strip(" (").split("  ")[0] in (rest, rest.replace("-", " ")) for text in strings)
    return family == "http" and re.fullmatch(r"[45]\d\d", rest) is not None


def listed() -> list[str]:
    return _CODE_ROW.findall((ROOT / "docs" / "errors.md").read_text(encoding="utf-8"))


def test_every_listed_code_exists() -> None:
    strings = literals()
    assert len(listed()) > 100
    assert [code for code in listed() if not exists(code, strings)] == []
    assert not exists("binding.no-such-thing", strings)
    assert not exists("appraisal.no-such-thing", strings)


def test_every_code_is_listed_once() -> None:
    assert len(listed()) == len(set(listed()))
    assert sorted(raised() - set(listed())) == [], "add a line to docs/errors.md"


# Policies


def policies() -> str:
    return (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")


def examples_of_policies() -> list[str]:
    """A user policy and a model policy, with a simulated platform's roots where they stand for them."""
    found = [text for language, text in _BLOCK.findall(policies()) if language == "toml"][:2]
    roots = "".join(map(to_pem, split_certificates(simulated_roots())))
    return [text.replace("ROOT\n", roots) for text in found]


@cache
def simulated_roots() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return SimulatedAuthority.create(Path(folder), now=int(time.time())).roots_der


def test_the_examples_of_policies_are_what_they_say() -> None:
    user, model, *_ = examples_of_policies()
    read = UserPolicy.from_toml(user)
    assert UserPolicy.from_toml(read.to_toml()) == read
    assert len(read.worker.mr_enclave) == 2
    assert read.worker.dangerous_simulated_roots is None
    owner = ModelPolicy.from_toml(model)
    assert ModelPolicy.from_toml(owner.to_toml()) == owner
    assert owner.release.dangerous_simulated_roots == simulated_roots()
    assert owner.options.slo_ms == 50


def test_the_full_example_has_every_key_of_an_sgx_policy() -> None:
    release = tomllib.loads(examples_of_policies()[1])["release"]
    assert release.keys() == {"tee", *keys_of("sgx")}


def keys_of(tee: str) -> set[str]:
    """Keys of an appraisal policy for one TEE."""
    claimed = {name for claim in CLAIMS[tee] for name in claim.fields}
    return claimed | {"max_age", "dangerous_simulated_roots"}


def rows_of(heading: str) -> dict[str, list[str]]:
    """Key -> cells of the tables below a heading."""
    section = policies().split(f"# {heading}\n", 1)[1].split("\n#", 1)[0]
    rows = re.findall(r"^\| `\[?(\w+)\]?` \| (.*) \|$", section, re.MULTILINE)
    return {key: [cell.strip() for cell in cells.split("|")] for key, cells in rows}


@pytest.mark.parametrize("tee", ["sgx", "tdx", "snp", "nitro"])
def test_every_key_of_an_appraisal_policy_has_its_row(tee: str) -> None:
    headings = {
        "sgx": ("SGX", "SGX and TDX"),
        "tdx": ("TDX", "SGX and TDX"),
        "snp": ("SEV-SNP",),
        "nitro": ("Nitro",),
    }
    rows = rows_of("Keys of every appraisal policy")
    for each in headings[tee]:
        rows |= rows_of(f"Keys for {each}")
    assert rows.keys() == {"tee", "any_of", "all_of", *keys_of(tee)}
    defaults = {field.name: field.default for field in fields(AppraisalPolicy)}
    for key, cells in rows.items():
        assert len(cells) == 4, key
        if cells[2].startswith("`"):
            stated = tomllib.loads(f"it = {cells[2].strip('`')}")["it"]
            default = defaults[key]
            assert stated == (list(default) if isinstance(default, frozenset | tuple) else default), key
            assert type(stated) in (bool, int, list)
        form = FORMS.get(key)
        if isinstance(form, Number) and form.most < 1 << 64 and cells[1] != "0 to 2^64 - 1":
            assert cells[1] == f"{form.least} to {form.most}", key
        if isinstance(form, OctetSet | Octets):
            assert cells[1].startswith(f"{2 * form.size} hex digits"), key


def test_every_key_of_both_policies_has_its_row() -> None:
    consent = {field.name for field in fields(Consent)}
    assert rows_of("A user policy").keys() == {"service", "key_service", "worker", "consent"} | consent
    assert rows_of("A model policy").keys() == {"release", "key_service", "options", *OPTIONS}


# Evidence


@pytest.fixture(scope="module")
def at_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page on evidence speaks of: a quote, its collateral and a policy; simulated, of now."""
    folder, now = tmp_path_factory.mktemp("evidence"), int(time.time())
    authority, measured = SimulatedAuthority.create(folder / "authority", now=now), measure("worker")
    evidence = tees.evidence(authority, measured, "tdx", b"mine".ljust(64, b"\0"), now)
    assert isinstance(evidence.collateral, Collateral)
    (folder / "quote.bin").write_bytes(evidence.quote)
    (folder / "collateral.json").write_text(evidence.collateral.to_json())
    kept = folder / "collateral" / DcapKey.from_quote(evidence.quote).file
    kept.parent.mkdir(parents=True)  # as `cloister collateral fetch` fills it
    kept.write_text(evidence.collateral.to_json())
    (folder / "policy.toml").write_text(reference_policy(measured, authority.roots_der, "tdx").to_toml())
    return folder


def blocks_on_evidence(wanted: str) -> list[str]:
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    return [block for language, block in _BLOCK.findall(text) if language == wanted]


@pytest.mark.parametrize(
    ("expected", "says"),
    [(b"mine", "refused: binding"), (b"mine".ljust(64, b"\0"), "accepted, to be verified")],
)
def test_the_program_that_verifies_runs_as_written(at_hand: Path, expected: bytes, says: str) -> None:
    (program,) = blocks_on_evidence("python")
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=at_hand,
        env={**_environment(), "EXPECTED": expected.hex()},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith(says)
    assert ("[ok] mr_td: " in done.stdout) == says.startswith("accepted")


def test_the_commands_on_evidence_run_as_written(at_hand: Path) -> None:
    show, fetch, verify = (block.splitlines() for block in blocks_on_evidence("sh"))
    assert "cloister collateral fetch --quote quote.bin" in fetch[0]  # it needs a network
    functions = f'cloister() {{ "{sys.executable}" -m cloister.cli "$@"; }}\nEXPECTED={b"mine".hex()}\n'
    assert "NOT verified" in _run(["bash", "-euc", functions + show[0]], at_hand)
    assert "tdx evidence, accepted" in _run(["bash", "-euc", functions + verify[1]], at_hand)
    refused = subprocess.run(  # without the policy, that the roots are simulated is nobody's wish
        ["bash", "-euc", functions + verify[0]],
        cwd=at_hand,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (refused.returncode, "evidence.simulated" in refused.stderr) == (1, True)


# A service by hand


@pytest.mark.timeout(180)
def test_a_service_runs_by_hand_as_written() -> None:
    """Each line runs until it says what stands behind it, or ends; only the port differs."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text[text.index("### By hand") :].replace(_PORT, str(_free_port()))
    _, block = _BLOCK.findall(section)[0]
    lines = block.splitlines()
    assert len(lines) == 5
    folder = Path(tempfile.mkdtemp(prefix="cloister-hand-"))
    running = []
    try:
        for number, line in enumerate(lines):
            command, _, says = line.partition("#")
            arguments = shlex.split(command)
            assert arguments[0] == "cloister"
            if arguments[1] == "pool":
                done = _run([sys.executable, "-m", "cloister.cli", *arguments[1:]], folder)
                assert "default" in done
                continue
            log = folder / f"{number}.log"
            with log.open("w") as output:
                running.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "cloister.cli", *arguments[1:]],
                        cwd=folder,
                        env=_environment(),
                        stdout=output,
                        stderr=output,
                    )
                )
            wanted = says.strip().partition("<")[0].strip()
            assert "ready" in wanted
            _wait_until(lambda log=log, wanted=wanted: wanted in log.read_text(), running[-1], log)
        assert re.search(r"^default +[0-9a-f]{64} +sgx +none yet +0 +1$", done, re.MULTILINE)
        url = json.loads((folder / "var" / "service.json").read_text())["url"]
        command = ["verify", url, "--policy", "var/user-policy.toml", "--json"]
        verified = json.loads(_run([sys.executable, "-m", "cloister.cli", *command], folder))
        assert [pool["name"] for pool in verified["pools"]] == ["default"]
        again = subprocess.run(
            [sys.executable, "-m", "cloister.cli", "worker", "--data", "var", "--name", "w1"],
            **{"cwd": folder, "env": _environment(), "capture_output": True, "text": True, "timeout": 30},
            check=False,
        )
        assert again.returncode == 1
        assert again.stderr.startswith("roles.running: ")
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


# The README's example


@pytest.mark.timeout(180)
def test_the_readme_example_runs_as_written() -> None:
    """The operator's block runs behind, then the people's, then the program; only the port differs."""
    port = _free_port()
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace(_PORT, str(port))
    section = readme[readme.index("## Try it by hand") :]
    (_, operator), (_, people), (language, program) = _BLOCK.findall(section)[:3]
    assert language == "python"
    assert len(program.splitlines()) == 12
    folder = Path(tempfile.mkdtemp(prefix="cloister-docs-"))  # short: Unix sockets lie below it
    service = None
    try:
        (folder / "examples").symlink_to(ROOT / "examples")
        log = folder / "up.log"
        with log.open("w") as output:
            service = subprocess.Popen(
                ["bash", "-c", _shell(operator)],
                cwd=folder,
                env=_environment(),
                start_new_session=True,
                stdout=output,
                stderr=output,
            )
        _wait_for(folder / "var" / "user-policy.toml", service, log)
        done = _run(["bash", "-euc", _shell(people)], folder)
        assert "digits" in done
        answer = _run([sys.executable, "-c", program], folder)
        assert "[ok] mr_enclave: " in answer
        assert answer.splitlines()[-1] == "this is a 0"
    finally:
        if service is not None:
            with contextlib.suppress(ProcessLookupError):  # it may have failed and ended
                os.killpg(service.pid, signal.SIGTERM)
            service.wait(40)
        shutil.rmtree(folder, ignore_errors=True)


def _shell(block: str) -> str:
    """A block of the README, with this interpreter's environment instead of the one that it activates."""
    lines = [line for line in block.splitlines() if line != ". .venv/bin/activate"]
    python = f'"{sys.executable}"'
    functions = f'cloister() {{ {python} -m cloister.cli "$@"; }}\npython() {{ {python} "$@"; }}\n'
    return functions + "\n".join(lines)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE.parent), "NO_COLOR": "1", "COLUMNS": "200"}


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, env=_environment(), capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _wait_for(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    _wait_until(path.exists, process, log)


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 90
    while not ready():
        assert process.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < until, "the service did not come up"
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

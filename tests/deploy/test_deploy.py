"""What can be checked of deploy/ without its hardware: files parse, names exist, arguments are the code's."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import cloister
from cloister.core.protocol.configuration import ROLES as CONFIGURED
from cloister.enclave.attester import open_attester
from cloister.errors import UsageError
from cloister.sim.image import ENTRY_MODULE, ROLES, SOURCE_PARTS, locate
from cloister.sim.sandbox import _BOOT

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SOURCE = Path(cloister.__file__).resolve().parent
UNITS = sorted((DEPLOY / "cvm").rglob("*.service")) + sorted((DEPLOY / "cvm").rglob("*.socket"))
INI = [
    path
    for path in DEPLOY.rglob("*")
    if path.suffix in (".conf", ".service", ".socket", ".mount", ".network")
]
_VARIABLE = re.compile(r"\bCLOISTER_[A-Z_]+\b")
_PLACE = re.compile(r"\{\{ ([a-z_.()]+) \}\}")


def read_variables() -> set[str]:
    """Environment variables that the enclave's source names."""
    found = set()
    for path in (SOURCE / "enclave").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and _VARIABLE.fullmatch(node.value)
            ):
                found.add(node.value)
    return found


def ini(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Sections of an ini file as systemd and mkosi read them: names may repeat, lines may go on."""
    sections: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in path.read_text().splitlines():
        if not line.strip() or line.startswith(("#", ";")):
            continue
        if line.startswith("["):
            current = sections.setdefault(line.strip("[]"), [])
        elif line[0].isspace():
            name, value = current.pop()
            current.append((name, f"{value} {line.strip()}"))
        else:
            name, _, value = line.partition("=")
            assert name.strip().isidentifier(), f"{path.name}: {line}"
            current.append((name.strip(), value.strip()))
    return sections


def values(path: Path, section: str, name: str) -> list[str]:
    return [value for each, value in ini(path).get(section, []) if each == name]


def test_every_variable_that_is_set_is_one_that_the_enclave_reads() -> None:
    named = {
        name
        for path in DEPLOY.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
        for name in _VARIABLE.findall(path.read_text())
    }
    assert named == {"CLOISTER_ATTESTER", "CLOISTER_COLLATERAL"}
    assert named <= read_variables()


# Gramine


def rendered(role: str) -> dict[str, object]:
    """The manifest with every place filled in."""
    texts = {
        "gramine.libos": "/usr/lib/gramine/libsysdb.so",
        "gramine.runtimedir()": "/usr/lib/gramine/runtime/glibc",
        "python": "/usr/bin/python3.11",
        "stdlib": "/usr/lib/python3.11",
        "role": role,
        "image": "/build/image",
        "run_dir": "/run/cloister",
        "collateral": "/var/lib/cloister/collateral",
        "arch_libdir": "/lib/x86_64-linux-gnu",
        "enclave_size": "2G",
        "max_threads": "32",
        "isv_prod_id": str(ROLES[role].isv_prod_id),
        "isv_svn": str(ROLES[role].isv_svn),
    }
    template = (DEPLOY / "gramine" / "enclave.manifest.template").read_text()
    assert set(_PLACE.findall(template)) == texts.keys()
    return tomllib.loads(_PLACE.sub(lambda match: texts[match[1]], template))


@pytest.mark.parametrize("role", ROLES)
class TestManifest:
    def test_the_command_is_the_one_that_the_simulation_runs(self, role: str) -> None:
        loader = rendered(role)["loader"]
        assert isinstance(loader, dict)
        assert loader["argv"] == [
            *("python3", "-I", "-S", "-B", "-c", _BOOT),
            *(ENTRY_MODULE, "/cloister/image", role, "/cloister/run"),
        ]
        assert role in CONFIGURED

    def test_the_environment_is_fixed(self, role: str) -> None:
        loader = rendered(role)["loader"]
        assert isinstance(loader, dict)
        assert all(type(value) is str for value in loader["env"].values())
        with pytest.raises(UsageError, match="no such attester"):
            open_attester({"CLOISTER_ATTESTER": "other"})
        attester = open_attester(loader["env"])
        assert type(attester).__name__ == "GramineAttester"

    def test_nothing_insecure_is_on(self, role: str) -> None:
        text = (DEPLOY / "gramine" / "enclave.manifest.template").read_text()
        assert "insecure__" not in text
        assert "passthrough" not in text
        assert "file_check_policy" not in text
        sgx = rendered(role)["sgx"]
        assert isinstance(sgx, dict)
        assert (sgx["debug"], sgx["remote_attestation"]) == (False, "dcap")

    def test_product_and_version_are_the_roles(self, role: str) -> None:
        sgx = rendered(role)["sgx"]
        assert isinstance(sgx, dict)
        assert (sgx["isvprodid"], sgx["isvsvn"]) == (ROLES[role].isv_prod_id, ROLES[role].isv_svn)

    def test_all_that_is_mounted_is_trusted_or_the_hosts(self, role: str) -> None:
        manifest = rendered(role)
        sgx, mounts = manifest["sgx"], manifest["fs"]
        assert isinstance(sgx, dict)
        assert isinstance(mounts, dict)
        allowed = {uri.rstrip("/") for uri in sgx["allowed_files"]}
        trusted = {uri.rstrip("/") for uri in sgx["trusted_files"]}
        assert allowed == {"file:/run/cloister", "file:/var/lib/cloister/collateral"}
        mounted = {mount["uri"].rstrip("/") for mount in mounts["mounts"] if "uri" in mount}
        assert mounted <= allowed | trusted
        assert not allowed & trusted
        paths = [mount["path"] for mount in mounts["mounts"]]
        assert {"/cloister/image", "/cloister/run", "/cloister/collateral"} <= set(paths)
        assert len(paths) == len(set(paths))


MAKEFILE = DEPLOY / "gramine" / "Makefile"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("role", ROLES)
def test_the_makefile_fills_in_every_place(role: str) -> None:
    done = subprocess.run(
        ["make", "-n", "-C", str(MAKEFILE.parent), f"ROLE={role}", f"PYTHON={sys.executable}", "KEY=k.pem"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(SOURCE.parent)},
    )
    lines = done.stdout.replace("\\\n", " ").splitlines()
    (render,) = [line for line in lines if line.startswith("gramine-manifest")]
    given = dict(each[2:].split("=", 1) for each in shlex.split(render) if each.startswith("-D"))
    template = (DEPLOY / "gramine" / "enclave.manifest.template").read_text()
    assert given.keys() == {name for name in _PLACE.findall(template) if not name.startswith("gramine.")}
    assert all(given.values())
    assert given["role"] == role
    assert Path(given["python"]).is_file()
    assert Path(given["stdlib"], "os.py").is_file()
    assert int(given["isv_prod_id"]) == ROLES[role].isv_prod_id
    (sign,) = [line for line in lines if line.startswith("gramine-sgx-sign")]
    assert shlex.split(sign)[1:] == [
        *("--manifest", f"{role}.manifest", "--output", f"{role}.manifest.sgx", "--key", "k.pem")
    ]
    assert any(line.startswith(f"gramine-sgx-sigstruct-view --verbose {role}.sig") for line in lines)
    assert any("../assemble.py" in line for line in lines)
    assert (MAKEFILE.parent / "../assemble.py").is_file()


# The image


def assembler() -> ModuleType:
    specification = importlib.util.spec_from_file_location("assemble", DEPLOY / "assemble.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_an_assembled_image_holds_what_is_measured_and_starts(tmp_path: Path) -> None:
    folder = tmp_path / "image"
    folder.mkdir()
    (folder / "stale.py").touch()
    assembler().assemble("key-service", folder)
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    assert not [
        path for path in files if path.is_symlink() or path.suffix == ".pyc" or path.name == "stale.py"
    ]
    assert {path.name for path in (folder / "cloister").iterdir()} == set(SOURCE_PARTS)
    image = locate("key-service")
    measured = {each.site / name for each in image.distributions for name in each.files}
    assert {
        path for path in measured if not (folder / path.relative_to(image.distributions[0].site)).exists()
    } == set()
    command = [str(image.interpreter.binary), "-I", "-S", "-B", "-c", _BOOT, ENTRY_MODULE]
    done = subprocess.run(
        [*command, str(folder), "key-service", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"LANG": "C.UTF-8"},
    )
    assert done.returncode == 1
    assert "enclave.host: the host's folder can't be used (FileNotFoundError)" in done.stderr


def test_the_assembler_says_how_it_is_used() -> None:
    done = subprocess.run(
        [sys.executable, str(DEPLOY / "assemble.py"), "gateway", "x"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(SOURCE.parent)},
    )
    assert (done.returncode, done.stderr.strip()) == (1, "usage: assemble.py key-service|worker FOLDER")


# Virtual machines


@pytest.mark.parametrize("path", INI, ids=lambda path: path.name)
def test_ini_files_parse(path: Path) -> None:
    sections = ini(path)
    known = {
        ".conf": {"Distribution", "Output", "Content", "Partition", "Service"},
        ".service": {"Unit", "Service", "Install"},
        ".socket": {"Unit", "Socket"},
        ".mount": {"Unit", "Mount"},
        ".network": {"Match", "Network"},
    }[path.suffix]
    assert sections
    assert sections.keys() <= known
    configparser.ConfigParser(strict=False, interpolation=None).read_string(path.read_text())


SYSTEM = DEPLOY / "cvm" / "mkosi.extra" / "usr" / "lib" / "systemd" / "system"
ENCLAVE = SYSTEM / "cloister-enclave@.service"


def test_the_unit_runs_the_command_that_the_simulation_runs() -> None:
    (command,) = values(ENCLAVE, "Service", "ExecStart")
    words = shlex.split(command)
    assert words == [
        *("/usr/bin/python3", "-I", "-S", "-B", "-c", _BOOT),
        *(ENTRY_MODULE, "/usr/lib/cloister/image", "%i", "/run/cloister/%i"),
    ]


def test_the_units_sockets_are_the_enclaves() -> None:
    sources = (SOURCE / "enclave" / "__main__.py").read_text()
    for name, unit in (("link.sock", "cloister-link@.socket"), ("enclave.sock", "cloister-front@.service")):
        assert f'"{name}"' in sources
        assert f"/run/cloister/%i/{name}" in (SYSTEM / unit).read_text()
    assert '"configuration"' in sources
    (prepare,) = values(ENCLAVE, "Service", "ExecStartPre")
    assert shlex.split(prepare)[-2:] == ["/run/cloister/host/configuration", "/run/cloister/%i/configuration"]


def test_units_name_units_that_exist() -> None:
    for path in [*UNITS, *SYSTEM.glob("*.mount")]:
        for _, value in [pair for pairs in ini(path).values() for pair in pairs]:
            for name in re.findall(r"\bcloister-[a-z]+@%i\.[a-z]+", value):
                assert (SYSTEM / name.replace("%i", "")).is_file(), f"{path.name}: {name}"
    (where,) = values(SYSTEM / "run-cloister-host.mount", "Mount", "Where")
    assert where == "/" + "run-cloister-host".replace("-", "/")
    assert values(ENCLAVE, "Unit", "RequiresMountsFor") == [where]


def test_profiles_pin_role_and_attester(tmp_path: Path) -> None:
    profiles = DEPLOY / "cvm" / "mkosi.profiles"
    assert {path.name for path in profiles.iterdir()} == {*ROLES, "snp", "tdx"}
    for role in ROLES:
        (preset,) = (profiles / role).rglob("*.preset")
        assert f"enable cloister-enclave@.service {role}\n" in preset.read_text()
        assert preset.read_text().endswith("disable *\n")
    for profile, kind in (("snp", "SevGuestAttester"), ("tdx", "TsmAttester")):
        (dropin,) = (profiles / profile).rglob("*.conf")
        assert dropin.parent.name == f"{ENCLAVE.name}.d"
        environment = dict(each.split("=", 1) for each in values(dropin, "Service", "Environment"))
        environment |= dict(each.split("=", 1) for each in values(ENCLAVE, "Service", "Environment"))
        assert type(open_attester(environment, root=tmp_path)).__name__ == kind


def test_the_root_is_under_verity() -> None:
    partitions = DEPLOY / "cvm" / "mkosi.repart"
    found = {
        values(path, "Partition", "Type")[0]: (
            values(path, "Partition", "Verity"),
            values(path, "Partition", "VerityMatchKey"),
        )
        for path in partitions.glob("*.conf")
    }
    assert found == {"esp": ([], []), "root": (["data"], ["root"]), "root-verity": (["hash"], ["root"])}
    (line,) = values(DEPLOY / "cvm" / "mkosi.conf", "Content", "KernelCommandLine")
    assert "root=" not in line  # mkosi adds roothash= itself, and no root= may stand beside it
    assert values(DEPLOY / "cvm" / "mkosi.conf", "Content", "Bootloader") == ["uki"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_knows_every_directive(tmp_path: Path) -> None:
    for path in SYSTEM.iterdir():
        if path.is_file():
            name = path.name.replace("@.", "@key-service.")
            (tmp_path / name).write_text(path.read_text())
    for path in sorted(tmp_path.iterdir()):
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        told = [line for line in done.stderr.splitlines() if path.name in line]
        assert not [
            line for line in told if re.search("[Uu]nknown|[Ii]nvalid|[Ff]ailed to parse|ignoring", line)
        ], told


def test_the_readme_says_that_nothing_was_run_and_names_what_exists() -> None:
    text = (DEPLOY / "README.md").read_text()
    assert "Nothing in this folder was run on hardware." in text
    for command in re.findall(r"^    cloister (collateral [a-z]+ .*)$", text, re.MULTILINE):
        from cloister.cli.collateral import app

        words = shlex.split(command)
        names = {each.name: each for each in app.registered_commands}
        assert words[1] in names
        callback = names[words[1]].callback
        assert callback is not None
        parameters = set(callback.__annotations__)
        for option in (word for word in words[2:] if word.startswith("--")):
            assert option[2:].replace("-", "_") in parameters, option
    for name in re.findall(r"^\| `([a-z_./]+)` \|", text, re.MULTILINE):
        assert (DEPLOY / name).exists(), name

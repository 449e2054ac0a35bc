from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cloister.core.encoding import encode
from cloister.errors import UsageError
from cloister.sim.image import ROLES, EnclaveImage, Interpreter, installed_source, locate
from cloister.sim.measurement import DOMAIN, SIMULATED_SIGNER, measure, measure_image
from sim.fakes import fake_source


def distribution(site: Path, name: str, *files: str) -> None:
    info = f"{name}-1.0.dist-info"
    texts = {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"}
    texts |= {f"{info}/INSTALLER": "any", f"{info}/REQUESTED": "", f"{info}/direct_url.json": "{}"}
    texts |= {file: f"# {file} of {name}\n" for file in files}
    for path, text in texts.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
    rows = [f"{path},," for path in (*texts, f"{info}/RECORD", f"../../../bin/{name}")]
    (site / info / "RECORD").write_text("\n".join(rows) + "\n")


def small_image(root: Path) -> EnclaveImage:
    """A whole image of small files: source, distributions, interpreter."""
    site = root / "site"
    for name in ROLES["worker"].distributions:
        distribution(site, name, f"{name}/__init__.py", f"{name}/native.so", f"{name}.libs/lib.so")
    distribution(site, "protobuf", "google/protobuf/__init__.py", "google/_upb/message.so")
    stdlib = root / "lib" / "python3"
    for path in ("os.py", "lib-dynload/_ssl.so", "test/test_os.py", "site-packages/other.py", "json/README"):
        (stdlib / path).parent.mkdir(parents=True, exist_ok=True)
        (stdlib / path).write_text(path)
    (root / "python3").write_text("binary")
    (root / "libpython.so").write_text("library")
    interpreter = Interpreter(
        binary=root / "python3", version="3.11.7", libraries=(root / "libpython.so",), stdlib=stdlib
    )
    return locate("worker", fake_source(root / "src"), site=site, interpreter=interpreter)


@pytest.fixture
def image(tmp_path: Path) -> EnclaveImage:
    return small_image(tmp_path)


def again(image: EnclaveImage) -> bytes:
    """Measured anew, with what lies on the disk now."""
    site = image.distributions[0].site
    fresh = locate(image.role.name, image.source, site=site, interpreter=image.interpreter)
    return measure_image(fresh).mr_enclave


def test_unknown_role_is_refused() -> None:
    with pytest.raises(UsageError) as refusal:
        measure("gateway")
    assert (refusal.value.code, refusal.value.actual) == ("usage.role", "gateway")


def test_folder_that_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        measure("worker", tmp_path)
    assert refusal.value.code == "measurement.source"


def test_missing_distribution_is_refused(image: EnclaveImage) -> None:
    shutil.rmtree(image.distributions[0].site / "numpy-1.0.dist-info")
    with pytest.raises(UsageError, match="numpy") as refusal:
        again(image)
    assert refusal.value.code == "measurement.distribution"


def test_missing_file_of_a_distribution_is_refused(image: EnclaveImage) -> None:
    (image.distributions[0].site / "numpy" / "native.so").unlink()
    with pytest.raises(UsageError, match=r"native\.so") as refusal:
        again(image)
    assert refusal.value.code == "measurement.file"


def test_distribution_without_record_is_refused(image: EnclaveImage) -> None:
    (image.distributions[0].site / "numpy-1.0.dist-info" / "RECORD").unlink()
    with pytest.raises(UsageError) as refusal:
        again(image)
    assert refusal.value.claim == "RECORD"


CHANGES: dict[str, Callable[[EnclaveImage], Path]] = {
    "errors": lambda image: image.source / "errors.py",
    "facade": lambda image: image.source / "__init__.py",
    "core": lambda image: image.source / "core" / "encoding.py",
    "net": lambda image: image.source / "net" / "__init__.py",
    "enclave": lambda image: image.source / "enclave" / "__main__.py",
    "distribution source": lambda image: image.distributions[0].site / "numpy" / "__init__.py",
    "distribution library": lambda image: image.distributions[0].site / "numpy.libs" / "lib.so",
    "distribution of a namespace": lambda image: (
        image.distributions[0].site / "google" / "_upb" / "message.so"
    ),
    "distribution metadata": lambda image: image.distributions[0].site / "numpy-1.0.dist-info" / "METADATA",
    "interpreter": lambda image: image.interpreter.binary,
    "interpreter library": lambda image: image.interpreter.libraries[0],
    "standard library": lambda image: image.interpreter.stdlib / "os.py",
    "extension module": lambda image: image.interpreter.stdlib / "lib-dynload" / "_ssl.so",
}


@pytest.mark.parametrize("category", CHANGES)
def test_a_changed_file_changes_the_measurement(image: EnclaveImage, category: str) -> None:
    before = again(image)
    path = CHANGES[category](image)
    with path.open("a") as file:
        file.write("# changed\n")
    assert again(image) != before


@pytest.mark.parametrize("name", ["source/core/extra.py", "source/enclave/roots.pem", "site/numpy/extra.py"])
def test_an_added_file_changes_the_measurement(image: EnclaveImage, name: str) -> None:
    before = again(image)
    folders = {"source": image.source, "site": image.distributions[0].site}
    where, _, path = name.partition("/")
    (folders[where] / path).write_text("")
    assert again(image) != before


def test_a_change_of_the_same_size_is_seen(image: EnclaveImage) -> None:
    path = image.source / "errors.py"
    before, status = again(image), path.stat()
    path.write_bytes(path.read_bytes().replace(b"Cloister", b"Cluster!"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert again(image) != before


def test_version_of_the_interpreter_is_measured(image: EnclaveImage) -> None:
    other = dataclasses.replace(image, interpreter=dataclasses.replace(image.interpreter, version="3.11.8"))
    assert measure_image(other).mr_enclave != measure_image(image).mr_enclave


@pytest.mark.parametrize(
    "name",
    [
        "source/host/new.py",
        "source/core/__pycache__/encoding.cpython-311.pyc",
        "site/numpy-1.0.dist-info/INSTALLER",
        "site/unrelated/__init__.py",
        "site/google/cloud/__init__.py",
        "stdlib/test/test_new.py",
        "stdlib/site-packages/new.py",
    ],
)
def test_what_the_enclave_does_not_run_is_not_measured(image: EnclaveImage, name: str) -> None:
    before = again(image)
    folders = {
        "source": image.source,
        "site": image.distributions[0].site,
        "stdlib": image.interpreter.stdlib,
    }
    where, _, path = name.partition("/")
    (folders[where] / path).parent.mkdir(parents=True, exist_ok=True)
    (folders[where] / path).write_text("something else")
    assert again(image) == before


def test_another_checkout_and_another_environment_measure_the_same(
    image: EnclaveImage, tmp_path: Path
) -> None:
    assert measure_image(small_image(tmp_path / "elsewhere")).mr_enclave == measure_image(image).mr_enclave


def test_installed_package_measures_the_same_elsewhere(tmp_path: Path) -> None:
    source = tmp_path / "elsewhere" / "cloister"
    shutil.copytree(installed_source(), source, ignore=shutil.ignore_patterns("__pycache__"))
    assert measure("key-service", source).mr_enclave == measure("key-service").mr_enclave


def test_measurement_is_the_same_in_another_process() -> None:
    code = "from cloister.sim.measurement import measure; print(measure('key-service').mr_enclave.hex())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == measure("key-service").mr_enclave.hex()


def test_roles_measure_differently() -> None:
    service, worker = measure("key-service"), measure("worker")
    assert service.mr_enclave != worker.mr_enclave
    assert service.isv_prod_id != worker.isv_prod_id


def test_measurement_is_the_digest_of_its_manifest() -> None:
    measured = measure("worker")
    assert measured.mr_enclave == hashlib.sha256(DOMAIN + encode(measured.manifest)).digest()
    assert len(measured.mr_signer) == 32
    assert b"SIMULATED" in measured.mr_signer == SIMULATED_SIGNER


def test_manifest_names_the_real_dependencies() -> None:
    manifest = measure("worker").manifest
    assert "core/encoding.py" in manifest["source"]
    assert not any(
        name.startswith(("host/", "sim/", "cli/", "owner/", "client/")) for name in manifest["source"]
    )
    assert manifest["distributions"]["onnxruntime"]["files"] > 100
    assert manifest["interpreter"]["stdlib"]["files"] > 500
    assert "onnxruntime" not in measure("key-service").manifest["distributions"]


def test_no_path_of_the_machine_is_in_the_manifest(tmp_path: Path) -> None:
    text = encode(measure("worker", fake_source(tmp_path)).manifest)
    assert os.fsencode(tmp_path) not in text
    assert os.fsencode(sys.prefix) not in text

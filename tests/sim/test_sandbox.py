"""Each test runs real enclaves, confined by whatever this machine offers, in up to three ways."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cloister.errors import UsageError
from cloister.sim import confine
from cloister.sim.image import locate
from cloister.sim.platform import SimulatedPlatform
from cloister.sim.sandbox import Feature, Sandbox
from sim.fakes import FakeAuthority, fake_source

WAYS = {
    "bubblewrap": (),
    "landlock": ("bubblewrap",),
    "no-namespaces": ("bubblewrap", "namespaces"),
    "bare": ("bubblewrap", "landlock", "namespaces", "seccomp"),
}


@pytest.fixture(scope="module")
def sandboxes() -> dict[str, Sandbox]:
    return {name: Sandbox.detect(without=without) for name, without in WAYS.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_source(tmp_path_factory.mktemp("source"))


def run(sandbox: Sandbox, source: Path, run_dir: Path, program: str, memory_limit: int | None = None) -> Any:
    """Run a program as an enclave; it leaves its answer in ``result``."""
    text = "import json\nresult = {}\n" + textwrap.dedent(program)
    (run_dir / "configuration").write_text(text + '\n(run_dir / "result").write_text(json.dumps(result))\n')

    async def launch() -> int:
        platform = SimulatedPlatform(FakeAuthority(), sandbox, source=source)
        enclave = await platform.launch("worker", run_dir, memory_limit=memory_limit)
        return await enclave.wait()

    status = asyncio.run(launch())
    assert status == 0, (run_dir / "enclave.log").read_text()[-2000:]
    return json.loads((run_dir / "result").read_text())


def require(sandbox: Sandbox, *names: str) -> None:
    for name in names:
        if not sandbox.has(name):
            pytest.skip(f"this machine has no {name}")


READ = """
for path in paths:
    try:
        open(path, "rb").read(1) if os.path.isfile(path) or not os.path.isdir(path) else os.listdir(path)
        result[path] = "read"
    except OSError as error:
        result[path] = type(error).__name__
"""


@pytest.mark.parametrize("way", ["bubblewrap", "landlock", "no-namespaces"])
def test_files_outside_the_image_are_closed(
    sandboxes: dict[str, Sandbox], source: Path, tmp_path: Path, way: str
) -> None:
    require(sandboxes[way], "bubblewrap" if way == "bubblewrap" else "landlock")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    unmeasured = Path(pytest.__file__)
    paths = [str(secret), str(unmeasured), str(source.parent), "/etc/passwd", str(tmp_path)]
    result = run(sandboxes[way], source, run_dir, f"paths = {paths!r}\n{READ}")
    # bubblewrap shows the folders that lead to what is visible, but nothing else in them.
    readable = {path for path, outcome in result.items() if outcome == "read"}
    assert readable <= ({str(source.parent), str(tmp_path)} if way == "bubblewrap" else set())


@pytest.mark.parametrize("way", ["bubblewrap", "landlock", "no-namespaces"])
def test_only_the_run_folder_is_writable(
    sandboxes: dict[str, Sandbox], source: Path, tmp_path: Path, way: str
) -> None:
    require(sandboxes[way], "bubblewrap" if way == "bubblewrap" else "landlock")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    targets = [str(source / "new.py"), str(source / "errors.py"), str(tmp_path / "new"), "/etc/new"]
    program = f"""
    for path in {targets!r} + [str(run_dir / "new")]:
        try:
            open(path, "ab").close()
            result[path] = "written"
        except OSError as error:
            result[path] = type(error).__name__
    """
    result = run(sandboxes[way], source, run_dir, program)
    assert result.pop(str(run_dir / "new")) == "written"
    # What bubblewrap lets an enclave write outside its folder lies in its own memory and dies with it.
    assert not (source / "new.py").exists()
    assert not (tmp_path / "new").exists()
    assert result[str(source / "errors.py")] != "written"


@pytest.mark.parametrize("way", ["bubblewrap", "landlock", "no-namespaces"])
def test_there_is_no_network(sandboxes: dict[str, Sandbox], source: Path, tmp_path: Path, way: str) -> None:
    require(sandboxes[way], *(("bubblewrap",) if way == "bubblewrap" else ("seccomp",)))
    if way == "landlock":
        require(sandboxes[way], "namespaces")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"""
        import socket
        try:
            socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), timeout=2)
            result["outcome"] = "connected"
        except OSError as error:
            result["outcome"] = type(error).__name__
        """
        assert run(sandboxes[way], source, tmp_path, program)["outcome"] != "connected"


@pytest.mark.parametrize("way", ["bubblewrap", "landlock", "no-namespaces"])
def test_dangerous_calls_are_refused(
    sandboxes: dict[str, Sandbox], source: Path, tmp_path: Path, way: str
) -> None:
    require(sandboxes[way], "seccomp")
    program = """
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    result["ptrace"] = [libc.ptrace(0, 0, 0, 0), ctypes.get_errno()]
    result["status"] = Path("/proc/self/status").read_text()
    """
    result = run(sandboxes[way], source, tmp_path, program)
    status = dict(line.split(":\t", 1) for line in result["status"].splitlines() if ":\t" in line)
    assert result["ptrace"] == [-1, 1]
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert status["CapEff"].strip("0") == ""
    assert status["CapPrm"].strip("0") == ""


@pytest.mark.parametrize("way", list(WAYS))
def test_no_core_is_dumped(sandboxes: dict[str, Sandbox], source: Path, tmp_path: Path, way: str) -> None:
    program = """
    import resource
    result["core"] = resource.getrlimit(resource.RLIMIT_CORE)
    """
    assert run(sandboxes[way], source, tmp_path, program)["core"] == [0, 0]


@pytest.mark.parametrize("way", list(WAYS))
def test_memory_limit_holds(sandboxes: dict[str, Sandbox], source: Path, tmp_path: Path, way: str) -> None:
    program = """
    try:
        bytearray(200 << 20)
        result["outcome"] = "allocated"
    except MemoryError:
        result["outcome"] = "refused"
    """
    limited = run(sandboxes[way], source, tmp_path, program, memory_limit=128 << 20)
    assert limited["outcome"] == "refused"
    assert run(sandboxes[way], source, tmp_path, program)["outcome"] == "allocated"


@pytest.mark.parametrize("way", list(WAYS))
def test_unmeasured_packages_are_out_of_reach(
    sandboxes: dict[str, Sandbox], source: Path, tmp_path: Path, way: str
) -> None:
    program = """
    for name in ("numpy", "onnxruntime", "cryptography", "pytest", "starlette", "cloister.sim"):
        try:
            __import__(name)
            result[name] = True
        except ImportError:
            result[name] = False
    """
    result = run(sandboxes[way], source, tmp_path, program)
    assert {name for name, found in result.items() if found} == {"numpy", "onnxruntime", "cryptography"}


@pytest.mark.parametrize("way", list(WAYS))
def test_onnxruntime_works_with_threads(
    sandboxes: dict[str, Sandbox], source: Path, tmp_path: Path, way: str
) -> None:
    weights = np.arange(64 * 64, dtype=np.float32).reshape(64, 64) / 4096
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 64])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    program = """
    import threading
    import numpy, onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession((run_dir / "model.onnx").read_bytes(), options)
    rows = numpy.ones((8, 64), numpy.float32)
    sums = []
    def infer():
        sums.append(float(session.run(None, {"x": rows})[0].sum()))
    threads = [threading.Thread(target=infer) for _ in range(4)]
    [each.start() for each in threads]
    [each.join() for each in threads]
    result["sums"] = sums
    """
    result = run(sandboxes[way], source, tmp_path, program, memory_limit=1 << 30)
    assert result["sums"] == pytest.approx([float(weights.sum()) * 8] * 4, rel=1e-4)
    assert onnx.checker.check_model(model) is None


@pytest.mark.parametrize("way", list(WAYS))
def test_an_enclave_dies_with_its_launcher(
    sandboxes: dict[str, Sandbox], source: Path, tmp_path: Path, way: str
) -> None:
    (tmp_path / "configuration").write_text('import time\n(run_dir / "started").touch()\ntime.sleep(60)\n')
    # The parent is a process of its own, which is then killed as a crash would.
    code = textwrap.dedent(
        f"""
        import asyncio, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from cloister.sim.platform import SimulatedPlatform
        from cloister.sim.sandbox import Sandbox
        from sim.fakes import FakeAuthority
        async def main():
            platform = SimulatedPlatform(FakeAuthority(), Sandbox.detect(without={WAYS[way]!r}))
            enclave = await platform.launch("worker", Path({str(tmp_path)!r}), source=Path({str(source)!r}))
            print(enclave.pid, flush=True)
            await enclave.wait()
        asyncio.run(main())
        """
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        wait_for(lambda: (tmp_path / "started").exists())
        assert processes_in(tmp_path)
        os.kill(parent.pid, signal.SIGKILL)
    wait_for(lambda: not processes_in(tmp_path))
    assert not os.path.exists(f"/proc/{pid}/exe")


def wait_for(condition: Any) -> None:
    import time

    for _ in range(250):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it never happened")


def processes_in(run_dir: Path) -> list[int]:
    """Processes that have the run folder on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(run_dir) + b"\0" in line and b"confine.py" not in line:
                found.append(int(entry.name))
    return found


def test_a_vanished_parent_stops_the_launch() -> None:
    specification = {
        "argv": ["/bin/echo", "ran"],
        "parent": 1,
        "memory_limit": None,
        "bubblewrap": False,
        "namespaces": False,
        "landlock": False,
        "seccomp": False,
        "readable": [],
        "writable": [],
    }
    command = [sys.executable, "-I", "-S", confine.__file__, json.dumps(specification)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert "ran" not in answer.stdout


def test_no_filter_for_an_unknown_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confine.platform, "machine", lambda: "riscv64")
    with pytest.raises(OSError, match="riscv64"):
        confine.filter_program(unix_sockets_only=False)


def test_filter_jumps_stay_inside_the_program() -> None:
    for only in (False, True):
        program = confine.filter_program(unix_sockets_only=only)
        assert len(program) % 8 == 0
        assert len(program) // 8 < 256


def test_report_names_every_feature(sandboxes: dict[str, Sandbox]) -> None:
    lines = sandboxes["bare"].report()
    assert "bubblewrap: no (turned off)" in lines
    assert len(lines) == len(sandboxes["bare"].features)


def test_missing_everything_is_reported_and_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("cloister.sim.sandbox._CONFINE", tmp_path / "nothing.py")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = Sandbox.detect()
    assert found.bubblewrap is None
    assert Feature(name="bubblewrap", available=False, detail="not installed") in found.features
    assert not any(found.has(name) for name in ("landlock", "namespaces", "seccomp", "memfd_secret"))


def test_command_refuses_a_memory_limit_that_is_none(sandboxes: dict[str, Sandbox], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        sandboxes["bare"].command(locate("worker"), tmp_path, memory_limit=0)

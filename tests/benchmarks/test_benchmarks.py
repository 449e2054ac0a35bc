"""Short runs of every benchmark: the last line is the JSON object that DESIGN, section 12, promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.__main__ import BENCHMARKS, PUBLISHED, command, publish  # noqa: E402
from benchmarks.models import IMAGE, bare_session, locate, sample  # noqa: E402
from benchmarks.report import Report, Rows, percentile, rounded  # noqa: E402

from benchmarks import __main__ as main  # noqa: E402
from benchmarks import models, overhead, zoo  # noqa: E402

SHORT = {
    "overhead": ("--model", "digits", "--runs", "3"),
    "throughput": ("--model", "digits", "--clients", "4", "--runs", "1", "--seconds", "0.3"),
    "peers": ("--model", "digits", "--runs", "1", "--seconds", "0.1", "--no-install", "--envs", "nowhere"),
    "flood": ("--clients", "40", "--runs", "1", "--seconds", "0.5"),
    "ladder": ("--model", "digits", "--runs", "1"),
    "chaos": ("--runs", "200", "--kill-every", "0.2"),
    "attestation": ("--runs", "2", "--largest-batch", "16"),
    "verification": ("--runs", "3"),
    "sealing": ("--mib", "2", "--runs", "2"),
    "sealed-load": ("--model", "digits", "--runs", "1"),
}
FIGURES = {
    "overhead": {
        "bare_ms_p50",
        "confidential_ms_p50",
        "added_ms_p50",
        "added_ms_p99",
        "ratio_p50",
        "verify_full_ms_p50",
        "verify_cached_us_p50",
        "transport_ms_p50",
    },
    "throughput": {"clients"},
    "peers": set(),  # see test_peers.py
    "flood": {"ratio_p99", "cloister_rps", "plain_rps", "gateway_after_mib", "worker_after_mib"},
    "ladder": {"cold_ms_p50", "warm_ms_p50", "hot_ms_p50", "ratio_cold_to_hot"},
    "chaos": {"right", "kills", "request_ms_p50"},
    "attestation": {
        "verify_quote_ms_p50",
        "verify_full_ms_p50",
        "verify_cached_us_p50",
        "possession_single_us_p50",
        "possession_batched_us_p50",
    },
    "verification": {f"{tee}_ms_p50" for tee in ("sgx", "tdx", "snp", "nitro", "dcap_qvl")},
    "sealed-load": {
        "gb_per_s",
        "open_gb_per_s",
        "load_s",
        "plain_load_s",
        "peak_mib",
        "plain_peak_mib",
        "peak_ratio",
        "peak_ratio_external",
        "peak_ratio_lean",
    },
    "sealing": {"seal_gb_per_s", "open_streamed_gb_per_s", "open_new_gb_per_s", "ratio_open_p50"},
}


def check_throughput(found: dict[str, Any]) -> None:
    figures = found["models"]["digits"]
    assert figures["ratio"] == pytest.approx(figures["confidential_rps"] / figures["bare_rps"], rel=1e-2)
    assert 0 < figures["confidential_ms_p50"] <= figures["confidential_ms_p99"]


def check_flood(found: dict[str, Any]) -> None:
    assert found["undeclared_errors"] == 0
    assert found["ratio_p99"] == pytest.approx(found["cloister_ms_p99"] / found["plain_ms_p99"], rel=1e-2)


def check_ladder(found: dict[str, Any]) -> None:
    stages = found["stages_ms_p50"]
    for kind, times in stages.items():
        assert all(value >= 0 for value in times.values()), kind
        assert sum(times.values()) == pytest.approx(found[f"{kind}_ms_p50"], rel=0.3)
    assert {"launcher", "launch", "challenge", "attest", "release", "register"} <= stages["cold"].keys()
    assert stages["warm"]["build"] > 0 == stages["hot"]["build"]


def check_chaos(found: dict[str, Any]) -> None:
    assert found["met"] is True
    assert (found["right"], found["wrong"], found["swapped"], found["lost"]) == (200, 0, 0, 0)


MORE = {
    "throughput": check_throughput,
    "flood": check_flood,
    "ladder": check_ladder,
    "chaos": check_chaos,
}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", SHORT)
def test_the_last_line_is_the_promised_object(name: str) -> None:
    found = last_line(bench(name, *SHORT[name]))
    assert found["benchmark"] == name
    assert found["runs"] == int(SHORT[name][SHORT[name].index("--runs") + 1])
    assert {"processor", "cores", "memory_gib", "python", "tee"} <= found["machine"].keys()
    assert FIGURES[name] <= found.keys()
    assert all(found[figure] > 0 for figure in FIGURES[name])
    MORE.get(name, lambda _: None)(found)


def test_the_profile_names_every_component() -> None:
    found = last_line(bench("overhead", "--model", "digits", "--runs", "3", "--profile"))
    parts = found["components_us_p50"]
    assert {part.partition(":")[0] for part in parts} == {"client", "gateway", "worker"}
    assert len(parts) == 20
    assert found["components_ms_p50"] == pytest.approx(sum(parts.values()) / 1e3, rel=1e-2)


def test_a_model_of_the_zoo_has_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "NAMES", ("MobileNetV1",))
    monkeypatch.setattr(overhead, "BAR_RATIO", {"MobileNetV1": 1e-9})
    found = overhead.run(["--zoo", "--runs", "2"])
    figures = found.figures["models"]["MobileNetV1"]
    assert figures["ratio_p50"] > 1
    assert figures["met"] is False
    assert "NOT met" in found.tables[0].rows[0][-1]


def test_a_large_model_is_compared_with_a_run_without_prepacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers don't prepack these either; with it, the last bits of the answer may differ."""
    asked: list[bool] = []
    plain = models.bare_session

    def spy(model: Path, *, prepacking: bool = True) -> Any:
        asked.append(prepacking)
        return plain(model, prepacking=prepacking)

    monkeypatch.setattr(models, "bare_session", spy)
    path = locate("digits", Path())
    inputs = sample(plain(path))
    (given,) = models.answer(path, inputs).values()
    monkeypatch.setattr(models, "PREPACK_LIMIT", 1)
    (other,) = models.answer(path, inputs).values()
    assert asked == [True, False]
    assert other == pytest.approx(given, abs=1e-5)


def test_every_benchmark_is_tested_and_published() -> None:
    assert BENCHMARKS.keys() == SHORT.keys() == {name for name, *_ in PUBLISHED}


@pytest.mark.parametrize("arguments", [("nonesuch",), ("--publish", "overhead", "nonesuch")])
def test_an_unknown_benchmark_is_wrong_usage(arguments: tuple[str, ...]) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert "nonesuch" in done.stderr


def test_the_help_names_every_benchmark() -> None:
    done = bench("--help")
    assert done.returncode == 0
    assert all(f"\n{name} " in done.stdout for name in BENCHMARKS)
    assert "--publish NAME" in done.stdout


def fake(name: str, arguments: Sequence[str]) -> Report:
    if name == "ladder":
        raise SystemExit("no such luck")
    table = Rows(title="T", columns=("a",), rows=((" ".join(arguments),),))
    return Report(benchmark=name, runs=1, figures={}, tables=(table,))


def test_one_command_writes_the_document_and_another_a_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "measure", fake)
    document = tmp_path / "docs" / "benchmarks.md"
    with pytest.raises(SystemExit):  # what was measured before a failure is kept
        publish(tuple(BENCHMARKS), document)
    text = document.read_text()
    assert text.count("\n## ") == [name for name, *_ in PUBLISHED].index("ladder")
    assert re.search(r"^`make bench BENCH=flood` \(\d{4}-\d\d-\d\d, 0\.0 min\)$", text, re.MULTILINE)
    assert publish(("sealing",), document) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["results"][0]["benchmark"] == "sealing"
    more = document.read_text()
    assert more.removesuffix(more[more.index("\n## sealing") :]) == text
    assert publish(("overhead",), document) == 0
    assert document.read_text() == more


def test_the_synthetic_model_takes_the_input_that_the_design_speaks_of(tmp_path: Path) -> None:
    session = bare_session(locate("synthetic", tmp_path))
    (image,) = sample(session).values()
    assert (image.shape, image.nbytes) == (IMAGE, 602_112)
    assert session.get_session_options().intra_op_num_threads == 1


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_percentiles_are_nearest_rank(share: float, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), share) == expected


def test_figures_are_rounded_and_the_rest_is_kept() -> None:
    assert rounded({"a": 1234.5678, "b": [0.000123456], "c": "x", "d": 7}) == {
        "a": 1235,
        "b": [0.0001235],
        "c": "x",
        "d": 7,
    }


def test_a_report_as_markdown_names_the_command() -> None:
    table = Rows(title="T", columns=("a", "b ms"), rows=(("x", 1.23456),))
    report = Report(benchmark="n", runs=1, figures={"b_ms": 1.0}, tables=(table,), setting="S.")
    assert report.to_markdown("n digits", command("n", ("--model", "digits"))) == (
        '## n digits\n\n`make bench BENCH=n ARGS="--model digits"`\n\nS.\n\nT:\n\n'
        "| a | b ms |\n|---|--:|\n| x | 1.235 |\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("overhead", "--model", "nosuch"),
        ("ladder", "--runs", "0"),
        ("peers", "--clients", "4", "-1"),
        ("flood", "--seconds", "nan"),
        ("throughput", "--model", "examples"),
    ],
)
def test_arguments_that_mean_nothing_are_wrong_usage(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(arguments)
    assert ended.value.code == 2
    assert f"argument {arguments[1]}: " in capsys.readouterr().err

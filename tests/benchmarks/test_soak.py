"""The judge of `chaos`: wrong answers and swapped ones are told from right ones."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.models import locate  # noqa: E402
from benchmarks.soak import Tally, _Plain, _report, _Soak  # noqa: E402

OPTIONS = Namespace(runs=1, clients=1, kill_every=1.0)
MINE = {"scores": np.array([1.0, 2.0], np.float32)}
OTHERS = {"scores": np.array([3.0, 4.0], np.float32)}


@pytest.mark.parametrize(
    ("outputs", "counts"),
    [
        (MINE, (1, 0, 0)),
        (OTHERS, (0, 1, 1)),
        ({"scores": np.array([1.0, np.nextafter(np.float32(2), np.float32(3))], np.float32)}, (0, 1, 0)),
        ({}, (0, 1, 0)),
        ({"other": MINE["scores"]}, (0, 1, 0)),
    ],
)
def test_an_answer_is_right_wrong_or_swapped(outputs: dict[str, Any], counts: tuple[int, int, int]) -> None:
    soak = _Soak(None, {}, OPTIONS)  # type: ignore[arg-type]
    soak._in_flight = {0: MINE, 1: OTHERS}
    soak._judge(0, outputs)
    assert (soak.tally.right, soak.tally.wrong, soak.tally.swapped) == counts


@pytest.mark.parametrize("flaw", ["wrong", "swapped", "lost", "failures", "missing"])
def test_one_flaw_is_enough_not_to_meet_the_bar(flaw: str) -> None:
    tally = Tally(right=1)
    tally.times.seconds.append(0.1)
    assert _report(OPTIONS, tally, 1.0).figures["met"]
    match flaw:
        case "wrong" | "swapped":
            setattr(tally, flaw, 1)
        case "missing":
            tally.right = 0
        case _:
            getattr(tally, flaw)["code"] += 1
    assert not _report(OPTIONS, tally, 1.0).figures["met"]


def test_every_question_is_another(tmp_path: Path) -> None:
    plain = _Plain(locate("digits", tmp_path), 1)
    answers = [plain.question()[1]["probabilities"].tobytes() for _ in range(20)]
    assert len(set(answers)) == 20

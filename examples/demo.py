"""The main job end to end, on real processes: sealed models, sealed requests, and everything that is refused.

    make demo            run it; exits 1 if any line does not hold
    make demo KEEP=1     leave the service running, and print what to try next

Everything happens in a fresh temporary folder, which is deleted at the end. It runs as any user.
"""

from __future__ import annotations

import sys

try:
    import argparse
    import shlex
    import signal
    import threading
    from pathlib import Path
    from types import FrameType

    import numpy as np
    from rich.console import Console
    from rich.markup import escape

    from demonstration import job, refusals, sight, tampering
    from demonstration.report import Report
    from demonstration.stage import LEASE, Stage, examples
except KeyboardInterrupt:  # these take a second, and whoever is in a hurry needs no traceback
    sys.exit(130)

FAULTS = ("answer", "leak", "grant")  # what the tests break, to see that the line which shows it fails


def main(arguments: list[str] | None = None) -> int:
    """Run the demonstration; gives the exit status."""
    parser = argparse.ArgumentParser(description="Cloister's main job, end to end.")
    parser.add_argument("--keep", action="store_true", help="leave the service running")
    parser.add_argument("--fault", action="append", default=[], choices=FAULTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _exit)
    report, stage = Report(Console(highlight=False)), Stage()
    kept = False
    try:
        run(report, stage, faults=frozenset(options.fault))
        holds = report.summary()
        if options.keep:
            kept = True
            keep(report, stage)
    except KeyboardInterrupt:
        report.console.print("interrupted", style="red")
        return 130
    finally:
        stage.stop()
        if not kept:
            stage.remove()
    return 0 if holds else 1


def run(report: Report, stage: Stage, *, faults: frozenset[str]) -> None:
    """Every act, in order."""
    models = examples()
    if not job.start_service(report, stage):
        return
    job.publish(report, stage, models)
    job.verify(report, stage)
    served = job.ask(report, stage, models, spoil="answer" in faults)
    search = sight.show(report, stage, served, leak="leak" in faults)
    report.section(
        "What is refused",
        "Each of these is really tried against the running service, and must be refused with its own code.",
    )
    refusals.refuse_enclaves(report, stage, served)
    refusals.refuse_users(report, stage, served, grant="grant" in faults)
    tampering.refuse_replay(report, stage, served)
    tampering.refuse_tampered_model(report, stage, served)
    tampering.refuse_tampered_document(report, stage)
    refusals.refuse_services(report, stage, served)
    job.answers_again(report, stage, served)
    sight.show_again(report, stage, search)


def keep(report: Report, stage: Stage) -> None:
    """Print commands to try, and keep every process running until interrupted."""
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    sample = stage.user_identity.with_name("sample.npy")
    np.save(sample, examples()[0].samples[:1])
    print_commands(report.console, stage, sample)
    while not told.wait(0.5):
        for name in stage.service.revive():
            report.console.print(f"[yellow]{name} ended and was started again[/yellow]")
    report.console.print(f"stopping; the data stays in {stage.root}", soft_wrap=True)


def print_commands(console: Console, stage: Stage, sample: Path) -> None:
    """The next commands, with this service's own paths."""
    beside = Path(sys.executable).with_name("cloister")
    cloister = [str(beside)] if beside.exists() else [sys.executable, "-m", "cloister.cli"]
    policy = ["--policy", str(stage.site.user_policy)]
    owner = ["--desk", str(stage.desk.directory), "--service-policy", str(stage.site.user_policy)]
    model, identity = stage.desk.model_id("digits"), ["--identity", str(stage.user_identity)]
    visitor = stage.visitor.user_id(stage.desk.owner).hex()
    commands = (
        ("verify the service and see every step", [*cloister, "verify", stage.url, *policy]),
        (
            "send one sealed request",
            [*cloister, "infer", stage.url, model, "--input", f"image={sample}", *policy, *identity],
        ),
        (
            f"take the user's grant back; workers follow within their lease: wait {LEASE} s, then ask again",
            [
                *cloister,
                "owner",
                "revoke",
                "digits",
                stage.user.user_id(stage.desk.owner).hex(),
                stage.url,
                *owner,
            ],
        ),
        (
            "grant the model to the visitor",
            [*cloister, "owner", "grant", "digits", visitor, stage.url, *owner],
        ),
        ("what the operator counts", ["curl", "-s", f"{stage.url}/metrics"]),
        ("what the operator captured", ["less", str(stage.capture)]),
    )
    console.print(f"\n[bold]Serving at {stage.url} until Ctrl-C.[/bold] In another terminal:")
    for what, command in commands:
        console.print(f"\n[dim]# {escape(what)}[/dim]", soft_wrap=True)
        console.print(escape(shlex.join(command)), soft_wrap=True)
    console.print(f"\ndata in {stage.root}", soft_wrap=True)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

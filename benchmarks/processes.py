"""What the kernel says of processes: who started whom, memory, processor time (proc(5))."""

from __future__ import annotations

import os
import time
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, left = [], [pid]
    while left:
        found.append(left.pop())
        left += children.get(found[-1], [])
    return found


def resident_mib(pid: int) -> float:
    """MiB of memory that a process and its descendants have resident; shared pages count for each."""
    return sum(_status(each, "VmRSS") for each in family(pid)) / 1024


def peak_mib(pid: int) -> float:
    """MiB that each of them had resident at most, added up."""
    return sum(_status(each, "VmHWM") for each in family(pid)) / 1024


def processor_seconds(pid: int) -> float:
    """Seconds of processor time that a process and its descendants took, as far as they still run."""
    rows = (_stat(each) for each in family(pid))
    return sum((int(row[11]) + int(row[12])) / _TICKS for row in rows if row)


def started(pid: int) -> float:
    """When a process was started, in monotonic seconds, to a hundredth; 0 where it is gone."""
    row = _stat(pid)
    if not row:
        return 0.0
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(row[19]) / _TICKS
    return time.monotonic() - age


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name, from the state on; empty where the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _status(pid: int, name: str) -> int:
    """A field of /proc/PID/status, in KiB; 0 where the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name + ":")), 0)

"""Runs in a fresh process, confines it, and becomes the enclave: ``python -I -S confine.py SPECIFICATION``.

It is a script of the standard library alone, because what it does to itself (user namespaces, Landlock,
seccomp) a process with threads can't do between fork and exec. The specification is a JSON object written by
`cloister.sim.sandbox`; ``--probe`` instead prints as JSON what this machine allows.

Sources: landlock(7), seccomp(2), user_namespaces(7), prctl(2), the kernel's ``include/uapi``.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
from typing import Any, Final

_libc: Final = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG: Final = 1
PR_SET_SECCOMP: Final = 22
PR_CAPBSET_DROP: Final = 24
PR_SET_NO_NEW_PRIVS: Final = 38
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWNET: Final = 0x40000000
CLONE_NEWIPC: Final = 0x08000000

# These four have one number on every architecture: they are younger than the common table.
SYS_LANDLOCK_CREATE_RULESET: Final = 444
SYS_LANDLOCK_ADD_RULE: Final = 445
SYS_LANDLOCK_RESTRICT_SELF: Final = 446
SYS_MEMFD_SECRET: Final = 447

LANDLOCK_READ: Final = 0b1101  # execute, read file, read folder
LANDLOCK_FILE_RIGHTS: Final = 0b111 | 1 << 14 | 1 << 15  # what a rule may allow on a file that is no folder

# What no enclave needs: looking into other processes, loading code into the kernel, changing the machine.
ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*, in this order below
SOCKET: Final = (41, 198)
DENIED: Final = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "bpf": (321, 280),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "open_by_handle_at": (304, 265),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "userfaultfd": (323, 282),
}


def main(arguments: list[str]) -> None:
    """Confine this process as the specification says, then execute its ``argv``."""
    if arguments == ["--probe"]:
        print(json.dumps(probe()))
        return
    specification = json.loads(arguments[0])
    argv: list[str] = specification["argv"]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if specification["memory_limit"] is not None:
        limit_memory(specification["memory_limit"])
    if specification["bubblewrap"]:
        if specification["seccomp"]:
            argv[1:1] = ["--seccomp", str(_filter_descriptor())]
    else:
        confine(specification)
    # Last, since a change of credentials clears it.
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")
    if os.getppid() != specification["parent"]:
        sys.exit("the launcher is gone")
    os.execv(argv[0], argv)  # noqa: S606


def confine(specification: dict[str, Any]) -> None:
    """Apply what bubblewrap would have: namespaces, capabilities, Landlock, seccomp."""
    if specification["namespaces"]:
        enter_namespaces()
    drop_capabilities()
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    if specification["landlock"]:
        restrict_files(specification["readable"], specification["writable"])
    if specification["seccomp"]:
        filter_calls(unix_sockets_only=not specification["namespaces"])


def limit_memory(limit: int) -> None:
    """Bound this process's private writable memory, in bytes; a lower limit that is already there stays."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    bound = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))


def probe() -> dict[str, Any]:
    """What this machine allows a process without privileges; each value is a number, true, or a reason."""
    found: dict[str, Any] = {
        "landlock": _libc.syscall(SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    }
    descriptor = _libc.syscall(SYS_MEMFD_SECRET, 0)
    found["memfd_secret"] = True if descriptor >= 0 else os.strerror(ctypes.get_errno())
    if descriptor >= 0:
        os.close(descriptor)
    found["namespaces"] = _attempt(enter_namespaces)
    found["seccomp"] = _attempt(_try_filter)
    return found


def enter_namespaces() -> None:
    """Enter new user, network and IPC namespaces, keeping this process's user and group ids."""
    user, group = os.getuid(), os.getgid()
    _check(_libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def drop_capabilities() -> None:
    """Empty the bounding set, so that the exec leaves none, even to root."""
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    for capability in range(last + 1):
        # Refused to whoever holds none: then there is nothing to drop.
        _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def restrict_files(readable: list[str], writable: list[str]) -> None:
    """Allow reading and executing below ``readable``, everything below ``writable``, and no TCP."""
    version = _libc.syscall(SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    rights = (1 << (13 + (version >= 2) + (version >= 3))) - 1
    if version >= 5:
        rights |= 1 << 15  # ioctl on devices
    network = 0b11 if version >= 4 else 0  # bind and connect
    scoped = 0b11 if version >= 6 else 0  # abstract Unix sockets, signals
    attributes = struct.pack("=QQQ", rights, network, scoped)[
        : 8 if version < 4 else 16 if version < 6 else 24
    ]
    ruleset = _libc.syscall(
        SYS_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0)
    )
    _check(ruleset, "landlock_create_ruleset")
    for path in readable:
        _allow(ruleset, path, LANDLOCK_READ)
    for path in writable:
        _allow(ruleset, path, rights)
    _check(_libc.syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)), "landlock_restrict_self")
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not os.path.isdir(path):
        rights &= LANDLOCK_FILE_RIGHTS
    rule = struct.pack("=Qi", rights, descriptor)
    _check(_libc.syscall(SYS_LANDLOCK_ADD_RULE, ruleset, 1, rule, ctypes.c_uint32(0)), "landlock_add_rule")
    os.close(descriptor)


def filter_calls(*, unix_sockets_only: bool) -> None:
    """Install the seccomp filter on this process."""
    program = filter_program(unix_sockets_only=unix_sockets_only)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    _check(_libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0), "PR_SET_SECCOMP")


def filter_program(*, unix_sockets_only: bool) -> bytes:
    """The classic BPF program: EPERM for the denied calls, death for a foreign architecture.

    Args:
        unix_sockets_only: Also refuse sockets of other families: where there is no network namespace.

    Raises:
        OSError: this architecture's numbers are not known.
    """
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no seccomp filter for {machine}")
    column = list(ARCHITECTURES).index(machine)
    load, equal, at_least, jump, give = 0x20, 0x15, 0x35, 0x05, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
    lines = [(load, 0, 0, 4), (equal, 1, 0, ARCHITECTURES[machine]), (give, 0, 0, kill), (load, 0, 0, 0)]
    # The x32 ABI has numbers of its own from 2^30 on, which the list below would miss.
    lines += [(at_least, 0, 1, 0x40000000), (give, 0, 0, refuse)]
    for numbers in DENIED.values():
        lines += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse)]
    if unix_sockets_only:
        lines += [(equal, 1, 0, SOCKET[column]), (jump, 0, 0, 3), (load, 0, 0, 16)]
        lines += [(equal, 1, 0, 1), (give, 0, 0, refuse)]
    lines.append((give, 0, 0, allow))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def _filter_descriptor() -> int:
    """The program in a memory file that the next program of this process inherits."""
    descriptor = os.memfd_create("seccomp", 0)
    os.write(descriptor, filter_program(unix_sockets_only=False))
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _try_filter() -> None:
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    filter_calls(unix_sockets_only=False)


def _attempt(action: Any) -> bool | str:
    try:
        action()
    except OSError as error:
        return str(error.strerror or error)
    return True


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""What a child process gives up before it gets a model: files, network, new processes, sight of others.

The filter names the few calls that a ready process makes, and refuses every other one: it can't open a file,
make a socket, a process or executable memory, or send a signal. Landlock, where the kernel has it, closes
files a second time. None of it needs privileges, and none of it can be taken back.

Sources: seccomp(2), landlock(7), prctl(2), the kernel's ``include/uapi`` and system call tables.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_LANDLOCK_CREATE_RULESET: Final = 444  # these two have one number on every architecture
_LANDLOCK_RESTRICT_SELF: Final = 446

_ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*, in this order below
_SECCOMP: Final = (317, 277)
_FCNTL: Final = (72, 25)
_F_DUPFD_CLOEXEC: Final = 1030  # which Python's mmap makes of a descriptor
_PROTECTING: Final = {"mmap": (9, 222), "mprotect": (10, 226)}  # where nothing becomes executable any more
_ALLOWED: Final = {
    "brk": (12, 214),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "close": (3, 57),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "futex": (202, 98),
    "getpid": (39, 172),
    "getrandom": (318, 278),
    "gettid": (186, 178),
    "gettimeofday": (96, 169),
    "madvise": (28, 233),
    "membarrier": (324, 283),
    "mremap": (25, 216),
    "munmap": (11, 215),
    "recvmsg": (47, 212),
    "restart_syscall": (219, 128),
    "rseq": (334, 293),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_getaffinity": (204, 123),
    "sched_yield": (24, 124),
    "sendto": (44, 206),
    "set_robust_list": (273, 99),
    "sigaltstack": (131, 132),
}


def die_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends, in whatever way; at once if that is gone."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")
    if os.getppid() != parent:
        sys.exit("the parent is gone")


def close_files() -> bool:
    """Close every file to this thread and those that it starts, open ones apart; False without Landlock."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    version = _libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    files = (1 << (13 + (version >= 2) + (version >= 3))) - 1 | (version >= 5) << 15
    network, scoped = 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0
    handled = struct.pack("=QQQ", files, network, scoped)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _libc.syscall(
        _LANDLOCK_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), ctypes.c_uint32(0)
    )
    _check(ruleset, "landlock_create_ruleset")
    _check(_libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)), "landlock_restrict_self")
    os.close(ruleset)
    return True


def filter_calls() -> None:
    """Allow this process, all its threads, nothing but `_ALLOWED`; raises OSError where that can't be."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    program = filter_program()
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    number = _SECCOMP[_column()]
    if _libc.syscall(number, 1, 1, header) != 0:  # SECCOMP_SET_MODE_FILTER, for every thread
        raise OSError(ctypes.get_errno() or errno.ESRCH, "seccomp")


def filter_program() -> bytes:
    """The classic BPF program: EPERM for all but the allowed calls, death for a foreign architecture.

    Raises:
        OSError: this architecture's numbers are not known.
    """
    column = _column()
    load, equal, at_least, has, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
    architecture = list(_ARCHITECTURES.values())[column]
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    lines += [(at_least, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # x32 has numbers of its own
    for numbers in _ALLOWED.values():
        lines += [(equal, 0, 1, numbers[column]), (give, 0, 0, allow)]
    for numbers in _PROTECTING.values():  # the third argument, PROT_EXEC
        lines += [(equal, 0, 4, numbers[column]), (load, 0, 0, 32), (has, 0, 1, 4)]
        lines += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    lines += [(equal, 0, 3, _FCNTL[column]), (load, 0, 0, 24), (equal, 0, 1, _F_DUPFD_CLOEXEC)]
    lines += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def _column() -> int:
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no seccomp filter for {machine}")
    return list(_ARCHITECTURES).index(machine)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")

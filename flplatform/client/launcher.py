"""Starts a command of which nothing survives: `python -I -S launcher.py PLAN COMMAND…`.

The launcher stays as the command's parent. When the command ends, it kills whatever the command
left behind, sessions of their own or not, and exits with its status (128 + n for signal n). When
the launcher gets SIGTERM, or *its* parent dies, it kills everything.

With mounts in the plan the command runs in user, mount, network, process and IPC namespaces of
its own: the file system read-only but for what the plan says, a network with loopback only, no
capabilities, and no way to get new ones. Needs Linux 5.12.

Standard library only and no import of the platform: it is started by path.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import stat
import struct
import sys
import time
from typing import NoReturn

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 1 << 18
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 24, 36, 38
# System calls newer than 5.0 have the same number on every architecture that Python runs on.
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_MOUNT_SETATTR = 428, 429, 442
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH, MOUNT_ATTR_RDONLY = 1, 4, 1
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1

EXIT_SETUP = 125
LOOK_AGAIN_S = 0.005, 0.25
EXIT_NO_COMMAND = 127
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")

_libc = ctypes.CDLL(None, use_errno=True)


def main(arguments: list[str]) -> NoReturn:
    """Run the command as the plan says and exit with its status."""
    plan, command = json.loads(arguments[0]), arguments[1:]
    try:
        if plan["mounts"]:
            _enter_namespaces()
        else:
            _prctl(PR_SET_CHILD_SUBREAPER, 1)
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != plan["parent"]:
            os._exit(EXIT_SETUP)
        child = os.fork()
        if child == 0 and plan["mounts"]:
            # The first process of a process namespace: when it ends, all others are killed.
            _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            enclose(plan["mounts"], plan["devices"])
            os.chdir(plan["folder"])
            child = os.fork()
        if child == 0:
            _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            _prctl(PR_SET_NO_NEW_PRIVS, 1)
            if plan["mounts"]:
                _drop_capabilities()
    except OSError as error:
        print(f"sandbox: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_SETUP)
    if child == 0:
        _execute(command)
    _wait(child, sweep=not plan["mounts"])


def _execute(command: list[str]) -> NoReturn:
    try:
        os.execv(command[0], command)  # this is what a launcher does
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    os._exit(EXIT_NO_COMMAND)


class _Stopped(BaseException):
    """SIGTERM came, from the parent or because the parent is no more."""


def _stop(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Stopped


def _wait(child: int, sweep: bool) -> NoReturn:
    """Reap every orphan until `child` ends or SIGTERM comes; kill what is left and exit.

    Args:
        child: what to wait for.
        sweep: look for descendants. Not within namespaces: there the kernel kills them with the
            first process, and /proc shows other numbers than this process knows.
    """
    try:
        signal.signal(signal.SIGTERM, _stop)
        pid, status = os.wait()
        while pid != child:
            pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        code = code if code >= 0 else 128 - code
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is left is killed in any case
    except _Stopped:
        code = 128 + signal.SIGTERM
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    with contextlib.suppress(ChildProcessError):
        pause_s = LOOK_AGAIN_S[0]
        while sweep:  # orphans come back to this process, so that none gets away
            with contextlib.suppress(OSError):  # no descriptor is left to look for them
                for pid in _descendants():
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
            # One may have been passed over, its parent gone while /proc was read: look again.
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LOOK_AGAIN_S[1])
    os._exit(code)


def _descendants() -> list[int]:
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    # pid (name) state parent …; the name may hold anything but ends at the last ).
                    parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
            except OSError:
                continue
    found: list[int] = []
    front = {os.getpid()}
    while front:
        front = {pid for pid, parent in parents.items() if parent in front}
        found += front
    return found


def _enter_namespaces() -> None:
    user, group = os.geteuid(), os.getegid()
    flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC
    _check(_libc.unshare(flags), "unshare")
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{user} {user} 1")
    _write("/proc/self/gid_map", f"{group} {group} 1")


def enclose(mounts: list[list[str]], devices: list[str]) -> None:
    """Build the file system, loopback and limits of a new set of namespaces.

    Args:
        mounts: in order, [kind, source, target]: "read" and "write" show `source` at `target`,
            "hide" puts an empty folder there.
        devices: further device files that stay visible.

    Raises:
        OSError: the kernel refused.
    """
    os.chdir("/")
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    # Sources are cloned first: later mounts may cover them.
    clones = [_clone(source) if kind != "hide" else -1 for kind, source, _ in mounts]
    nodes = [f"/dev/{name}" for name in DEVICES] + devices
    node_clones = [_clone(node) for node in nodes]
    # A nested user namespace would bring new capabilities to attack the kernel with. Where /proc
    # cannot be written, the mounts made here stay locked in it all the same.
    with contextlib.suppress(OSError):
        _write("/proc/sys/user/max_user_namespaces", "0")
    _read_only(AT_FDCWD, "/", AT_RECURSIVE)
    _make_dev(list(zip(nodes, node_clones, strict=True)))
    _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    _read_only(AT_FDCWD, "/proc", 0)
    hidden = []
    for (kind, _, target), clone in zip(mounts, clones, strict=True):
        if kind == "hide":
            if os.path.isdir(target):
                _mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m")
                hidden.append(target)
            continue
        if kind == "read":
            _read_only(clone, "", AT_EMPTY_PATH | AT_RECURSIVE)
        _make_target(target, clone)
        _move(clone, target)
    for target in hidden:
        _read_only(AT_FDCWD, target, 0)
    _raise_loopback()


def _make_dev(nodes: list[tuple[str, int]]) -> None:
    _mount("tmpfs", "/dev", "tmpfs", MS_NOSUID, "mode=0755")
    for path, clone in nodes:
        _make_target(path, clone)
        _move(clone, path)
    os.mkdir("/dev/shm", 0o1777)  # noqa: S108 - the one of this mount namespace
    os.chmod("/dev/shm", 0o1777)  # noqa: S108, S103 - as everywhere
    os.symlink("/proc/self/fd", "/dev/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"/dev/{name}")


def _make_target(target: str, clone: int) -> None:
    """Make an empty file or folder to mount `clone` on, if there is none."""
    if os.path.exists(target):
        return
    if stat.S_ISDIR(os.fstat(clone).st_mode):
        os.makedirs(target)
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _raise_loopback() -> None:
    """Set the interface `lo` up: processes of one job may talk to each other."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        request = struct.pack("16sh22x", b"lo", 0)
        _, flags = struct.unpack("16sh22x", fcntl.ioctl(handle, SIOCGIFFLAGS, request))
        fcntl.ioctl(handle, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | IFF_UP))


def _drop_capabilities() -> None:
    """Leave nothing for the command's `exec` to regain."""
    for capability in range(64):
        if _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # there are no more


def _check(result: int, what: str) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, value, 0, 0, 0), "prctl")


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    texts = source.encode(), os.fsencode(target), kind.encode()
    flag_bits = ctypes.c_ulong(flags)
    _check(_libc.mount(*texts, flag_bits, options.encode()), f"mount {kind} on {target}")


def _clone(path: str) -> int:
    """Return a handle on a copy of the mounts below `path`."""
    flags = ctypes.c_uint(OPEN_TREE_CLONE | AT_RECURSIVE | os.O_CLOEXEC)
    return _check(_libc.syscall(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(path), flags), path)


def _move(clone: int, target: str) -> None:
    flags = ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH)
    arguments = clone, b"", AT_FDCWD, os.fsencode(target), flags
    _check(_libc.syscall(SYS_MOVE_MOUNT, *arguments), f"move_mount to {target}")
    os.close(clone)


def _read_only(folder: int, path: str, flags: int) -> None:
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    arguments = folder, os.fsencode(path), ctypes.c_uint(flags), attributes, size
    _check(_libc.syscall(SYS_MOUNT_SETATTR, *arguments), f"mount_setattr {path}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])

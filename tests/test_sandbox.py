"""Programs that nobody has read: what they may do, and what stops them."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from diffmas.evaluation import sandbox
from diffmas.evaluation.sandbox import Limits, run

SHORT = Limits(seconds=2.0)


@pytest.fixture(scope="module", autouse=True)
def namespaces():
    if sandbox.isolation() != "namespaces":
        pytest.skip("no bubblewrap, or a system without namespaces")


def remaining(mark: str) -> list[str]:
    """The command lines of this machine's processes that hold `mark`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().decode("utf-8", "replace")
            except OSError:
                continue
            found += [line] if mark in line else []
    return found


# ---- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program, reason",
    [
        ("assert 1 + 1 == 2", ""),
        ("print('x' * 10**6); import sys; sys.stderr.write('y')", ""),
        ("import math, json, re, collections, typing, dataclasses", ""),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\nassert A(1).x == 1", ""),
        ("if __name__ == '__main__': raise ValueError", ""),
        ("open('mine', 'w').write('a'); assert open('mine').read() == 'a'", ""),
        ("assert 1 == 2, 'a\\nb'", "AssertionError: a b"),
        ("x = (", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("input()", "EOFError"),
        ("import os; os._exit(0)", "left with exit code 0 before its last line"),
        ("import os; os.kill(os.getpid(), 9)", "before its last line"),
        ("import ctypes; ctypes.string_at(0)", "before its last line"),
        ("def f(): f()\nf()", "RecursionError"),
        ("\ud800", "UnicodeEncodeError|SyntaxError|NameError"),
    ],
)
def test_a_program_passes_if_it_reaches_its_end(program, reason):
    verdict = run(program, SHORT)
    assert verdict.passed == (reason == "") and verdict.isolation == "namespaces"
    assert any(part in verdict.reason for part in reason.split("|")), verdict


def test_numpy_is_there_as_plus_tests_need_it():
    pytest.importorskip("numpy")
    assert run("import numpy; assert numpy.allclose(numpy.ones((9, 9)) @ numpy.ones(9), 9)").passed


def test_an_interpreter_below_the_directory_that_programs_work_in():
    """/tmp is the program's own, and yet an environment that lies there is seen."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
        code = "from diffmas.evaluation import sandbox; print(sandbox.run('assert True', isolated='namespaces'))"
        path = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, sys.path)])
        ran = subprocess.run(
            [f"{directory}/bin/python", "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
        )  # fmt: skip
    assert "passed=True" in ran.stdout, ran.stdout + ran.stderr


def test_a_long_program_and_its_threads():
    """Longer than a pipe, and ended while a thread of it goes on."""
    assert run("x = 0\n" * 200_000 + "import threading\nthreading.Thread(target=threading.Event().wait).start()").passed


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"isolated: expected one of .*got 'magic'"):
        run("", isolated="magic")


# ---- hostile programs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(1000)", "import re; re.match('(a+)+b', 'a' * 99)"]
)
def test_an_endless_program_ends(program):
    start = time.perf_counter()
    verdict = run(program, Limits(seconds=1.0))
    assert not verdict.passed and verdict.reason == "no end after 1 s" and time.perf_counter() - start < 10


def test_ten_gigabytes_are_refused():
    assert "MemoryError" in run("x = bytearray(10 * 2**30)", SHORT).reason
    assert not run("x = []\nwhile True: x.append(bytearray(2**20))", SHORT).passed
    swallowed = "try:\n    x = bytearray(10 * 2**30)\nexcept MemoryError:\n    x = None\nassert x is not None"
    assert run(swallowed, SHORT).reason == "AssertionError"


def test_processes_share_the_memory():
    """What children can have together, each as much as it gets, while all of them live."""
    program = (
        "import os, time\nread, write = os.pipe()\n"
        "for _ in range(40):\n    try: child = os.fork()\n    except OSError: break\n"
        "    if child == 0:\n        kept = []\n"
        "        try:\n            while True: kept.append(bytearray(2**20))\n"
        "        except MemoryError: os.write(write, b'%d ' % len(kept))\n        time.sleep(9)\n"
        "time.sleep(1)\ngot = [int(n) for n in os.read(read, 999).split()]\nassert len(got) > 1 and 40 < sum(got), got\n"
        "assert sum(got) <= 256, got"
    )
    verdict = run(program, Limits(seconds=5, memory=256 << 20, processes=4))
    assert verdict.passed, verdict
    assert Limits().memory <= 2 << 30


def test_a_disk_that_fills_is_refused():
    big = "with open('big', 'wb') as f:\n    for _ in range(64): f.write(bytes(2**20))"
    assert "File too large" in run(big, SHORT).reason
    many = "for i in range(99):\n    with open(f'f{i}', 'wb') as f: f.write(bytes(8 * 2**20))"
    assert "No space left" in run(many, SHORT).reason


def test_processes_are_counted_before_there_are_many():
    program = "import os, time\nn = 0\ntry:\n    while n < 40:\n        n += 1\n        if not os.fork(): time.sleep(9)\n"
    assert run(f"{program}except OSError: pass\nassert n < 20, n", Limits(seconds=5, processes=8)).passed


def test_a_fork_bomb_is_stopped_and_leaves_nothing():
    mark = f"bomb-{os.getpid()}"
    program = (
        "import os, subprocess, sys\n"
        f"try: subprocess.Popen(['/bin/sh', '-c', 'sleep 60; echo {mark}'], start_new_session=True)\nexcept OSError: pass\n"
        "while True:\n    try: os.fork()\n    except OSError: pass\n"
    )
    verdict = run(program, Limits(seconds=2.0, processes=8))
    assert not verdict.passed and verdict.seconds < 20
    deadline = time.monotonic() + 5  # the kernel ends a namespace's processes one by one
    while remaining(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert remaining(mark) == []
    assert subprocess.run([sys.executable, "-c", "pass"]).returncode == 0


def test_a_process_that_stays_behind_goes(tmp_path):
    mark = f"stays-{os.getpid()}"
    program = f"import subprocess; subprocess.Popen(['/bin/sh', '-c', 'sleep 60; echo {mark}'], start_new_session=True)"
    assert run(program, SHORT).passed
    deadline = time.monotonic() + 5
    while remaining(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert remaining(mark) == []


def test_nothing_outside_can_be_written(tmp_path):
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o777)
    targets = [
        tmp_path / "x",
        "/tmp/../x",
        "/dev/shm/diffmas-x",
        "/var/tmp/diffmas-x",
        Path(sys.prefix) / "diffmas-x",
        "/etc/diffmas-x",
    ]
    for target in map(str, targets):
        verdict = run(f"open({target!r}, 'w').write('x')", SHORT)
        assert not verdict.passed and "Error" in verdict.reason, target
        assert not Path(target).exists()
    victim = tmp_path / "victim"
    victim.write_text("here")
    assert not run(f"import os; os.remove({str(victim)!r})", SHORT).passed and victim.read_text() == "here"
    before = set(Path("/tmp").iterdir())
    assert run("open('/tmp/diffmas-own', 'w').write('x')", SHORT).passed  # its own /tmp
    assert not Path("/tmp/diffmas-own").exists() and not {
        p for p in set(Path("/tmp").iterdir()) - before if "diffmas-" in p.name
    }


def test_what_it_sees_is_read_only():
    """Also where a user of its own would be kept from writing anyway."""
    seen = ["/", "/usr", "/dev", sys.prefix, sys.base_prefix]
    check = f"import os\nfor path in {seen!r}: assert os.statvfs(path).f_flag & os.ST_RDONLY, path\n"
    assert run(check + "assert not os.statvfs('.').f_flag & os.ST_RDONLY", SHORT).passed


def test_secrets_cannot_be_read(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFMAS_TEST_SECRET", "hidden")
    assert run("import os; assert 'DIFFMAS_TEST_SECRET' not in os.environ and 'HF_TOKEN' not in os.environ", SHORT).passed
    everywhere = (
        "import glob\nfor name in glob.glob('/proc/[0-9]*/environ') + glob.glob('/proc/[0-9]*/cmdline'):\n"
        "    try: text = open(name, 'rb').read()\n    except OSError: continue\n    assert b'hidden' not in text, name\n"
    )
    assert run(everywhere, SHORT).passed
    assert "FileNotFoundError" in run(f"open('/proc/{os.getpid()}/environ')", SHORT).reason
    secret = tmp_path / "token"
    secret.write_text("hidden")
    assert "FileNotFoundError" in run(f"open({str(secret)!r})", SHORT).reason
    assert not run(f"import os; os.kill({os.getpid()}, 0)", SHORT).passed


def test_the_word_is_nowhere_to_be_found():
    """Neither in a frame, nor in any object, nor in the file that it came in."""
    program = (
        "import gc, glob, os, re, sys\nfound, frame = [], sys._getframe()\n"
        "def look(value):\n    text = value if isinstance(value, bytes) else str(value).encode('utf-8', 'replace')\n"
        "    if re.search(rb'\\b[0-9a-f]{32}\\b', text): found.append(text[:200])\n"
        "while frame := frame.f_back:\n    for value in frame.f_locals.values(): look(value)\n"
        "for held in gc.get_objects():\n    for value in gc.get_referents(held):\n"
        "        if isinstance(value, (str, bytes)): look(value)\n"
        "for name in glob.glob('/proc/[0-9]*/fd/*'):\n"
        "    try: text = os.pread(os.open(name, os.O_RDONLY | os.O_NONBLOCK), 4096, 0)\n    except OSError: continue\n"
        "    look(text)\n"
        "assert not found, found"
    )
    verdict = run(program, Limits(seconds=5))
    assert verdict.passed, verdict


def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 1).close()  # open to everybody else
        verdict = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)", SHORT)
    assert not verdict.passed and "Error" in verdict.reason


def test_it_is_nobody_with_no_rights():
    assert run("import os; assert os.getuid() != 0 and os.geteuid() != 0", SHORT).passed or os.geteuid() != 0
    status = "lines = dict(l.split(':\\t') for l in open('/proc/self/status').read().splitlines() if ':\\t' in l)\n"
    assert run(
        f"{status}assert int(lines['CapEff'], 16) == int(lines['CapPrm'], 16) == 0\nassert lines['NoNewPrivs'] == '1'", SHORT
    ).passed
    assert not run("import os; os.setuid(0)", SHORT).passed or os.geteuid() != 0


# ---- without namespaces ----------------------------------------------------------------------------------------------


def test_without_bubblewrap_it_says_so(monkeypatch):
    monkeypatch.setattr(sandbox, "_bwrap", lambda: None)
    sandbox.isolation.cache_clear()
    try:
        with pytest.warns(UserWarning, match="bubblewrap is not installed"):
            assert sandbox.isolation() == ("user" if os.geteuid() == 0 else "limits")
    finally:
        sandbox.isolation.cache_clear()


def test_without_a_user_of_its_own_the_warning_names_the_environment(monkeypatch):
    monkeypatch.setattr(sandbox, "_bwrap", lambda: None)
    for uid, named in ((1000, True), (0, False)):
        monkeypatch.setattr(os, "geteuid", lambda uid=uid: uid)
        sandbox.isolation.cache_clear()
        try:
            with pytest.warns(UserWarning) as said:
                sandbox.isolation()
        finally:
            sandbox.isolation.cache_clear()
        assert ("could read your environment" in str(said[0].message)) == named


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
@pytest.mark.parametrize(
    "uid_map", ["0 1000 1\n", "0 1000 1\n1 100000 500\n", "0 0 4294967295\n", "0 1000 1\n1 100000 65536\n"]
)
def test_users_of_a_namespace(monkeypatch, tmp_path, uid_map):
    """Where there is nobody else to become, a program stays who it is, with no rights, or does not run."""
    (tmp_path / "uid_map").write_text(uid_map)
    monkeypatch.setattr(sandbox, "UID_MAP", tmp_path / "uid_map")
    many = uid_map.split()[-1] in ("4294967295", "65536")
    assert run(f"import os; assert (os.getuid() != 0) == {many}", SHORT, "namespaces").passed
    assert run("assert 'CapEff:\\t0000000000000000' in open('/proc/self/status').read()", SHORT, "namespaces").passed
    if not many:
        with pytest.raises(PermissionError, match="this user namespace has no other users"):
            run("", isolated="user")


@pytest.mark.skipif(os.geteuid() != 0, reason="who is not root runs programs as himself")
def test_never_as_root():
    with pytest.raises(PermissionError, match="would run as root"):
        run("", isolated="limits")


@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs an interpreter that everybody may run")
@pytest.mark.parametrize("isolated", ["user"] if os.geteuid() == 0 else ["limits"])
def test_limits_hold_without_namespaces(monkeypatch, tmp_path, isolated):
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    mark = f"left-{os.getpid()}"
    assert run("open('mine', 'w').write('x')", SHORT, isolated).passed
    assert not run("x = bytearray(10 * 2**30)", SHORT, isolated).passed
    assert run("while True: pass", Limits(seconds=1.0), isolated).reason == "no end after 1 s"
    stays = f"import subprocess; subprocess.Popen(['/bin/sh', '-c', 'sleep 60; echo {mark}'])"
    assert run(stays, SHORT, isolated).passed
    assert remaining(mark) == []
    if isolated == "user":
        tmp_path.chmod(0o755)
        assert not run(f"open({str(tmp_path / 'x')!r}, 'w')", SHORT, isolated).passed
        assert not run(f"import os; os.kill({os.getpid()}, 0)", SHORT, isolated).passed

"""How many threads a command takes, and what they do while they wait; a library's user is left alone."""

import os
import subprocess
import sys

import pytest

from diffmas.cli import main as cli
from diffmas.cli import threads

SAID = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "MKL_NUM_THREADS")
SHOW = """
import os, sys
from diffmas.cli import main

assert "torch" not in sys.modules

@main.app.command()
def shown():
    import torch

    print(*(os.environ.get(name, "-") for name in {names!r}), torch.get_num_threads())

main.app(["shown"])
"""


def child(code: str, **environment) -> list[str]:
    clean = {k: v for k, v in os.environ.items() if k not in SAID}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**clean, **environment})
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.split()


def machine(path, siblings=(), files=()):
    """A root directory with what /sys and /proc say."""
    contents = {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in enumerate(siblings)}
    for name, text in {**contents, **dict(files)}.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text + "\n")
    return path


HYPER = ("0,2", "1,3", "0,2", "1,3")


@pytest.mark.parametrize(
    "siblings, affinity, files, want",
    [
        (HYPER, {0, 1, 2, 3}, {}, 2),
        (HYPER, {1, 3}, {}, 1),
        ((), {0, 1, 2}, {}, 3),  # nothing is known of the CPUs
        (map(str, range(8)), set(range(8)), {"sys/fs/cgroup/cpu.max": "250000 100000"}, 2),
        (map(str, range(8)), set(range(8)), {"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        (map(str, range(8)), set(range(8)), {"sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        (map(str, range(8)), set(range(8)), {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "300000 100000"}, 3),
        (
            map(str, range(8)), set(range(8)),
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/a\n1:memory:/a", "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            }, 4,
        ),
    ],
    ids=["hyper-threads", "affinity", "unknown", "group 2.5", "group 0.5", "group max", "group by path", "version 1"],
)  # fmt: skip
def test_cores_are_physical_of_the_affinity_and_of_the_group(tmp_path, monkeypatch, siblings, affinity, files, want):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: affinity, raising=False)
    assert threads.cores(machine(tmp_path, siblings, files)) == want


def test_a_command_chooses_before_torch_is_loaded():
    code = SHOW.format(names=SAID[:4])
    cores = threads.cores()
    assert child(code) == [str(cores), "PASSIVE", "-", "0", str(cores)]
    assert child(code, OMP_NUM_THREADS="1")[0] == "1"
    assert child(code, GOMP_SPINCOUNT="7")[1:4] == ["-", "7", "-"]
    assert child(code, OMP_WAIT_POLICY="ACTIVE")[1:4] == ["ACTIVE", "-", "-"]


def test_a_library_user_is_left_alone():
    names = f"import os; print(*(os.environ.get(x, '-') for x in {SAID[:4]!r}))"
    assert child(f"import diffmas, diffmas.cli; from diffmas import Trainer; {names}") == ["-"] * 4
    late = f"import torch; from diffmas.cli import threads; assert not threads.choose(); {names}"
    assert child(late) == ["-"] * 4  # somebody else has loaded torch


def test_a_busy_machine_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(os, "getloadavg", lambda: (7.25, 0.0, 0.0))
    line = threads.busy()
    assert "load average is 7.2 on 4 cores" in line and "OMP_NUM_THREADS=1" in line and "\n" not in line
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads.busy() is None
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(os, "getloadavg", lambda: (3.9, 9.0, 9.0))
    assert threads.busy() is None


def test_long_commands_say_it_and_short_ones_do_not(monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.setattr(threads, "busy", lambda: "busy: so much")
    monkeypatch.setattr(threads, "choose", lambda share: True)
    run = CliRunner()
    assert "busy: so much" in run.invoke(cli.app, ["train", "no-such.yaml"]).output
    assert "busy" not in run.invoke(cli.app, ["plan", "--help"]).output
    assert "busy" not in run.invoke(cli.app, ["tasks"]).output
    monkeypatch.setattr(threads, "choose", lambda share: False)  # torch was there before: the threads are not ours
    assert "busy" not in run.invoke(cli.app, ["train", "no-such.yaml"]).output
    assert {*cli.LONG, *cli.OWN_THREADS} <= {c.callback.__name__ for c in cli.app.registered_commands}

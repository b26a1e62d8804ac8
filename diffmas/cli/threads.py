"""Threads of a command: how many, and what they do while they wait. Set in the environment, before torch loads its OpenMP.

OpenMP's threads spin while they wait. Where another process has taken one's core, all others spin for as long as that one
waits, on cores that it could have run on. The commands let them sleep instead. Who imports diffmas as a library has chosen
already.
"""

import os
import sys
from pathlib import Path

__all__ = ["busy", "choose", "cores"]

# GNU's OpenMP, which torch's wheels bring, reads the first and the second; Intel's and LLVM's the others.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
THREADS = "OMP_NUM_THREADS"


def cores(system: Path = Path("/")) -> int:
    """How many cores this process may use: physical ones of its affinity, and no more than its control group is given.

    system: where /sys and /proc are."""
    affinity = getattr(os, "sched_getaffinity", None)
    usable = affinity(0) if affinity else range(os.cpu_count() or 1)
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    physical = {_read(system / topology.format(cpu)) or str(cpu) for cpu in usable}
    return max(1, min(len(physical), int(_quota(system) or len(physical))))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _quota(system: Path) -> float | None:
    """The CPUs that the control group may use at once, by version 2 or 1; None: as many as there are."""
    groups = system / "sys/fs/cgroup"
    paths = dict(line.split(":", 2)[1:] for line in _read(system / "proc/self/cgroup").splitlines() if line.count(":") >= 2)
    found = []
    # In a container the group's own path may not be there: its files are at the root.
    for place in {groups, groups / paths.get("", "").strip("/")}:
        quota, _, period = _read(place / "cpu.max").partition(" ")
        found.append((quota, period))
    for name, path in paths.items():
        if "cpu" in name.split(","):
            for place in {groups / "cpu", groups / "cpu" / path.strip("/")}:
                found.append((_read(place / "cpu.cfs_quota_us"), _read(place / "cpu.cfs_period_us")))
    shares = [int(quota) / int(period) for quota, period in found if quota.isdigit() and period.isdigit() and int(period)]
    return min(shares, default=None)


def choose(share: int = 1) -> bool:
    """Sets the environment of this process, and of those that it starts, unless it says something already. Returns False, with
    nothing done, where torch is loaded: the threads are then another's.

    share: of the cores, one in so many."""
    if "torch" in sys.modules:
        return False
    if not any(name in os.environ for name in WAITING):
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    os.environ.setdefault(THREADS, str(max(1, cores() // share)))
    return True


def busy() -> str | None:
    """A line for the user of a machine whose cores are all taken before we begin; None where they are not."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        return None
    threads, there = os.environ.get(THREADS, "1"), os.cpu_count() or 1
    if load < there or threads == "1":
        return None
    return (
        f"busy: the load average is {load:.1f} on {there} cores; {threads} threads that wait for each other may "
        f"be slower than one ({THREADS}=1)"
    )

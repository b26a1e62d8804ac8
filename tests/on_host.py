"""Runs kernels in a program of their own: CUDA's on the CPU (tests/host/host.h), and the CPU's for instructions that it has
not. Compiles tests/host/<program>.cpp with the sanitizers, or for another CPU, and drives it.

y = torch.full((64,), torch.nan)
run("program", dict(n=64), dict(x=x), dict(y=y), seed=1)      # y is written in place; x must not be
"""

import fcntl
import functools
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "host"
INCLUDES = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'host'}"]
COMPILER = shutil.which("g++")
CHECKED = [
    COMPILER, "-std=c++17", "-g1", "-Wall", "-Wno-unknown-pragmas", "-ffp-contract=off", "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all", "-DDIFFMAS_HOST_EMULATION", *INCLUDES,
]  # fmt: skip
ARM = ["aarch64-linux-gnu-g++", "-std=c++17", "-O1", "-static", "-fno-math-errno", *INCLUDES]
EMULATOR = ["qemu-aarch64", "-cpu", "max"]


@dataclass
class Program:
    """How tests/host/<source>.cpp is compiled, and what runs it."""

    source: str
    compile: list[str]
    runner: list[str] = field(default_factory=list)


# -O1 takes three times as long to compile the CPU kernels, whose vectors it takes apart, and twice as long for those of 8 bits;
# their tests are short.
PROGRAMS = {name: Program(name, [*CHECKED, "-O0"]) for name in ("cpu_dots", "cpu_tiles", "attention_quantized")} | {
    "cpu_arm": Program("cpu_plain", [*ARM, "-march=armv8-a"], EMULATOR),
    "cpu_arm_bf16": Program("cpu_plain", [*ARM, "-march=armv8.2-a+bf16"], EMULATOR),
}


def program_of(name: str) -> Program:
    return PROGRAMS.get(name) or Program(name, [*CHECKED, "-O1"])


class Failed(Exception):
    """The kernel did what it must not, or a sanitizer found it: what the program said."""


@functools.cache
def compiled(program: str) -> Path:
    """Its executable, compiled anew when a source has changed."""
    how = program_of(program)
    source = ROOT / "tests" / "host" / f"{how.source}.cpp"
    sources = [source, Path(__file__), *(ROOT / "tests" / "host").glob("*.h"), *(ROOT / "csrc").rglob("*.*")]
    target = BUILD / program
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{program}.lock", "w") as lock:  # files of tests run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists() or target.stat().st_mtime < max(s.stat().st_mtime for s in sources):
            run = subprocess.run([*how.compile, str(source), "-o", str(target)], capture_output=True, text=True)
            assert run.returncode == 0, run.stderr[-4000:]
    return target


def memory(x: Tensor) -> bytes:
    """The bytes from the first element to the last."""
    return b"" if not x.numel() else bytes(_span(x).view(torch.uint8).numpy())


def _span(x: Tensor) -> Tensor:
    length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.as_strided((length,), (1,))


def run(program: str, numbers: dict, inputs: dict[str, Tensor | None], outputs: dict[str, Tensor], seed: int = 0) -> None:
    """Outputs go in as they are and come back written. A tensor that is None is left out. Raises Failed."""
    parts = [f"number {name} {float(x)!r}\n".encode() for name, x in {**numbers, "seed": seed}.items()]
    for access, tensors in (("in", inputs), ("out", outputs)):
        for name, x in tensors.items():
            if x is None:
                continue
            assert all(stride >= 0 for stride in x.stride())
            data = memory(x)
            dtype = str(x.dtype).removeprefix("torch.")
            words = (name, dtype, access, len(data), x.data_ptr() % 64, x.element_size(), x.dim(), *x.shape, *x.stride())
            parts.append(f"tensor {' '.join(map(str, words))}\n".encode() + data)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    command = [*program_of(program).runner, compiled(program)]
    done = subprocess.run(command, input=b"".join([*parts, b"end\n"]), capture_output=True, env=environment)
    if done.returncode:
        raise Failed(done.stderr.decode(errors="replace"))
    result = bytearray(done.stdout)
    for x in outputs.values():
        if x is None or not x.numel():
            continue
        span = _span(x)
        count = span.numel() * x.element_size()
        written, result = torch.frombuffer(result[:count], dtype=x.dtype), result[count:]
        x.copy_(written.as_strided(x.shape, x.stride()))
    assert not result

"""Launches of the package's launchers, compiled and run here."""

import atexit
import contextlib
import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import triton

from diffmas.kernels import cross_attention, inject, linear, merge_states, pointwise, reposition
from diffmas.kernels.blocks import launch_options, line_of, table
from ptx.block import Block, Counts
from ptx.compiler import Compiled, Pointer, Request
from ptx.decode import Code
from ptx.memory import GLOBAL, GlobalMemory, SharedMemory
from ptx.text import parse

__all__ = ["Launch", "Launches", "executed"]

MODULES = (cross_attention, inject, linear, merge_states, pointwise, reposition)
ROOT = Path(__file__).parents[2]

# Triton 3.6 puts no fence between an asynchronous copy and wgmma. PTX asks for one; newer versions have it.
FENCED_COPIES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


@functools.cache
def compiler() -> subprocess.Popen:
    """The process that compiles. It ends with its input, that is, with this process."""
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    command = [sys.executable, "-m", "ptx.compiler"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT)
    atexit.register(process.communicate)
    return process


@functools.cache
def compiled(request: Request) -> Compiled:
    process = compiler()
    pickle.dump(request, process.stdin)
    process.stdin.flush()
    answer = pickle.load(process.stdout)
    if isinstance(answer, str):
        raise RuntimeError(f"{request.kernel} cannot be compiled: {answer}")
    return answer


@functools.cache
def code_of(ptx: str) -> Code:
    return Code(parse(ptx))


@dataclass
class Launch:
    kernel: str
    grid: tuple[int, ...]
    constants: dict
    counts: dict[tuple[int, ...], Counts] = field(default_factory=dict)  # by program


@dataclass
class Launches:
    """What `executed` yields. tiles: for the attention launchers."""

    arch: int
    edit: Callable[[str, str, list[str]], str]
    seen: list[Launch] = field(default_factory=list)

    def tiles(self, kernel, rows, head_dim, wide, offset, device) -> dict:
        line = line_of(kernel, rows, head_dim, wide, offset, self.arch)
        return launch_options(table()[line], line[-1], kernel)

    def of(self, kernel: str) -> list[Launch]:
        """The launches of a kernel whose name ends so."""
        return [one for one in self.seen if one.kernel.endswith(kernel)]


def storage(x: torch.Tensor) -> np.ndarray:
    """The bytes of all that the tensor is a view of."""
    return torch.as_strided(x.detach(), (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).view(torch.uint8).numpy()


class Executed:
    """In the place of a kernel: `[grid](..)` runs its PTX."""

    def __init__(self, module: str, kernel, launches: Launches):
        self.module, self.kernel, self.launches = module, kernel, launches

    def __getitem__(self, grid):
        return functools.partial(self.run, grid)

    def run(self, grid, *args, **kwargs):
        names = self.kernel.arg_names
        values = dict(zip(names, args)) | {name: x for name, x in kwargs.items() if name in names}
        tensors = {name: x for name, x in values.items() if isinstance(x, torch.Tensor)}
        storages = {x.untyped_storage().data_ptr(): storage(x) for x in tensors.values() if x.numel()}
        threads = 32 * kwargs.get("num_warps", 4)
        memory = GlobalMemory(list(storages.values()), threads)
        place = dict(zip(storages, memory.addresses))
        numbers = {}
        for name, x in values.items():
            if isinstance(x, torch.Tensor):
                first = place[x.untyped_storage().data_ptr()] if x.numel() else GLOBAL - 1024
                numbers[name] = first + x.storage_offset() * x.element_size()
            elif isinstance(x, float):
                numbers[name] = int(np.float32(x).view(np.uint32))
            elif isinstance(x, int):
                numbers[name] = x
        described = lambda name, x: Pointer(x.dtype, numbers[name] % 16 == 0) if isinstance(x, torch.Tensor) else x
        options = tuple((name, x) for name, x in kwargs.items() if name not in names)
        arguments = tuple((name, described(name, values[name])) for name in names)
        made = compiled(Request(self.module, self.kernel.__name__, arguments, options, self.launches.arch))
        code = code_of(self.launches.edit(self.kernel.__name__, made.ptx, made.parameters))
        assert code.threads == threads
        # two more parameters, for scratch memory that these kernels do not ask for
        given = dict(zip(code.program.parameters, [numbers[name] for name in made.parameters] + [0, 0], strict=True))
        launch = Launch(self.kernel.__name__, tuple(grid), kwargs)
        self.launches.seen.append(launch)
        size = (*grid, 1, 1)[:3]
        with np.errstate(all="ignore"):
            for i, at in enumerate(np.ndindex(*size)):
                memory.enter(i)
                shared = SharedMemory(made.shared, threads, FENCED_COPIES)
                launch.counts[at[: len(grid)]] = Block(code, given, memory, shared, at, size).run()
        memory.give_back()


@contextlib.contextmanager
def executed(arch: int, edit: Callable[[str, str, list[str]], str] = lambda kernel, ptx, parameters: ptx):
    """Every Triton kernel of the package is compiled for compute capability arch / 10 and executed, on tensors of the CPU.
    edit: (name of the kernel, PTX, names of its parameters in order) -> the PTX that is run."""
    launches, kept = Launches(arch, edit), []
    for module in MODULES:
        for name, kernel in list(vars(module).items()):
            if "_kernel" in name and hasattr(kernel, "arg_names"):
                kept.append((module, name, kernel))
                setattr(module, name, Executed(module.__name__, kernel, launches))
    try:
        yield launches
    finally:
        for module, name, kernel in kept:
            setattr(module, name, kernel)

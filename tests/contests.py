"""What the tests of the benchmark suite share: a machine, a problem, a way to solve it, rows."""

import importlib

import torch

from diffmas.benchmarks import run
from diffmas.benchmarks.machine import Machine
from diffmas.benchmarks.measure import Case, Problem, Trial

MODULES = {path.stem: importlib.import_module(f"diffmas.benchmarks.{path.stem}") for path in run.modules()}

MACHINE = Machine(
    "cpu", "a machine", 1, 32 << 20, read=10e9, read_cached=40e9, copy=8e9, copy_cached=32e9, matmul=50e9, matmul_16bit=1e9
)


def doubling() -> Problem:
    x = torch.linspace(-1, 1, 100)
    return Problem(Case("double", "any", n=100), x, lambda dtype: {"y": 2 * x.to(dtype)}, copied=800.0)


def way(function):
    return lambda p: Trial(lambda: function(p.inputs), lambda y: {"y": y})


def row(provider, seconds, **more) -> dict:
    filled = Case("cross_attention", "latent step", N=2048, n=1, heads="16/8", D=128).columns() | {"provider": provider}
    if seconds:
        filled |= dict(seconds=seconds, ratio=seconds / 0.001, spread=0.01, rounds=5, peak_bytes=1000, error=1e-7, budget=1e-6)
    return filled | more

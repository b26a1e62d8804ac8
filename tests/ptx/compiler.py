"""Compiles kernels in a process of its own, because under TRITON_INTERPRET=1, as the tests run, Triton cannot.

python -m ptx.compiler      reads pickled `Request`s from stdin, writes pickled `Compiled`s, or errors, to stdout
"""

import importlib
import pickle
import sys
import traceback
from dataclasses import dataclass

import torch
import triton

__all__ = ["Compiled", "Pointer", "Request"]


@dataclass(frozen=True)
class Pointer:
    """A tensor among the arguments. aligned: its address divides by 16."""

    dtype: torch.dtype
    aligned: bool


@dataclass(frozen=True)
class Request:
    module: str
    kernel: str
    arguments: tuple  # (name, Pointer or value)
    options: tuple  # (name, value): num_warps ..
    arch: int


@dataclass(frozen=True)
class Compiled:
    ptx: str
    parameters: list[str]  # names of the arguments that are no constants, in order
    shared: int  # bytes


def compile(request: Request) -> Compiled:
    from tools.triton_report import Recorder, binary

    kernel, seen = getattr(importlib.import_module(request.module), request.kernel), []
    stand_in = lambda x: torch.empty(0, dtype=x.dtype) if isinstance(x, Pointer) else x
    arguments = dict(request.arguments)
    Recorder(kernel, seen).record(**{name: stand_in(x) for name, x in arguments.items()}, **dict(request.options))
    (launch,) = seen
    for i, name in enumerate(kernel.arg_names):
        if isinstance(arguments[name], Pointer) and not arguments[name].aligned:
            launch.attributes.pop((i,), None)
    made = binary(launch, request.arch)
    parameters = [name for name, kind in launch.signature.items() if kind != "constexpr"]
    return Compiled(made.asm["ptx"], parameters, made.metadata.shared)


def without_ptxas(backend=None, stages=None, *_):
    """Triton's hook into its stages, and what tells its cache: PTX is enough, and assembling it takes a fifth of the time."""
    if stages is None:
        return "until ptx", "until ptx"
    stages["cubin"] = lambda ptx, metadata: b""


def main() -> None:
    triton.knobs.runtime.add_stages_inspection_hook = without_ptxas
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # whatever prints, prints elsewhere
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = compile(request)
        except Exception:
            answer = traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    sys.modules["ptx.compiler"] = sys.modules["__main__"]  # what is pickled here belongs to this name
    for one in (Pointer, Request, Compiled):
        one.__module__ = "ptx.compiler"
    main()

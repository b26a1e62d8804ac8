"""Defines torch.ops.diffmas_native and loads its compiled kernels, for CPU and CUDA tensors. Never raises: without them diffmas
runs on its other backends.

loaded              whether the library is in this process
error               why not, as one line for a person; None when loaded
cpu_forms           what its CPU kernels are compiled for: "generic", "avx2", ...; cpu_form() runs
cpu_forms_left_out  those that the compiler did not know
cuda_targets        what it has CUDA binaries for: "80", "90a", ...
cuda_error          why it has none
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from diffmas.ops.schemas import FUSED, LINEAR, LOW_RANK, QUANTIZED, SCHEMAS

_PACKAGE = Path(__file__).parent.parent

_library = torch.library.Library("diffmas_native", "DEF")
for _name, _schema in (SCHEMAS | QUANTIZED | LOW_RANK | FUSED | LINEAR).items():
    _library.define(_name + _schema)
_library.define("versions() -> (int driver, int runtime)")  # of CUDA
_library.define("cpu_form() -> str")


def _build_info() -> dict:
    try:
        return json.loads((_PACKAGE / "build_info.json").read_text())
    except (OSError, ValueError):
        return {}


def _load() -> str | None:
    library = _PACKAGE / "libdiffmas.so"
    if not library.exists():
        return _build_info().get("error") or "the extension is not built: run `pip install -e .` in the source tree"
    try:
        torch.ops.load_library(str(library))
    except Exception as exc:  # a library of another platform, a torch older than 2.10: whatever dlopen says
        return f"{library.name} does not load: {exc}"
    return None


def _cuda_error() -> str | None:
    if error or cuda_targets:
        return error
    return _build_info().get("cuda_error") or "the extension was built by an older version: install diffmas again"


def cpu_form() -> str:
    """Which form of the CPU kernels runs here: "amx", "avx512_bf16", "avx512", "avx2", "arm_bf16" or "generic", the first that
    this CPU has unless DIFFMAS_CPU_ISA names another. Raises RuntimeError for one that it, or the build, has not."""
    return torch.ops.diffmas_native.cpu_form()


error: str | None = _load()
loaded: bool = error is None
cpu_forms: list[str] = _build_info().get("cpu_forms", []) if loaded else []
cpu_forms_left_out: list[str] = _build_info().get("cpu_forms_left_out", []) if loaded else []
cuda_targets: list[str] = _build_info().get("cuda_targets", []) if loaded else []
cuda_error: str | None = _cuda_error()

"""What stands between a layer's linears, RMSNorm with a frozen weight and silu(gate) * up, against transformers' own modules as
they are and compiled, and on a GPU Liger's kernels. "backward" is timed alone, behind a forward that stays."""

import importlib

import torch
import torch.nn.functional as F

from diffmas.benchmarks import ours
from diffmas.benchmarks.measure import OURS, Cannot, Case, Problem, Senseless, Trial
from diffmas.models.pointwise import Gate, Norm
from diffmas.ops.layer import layer_ops, usable

__all__ = ["CASES", "PROVIDERS", "problem"]

EPS = 1e-5


def _case(op, n, D, phase, dtype="bfloat16", quick=False) -> Case:
    return Case(op, "between linears", phase, n=n, D=D, dtype=dtype, quick=quick)


CPU_CASES = [
    _case(op, n, D, phase, quick=n == 512)
    for op, D in (("norm", 576), ("gate", 1536))
    for n in (12, 512)
    for phase in ("forward", "backward")
]
GPU_CASES = [
    _case(op, n, D, phase, quick=n == 12)
    for op, D in (("norm", 4096), ("gate", 14336))
    for n in (1, 12, 512, 8192)
    for phase in ("forward", "backward")
]
CASES = GPU_CASES if torch.cuda.is_available() else CPU_CASES


def _norm(x, weight):
    """As transformers' LlamaRMSNorm."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * h.to(x.dtype)


def _gate(gate, up):
    return F.silu(gate) * up


def problem(case: Case) -> Problem:
    """inputs: dy, and what goes in: x and the frozen weight, or gate and up."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, case.dtype)
    rows = [torch.randn(case.n, case.D, device=device).to(dtype) for _ in range(3)]
    given = (rows[1], torch.randn(case.D, device=device).to(dtype)) if case.op == "norm" else tuple(rows[1:])
    plain = {"norm": _norm, "gate": _gate}[case.op]

    def answer(dtype: torch.dtype) -> dict:
        return _run(case, plain, rows[0].to(dtype), [t.to(dtype) for t in given])[1]

    moved = {("norm", "forward"): 2, ("norm", "backward"): 3, ("gate", "forward"): 3, ("gate", "backward"): 5}
    return Problem(case, (rows[0], given), answer, copied=moved[case.op, case.phase] * rows[0].nbytes)


def _leaves(case: Case, given) -> list:
    """What has a gradient, and what has none."""
    trained = (True, False) if case.op == "norm" else (True, True)
    return [t.detach().requires_grad_(one) for t, one in zip(given, trained)]


def _run(case: Case, function, dy, given):
    """-> the call that is timed, and what it gives, by name."""
    if case.phase == "forward":
        call = torch.no_grad()(lambda: function(*given))
        return call, {"y": call()}
    leaves = _leaves(case, given)
    y, wanted = function(*leaves), [t for t in leaves if t.requires_grad]
    call = lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)
    return call, _named(call())


def _named(found) -> dict:
    return {"y": found} if isinstance(found, torch.Tensor) else {f"d{i}": x for i, x in enumerate(found)}


def _trial(p: Problem, function) -> Trial:
    return Trial(_run(p.case, function, *p.inputs)[0], _named)


def diffmas(p: Problem) -> Trial:
    kernels = layer_ops(p.inputs[0], usable("auto", fuse=True))
    if kernels is None:
        raise Senseless
    if p.case.op == "norm":
        return _trial(p, lambda x, weight: Norm.apply(x, weight, EPS, kernels.ops))
    return _trial(p, lambda gate, up: Gate.apply(gate, up, kernels.ops))


def eager(p: Problem) -> Trial:
    return _trial(p, {"norm": _norm, "gate": _gate}[p.case.op])


def compiled(p: Problem) -> Trial:
    if not ours.on_gpu():
        raise Senseless
    return _trial(p, torch.compile({"norm": _norm, "gate": _gate}[p.case.op]))


def liger(p: Problem) -> Trial:
    if not ours.on_gpu():
        raise Senseless
    try:
        functions = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError:
        raise Cannot("liger_kernel is not installed") from None
    if p.case.op == "norm":
        return _trial(p, lambda x, weight: functions.liger_rms_norm(x, weight, EPS, 0.0, "llama", False))
    return _trial(p, functions.liger_swiglu)


PROVIDERS = {OURS: diffmas, "eager": eager, "compiled": compiled, "Liger": liger}


def test_layer(bench, case):
    bench(case, problem, PROVIDERS)

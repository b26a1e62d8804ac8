"""merge_states: the attention state over the union of two views, against the formula in eager PyTorch."""

import torch

from diffmas.benchmarks.measure import OURS, Case, Problem, Trial
from diffmas.benchmarks.ours import run_op
from diffmas.ops import reference

__all__ = ["CASES", "PROVIDERS", "problem"]

CASES = [
    Case("merge_states", "one token" if n == 1 else "tokens", phase, n=n, heads=f"{H}/{H}", D=128, dtype=dtype, quick=n == 512)
    for phase in ("forward", "backward")
    for n, H, dtype in ((1, 16, "float32"), (512, 16, "float32"), (4096, 16, "float32"), (4096, 32, "bfloat16"))
]


def problem(case: Case) -> Problem:
    H, D, n, dtype = int(case.heads.split("/")[0]), case.D, case.n, getattr(torch, case.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = lambda *shape: torch.randn(*shape, device=device).bfloat16()
    states = [random(n, H, D).to(dtype), random(n, H).float(), random(n, H, D).to(dtype), random(n, H).float()]
    grads = [random(n, H, D).to(dtype), random(n, H).float()]

    def answer(as_dtype: torch.dtype) -> dict:
        wide = reference.accumulator(as_dtype)
        cast = lambda xs: [x.to(as_dtype if x.dim() == 3 else wide) for x in xs]
        o, lse = reference.merge_states(*cast(states))
        if case.phase == "forward":
            return {"o": o, "lse": lse}
        names = ("do_a", "dlse_a", "do_b", "dlse_b")
        return dict(zip(names, reference.merge_states_backward(*cast(grads), *cast(states), o, lse)))

    copies = {"forward": 3, "backward": 6}[case.phase]  # o_a, o_b, o; and do, do_a, do_b
    return Problem(case, (states, grads), answer, copied=copies * n * H * (D * dtype.itemsize + 4))


def diffmas(p: Problem) -> Trial:
    states, grads = p.inputs
    with torch.no_grad():
        o, lse = run_op("merge_states", states[0], *states)
    if p.case.phase == "forward":
        return Trial(torch.no_grad()(lambda: run_op("merge_states", states[0], *states)), lambda r: {"o": r[0], "lse": r[1]})
    names = ("do_a", "dlse_a", "do_b", "dlse_b")
    return Trial(lambda: run_op("merge_states_backward", o, *grads, *states, o, lse), lambda r: dict(zip(names, r)))


def eager(p: Problem) -> Trial:
    train = p.case.phase == "backward"
    states, grads = [x.clone().requires_grad_(train) for x in p.inputs[0]], p.inputs[1]

    def merge():
        o_a, lse_a, o_b, lse_b = states
        lse = torch.logaddexp(lse_a, lse_b)
        o = (lse_a - lse).exp()[..., None] * o_a + (lse_b - lse).exp()[..., None] * o_b
        return o.to(o_a.dtype), lse

    if not train:
        return Trial(torch.no_grad()(merge), lambda r: {"o": r[0], "lse": r[1]})
    kept, names = merge(), ("do_a", "dlse_a", "do_b", "dlse_b")
    return Trial(lambda: torch.autograd.grad(kept, states, grads, retain_graph=True), lambda r: dict(zip(names, r)))


PROVIDERS = {OURS: diffmas, "eager": eager}


def test_merge(bench, case):
    bench(case, problem, PROVIDERS)

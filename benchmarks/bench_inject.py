"""inject: norm, RoPE and the K/V write of new tokens in one op, against the same in Hugging Face's modules.

Peers by what becomes of K and V: "eager" leaves them where they are (nothing is stored), "eager + cat" appends them to a
DynamicCache by torch.cat, "eager + cat into a buffer" does so into memory that is kept, "eager + static" copies them into a
StaticCache. "compiled" is one of these under torch.compile, on a GPU.
"""

import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from diffmas.benchmarks import ours
from diffmas.benchmarks.measure import OURS, Case, Problem, Senseless, Trial
from diffmas.benchmarks.ours import run_op, variants
from diffmas.ops import reference

__all__ = ["CASES", "PROVIDERS", "problem"]

EPS = 1e-6


def _case(regime, n, N=0, heads="16/8", phase="forward", dtype="float32", quick=False) -> Case:
    return Case("inject", regime, phase, N=N, n=n, heads=heads, D=128, dtype=dtype, quick=quick)


CPU_CASES = [
    *(_case("one token", 1, N, quick=N == 2048) for N in (2048, 8192)),
    *(_case("tokens", n, heads=heads, quick=(n, heads) == (512, "16/8"))
      for n in (64, 512, 2048) for heads in ("8/8", "16/8", "32/8")),
    _case("tokens", 512, dtype="bfloat16"),
    _case("one token", 1, 2048, phase="backward"),
    *(_case("tokens", n, phase="backward", quick=n == 512) for n in (64, 512, 2048)),
]  # fmt: skip
GPU_CASES = [
    _case("one token" if n == 1 else "tokens", n, 2048, heads, phase, "bfloat16", quick=heads == "16/8")
    for heads in ("16/8", "32/8") for phase in ("forward", "backward") for n in (1, 64, 8192, 65536)
]  # fmt: skip
CASES = GPU_CASES if torch.cuda.is_available() else CPU_CASES


def problem(case: Case) -> Problem:
    Hq, Hkv = map(int, case.heads.split("/"))
    n, D, dtype = case.n, case.D, getattr(torch, case.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = lambda *shape: torch.randn(*shape, device=device).bfloat16().to(dtype)
    angle = torch.arange(case.N, case.N + n)[:, None] * 1e6 ** (-torch.arange(0, D, 2).double() / D)
    angle = torch.cat((angle, angle), -1).to(device)
    x = dict(
        q=random(n, Hq, D), k=random(n, Hkv, D), v=random(n, Hkv, D), cos=angle.cos().to(dtype), sin=angle.sin().to(dtype),
        q_weight=1 + random(D) / 4, k_weight=1 + random(D) / 4, dq=random(n, Hq, D), dk=random(n, Hkv, D), dv=random(n, Hkv, D),
        slots=torch.arange(case.N, case.N + n, device=device),
    )  # fmt: skip

    def answer(as_dtype: torch.dtype) -> dict:
        y = {name: t if name == "slots" else t.to(as_dtype) for name, t in x.items()}
        slots = y["slots"] - case.N
        rest = (y["cos"], y["sin"], slots, y["q_weight"], y["k_weight"], EPS, False)
        k, v = torch.zeros_like(y["k"]), torch.zeros_like(y["v"])
        if case.phase == "forward":
            q = reference.inject(y["q"], y["k"], y["v"], *rest, k, v)
            return {"q": q, "k": k, "v": v}
        dk, dv = (y[name].to(reference.accumulator(as_dtype)).clone() for name in ("dk", "dv"))
        names = ("dq", "dk", "dv", "dq_weight", "dk_weight")
        return dict(zip(names, reference.inject_backward(y["dq"], y["q"], y["k"], *rest, dk, dv)))

    tokens = {"forward": 2 * Hq + 4 * Hkv, "backward": 3 * Hq + 3 * Hkv}[case.phase] * dtype.itemsize
    tokens += 16 * Hkv if case.phase == "backward" else 0  # float32 gradient rows, read and zeroed
    return Problem(case, x, answer, copied=tokens * D * n)


def diffmas(p: Problem, run_op=run_op) -> Trial:
    x, case = p.inputs, p.case
    rest = (x["cos"], x["sin"], x["slots"], x["q_weight"], x["k_weight"], EPS, False)
    heads, rows = x["k"].shape[1], case.N + case.n
    pool = lambda dtype: torch.zeros(heads, rows, case.D, dtype=dtype, device=x["q"].device).transpose(0, 1)
    if case.phase == "forward":
        k, v = pool(x["k"].dtype), pool(x["k"].dtype)
        call = lambda: run_op("inject", x["q"], x["q"], x["k"], x["v"], *rest, k, v)
        return Trial(call, lambda q: {"q": q, "k": k[case.N :], "v": v[case.N :]})
    dk, dv = (pool(reference.accumulator(x["k"].dtype)) for _ in range(2))

    def refill():  # the op takes the rows out
        dk[case.N :], dv[case.N :] = x["dk"], x["dv"]

    names = ("dq", "dk", "dv", "dq_weight", "dk_weight")
    call = lambda: run_op("inject_backward", x["q"], x["dq"], x["q"], x["k"], *rest, dk, dv)
    return Trial(call, lambda grads: dict(zip(names, grads)), refill)


def eager(store: str, compiled=False):
    """store: none | cat | cat into a buffer | static."""

    def provider(p: Problem) -> Trial:
        if compiled and not ours.on_gpu():
            raise Senseless
        x, case = p.inputs, p.case
        train = case.phase == "backward"
        if store != "none" and (not case.N or (train and store != "cat")):
            raise Senseless
        norms = []
        for name in ("q_weight", "k_weight"):
            norm = Qwen3RMSNorm(case.D, EPS).to(x["q"])
            norm.weight.data.copy_(x[name])
            norms.append(norm)
        q, k, v = (x[name][None].clone().requires_grad_(train) for name in ("q", "k", "v"))
        cos, sin = x["cos"][None], x["sin"][None]
        # As random as what is new: a GPU moves zeros at a higher clock.
        before = [torch.randn(1, k.shape[2], case.N, case.D, device=k.device).to(k.dtype) for _ in range(2)]
        buffers = [torch.zeros(1, k.shape[2], case.N + case.n, case.D, dtype=k.dtype, device=k.device) for _ in range(2)]

        def forward():
            rotated = apply_rotary_pos_emb(norms[0](q).transpose(1, 2), norms[1](k).transpose(1, 2), cos, sin)
            new = (rotated[1], v.transpose(1, 2))
            if store == "cat":
                new = [torch.cat((old, row), 2) for old, row in zip(before, new)]
            elif store == "cat into a buffer":
                new = [torch.cat((old, row), 2, out=buffer) for old, row, buffer in zip(before, new, buffers)]
            elif store == "static":
                new = [buffer.index_copy_(2, x["slots"], row) for buffer, row in zip(buffers, new)]
            return rotated[0], *new

        if compiled:
            torch._functorch.config.donated_buffer = False  # the graph of the forward is kept
            forward = torch.compile(forward, dynamic=False)

        def outputs(result):
            return {name: t.detach()[0].transpose(0, 1)[-case.n :] for name, t in zip("qkv", result)}

        if not train:
            return Trial(torch.no_grad()(forward), outputs)
        leaves = (q, k, v, norms[0].weight, norms[1].weight)
        kept = forward()
        grads = []
        for name, out in zip(("dq", "dk", "dv"), kept):
            grad = torch.zeros_like(out)
            grad[:, :, -case.n :] = x[name].transpose(0, 1)
            grads.append(grad)
        names = ("dq", "dk", "dv", "dq_weight", "dk_weight")
        call = lambda: torch.autograd.grad(kept, leaves, grads, retain_graph=True)
        return Trial(call, lambda g: {n: t[0] if t.dim() == 4 else t for n, t in zip(names, g)})

    return provider


STORES = ("cat", "cat into a buffer", "static")
PROVIDERS = {OURS: diffmas, "eager": eager("none"), **variants("inject", diffmas)}
PROVIDERS |= {f"eager + {store}": eager(store) for store in STORES}
PROVIDERS |= {"compiled": eager("none", compiled=True), "compiled + static": eager("static", compiled=True)}
SLOW = {"compiled", "compiled + static"}


def test_inject(bench, case):
    bench(case, problem, PROVIDERS)

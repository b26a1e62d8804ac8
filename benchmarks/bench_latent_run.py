"""T latent steps of a whole model over a long trace, each fed with the last: as the package takes them, on a GPU in a CUDA
graph; one by one; and with gradients ("step": with the backward through all of them to the first input). Times are per step.

The trace's rows are random and constants, weights are frozen. The peer is a DynamicCache of the same rows.
"""

from dataclasses import replace

import torch
from transformers import DynamicCache

from diffmas import Segment, Trace, patch_model
from diffmas.agents.latent import latent_steps
from diffmas.agents.realign import Realign
from diffmas.benchmarks import ours
from diffmas.benchmarks.measure import OURS, Case, Problem, Senseless, Trial
from diffmas.benchmarks.systems import DEVICE, end_to_end, make_model
from diffmas.models.patch import patch_of
from diffmas.trace.cache import cache_argument

__all__ = ["CASES", "PROVIDERS", "problem"]


LITTLE = 1 / 32


def _case(N, T, phase, model="small", layers=4, **more) -> Case:
    case = end_to_end("latent_run", "latent steps", phase, model, layers, N=N, n=1, T=T, **more)
    return replace(case, note=f"{case.note}; time per step")


CPU_CASES = [_case(1024, 8, phase, quick=True) for phase in ("forward", "step")]
GPU_CASES = [
    _case(N, 16, phase, "0.6B", 28, dtype="bfloat16", quick=N == 4096) for N in (4096, 16384) for phase in ("forward", "step")
]
CASES = GPU_CASES if torch.cuda.is_available() else CPU_CASES


def _model(case: Case, dtype: torch.dtype):
    """Layers that add little to what they are given: otherwise 28 of them with random weights, 16 times over, make noise of the
    rounding of 16 bits."""
    model = make_model(case, dtype).requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.mul_(LITTLE)
    return model


def problem(case: Case) -> Problem:
    dtype, heads = getattr(torch, case.dtype), int(case.heads.split("/")[1])
    model = _model(case, dtype)
    rows = [[torch.randn(case.N, heads, case.D, device=DEVICE).to(dtype) for _ in range(2)] for _ in range(case.layers)]
    x, grad = (torch.randn(1, model.config.hidden_size, device=DEVICE).to(dtype) for _ in range(2))

    def answer(dtype: torch.dtype) -> dict:
        given = _model(case, dtype), rows, x.to(dtype), grad.to(dtype)
        trial = _trial(case, given, _cached)
        return trial.read(trial.call())

    # As in bench_latent_step. In 16 bits, whose rounding is fed back from step to step, only what is grossly wrong shows.
    return Problem(case, (model, rows, x, grad), answer, tolerance=1e-4 if dtype == torch.float32 else 0.4, units=case.T)


def _trial(case: Case, given, way) -> Trial:
    """way(model, rows, case) -> run(x [1, hidden]) -> the last hidden state [1, hidden]."""
    model, rows, x, grad = given
    run, x = way(model, rows, case), x.clone()
    if case.phase == "forward":
        return Trial(torch.no_grad()(lambda: run(x)), lambda h: {"hidden": h})
    x.requires_grad_()

    def call():
        x.grad = None
        h = run(x)
        h.backward(grad)
        return h.detach()

    return Trial(call, lambda h: {"hidden": h, "x": x.grad})


def _traced(model, rows, case: Case):
    patch, realign = patch_of(patch_model(model, training_graphs=True)), Realign(model, "none")
    base = Trace.of_rows(
        model, [[Segment(0, None, "prompt", 0, case.N, 0)]], [case.N], rows, capacity=case.N + 4 * case.T
    )  # fmt: skip
    return lambda x: latent_steps(patch, realign, base.fork(1)[0], x, [case.T])


def _one_by_one(model, rows, case: Case):
    run, patch = _traced(model, rows, case), patch_of(model)

    def eager(x):
        patch.graphs = False
        try:
            return run(x)
        finally:
            patch.graphs = True

    return eager


def _cached(model, rows, case: Case):
    body, argument = model.base_model, cache_argument(model.base_model)
    dtype = next(model.parameters()).dtype
    rows = [[t.transpose(0, 1)[None].to(dtype) for t in kv] for kv in rows]

    def run(x):
        cache = DynamicCache()
        for layer, kv in enumerate(rows):
            cache.update(*kv, layer)
        for _ in range(case.T):
            x = body(inputs_embeds=x[None], **{argument: cache}).last_hidden_state[0]
        return x

    return run


def _provider(way, gpu_only=False):
    def provider(p: Problem) -> Trial:
        if gpu_only and not ours.on_gpu():
            raise Senseless  # elsewhere steps are taken one by one anyhow
        return _trial(p.case, p.inputs, way)

    return provider


PROVIDERS = {
    OURS: _provider(_traced),
    f"{OURS}, one by one": _provider(_one_by_one, gpu_only=True),
    "DynamicCache": _provider(_cached),
}


def test_latent_run(bench, case):
    bench(case, problem, PROVIDERS)

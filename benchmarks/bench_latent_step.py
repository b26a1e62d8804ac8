"""One latent step of a whole model's body over a long trace: diffmas, DynamicCache, StaticCache, the LatentMAS way.

The last is a DynamicCache and the whole model: its logits, hidden states of all layers, an attention mask of ones.
The caches hold the same random rows, so that a long trace needs no long prefill.
"""

import torch
from transformers import DynamicCache, StaticCache

from diffmas import Segment, Trace, patch_model
from diffmas.benchmarks.measure import OURS, Case, Problem, Trial
from diffmas.benchmarks.systems import DEVICE, end_to_end, make_model
from diffmas.models.forward import forward
from diffmas.models.patch import patch_of
from diffmas.trace.cache import cache_argument

__all__ = ["CASES", "PROVIDERS", "problem"]

ROOM = 16  # latent steps that fit a sample

CPU_CASES = [
    *(end_to_end("latent_step", "latent step", "forward", N=N, quick=N in (1024, 8192)) for N in (1024, 4096, 8192, 32768)),
    *(end_to_end("latent_step", "latent step", "forward", "0.6B", 2, N=N, quick=N == 8192) for N in (1024, 8192, 32768)),
    end_to_end("latent_step", "latent step", "forward", "8B", 1, N=8192),
]
GPU_CASES = [
    end_to_end("latent_step", "latent step", "forward", "8B", 4, N=N, dtype="bfloat16", quick=N == 16384)
    for N in (1024, 4096, 16384, 32768)
]
CASES = GPU_CASES if torch.cuda.is_available() else CPU_CASES


def problem(case: Case) -> Problem:
    dtype = getattr(torch, case.dtype)
    model = patch_model(make_model(case, dtype))
    heads = int(case.heads.split("/")[1])
    rows = [[torch.randn(case.N, heads, case.D, device=DEVICE).to(dtype) for _ in range(2)] for _ in range(case.layers)]
    x = torch.randn(1, model.config.hidden_size, device=DEVICE).to(dtype)

    def answer(dtype: torch.dtype) -> dict:
        body, cache = make_model(case, dtype).base_model, dynamic(rows, dtype)
        with torch.no_grad():
            return {"hidden": body(inputs_embeds=x[None].to(dtype), **{cache_argument(body): cache}).last_hidden_state[0]}

    # transformers takes norms and rotary tables in float32 in float64 models too; a shorter dtype rounds the weights as well.
    return Problem(case, (model, rows, x), answer, tolerance=1e-4 if dtype == torch.float32 else 0.05)


def dynamic(rows, dtype=None) -> DynamicCache:
    cache = DynamicCache()
    for layer, kv in enumerate(rows):
        cache.update(*(t.transpose(0, 1)[None].to(dtype or t.dtype) for t in kv), layer)
    return cache


def diffmas(p: Problem) -> Trial:
    model, rows, x = p.inputs
    past = [[Segment(0, None, "prompt", 0, p.case.N, 0)]]
    base = Trace.of_rows(model, past, [p.case.N], rows, capacity=p.case.N + 32 * ROOM)
    patch, traces = patch_of(model), []

    def reset():
        traces[:] = base.fork(1)

    @torch.no_grad()
    def call():
        forward_pass = traces[0].plan([1], "latent", reserve=ROOM)
        return forward(patch, traces[0], forward_pass, inputs_embeds=x[None]).last_hidden_state

    return Trial(call, lambda h: {"hidden": h[0]}, reset)


def _body_alone(model, past, embeds):
    return model.base_model(inputs_embeds=embeds, **{cache_argument(model): past}).last_hidden_state


def _whole_model(model, past, embeds):
    mask = torch.ones(1, past.get_seq_length() + 1, dtype=torch.long, device=DEVICE)
    options = {"attention_mask": mask, cache_argument(model): past, "use_cache": True, "output_hidden_states": True}
    return model(inputs_embeds=embeds, **options).hidden_states[-1][:, -1:]


def _peer(cache, rewind, step=_body_alone):
    def provider(p: Problem) -> Trial:
        model, rows, x = p.inputs
        past = cache(model, rows, p.case.N)

        @torch.no_grad()
        def call():
            return step(model, past, x[None])

        return Trial(call, lambda h: {"hidden": h[0]}, lambda: rewind(past, p.case.N))

    return provider


def static(model, rows, N) -> StaticCache:
    cache = StaticCache(model.config, max_cache_len=N + ROOM)
    for layer, kv in enumerate(rows):
        cache.update(*(t.transpose(0, 1)[None] for t in kv), layer)
    return cache


def _rewind_dynamic(cache, N) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :N].contiguous(), layer.values[:, :, :N].contiguous()


def _rewind_static(cache, N) -> None:
    for layer in cache.layers:
        layer.cumulative_length.fill_(N)


PROVIDERS = {
    OURS: diffmas,
    "DynamicCache": _peer(lambda model, rows, N: dynamic(rows), _rewind_dynamic),
    "StaticCache": _peer(static, _rewind_static),
    "LatentMAS way": _peer(lambda model, rows, N: dynamic(rows), _rewind_dynamic, _whole_model),
}


def test_latent_step(bench, case):
    bench(case, problem, PROVIDERS)

"""Host time of a latent step, per layer: the model is so small that hardly anything else takes time.

A call is T latent steps of one sequence, each fed with the last hidden state. "forward": without gradients, after a prompt of N
tokens that is not timed. "step": the prompt, the steps and the backward through all of them to the prompt's embeddings; weights
are frozen. Times are per layer and forward pass; the prompt counts as one where it is timed.

"diffmas, layers alone" is the model's body with an attention that does nothing: k and v are computed and get a gradient, q goes
on to the output projection. What ours takes beyond it is the share of trace and ops. What DynamicCache takes beyond it is that
of Hugging Face's norms, rotation, cache and attention. Its result is another one, and is compared with its own in float64.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from diffmas import Trace, patch_model
from diffmas.benchmarks.measure import OURS, Case, Problem, Trial
from diffmas.benchmarks.systems import DEVICE, end_to_end, make_model
from diffmas.models import forward
from diffmas.models.patch import patch_of
from diffmas.trace.cache import cache_argument

__all__ = ["CASES", "PROVIDERS", "problem"]


def _case(phase) -> Case:
    case = end_to_end("host_time", "latent step per layer", phase, "tiny", 8, N=64, n=1, T=8, quick=True)
    return replace(case, note=f"{case.note}; time per layer and forward pass")


CASES = [_case("forward"), _case("step")]


def problem(case: Case) -> Problem:
    prompt, grad = torch.randn(case.N, 64, device=DEVICE), torch.randn(1, 64, device=DEVICE)
    passes = case.T + (case.phase == "step")
    answer = partial(_answer, dynamic_cache, case, (prompt, grad))
    return Problem(case, (prompt, grad), answer, tolerance=1e-4, units=case.layers * passes)


def _model(case: Case, dtype: torch.dtype = torch.float32):
    """Random weights, norms too, so that wrong code shows; larger ones would amplify rounding from step to step."""
    model = make_model(case).requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(1, 0.25) if weight.dim() == 1 else weight.normal_(0, 0.06)
    return model.to(dtype)


# A way is a function (model, case) -> begin. begin() starts a sequence: it returns forward(x [n, hidden]) -> hidden [n, hidden]
# and a list of further tensors that the backward starts from.


def diffmas(model, case: Case) -> Callable:
    patch = patch_of(patch_model(model))

    def begin():
        trace = Trace(model, capacity=case.N + case.T)

        def step(x: Tensor) -> Tensor:
            forward_pass = trace.plan([len(x)], "latent" if len(x) == 1 else "prompt", reserve=case.T)
            return forward.forward(patch, trace, forward_pass, inputs_embeds=x[None]).last_hidden_state[0]

        return step, []

    return begin


def dynamic_cache(model, case: Case) -> Callable:
    body, argument = model.base_model, cache_argument(model.base_model)

    def begin():
        options = {argument: DynamicCache()}
        return lambda x: body(inputs_embeds=x[None], **options).last_hidden_state[0], []

    return begin


def layers_alone(model, case: Case) -> Callable:
    body = model.base_model
    kept: list[Tensor] = []
    options = {n: dict(position_ids=torch.arange(n, device=DEVICE)[None], use_cache=False) for n in (1, case.N)}
    mask = torch.empty(1, 1, 1, 1, device=DEVICE)  # 4-D: transformers passes it on and builds none

    def nothing(attention, hidden_states, **_):
        q, k, v = attention.q_proj(hidden_states), attention.k_proj(hidden_states), attention.v_proj(hidden_states)
        kept.extend((k, v))
        return attention.o_proj(q), None

    for layer in body.layers:
        layer.self_attn.forward = partial(nothing, layer.self_attn)

    def begin():
        kept.clear()
        return lambda x: body(inputs_embeds=x[None], attention_mask=mask, **options[len(x)]).last_hidden_state[0], kept

    return begin


def _trial(way: Callable, case: Case, inputs: tuple[Tensor, Tensor], dtype: torch.dtype) -> Trial:
    begin = way(_model(case, dtype), case)
    prompt, grad = (x.to(dtype, copy=True) for x in inputs)
    started = []

    def steps(forward, h: Tensor) -> Tensor:
        for _ in range(case.T):
            h = forward(h)
        return h

    if case.phase == "forward":

        @torch.no_grad()
        def reset():
            forward, _ = begin()
            started[:] = forward, forward(prompt)[-1:]

        return Trial(torch.no_grad()(lambda: steps(*started)), lambda h: {"hidden": h}, reset)
    prompt.requires_grad_()
    width = int(case.heads.split("/")[1]) * case.D
    ones = {n: torch.ones(1, n, width, dtype=dtype, device=DEVICE) for n in (1, case.N)}

    def call():
        prompt.grad = None
        forward, also = begin()
        h = steps(forward, forward(prompt)[-1:])
        torch.autograd.backward([h, *also], [grad, *(ones[x.shape[1]] for x in also)])
        return h.detach()

    return Trial(call, lambda h: {"hidden": h, "prompt": prompt.grad})


def _answer(way: Callable, case: Case, inputs: tuple[Tensor, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    trial = _trial(way, case, inputs, dtype)
    if trial.reset:
        trial.reset()
    return trial.read(trial.call())


def _provider(way: Callable, own_answer: bool = False):
    def provider(p: Problem) -> Trial:
        trial = _trial(way, p.case, p.inputs, torch.float32)
        return replace(trial, answer=partial(_answer, way, p.case, p.inputs) if own_answer else None)

    return provider


PROVIDERS = {
    OURS: _provider(diffmas),
    "DynamicCache": _provider(dynamic_cache),
    f"{OURS}, layers alone": _provider(layers_alone, own_answer=True),
}


def test_host(bench, case):
    bench(case, problem, PROVIDERS)

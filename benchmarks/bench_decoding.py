"""A whole model's decoding, SmolLM2-135M's shape: a few tokens after 0, 2k and 8k rows of context, of which each sequence has
its own; and 512 tokens at once. Against Hugging Face, as it is and compiled, and llama.cpp on the same weights.

The tokens are given, so that all do the same; the logits of the last are compared.
"""

import functools

import torch
from transformers import DynamicCache, StaticCache

from diffmas import Segment, Trace, patch_model
from diffmas.benchmarks.llama import Decoder
from diffmas.benchmarks.measure import OURS, Case, Problem, Senseless, Trial
from diffmas.benchmarks.systems import SMOL, make_smol
from diffmas.models.forward import forward
from diffmas.models.next_tokens import NextTokens
from diffmas.models.patch import patch_of
from diffmas.trace.cache import cache_argument

__all__ = ["CASES", "PROVIDERS", "SLOW", "problem"]

STEPS, PREFILL = 8, 512


def _case(phase, N, batch, dtype, n, quick=False) -> Case:
    note = "random weights" + ("; time per step" if phase == "decode" else "")
    return Case("decoding", "whole model", phase, N=N, n=n, batch=batch, heads="9/3", D=64, dtype=dtype, model="135M",
                layers=SMOL["num_hidden_layers"], note=note, quick=quick)  # fmt: skip


DTYPES = ("bfloat16", "float32")
CASES = [
    *(
        _case("decode", STEPS + past, batch, dtype, 1, quick=(past, batch, dtype) == (0, 1, "bfloat16"))
        for dtype in DTYPES
        for past in (0, 2048)
        for batch in (1, 8)
    ),
    *(_case("prefill", 2048 + PREFILL, 1, dtype, PREFILL) for dtype in DTYPES),
]
# Minutes each, for every provider fills its cache: `diffmas bench --only "whole model" --missing` measures those that are not
# stored. Not eight sequences in float32, K/V of 3 GB for each provider.
LONG = [_case("decode", STEPS + 8192, *of, 1) for of in ((1, "bfloat16"), (8, "bfloat16"), (1, "float32"))]


class Inputs:
    """The model, patched; what all sequences begin with; the tokens that come, by sequence; K/V of the former, by layer
    [1, heads, n, D]."""

    def __init__(self, case: Case):
        self.case, self.new = case, PREFILL if case.phase == "prefill" else STEPS
        self.model = patch_model(make_smol(case, getattr(torch, case.dtype)))
        ids = torch.randint(SMOL["vocab_size"], (case.N + case.batch * self.new,), generator=torch.Generator().manual_seed(1))
        self.past, self.tokens = ids[: case.N - self.new], ids[case.N :].view(case.batch, -1)
        cache = DynamicCache()
        with torch.no_grad():
            for part in self.past.split(PREFILL) if len(self.past) else ():
                self.model.base_model(input_ids=part[None], **{cache_argument(self.model): cache})
        self.rows = [(x.keys[:1], x.values[:1]) for x in cache.layers]

    def fill(self, cache, batch: int, dtype: torch.dtype):
        """A cache of Hugging Face's with the rows of the past, for each sequence."""
        for layer, kv in enumerate(self.rows):
            cache.update(*(x.to(dtype).expand(batch, -1, -1, -1) for x in kv), layer)
        return cache


def problem(case: Case) -> Problem:
    inputs = Inputs(case)

    def answer(dtype: torch.dtype) -> dict:
        model, found = make_smol(case, dtype), []
        with torch.no_grad():
            for row in inputs.tokens:  # one by one: their rows are of one past, and take memory
                cache = inputs.fill(DynamicCache(), 1, dtype)
                found.append(model(row[None], logits_to_keep=1, **{cache_argument(model): cache}).logits[0])
        return {"logits": torch.cat(found)}

    size = sum(p.nbytes for p in inputs.model.parameters())
    kv = case.batch * 2 * case.layers * 3 * case.D * getattr(torch, case.dtype).itemsize
    read, flops = size + kv * case.N, 0
    if case.phase == "prefill":
        flops = 2 * PREFILL * sum(p.numel() for p in inputs.model.model.layers.parameters())
        flops += 4 * case.layers * 9 * case.D * PREFILL * (case.N - PREFILL / 2)
    steps = STEPS if case.phase == "decode" else 1
    # Peers round K/V to other types of 16 bits than they were computed in.
    tolerance = 1e-3 if case.dtype == "float32" else 0.05
    return Problem(case, inputs, answer, flops=flops * steps, read=read * steps, tolerance=tolerance, units=steps)


def diffmas(p: Problem) -> Trial:
    x: Inputs = p.inputs
    batch, length = p.case.batch, len(x.past)
    if length:
        kv = [[t[0].transpose(0, 1).repeat(batch, 1, 1) for t in pair] for pair in x.rows]
        rows = [[Segment(b * length, None, "prompt", 0, length, 0)] for b in range(batch)]
        base = Trace.of_rows(x.model, rows, [length] * batch, kv, capacity=batch * (length + 4 * x.new))
    else:
        base = Trace(x.model, batch)
    patch, traces, columns = patch_of(x.model), [], x.tokens.t().contiguous()

    def reset():
        traces[:] = [base.fork(1)[0] if batch == 1 else base.select(list(range(batch)))]

    @torch.no_grad()
    def call():
        if p.case.phase == "prefill":
            forward_pass = traces[0].plan([x.new], "prompt")
            return forward(patch, traces[0], forward_pass, head=True, input_ids=x.tokens, logits_to_keep=1).logits[0]
        step = NextTokens(patch, x.tokens.device)
        for i, tokens in enumerate(columns):
            logits = step(traces[0], tokens, STEPS - i)
        return logits

    return Trial(call, lambda logits: {"logits": logits}, reset)


def _steps(p: Problem, model, cache: list):
    """The forwards of a model on the cache that is in a list."""
    x: Inputs = p.inputs
    columns = [x.tokens] if p.case.phase == "prefill" else x.tokens.split(1, dim=1)

    @torch.no_grad()
    def call():
        for ids in columns:
            logits = model(input_ids=ids, logits_to_keep=1, **{cache_argument(x.model): cache[0]}).logits
        return logits[:, -1]

    return call


def dynamic(p: Problem) -> Trial:
    x: Inputs = p.inputs
    cache = []

    def reset():
        cache[:] = [x.fill(DynamicCache(), p.case.batch, x.model.dtype)]

    return Trial(_steps(p, x.model, cache), lambda logits: {"logits": logits}, reset)


def compiled(p: Problem) -> Trial:
    if p.case.phase == "prefill":
        raise Senseless
    x: Inputs = p.inputs
    cache = x.fill(StaticCache(x.model.config, max_cache_len=p.case.N), p.case.batch, x.model.dtype)
    if not len(x.past):
        cache.early_initialization(p.case.batch, 3, p.case.D, x.model.dtype, x.tokens.device)

    def reset():
        for layer in cache.layers:
            layer.cumulative_length.fill_(len(x.past))

    model = torch.compile(make_smol(p.case, x.model.dtype), dynamic=False)  # a patched one's hooks would be compiled with it
    trial = Trial(_steps(p, model, [cache]), lambda logits: {"logits": logits}, reset)
    reset()
    trial.call()  # compiles
    return trial


def _llama_cpp(p: Problem, half: bool = False, flash: bool = False) -> Trial:
    """half: in float16, beside bfloat16. flash: by its flash attention."""
    x: Inputs = p.inputs
    if half and p.case.dtype == "float32":
        raise Senseless
    kind = "F16" if half else {"float32": "F32", "bfloat16": "BF16"}[p.case.dtype]
    decoder = Decoder(x.model, kind, p.case.batch, p.case.N, flash)
    decoder.start(x.past.tolist())
    length, columns = len(x.past), x.tokens.t().tolist()

    def call():
        if p.case.phase == "prefill":
            decoder.forward([(token, length + i, 0) for i, token in enumerate(x.tokens[0].tolist())], 1)
        else:
            for i, tokens in enumerate(columns):
                decoder.forward([(token, length + i, b) for b, token in enumerate(tokens)], p.case.batch)
        return decoder

    return Trial(call, lambda decoder: {"logits": decoder.logits(p.case.batch)}, lambda: decoder.rewind(length))


PROVIDERS = {
    OURS: diffmas,
    "DynamicCache": dynamic,
    "StaticCache, compiled": compiled,
    "llama.cpp": _llama_cpp,
    "llama.cpp, flash": functools.partial(_llama_cpp, flash=True),
    "llama.cpp, float16": functools.partial(_llama_cpp, half=True),
}
SLOW = {"StaticCache, compiled"}


def test_decoding(bench, case):
    bench(case, problem, PROVIDERS)

"""The end-to-end check: a patched model on a trace, against its own plain forward.

The probe (diffmas.models.probe) replays attention layers one by one. Here everything else runs as it will in use: two sequences
of unequal chunks, the first of token ids and the second, like latent steps, of embeddings that are no token's. So it finds
positions that the body counts in a way of its own, convolutions and shifts over tokens, rows shared between layers, masks that
a layer makes for itself, embeddings that need to know ids, and bodies that the model calls past.

What enters every attention layer is compared, not the output alone: near the input little has been rounded, and a difference
shows clearly even in 16 bits. How much may differ is measured: as much as rounding the inputs of all layers changes.
"""

import inspect
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from diffmas.models.support import Unsupported
from diffmas.trace import Trace
from diffmas.trace.cache import NAMES
from diffmas.trace.spec import ModelSpec

__all__ = ["at_rest", "rehearse"]

LENGTH = 5  # tokens of each of the two sequences, or as many as a trace may hold
DRAWS = 6  # of random tokens: rounding may send one to another expert, in deep models every third time, but not every time
ROUNDINGS = 3  # what may differ, in responses to rounding every layer's input once; without experts right models stay below it


@contextmanager
def at_rest(model: nn.Module):
    """Evaluation mode without gradients; the random state and all that modules keep in attributes and buffers are put back, the
    values of tensors among them."""
    before = [(part, dict(part)) for m in model.modules() for part in (vars(m), m._buffers)]
    tensors = {id(x): x for _, was in before for x in was.values() if isinstance(x, Tensor) and not x.is_meta}
    values = {key: x.detach().clone() for key, x in tensors.items()}
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        try:
            for module in model.modules():
                module.training = False
            yield
        finally:
            for part, was in before:
                for name in part.keys() - was.keys():
                    del part[name]
                part.update(was)
            for key, x in tensors.items():
                if not torch.equal(x, values[key]):
                    with torch.inference_mode(x.is_inference()):
                        x.copy_(values[key])


def rehearse(causal_lm: nn.Module, attentions: list[nn.Module], spec: ModelSpec, fused: bool) -> None:
    """Raises Unsupported if the patched model differs on a trace from its own plain forward, naming where.

    fused: whether layers that nobody looks into may run another way (diffmas.models.few_rows), which is compared too. Costs
    four forwards of ten tokens or less, six with `fused`, or as many for each draw.
    """
    for seed in range(DRAWS):
        difference = _difference(causal_lm, attentions, spec, seed, fused)
        if difference is None:
            return
    raise Unsupported(
        f"diffmas cannot patch {type(causal_lm).__name__}: on a trace, two chunks in a batch of two, {difference} [end to end]"
    )


def _difference(
    causal_lm: nn.Module, attentions: list[nn.Module], spec: ModelSpec, seed: int, fused: bool
) -> str | None:  # fmt: skip
    parameters = inspect.signature(type(causal_lm).forward).parameters
    cache = next((name for name in NAMES if name in parameters), None)
    if cache is None or "inputs_embeds" not in parameters:
        return "it does not run: its forward takes no cache or no inputs_embeds"
    length = min(LENGTH, spec.max_length or LENGTH)
    half = length // 2
    lengths = ((length - half, half), (half, length - half)) if half else ((1, 1),)  # by chunk and sequence
    ids, x = _draw(causal_lm, length, lengths[0], seed)
    run = partial(_run, causal_lm, attentions)
    plain = dict(inputs_embeds=x, attention_mask=torch.ones_like(ids), use_cache=False)
    want, rounded = run(**plain), run(rounding=seed + 1, **plain)
    trace, forwards = Trace(spec, batch_size=2), list(zip((ids, x), lengths))
    states, output = _on_trace(run, cache, trace, forwards)
    if trace.lengths != [length, length]:
        return f"it calls past the body ({type(causal_lm).__name__}.forward does not call what diffmas hooks into)"
    got, own, other = (*states, output), (*want[0], want[1]), (*rounded[0], rounded[1])
    places = [f"what enters layer {a.layer_idx}" for a in attentions] + ["the output"]
    if fused:
        alone = _on_trace(partial(_run, causal_lm, []), cache, Trace(spec, batch_size=2), forwards)[1]
        got, own, other = (*got, alone), (*own, want[1]), (*other, rounded[1])
        places.append("the output of fused layers (fuse=False does without)")
    eps = max(_eps(h.dtype) for h in want[0])  # logits may come in float32
    for place, mine, its, moved in zip(places, got, own, other):
        scale = its.float().abs().max().clamp_min(1e-30)
        gap, response = (float((y.float() - its.float()).abs().max() / scale) for y in (mine, moved))
        if not gap <= max(1e-4, min(ROUNDINGS * max(response, eps), 4 * eps**0.5)):
            return f"{place} differs from its own forward by {gap:.1e} of its largest value"
    return None


def _on_trace(run, cache: str, trace: Trace, forwards: list) -> tuple[list[Tensor], Tensor]:
    """What `run` sees over chunks of token ids and of embeddings: of each layer [2, length, hidden], and the output.

    forwards: the two tensors [2, length, ...], and how many tokens of each sequence their chunk has.
    """
    chunks, done = [], (0, 0)
    for name, (tokens, new) in zip(("input_ids", "inputs_embeds"), forwards):
        rows = [row[at : at + n] for row, at, n in zip(tokens, done, new)]
        longest = max(new)
        batch = torch.stack([torch.cat((row[:1].expand(longest - len(row), *row.shape[1:]), row)) for row in rows])
        mask = torch.tensor([[0] * (longest - n) + [1] * n for n in new], device=tokens.device)
        seen, output = run(**{name: batch, "attention_mask": mask, cache: trace})
        chunks.append(([h.flatten(0, 1).split(new) for h in seen], [row[-n:] for row, n in zip(output, new)]))
        done = new
    together = lambda parts: torch.stack([torch.cat(rows) for rows in zip(*parts)])
    return [together(layer) for layer in zip(*(seen for seen, _ in chunks))], together([rows for _, rows in chunks])


def _eps(dtype: torch.dtype) -> float:
    """Of models in float64 too much is computed in float32."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def _draw(causal_lm: nn.Module, length: int, first: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Random ids [2, length], none of them special, and embeddings [2, length, hidden]: theirs in the first chunk, of as many
    tokens as `first` says, then some that are no token's."""
    embedding = causal_lm.get_input_embeddings()
    vocabulary, device = embedding.weight.shape[0], embedding.weight.device
    special = {x for config in (causal_lm.config, causal_lm.config.get_text_config()) for name, x in vars(config).items()
               if name.endswith(("_token_id", "_token_index")) and isinstance(x, int)}  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    drawn = [i for i in torch.randint(0, vocabulary, (8 * length,), generator=generator).tolist() if i not in special]
    ids = torch.tensor(drawn[: 2 * length], device=device).view(2, length)
    x = embedding(ids)
    token = torch.arange(length, device=device) < torch.tensor(first, device=device)[:, None]
    return ids, torch.where(token[..., None], x, (x + x.flip(0, 1)) / 2)


def _run(
    causal_lm: nn.Module, attentions: list[nn.Module], rounding: int | None = None, **inputs
) -> tuple[list[Tensor], Tensor]:
    """What enters each attention layer, and the output. rounding: the seed of an error to round what enters by."""
    seen = {}

    def look(attention, args, kwargs):
        h = seen[attention.layer_idx] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if rounding is None:
            return None
        generator = torch.Generator().manual_seed(rounding + attention.layer_idx)
        noise = 2 * torch.rand(h.shape, generator=generator) - 1
        h = h * (1 + _eps(h.dtype) * noise.to(h))
        return (args, {**kwargs, "hidden_states": h}) if "hidden_states" in kwargs else ((h, *args[1:]), kwargs)

    hooks = [a.register_forward_pre_hook(look, with_kwargs=True) for a in attentions]
    try:
        # CTRL scales the embeddings that it is given.
        output = causal_lm(**{name: x.clone() if name == "inputs_embeds" else x for name, x in inputs.items()})[0]
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[a.layer_idx] for a in attentions], output

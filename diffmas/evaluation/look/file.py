"""A saved trace, as far as it tells without its model: who wrote which tokens and latent steps, and how large rows are."""

from pathlib import Path

import torch
from torch import Tensor

from diffmas.evaluation.look.figures import Block, Lane, Look, Step
from diffmas.evaluation.look.lens import texts_of
from diffmas.trace import file as trace_file
from diffmas.trace.views import FROZEN, Segment

__all__ = ["look_at_file"]

NOBODY = "(no agent)"


def look_at_file(path, tokenizer=None, sequence: int = 0) -> Look:
    """One sequence of a file that `Trace.save` wrote. tokenizer: of its model; None shows token ids. Quantised rows are shown
    by the numbers that they stand for. What needs hidden states or queries, of which a trace keeps none, is left out: nearest
    tokens, attention, gradients.

    Raises ValueError for a file that is missing or damaged, and for a sequence that it has not.
    """
    segments, _, kv, ids, frozen = trace_file.read(path, {})
    if not 0 <= sequence < len(segments):
        raise ValueError(f"sequence: expected one in [0, {len(segments)}), of {path}, got {sequence}")
    row = segments[sequence]
    names = list(dict.fromkeys(s.agent or NOBODY for s in row))
    if frozen is not None:  # behind the others
        row = [s._replace(start=s.start - FROZEN + len(ids)) if s.start >= FROZEN else s for s in row]
        ids = torch.cat((ids, torch.from_numpy(frozen.ids).to(ids)))
        stood_for = [frozen.read(layer, 0, frozen.rows, torch.float32) for layer in range(len(frozen.layers))]
        kv = [tuple(map(torch.cat, zip(*pairs))) for pairs in zip(kv, stood_for)] if kv else stood_for
    keys, values = (torch.stack([_norms(pair[i]) for pair in kv]) for i in (0, 1))  # [layers, rows]
    blocks = [_block(s, names, keys, values, ids, tokenizer) for s in row]
    facts = [
        ("sequence", f"{sequence} of {len(segments)}"), ("rows", f"{sum(s.length for s in row):,}"),
        ("shown", "what a trace alone tells: no hidden states, no attention, no gradient"),
    ]  # fmt: skip
    if frozen is not None:
        facts.append(
            ("quantised rows", f"{frozen.rows:,} of all {len(ids):,}, in {frozen.bits}: by the numbers they stand for")
        )
    return Look(Path(path).name, facts, len(kv), [Lane(name) for name in names], blocks)


def _norms(x: Tensor) -> Tensor:
    """[rows, heads, D] -> [rows]"""
    return x.double().flatten(1).norm(dim=1)


def _block(s: Segment, names: list[str], keys: Tensor, values: Tensor, ids: Tensor, tokenizer) -> Block:
    mine = slice(s.start, s.end)
    latent = s.kind == "latent"
    tokens = [] if latent else ids[mine].tolist()
    if tokenizer is not None and tokens and min(tokens) >= 0:
        texts = texts_of(tokenizer, tokens)
    else:
        texts = [f"#{t} " if t >= 0 else "? " for t in tokens] or [""] * s.length
    per_row = zip(keys[:, mine].norm(dim=0).tolist(), values[:, mine].norm(dim=0).tolist())
    steps = [Step(keys=k, values=v) for k, v in per_row] if latent else []
    return Block(
        names.index(s.agent or NOBODY), s.kind, s.position, s.length, texts, steps, s.offset,
        keys=keys[:, mine].norm(dim=1).tolist(), values=values[:, mine].norm(dim=1).tolist(),
    )  # fmt: skip

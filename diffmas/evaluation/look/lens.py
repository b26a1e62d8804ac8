"""What hidden states say, by the output head (the logit lens), and the text of token ids."""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffmas.models.head import logits_of

__all__ = ["Lens", "lens", "rows_with", "texts_of", "token_text"]

CHUNK = 64  # hidden states at once: logits of a large vocabulary are wide
BEFORE = 4  # tokens that a token's text may depend on
UNFINISHED = "\ufffd"  # what a tokenizer makes of a character's first bytes


class Lens(NamedTuple):
    """ids, p [n, top]: the likeliest tokens and their probabilities. entropy [n]: in nats. chosen [n]: the probability of the
    tokens that were asked for, or of the likeliest."""

    ids: Tensor
    p: Tensor
    entropy: Tensor
    chosen: Tensor


@torch.no_grad()
def lens(causal_lm: nn.Module, h: Tensor, top: int, ids: Tensor | None = None) -> Lens:
    """What hidden states [n, hidden] say. ids [n]: tokens whose probability is asked for."""
    parts = []
    for first in range(0, len(h), CHUNK):
        log_p = logits_of(causal_lm, h[first : first + CHUNK]).float().log_softmax(-1)
        best = log_p.topk(min(top, log_p.shape[-1]), dim=-1)
        entropy = -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(-1)
        asked = best.indices[:, 0] if ids is None else ids[first : first + CHUNK].to(log_p.device)
        chosen = log_p.gather(1, asked[:, None])[:, 0]
        parts.append([x.cpu() for x in (best.indices, best.values.exp(), entropy, chosen.exp())])
    return Lens(*map(torch.cat, zip(*parts)))


def token_text(tokenizer, token: int) -> str:
    """A token alone, special ones too."""
    return tokenizer.decode([token])


def texts_of(tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text; a character of several tokens belongs to its last one."""
    texts, waiting = [], 0  # tokens whose character is not finished
    for i in range(len(ids)):
        first = max(0, i - waiting - BEFORE)
        before = tokenizer.decode(ids[first : i - waiting]) if i > waiting else ""
        now = tokenizer.decode(ids[first : i + 1])
        new = now[len(before) :] if now.startswith(before) else token_text(tokenizer, ids[i])
        unfinished = new.endswith(UNFINISHED) and i + 1 < len(ids) and waiting < BEFORE
        texts.append("" if unfinished else new)
        waiting = waiting + 1 if unfinished else 0
    return texts


def rows_with(texts: list[str], part: str) -> tuple[int, int] | None:
    """The first token, and the one after the last, that hold a part of the text; None where it is not in it."""
    at = "".join(texts).find(part)
    if at < 0 or not part:
        return None
    ends = list(accumulate(map(len, texts)))
    return next(i for i, end in enumerate(ends) if end > at), 1 + next(i for i, end in enumerate(ends) if end >= at + len(part))

"""Fewer forwards than latent steps: Jacobi iteration over all latent tokens of a turn (PCCoT, arXiv 2506.18582).

What goes into a latent token is the hidden state of the one before it, so T steps are T forwards, each bound by reading the
weights. A *pass* forwards all latent tokens at once, with the hidden states of the pass before; in the first one the prompt's
last hidden state h0 stands for all of them (PCCoT learns an embedding for that). What goes into the first token is right from
the start, into the second from the second pass on, and so on: T passes give what T steps give, J < T an approximation of it,
which is trained as what it is.

    pass 1   h0 h0 h0 h0  ->  h1 .  .  .      final: row 1
    pass 2      h1 .  .   ->     h2 .  .      rows 1, 2
    pass 3         h2 .   ->        h3 .      rows 1, 2, 3

A token that is final stays as it is. Only the others are forwarded again, and the rows that they had are dropped.
"""

import functools
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor, nn

from diffmas.agents.gradient_clip import current_clip
from diffmas.models.forward import forward
from diffmas.models.patch import Patch
from diffmas.trace import Trace

__all__ = ["forwards", "latent_passes", "one_by_one", "rows_written"]


def forwards(T: list[int], passes: int | None) -> int:
    """Of a batch's latent steps, in at most so many passes; None: one by one."""
    return max(T) if passes is None else min(max(T), passes)


def one_by_one(T: list[int], passes: int | None, grad_passes: int | None) -> bool:
    """Whether steps one by one are the same, and less work."""
    return passes is None or min(passes, grad_passes or passes) >= max(T)


def rows_written(T: list[int], passes: int | None, grad_passes: int | None) -> int:
    """Rows that the graph through a batch's latent steps holds, those that were dropped included."""
    if one_by_one(T, passes, grad_passes):
        return sum(T)
    return sum(sum(_left(T, j)) for j in range(min(forwards(T, passes), grad_passes or passes)))


def latent_passes(
    patch: Patch, realign: nn.Module, trace: Trace, h: Tensor, T: list[int], passes: int, grad_passes: int | None = None
) -> Tensor:  # fmt: skip
    """Appends T[b] latent tokens to sequence b of the trace, in `passes` forwards or as many as the longest T; returns the last
    hidden states, [B, hidden], as constants.

    h [B, hidden]: the last hidden state of each sequence. grad_passes: gradients go through the last so many passes; what the
    passes before them have computed is a constant. None: through all.
    """
    realign = functools.partial(realign, solved=realign.solved())
    count, owner = forwards(T, passes), [b for b, n in enumerate(T) for _ in range(n)]
    x = h[torch.tensor(owner, device=h.device)]  # what goes into each token, packed: [sum(T), hidden]
    if grad_passes is not None and torch.is_grad_enabled() and count > grad_passes:
        constant, count = count - grad_passes, grad_passes
        with torch.no_grad():
            known = _known(_passes(patch, realign, trace.fork(1)[0], x, T, constant), T)
        firsts = torch.tensor([i for i, b in enumerate(owner) if i == 0 or owner[i - 1] != b], device=h.device)
        x = known.roll(1, 0).index_copy(0, firsts, x[firsts])
    end = h.detach()
    for j, h in enumerate(_passes(patch, realign, trace, x, T, count)):
        going = [b for b, n in enumerate(_left(T, j)) if n]
        last = [n - 1 for n in accumulate(n for n in _left(T, j) if n)]
        end = end.index_copy(0, torch.tensor(going, device=h.device), h.detach()[torch.tensor(last, device=h.device)])
    return end


def _passes(patch: Patch, realign, trace: Trace, x: Tensor, T: list[int], count: int):
    """Yields the hidden states of each pass, packed; in pass j, from 0, each sequence leaves out its first j tokens.
    x [sum(T), hidden]: what goes into all tokens in the first pass."""
    clip = current_clip()
    for j in range(count):
        lengths = _left(T, j)
        if j:
            trace.drop_newest(lengths)
        if clip is not None:
            x = clip.step(x, torch.tensor([b for b, n in enumerate(lengths) for _ in range(n)], device=x.device))
        h = _forward(patch, trace, lengths, realign(x))
        yield h
        if j + 1 < count:
            x = h[torch.tensor(_places(lengths, 0, 1), device=h.device)]


def _forward(patch: Patch, trace: Trace, lengths: list[int], x: Tensor) -> Tensor:
    """A function of its own: its forward pass is let go, and with it, where no graph holds them, the rows that are dropped."""
    return forward(patch, trace, trace.plan(lengths, "latent"), inputs_embeds=x[None]).last_hidden_state[0]


def _left(T: list[int], passes: int) -> list[int]:
    """Tokens of each sequence that are not final after so many passes."""
    return [max(n - passes, 0) for n in T]


def _places(lengths: list[int], first: int, last: int) -> list[int]:
    """The packed places of all tokens but the `first` first and the `last` last ones of each sequence."""
    ends = accumulate(lengths, initial=0)
    return list(chain.from_iterable(range(start + first, end - last) for start, end in pairwise(ends)))


def _known(passes, T: list[int]) -> Tensor:
    """The newest hidden state of every token, [sum(T), hidden]."""
    known = None
    for j, h in enumerate(passes):
        known = h if known is None else known.index_copy(0, torch.tensor(_places(T, j, 0), device=h.device), h)
    return known

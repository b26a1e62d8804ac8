"""Realign: the map from a model's last hidden state to its input-embedding space, applied at every latent step.

A latent step feeds the hidden state h of the last position, after the final norm, back as an input embedding. But h is in
the space that the output embedding reads, not in the one that the input embedding writes (LatentMAS, arXiv 2511.20639;
DiffMAS, arXiv 2604.21794).
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffmas.agents.eval_mode import evaluating
from diffmas.agents.options import CHOICES
from diffmas.models.adapted import adapter_state
from diffmas.models.identity import state_of
from diffmas.models.linear_parts import is_ours
from diffmas.models.linears import product
from diffmas.models.local import for_all, gathered, local

__all__ = ["REALIGN", "Realign", "Solved"]

REALIGN = CHOICES["realign"]
CHUNK = 4096  # tokens of the vocabulary at once


class Solved(NamedTuple):
    """What a mode needs of the embeddings as they are. norm: the mean norm of a token's embedding. weight: W [hidden, hidden].
    table: E_in [V, hidden], where soft_token needs it (`_by_weighing`)."""

    norm: Tensor | None = None
    weight: Tensor | None = None
    table: Tensor | None = None


class Realign(nn.Module):
    """Maps h [n, hidden] to input embeddings [n, hidden], on the input embedding's device.

    mode:
        none: h as it is.
        norm: h, rescaled to the mean norm of the input embeddings.
        ridge: h W with W = (E_out' E_out + ridge I)^-1 E_out' E_in (LatentMAS), rescaled likewise. W is close to the
            identity for tied embeddings.
        soft_token: softmax(head(h) / temperature) E_in, the expected token embedding.
        learned: ridge, but W is a parameter that is trained and saved with the adapter.
    ridge: relative to the mean of the diagonal of E_out' E_out.

    With tied embeddings, ridge and norm are nearly one: a latent is the model's guess of the next token as a vector of that
    space, of a token's norm. soft_token at a temperature of 0.5 or less spells tokens; at 1 it may be a mean of a hundred, of
    less than half of a token's norm. none is far from a token's norm wherever the final norm's is (16 times, SmolLM2-135M).
    `diffmas.agents.latent_check` tells by a question; docs/choosing.md has a table.

    E_in and E_out are what the two modules compute: with the active adapter (LoRA on them, saved or trained tokens) and with
    what an embedding multiplies its weight by. Norm and W are those of the modules as they are: who trains, loads, resizes or
    switches them gets another W at the next call, in training one for each optimizer step, without a gradient through it. So
    a system that is loaded has the W that it was saved with. Only the W of "learned" is solved once, and then what it is
    trained to. What is written to the `.data` of a frozen weight is not noticed: call `forget()`.

    Raises ValueError for an unknown mode, and for a model without an output embedding, or with offloaded ones, where they
    are needed.
    """

    def __init__(self, model: nn.Module, mode: str = "ridge", ridge: float = 1e-3, temperature: float = 1.0):
        super().__init__()
        if mode not in REALIGN:
            raise ValueError(f"realign: expected one of {REALIGN}, got {mode!r}")
        if temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        self.mode, self.ridge, self.temperature = mode, ridge, temperature
        self._model = (model,)  # a tuple hides it from nn.Module: its weights are not this module's
        if mode in ("ridge", "soft_token", "learned") and model.get_output_embeddings() is None:
            raise ValueError(f"realign: {mode!r} needs a model with an output embedding")
        # "none" asks the input embeddings where they are.
        for which in ("input",) if mode in ("none", "norm") else ("input", "output"):
            if any(p.is_meta for p in getattr(model, f"get_{which}_embeddings")().parameters()):
                raise ValueError(f"realign: {mode!r} needs the {which} embeddings in memory, got offloaded ones")
        self._known: dict[tuple, tuple[tuple, Solved | bool]] = {}  # by the adapters that run; for soft_token `_by_weighing`
        self._settled: dict[int, set[tuple]] = {}  # by thread, which of these hold until `unchanging` ends
        self._kept = False
        if mode == "learned":
            self.weight = nn.Parameter(self._solve().contiguous())  # which FSDP2 asks for

    def forward(self, h: Tensor, solved: Solved | None = None) -> Tensor:
        """solved: of `solved()`, by default what it gives now."""
        norm, weight, table = self.solved() if solved is None else solved
        if self.mode == "soft_token":
            head = self._model[0].get_output_embeddings()
            logits = product(self._model[0], head, h) if _plain(head, nn.Linear) else None
            p = torch.softmax((head(h.to(_device_of(head))) if logits is None else logits) / self.temperature, dim=-1)
            if table is None:
                embedding = self._model[0].get_input_embeddings()
                x = product(self._model[0], embedding, p, transposed=True) if _plain(embedding, nn.Embedding) else None
                return (_expected(embedding, p) if x is None else x).to(h.dtype)
            return p.to(table.device) @ table.to(h.dtype)
        h = h.to(_device_of(self._model[0].get_input_embeddings()))
        if self.mode == "none":
            return h
        # In float32, autocast or not: one small product, and its rounding enters every later latent step.
        with torch.autocast(h.device.type, enabled=False):
            x = h if h.dtype == torch.float64 else h.float()
            if self.mode != "norm":
                x = x @ (self.weight if weight is None else weight).to(x.dtype)
            return (x * (norm.to(x.dtype) / x.norm(dim=-1, keepdim=True).clamp_min(1e-12))).to(h.dtype)

    def solved(self) -> Solved:
        """What `forward` needs of the embeddings, computed anew if they have changed; a run of latent steps asks once."""
        if self.mode == "none":
            return Solved()
        e_in, e_out = self._model[0].get_input_embeddings(), self._model[0].get_output_embeddings()
        if self.mode == "soft_token":
            key, state = (adapter_state(e_in),), (id(e_in), state_of(e_in.weight, read=False)[2:])
            if key not in self._known or self._known[key][0] != state:
                self._known[key] = state, _by_weighing(e_in)
            return Solved(table=None if self._known[key][1] else _rows(e_in, 0, len(e_in.weight)))
        modules = (e_in, e_out) if self.mode == "ridge" else (e_in,)
        key, settled = tuple(adapter_state(m) for m in modules), self._settled.get(threading.get_ident())
        known = self._known.get(key)
        if known is not None and (self._kept or (settled is not None and key in settled)):
            return known[1]
        tensors = {id(x): x for m in modules for x in (*m.parameters(), *m.buffers())}  # those that are tied once
        # Not every optimizer counts versions.
        state = tuple(state_of(x, read=x.requires_grad) for x in tensors.values())
        if known is None or known[0] != state:
            known = self._known[key] = state, Solved(self._norm(), self._solve() if self.mode == "ridge" else None)
        if settled is not None:
            settled.add(key)
        return known[1]

    @contextlib.contextmanager
    def unchanging(self):
        """Inside, nobody changes the embeddings: whether they have changed is looked at once, and not at each turn."""
        thread = threading.get_ident()
        outer = self._settled.setdefault(thread, mine := set()) is not mine
        try:
            yield
        finally:
            if not outer:
                del self._settled[thread]

    def forget(self) -> None:
        """The next call computes norm and W anew."""
        self._kept = False
        self._known.clear()

    def keep(self) -> None:
        """Keeps norm and W as they are now, if no embedding is trained: their tensors are about to be taken apart."""
        modules = (self._model[0].get_input_embeddings(), self._model[0].get_output_embeddings())
        if not any(p.requires_grad for m in modules if m is not None for p in m.parameters()):
            self.solved()
            self._kept = True

    def _norm(self) -> Tensor:
        e_in, total = self._model[0].get_input_embeddings(), 0.0
        with _as_they_are(e_in):
            for rows in _chunks(e_in):
                total = total + _wide(rows).norm(dim=-1).sum()
            return total / len(e_in.weight)

    def _solve(self) -> Tensor:
        """W [hidden, hidden]; solved in float64. The products are summed by chunks of the vocabulary."""
        e_in, e_out = self._model[0].get_input_embeddings(), self._model[0].get_output_embeddings()
        if len(e_in.weight) != len(e_out.weight):
            raise ValueError(
                f"realign: expected as many output as input embeddings, got {len(e_out.weight)} and {len(e_in.weight)}"
            )
        gram = cross = 0.0
        with _as_they_are(e_in, e_out):
            for x, y in zip(_chunks(e_in), _head_chunks(e_out)):
                dtype, x = _wide(x).dtype, x.double()
                y = y.to(x)
                gram, cross = gram + y.T @ y, cross + y.T @ x
            gram.diagonal().add_(self.ridge * gram.diagonal().mean())
            return torch.linalg.solve(gram, cross).to(dtype)


@contextlib.contextmanager
def _as_they_are(*modules: nn.Module):
    """Inside, modules compute what they are asked for, to be kept: without dropout, autocast and gradients."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(gathered([p for module in modules for p in module.parameters()]))
        for module in modules:
            stack.enter_context(evaluating(module))
            stack.enter_context(torch.autocast(_device_of(module).type, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _plain(module: nn.Module, kind: type) -> bool:
    """Whether a module is its weight and nothing else."""
    forward = vars(module).get("forward")
    return type(module) is kind and (forward is None or is_ours(forward)) and getattr(module, "bias", None) is None


def _rows(embedding: nn.Module, first: int, end: int) -> Tensor:
    """The embeddings of tokens `first` to `end`, as the module computes them."""
    return embedding(torch.arange(first, end, device=_device_of(embedding)))


class _Weighing(TorchFunctionMode):
    """Inside, an embedding that looks up tokens gets the mean of all rows instead, weighed by p [n, V]. read: where it has
    looked."""

    def __init__(self, p: Tensor):
        super().__init__()
        self.p, self.read = p, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.embedding:
            return func(*args, **(kwargs or {}))
        weight = args[1]
        self.read.append(local(weight).untyped_storage().data_ptr())
        return for_all(self.p.to(weight.device, weight.dtype), weight) @ weight


def _expected(embedding: nn.Module, p: Tensor) -> Tensor:
    """The mean over tokens, weighed by p [n, V], of what a module gives for them; see `_by_weighing`."""
    with _Weighing(p):
        return embedding(torch.zeros(len(p), dtype=torch.long, device=_device_of(embedding)))


@torch.no_grad()
def _by_weighing(embedding: nn.Module) -> bool:
    """Whether `_expected` is what it says: where a module scales the rows of its parameters or adds up some, as LoRA. Elsewhere
    a table of all tokens' embeddings is needed; so it is where a module makes new rows for every call."""
    if _plain(embedding, nn.Embedding):
        return True
    rows = len(embedding.weight)
    p = torch.zeros(1, rows, dtype=embedding.weight.dtype, device=_device_of(embedding))
    p[0, [1 % rows, rows - 1]] = 0.5  # two tokens, for which a norm of the rows, for one, is not linear
    with _as_they_are(embedding), _Weighing(p) as weighing:
        try:
            got = embedding(torch.zeros(1, dtype=torch.long, device=p.device))
        except (RuntimeError, TypeError, ValueError):  # rows that are packed
            return False
    want = _wide(torch.cat([_rows(embedding, i, i + 1) for i in (1 % rows, rows - 1)])).mean(0)
    own = {local(x).untyped_storage().data_ptr() for x in embedding.parameters()}
    close = (_wide(got)[0] - want).abs().max() <= 2 * torch.finfo(got.dtype).eps * want.abs().max()
    return bool(weighing.read) and own.issuperset(weighing.read) and bool(close)


def _chunks(embedding: nn.Module) -> Iterator[Tensor]:
    """E_in by chunks of the vocabulary."""
    rows = len(embedding.weight)
    for first in range(0, rows, CHUNK):
        yield _rows(embedding, first, min(first + CHUNK, rows))


def _head_chunks(head: nn.Module) -> Iterator[Tensor]:
    """E_out by chunks of the vocabulary. An adapted head is asked for all of it: what it makes of one-hot hidden states."""
    weight = head.weight
    if not _plain(head, nn.Linear):
        one_hot = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        weight = (head(one_hot) - head(torch.zeros_like(one_hot[:1]))).T
    yield from weight.split(CHUNK)

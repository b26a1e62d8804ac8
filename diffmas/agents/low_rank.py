"""An agent's rows as several adapters would have made them, computed once (LRAgent, arXiv 2602.01053).

Agents that have read the same text, each with an adapter of its own, have that text's rows each for itself: K and V of the
base model, and what the adapter adds to them. With `Agent.low_rank` one agent reads the text for all, on the bare model. Its
rows are there once; beside them each adapter of who reads it has the codes of its LoRA on k_proj and v_proj, x a' of the hidden
states x of that turn, r numbers for a row. A reader's attention goes over rows and codes as they are (diffmas.ops.low_rank).

So a reader has exactly what its k_proj and v_proj make of the bare model's hidden states. That is what its own turn over the
text would have made where its adapter changes no hidden state that a row comes from: with LoRA on k_proj and v_proj of the last
layer. Else the two differ by what the adapter does to hidden states in the layers before (docs/teams.md has how much): a team
should be trained with the rows that it will read.
"""

import threading
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from diffmas.agents import adapters
from diffmas.models.linear_parts import is_lora
from diffmas.models.parts import attention_layers
from diffmas.models.patch import patch_of
from diffmas.ops.low_rank import BY_ROW, Codes, of_pairs
from diffmas.ops.reference import accumulator
from diffmas.trace import Trace
from diffmas.trace.low_rank import Coding
from diffmas.trace.views import rows_of

__all__ = ["Coder", "check_low_rank"]


class Lora(NamedTuple):
    """What an adapter adds to a linear: scale dropout(x) a' b'."""

    a: nn.Module
    dropout: nn.Module
    b: Tensor  # [out, r]
    scale: float

    def codes(self, x: Tensor) -> Tensor:
        """[n, r]"""
        return self.a(self.dropout(x.to(self.a.weight.dtype))) * self.scale


def _lora_of(linear: nn.Module, adapter: str) -> Lora | None:
    """None where the adapter leaves a linear as it is."""
    if not is_lora(linear) or adapter not in linear.lora_A or linear.disable_adapters:
        return None
    b = linear.lora_B[adapter].weight
    return Lora(linear.lora_A[adapter], linear.lora_dropout[adapter], b.view_as(b), linear.scaling[adapter])


_COMPILED_LOCK = threading.RLock()  # what torch.compile is told, all models are told


class Coder:
    """Makes the codes of an agent's turn; a context around it, outside of the one in which it has its adapter.

    readers: by adapter, whether a gradient reaches its codes. In the turn's forwards, each layer's attention is hooked into.
    Codes that learn are made behind the turn: what a layer saves for backward, activation checkpointing would have to save
    again.
    """

    def __init__(self, system, readers: dict[str, bool]):
        check_low_rank(system)  # adapters may have come since it was made
        self._readers, self._patch = readers, patch_of(system.model)
        self._attentions = attention_layers(self._patch.body)
        self._loras = {
            name: [tuple(_lora_of(m._modules[kind], name) for kind in ("k_proj", "v_proj")) for m in self._attentions]
            for name in readers
        }
        self._slots: list[np.ndarray] = []  # of each forward
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._x: list[list[Tensor]] = [[] for _ in self._attentions]  # of each layer and forward, where some codes learn
        self._codes: dict[str, list[list[Codes]]] = {name: [[] for _ in self._attentions] for name in readers}

    def __enter__(self) -> "Coder":
        # What is compiled would be compiled anew, with hooks that leave something behind.
        _COMPILED_LOCK.acquire()
        self._stance = torch.compiler.set_stance("force_eager")
        self._stance.__enter__()
        self._hooks = [
            m.register_forward_pre_hook(self._hook(layer), with_kwargs=True) for layer, m in enumerate(self._attentions)
        ]
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()
        self._stance.__exit__(*error)
        _COMPILED_LOCK.release()

    def _hook(self, layer: int):
        def see(attention, args, kwargs) -> None:
            forward_pass = kwargs.get("diffmas_trace")
            if forward_pass is None:
                return
            x = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[0]
            for name, learns in self._readers.items():
                if not learns:
                    self._codes[name][layer].append(self._coded(name, layer, x))
            if any(self._readers.values()):
                self._x[layer].append(x)
            if layer == 0:
                cos, sin = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
                self._slots.append(forward_pass.work.slots.copy())
                self._tables.append((cos[0], sin[0]))

        return see

    def _coded(self, name: str, layer: int, x: Tensor) -> Codes:
        """Of x [n, hidden], what enters a layer's projections."""
        attention, (k, v) = self._attentions[layer], self._loras[name][layer]
        with torch.set_grad_enabled(self._readers[name]):
            codes = Codes()
            if v is not None:
                codes = codes._replace(z_v=v.codes(x), b_v=v.b)
            if k is None:
                return codes
            codes = codes._replace(z_k=k.codes(x), b_k=k.b)
            family = attention.diffmas_layer.family
            return codes if not family.norm else _normed(attention, x, codes)

    def encode(self, trace: Trace) -> dict[str, tuple[Coding, Tensor]]:
        """By adapter, what `Trace.with_codes` takes. trace: what of the turn is handed on."""
        if not self._slots:  # nobody had a turn
            return {}
        slots = np.concatenate(self._slots)
        # A row that was dropped may have been written again: what was written last stands.
        rows, last = np.unique(slots[::-1], return_index=True)
        kept = np.isin(rows, rows_of(trace.segments))
        rows, last = rows[kept], last[kept]
        index = torch.from_numpy(len(slots) - 1 - last)
        pick = lambda parts: torch.cat(parts)[index.to(parts[0].device)]
        interleaved = self._patch.spec.layers[0].rope == "interleaved"
        tables = of_pairs(tuple(map(pick, zip(*self._tables))), interleaved)
        found = {}
        for name, layers in self._codes.items():
            if self._readers[name]:
                layers = [[self._coded(name, i, x) for x in of_layer] for i, of_layer in enumerate(self._x)]
            with torch.set_grad_enabled(self._readers[name]):
                codes = [_packed(of_layer, pick) for of_layer in layers]
                turned = tables if any(x.z_k is not None for x in codes) else None
                found[name] = trace.encode(rows, codes, turned, interleaved)
        return found


def _packed(parts: list[Codes], pick) -> Codes:
    """Those of a layer's forwards, by row."""
    first = parts[0]
    return first._replace(**{x: pick([getattr(p, x) for p in parts]) for x in BY_ROW if getattr(first, x) is not None})


def _normed(attention: nn.Module, x: Tensor, codes: Codes) -> Codes:
    """Codes of keys that go through a norm: with its weight in b_k, and what it divides by without and with the adapter."""
    _, weight, eps = attention.diffmas_layer.family.norms(attention)
    k_proj = attention._modules["k_proj"]
    own = (k_proj.base_layer(x) if is_lora(k_proj) else k_proj(x)).unflatten(-1, (-1, len(weight)))  # [n, Hkv, D]
    own = own.to(accumulator(own.dtype))
    low = (codes.z_k.to(own.dtype) @ codes.b_k.to(own.dtype).T).view(own.shape)
    size = lambda y: torch.rsqrt(y.square().mean(-1) + eps)
    add = size(own + low)
    b_k = (codes.b_k.unflatten(0, (-1, len(weight))) * weight[:, None].to(codes.b_k.dtype)).flatten(0, 1)
    return codes._replace(b_k=b_k, keep=add / size(own), add=add)


def check_low_rank(system) -> None:
    """Raises ValueError naming what does not fit where an agent's rows are read with codes: the model, or its adapters."""
    agents, model = system.agents, system.model
    named = [agent.name for agent in agents if agent.low_rank]
    if not named or not hasattr(model, "peft_config"):  # without an adapter, everybody reads the rows as they are
        return
    where, spec = f"agent {named[0]!r}: low_rank", patch_of(model).spec
    if spec.offload is not None:
        raise ValueError(f"{where}: expected rows on the device, where they are read with codes, got offload={spec.offload!r}")
    for i in range(len(agents)):
        if not agents[i].low_rank and agents[i].model is None:
            adapters.name_of(system, i)
    for i, attention in enumerate(attention_layers(patch_of(model).body)):
        family = attention.diffmas_layer.family
        if family is None or family.qkv is not None:
            raise ValueError(
                f"{where}: expected attention with k_proj and v_proj, on the fused tier, got {type(attention).__name__} in "
                f"layer {i}"
            )
        for kind in ("k_proj", "v_proj"):
            why = _unlike_lora(attention._modules[kind])
            if why is not None:
                raise ValueError(f"{where}: expected plain LoRA on {kind}, or none, got {why} in layer {i}")


def _unlike_lora(linear: nn.Module) -> str | None:
    """What makes an adapted linear another thing than a linear and plain LoRA; None where it is one."""
    if type(linear) is nn.Linear:
        return None
    if not is_lora(linear):
        return type(linear).__name__
    for name, b in linear.lora_B.items():
        if linear.use_dora.get(name) or name in getattr(linear, "lora_variant", ()):
            return f"a variant of it, adapter {name!r},"
        if type(b) is not nn.Linear or b.bias is not None:
            return f"lora_bias of adapter {name!r}"
    return None

"""Rows of one model as rows of another: what a projector makes of K and V.

    Projector   new rows: each layer of the receiver has a linear map, or an MLP, from the rows of one of the sharer's. Keys are
                turned back to where RoPE found them, mapped, and turned to the receiver's positions by the receiver's RoPE
    Fuser       the receiver's own rows, to which what both models have of a token adds something (C2C, arXiv 2510.03215)

Which sharer's layer a receiver's layer reads is a *layer map*. Models may differ in layers, heads and head sizes.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from diffmas.agents.eval_mode import evaluating
from diffmas.models.forward import forward
from diffmas.models.parts import causal_lm_of
from diffmas.models.patch import patch_of
from diffmas.ops import reference
from diffmas.trace import Trace
from diffmas.trace.spec import LayerSpec, ModelSpec, spec_of

__all__ = ["Fuser", "Projector", "Rows", "layer_map", "row_shapes"]

Rows = list[tuple[Tensor, Tensor]]  # K and V by layer, [n, Hkv, D]


@torch.no_grad()
def row_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(Hkv, D) of each layer of a patched model, as one token's rows have it."""
    trace, patch, embedding = Trace(model), patch_of(model), model.get_input_embeddings()
    token = torch.zeros(1, 1, dtype=torch.long, device=next(embedding.parameters()).device)
    with evaluating(causal_lm_of(model)):
        forward(patch, trace, trace.plan([1], "prompt"), input_ids=token)
    return [tuple(k.shape[1:]) for k, _ in (trace.keys_values(i, 0) for i in range(len(trace)))]


def layer_map(layers, sharer: int, receiver: int, gaps: bool) -> list[int | None]:
    """The sharer's layer of each receiver's layer.

    layers: "terminal" (the last layers of both, and so on down, C2C's; where the sharer has no more, its first one, or with
    gaps none), "depth" (in proportion), or the list itself. sharer, receiver: how many layers they have. gaps: whether None is
    allowed. Raises ValueError for a map that does not fit.
    """
    if layers == "terminal":
        found = [i + sharer - receiver for i in range(receiver)]
        return [i if i >= 0 else None if gaps else 0 for i in found]
    if layers == "depth":
        return [round(i * (sharer - 1) / max(receiver - 1, 1)) for i in range(receiver)]
    known = isinstance(layers, (list, tuple)) and len(layers) == receiver
    fits = [(i is None and gaps) or (type(i) is int and 0 <= i < sharer) for i in layers] if known else [False]
    if not all(fits) or not any(i is not None for i in layers):
        one = "a layer (or None)" if gaps else "a layer"
        raise ValueError(
            f"layers: expected 'terminal', 'depth' or {one} of the sharer's {sharer} for each of the receiver's {receiver}, "
            f"got {layers!r}"
        )
    return list(layers)


def turned(k: Tensor, by: Tensor, spec: ModelSpec, layer: LayerSpec) -> Tensor:
    """Keys [n, Hkv, D] of a layer, turned on by so many positions, [n]; as they are where the layer does not turn keys."""
    if layer.rope == "none" or not by.any():
        return k
    wide, interleaved = reference.accumulator(k.dtype), layer.rope == "interleaved"
    cos, sin = reference.offset_tables(by.to(k.device), spec.frequencies(layer, k.device), interleaved, wide)
    return reference.rotate(k.to(wide), cos, sin, interleaved).to(k.dtype)


class Between(nn.Module):
    """What maps between the rows of two models have in common: their specs and shapes, and the layer map.

    sharer, receiver: patched models, or PEFT models around them; their weights are not this module's. layers: see `layer_map`.
    """

    fuses = False

    def __init__(self, sharer: nn.Module, receiver: nn.Module, layers):
        super().__init__()
        self.sharer, self.receiver = spec_of(sharer), spec_of(receiver)
        self._reader = (causal_lm_of(receiver),)  # a tuple hides it from nn.Module
        self.sharer_rows, self.receiver_rows = row_shapes(sharer), row_shapes(receiver)
        self.layers = layer_map(layers, len(self.sharer_rows), len(self.receiver_rows), gaps=self.fuses)
        for i, j in enumerate(self.layers):  # raises where a layer's turn is not known
            for spec, layer in ((self.receiver, i), (self.sharer, j)) if j is not None else ():
                if (one := spec.layers[layer]).rope != "none":
                    spec.frequencies(one, torch.device("cpu"))

    def check(self, sharer: nn.Module, receiver: nn.Module) -> None:
        """Raises ValueError unless it is between these two models, as they are patched now."""
        for name, mine, model in (("sharer", self.sharer, sharer), ("receiver", self.receiver, receiver)):
            if spec_of(model) is not mine:
                raise ValueError(f"projector: expected one that was made for this {name}, got one of another model or patch")

    def row_dtype(self, device: torch.device) -> torch.dtype:
        """Of rows that the receiver's layers would write now."""
        autocast = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if autocast else self._reader[0].dtype

    def sizes(self, i: int) -> tuple[int, int]:
        """Values of a row of K in the receiver's layer i, and in the sharer's layer that it reads."""
        return tuple(heads * D for heads, D in (self.receiver_rows[i], self.sharer_rows[self.layers[i]]))

    def options(self) -> dict:
        """What the constructor takes beside the models, as plain data."""
        return {"layers": self.layers}


class Projector(Between):
    """Makes rows of a receiver from those of a sharer, to be read as if an agent of the receiver's had written them.

    hidden: of an MLP in the place of the linear map, with a GELU after its first layer. sharer, receiver, layers: as in
    `Between`; where the receiver has more layers, "terminal" gives the first ones the sharer's first. Its weights are float32,
    and its inputs are computed in that. Raises ValueError for layers or hidden that do not fit, and where it is not known how a
    layer turns its keys.

        >>> projector = Projector(small, large, hidden=256)
    """

    kind = "projector"

    def __init__(self, sharer: nn.Module, receiver: nn.Module, layers="terminal", hidden: int | None = None):
        super().__init__(sharer, receiver, layers)
        if hidden is not None and (type(hidden) is not int or hidden < 1):
            raise ValueError(f"hidden: expected an integer >= 1 or None, got {hidden!r}")
        self.hidden = hidden
        self.keys = nn.ModuleList(self._map(i) for i in range(len(self.layers)))
        self.values = nn.ModuleList(self._map(i) for i in range(len(self.layers)))

    def _map(self, i: int) -> nn.Module:
        out, inner = self.sizes(i)
        sizes = [inner, out] if self.hidden is None else [inner, self.hidden, out]
        first, *rest = (nn.Linear(a, b) for a, b in pairwise(sizes))
        return nn.Sequential(first, *(x for layer in rest for x in (nn.GELU(), layer)))

    def options(self) -> dict:
        return {**super().options(), "hidden": self.hidden}

    def forward(self, rows: Rows, written: Tensor, read: Tensor) -> Rows:
        """rows: of the sharer, by layer, [n, Hs, Ds]. written, read [n], on the CPU: the positions that their keys were turned
        to, and those that the receiver has them at. -> of the receiver, by layer, [n, Hr, Dr]."""
        made = []
        for i, j in enumerate(self.layers):
            k, v = (x.to(self.keys[i][0].weight) for x in rows[j])
            k = turned(k, -written, self.sharer, self.sharer.layers[j])
            k, v = (f(x.flatten(1)).unflatten(1, self.receiver_rows[i]) for f, x in ((self.keys[i], k), (self.values[i], v)))
            rows_of_layer = turned(k, read, self.receiver, self.receiver.layers[i]), v
            made.append(tuple(x.to(self.row_dtype(x.device)) for x in rows_of_layer))
        return made


class Block(nn.Module):
    """x + W2 gelu(W1 norm(x)), of x [..., width]."""

    def __init__(self, width: int, inner: int, dropout: float):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm(x)))))


class Fusion(nn.Module):
    """C2C's fused projection of one layer's keys, or of its values; see `Fuser`."""

    def __init__(self, sharer: int, heads: int, head_dim: int, hidden: int, inner: int, depth: int, dropout: float):
        super().__init__()
        self.shape = heads, head_dim
        self.enter = nn.Sequential(nn.Linear(sharer + heads * head_dim, hidden), Block(hidden, inner, dropout))
        blocks = (Block(hidden, inner, dropout) for _ in range(depth))
        self.project = nn.Sequential(*blocks, nn.Linear(hidden, heads * head_dim))
        self.weigh = nn.Sequential(Block(hidden, hidden, dropout), nn.Linear(hidden, heads))
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, theirs: Tensor, own: Tensor, temperature: float) -> Tensor:
        """theirs [n, Hs, Ds], own [n, Hr, Dr] -> what is added to `own`, [n, Hr, Dr]."""
        x = self.enter(torch.cat((theirs.flatten(1), own.flatten(1)), 1))
        weight, added = torch.sigmoid(self.weigh(x))[..., None], self.project(x).unflatten(1, self.shape)
        if not self.training:
            return (self.gate > 0) * weight * added
        noise = torch.rand_like(weight).clamp_min(1e-20)
        gumbel = -torch.log((-torch.log(noise)).clamp_min(1e-20))
        return torch.sigmoid((self.gate + gumbel) / temperature) * weight * added


class Fuser(Between):
    """C2C's fused projection (Cache-to-Cache, arXiv 2510.03215): to a receiver's row is added what both models have of a token.

    In each layer, for keys and for values apart, x = block(W [sharer's row; receiver's row]), and the row becomes

        own + gate * sigmoid(weigh(x)) * project(x)

    with a weight for each head, and one gate for the layer. In training the gate is sigmoid((g + Gumbel noise) / temperature)
    of a learned g, drawn for each head and token; in eval mode it is open where g > 0. The temperature falls from 1 to 0.001
    (`anneal`, which `diffmas.Trainer` calls). Sizes and noise are those of the published code (github.com/thu-nics/C2C), which
    draws one Gumbel where a Gumbel-sigmoid has the difference of two. Keys stay as they are turned, as there; a sharer's key of
    another position is turned to the receiver's first.

    hidden, inner: widths of x and inside of its blocks. depth: blocks of `project`. layers: "terminal" leaves the receiver's
    first layers as they are where it has more, and so does None in a list. Raises ValueError as `Between`, and for sizes that
    do not fit.
    """

    kind, fuses = "c2c", True
    TEMPERATURES = 1.0, 0.001

    def __init__(
        self, sharer: nn.Module, receiver: nn.Module, layers="terminal", hidden: int = 1024, inner: int = 1024, depth: int = 1,
        dropout: float = 0.1,
    ):  # fmt: skip
        super().__init__(sharer, receiver, layers)
        for name, size in (("hidden", hidden), ("inner", inner), ("depth", depth)):
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {size!r}")
        self._options = {"hidden": hidden, "inner": inner, "depth": depth, "dropout": dropout}
        self.temperature = self.TEMPERATURES[0]
        used = [i for i, j in enumerate(self.layers) if j is not None]
        of = lambda i: Fusion(self.sizes(i)[1], *self.receiver_rows[i], hidden, inner, depth, dropout)  # noqa: E731
        self.keys, self.values = (nn.ModuleDict({str(i): of(i) for i in used}) for _ in range(2))

    def options(self) -> dict:
        return {**super().options(), **self._options}

    def anneal(self, share: float) -> None:
        """Sets the gates' temperature for a training of which this share, in [0, 1], is over."""
        first, last = self.TEMPERATURES
        self.temperature = first * (last / first) ** share

    def forward(self, theirs: Rows, own: Rows, written: Tensor, read: Tensor) -> Rows:
        """theirs, own: rows of the same n tokens, by layer of the sharer and of the receiver, [n, H, D]. written, read [n]: the
        positions that their keys were turned to. -> the receiver's, by layer."""
        fused = []
        for i, (layer, (k, v)) in enumerate(zip(self.layers, own)):
            if layer is None:
                fused.append((k, v))
                continue
            keys, values = self.keys[str(i)], self.values[str(i)]
            theirs_k, theirs_v = (x.to(keys.gate) for x in theirs[layer])
            theirs_k = turned(theirs_k, read - written, self.sharer, self.sharer.layers[layer])
            pairs = ((keys, theirs_k, k), (values, theirs_v, v))
            fused.append(tuple(x + f(y, x.to(y), self.temperature).to(x) for f, y, x in pairs))
        return fused

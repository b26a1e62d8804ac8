"""The numeric probe: every attention layer is replayed through diffmas and compared with its own forward.

The unpatched body forwards a few random tokens, at small and at large positions, while hooks record the arguments of each
attention layer. A float32 copy of the layer then computes the same inputs both ways, plain and scaled up until the softmax
saturates. This finds differences that no attribute reveals: another rotary layout, a norm in another place, a layer without
rotation, positions that scale the query.
"""

import copy
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffmas.models.attention import FAMILIES, Layer, install, uninstall
from diffmas.models.forward import skip_mask
from diffmas.models.local import local_copy
from diffmas.models.parts import text_stack_of
from diffmas.models.support import Unsupported, refuse
from diffmas.ops import reference
from diffmas.ops.fused import packed_table, with_heads

__all__ = ["choose_tiers"]

TOKENS = 9
SCALES = {1.0: 1e-4, 30.0: 5e-3}  # of the hidden states -> tolerated error, relative to the largest output
SENTINEL = "diffmas_trace"


class ProbePass:
    """Stands in for a ForwardPass: one sequence, one layer, a pool of its own, the reference backend."""

    def __init__(self, n: int):
        self.n, self.keys = n, None

    def attend(
        self, layer, q: Tensor, k: Tensor, v: Tensor, scale: float, cos=None, sin=None, q_weight=None, k_weight=None, eps=1e-6
    ) -> Tensor:
        if layer.head_dim is not None:
            q, k, v = (with_heads(x, self.n, layer.head_dim) for x in (q, k, v))
            cos, sin = packed_table(cos), packed_table(sin)
        if k.shape != v.shape or q.shape[2] != k.shape[2]:
            raise ValueError(f"q, k, v of shapes {list(q.shape)}, {list(k.shape)}, {list(v.shape)} [head_dim]")
        index = lambda *x: torch.tensor(x, device=q.device)  # noqa: E731
        view = (index(0, self.n), index(0, 1), index(0), index(self.n), None, None)
        slots, pools = torch.arange(self.n, device=q.device), (torch.zeros_like(k), torch.zeros_like(v))
        q = reference.inject(q, k, v, cos, sin, slots, q_weight, k_weight, eps, False, *pools)
        self.keys = pools[0]
        o = reference.cross_attention(q, *pools, *view, scale, True, False)[0]
        return o if layer.head_dim is None else o.flatten(1)[None]


@contextmanager
def recorded_calls(attentions: list[nn.Module], calls: dict):
    """Records args and kwargs of each attention's next call."""

    def record(module, args, kwargs):
        calls[module.layer_idx] = (args, kwargs)

    hooks = [a.register_forward_pre_hook(record, with_kwargs=True) for a in attentions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def record_body(body: nn.Module, attentions: list[nn.Module], first_position: int) -> dict[int, tuple]:
    """The (args, kwargs) of each layer when the body forwards TOKENS random tokens from `first_position` on."""
    weight = body.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, weight.shape[0], (1, TOKENS), generator=generator).to(weight.device)
    positions = torch.arange(first_position, first_position + TOKENS, device=weight.device)[None]
    calls = {}
    with recorded_calls(attentions, calls):
        try:
            body(input_ids=ids, position_ids=positions, use_cache=False, **{SENTINEL: None})
        except (TypeError, ValueError) as error:  # its forward takes no extra keyword arguments
            raise Unsupported(f"diffmas cannot patch {type(body).__name__}: {error} [{SENTINEL}]") from error
    return calls


def to_float32(x):
    if isinstance(x, Tensor):
        return x.detach().float() if x.is_floating_point() else x
    return tuple(map(to_float32, x)) if isinstance(x, tuple) else x


def replay(attention: nn.Module, call: tuple, scale: float, forward, **extra) -> Tensor:
    args, kwargs = (to_float32(call[0]), {k: to_float32(v) for k, v in call[1].items()})
    kwargs.update(extra)
    if "hidden_states" in kwargs:
        kwargs["hidden_states"] = kwargs["hidden_states"] * scale
    else:
        args = (args[0] * scale, *args[1:])
    out = forward(attention, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def traced(attention: nn.Module, *args, **kwargs):
    """The patched forward, with the mask that it gets in use."""
    ours = lambda x: skip_mask(x.device) if isinstance(x, Tensor) and x.dim() == 4 else x  # noqa: E731
    return attention.forward(*map(ours, args), **{name: ours(x) for name, x in kwargs.items()})


def plain_copy(attention: nn.Module) -> nn.Module:
    """A float32 copy in eval mode, with an attention function that works on any device."""
    copied = local_copy(attention).float().eval()
    copied.config = copy.copy(attention.config)
    if copied.config._attn_implementation not in ("eager", "sdpa"):
        copied.config._attn_implementation_internal = "sdpa"
    return copied


def mismatch(attention: nn.Module, copied: nn.Module, layer: Layer, calls: list[dict]) -> str | None:
    """What differs between the layer through diffmas and by itself, as text; None if nothing does."""
    own = type(attention).forward
    for call in calls:
        for scale, tolerance in SCALES.items():
            want = replay(copied, call[layer.index], scale, own)
            probe = ProbePass(TOKENS)
            install(copied, layer)
            try:
                got = replay(copied, call[layer.index], scale, traced, **{SENTINEL: probe})
            except Unsupported:
                raise
            except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
                return f"{type(error).__name__}: {error}"
            finally:
                uninstall(copied)
            if probe.keys is None:
                return "its forward does not go through transformers' attention interface"
            error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))
            if not error <= tolerance:
                return f"output differs by {error:.1e} of its largest value (inputs scaled by {scale:g})"
    return None


def rotation(copied: nn.Module, layer: Layer, calls: list[dict], offset: int, inv_freq: Tensor | None) -> str:
    """How the layer rotates its keys, half | interleaved | none | unknown: from the same hidden states at two positions."""
    near, moved = (call[layer.index][1].get("position_embeddings") for call in calls)
    if near is None or inv_freq is None:
        return "unknown"
    keys = []
    install(copied, layer)
    try:
        for tables in (near, moved):
            probe = ProbePass(TOKENS)
            replay(copied, calls[0][layer.index], 1.0, traced,
                   position_embeddings=to_float32(tables), **{SENTINEL: probe})  # fmt: skip
            keys.append(probe.keys.double())
    finally:
        uninstall(copied)
    offsets = torch.full((TOKENS,), offset, dtype=torch.int64, device=inv_freq.device)
    limit = 1e-3 * keys[0].abs().max()
    if (keys[0] - keys[1]).abs().max() <= limit:
        return "none"
    for name in ("half", "interleaved"):
        tables = reference.offset_tables(offsets, inv_freq, name == "interleaved", torch.float64)
        if (reference.rotate(keys[0], *tables, name == "interleaved") - keys[1]).abs().max() <= limit:
            return name
    return "unknown"


def choose_tiers(body: nn.Module, attentions: list[nn.Module]) -> list[Layer]:
    """The tier of every layer: fused if its family is known and the probe agrees, else generic if the probe agrees.

    For a body in evaluation mode, without gradients. Raises Unsupported naming layer and reason.
    """
    config = body.config.get_text_config()
    meta = [a for a in attentions if any(p.is_meta for p in a.parameters())]
    if meta:
        raise refuse(meta[0], ["weights that are not in memory, so that the layer cannot be probed [device=meta]"])
    longest = getattr(config, "max_position_embeddings", 2048) or 2048
    far = max(0, min(longest, 50_000) - TOKENS)
    near = min(far, 200)  # up to here float32 angles are exact enough to tell rotations apart
    first, moved, last = (record_body(body, attentions, position) for position in (0, near, far))
    calls = [first, last]
    inv_freq = getattr(getattr(text_stack_of(body), "rotary_emb", None), "inv_freq", None)
    layers = []
    for attention in attentions:
        if SENTINEL not in calls[0].get(attention.layer_idx, ((), {}))[1]:
            raise refuse(attention, [f"the keyword argument {SENTINEL} does not reach it"])
        copied = plain_copy(attention)
        family = FAMILIES.get(type(attention).__name__)
        reasons = []
        for candidate in (family, None) if family else (None,):
            layer = Layer(attention.layer_idx, "half" if candidate else "unknown", candidate)
            reason = mismatch(attention, copied, layer, calls)
            if reason is None:
                if candidate is None:
                    layer.rope = rotation(copied, layer, [first, moved], near, inv_freq)
                break
            reasons.append(f"{'fused' if candidate else 'generic'}: {reason}")
        else:
            raise refuse(attention, reasons)
        layers.append(layer)
    return layers

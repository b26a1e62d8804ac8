"""One forward of a patched model: padded batches in, packed tokens through the layers, the trace told at the end.

Two callers: `forward`, for those who pack and plan themselves (the agents), and the hooks on the body, for whoever passes a
Trace as `past_key_values` (`cache` since transformers 5.24). Both hand the forward pass down to the attention layers as the
keyword argument `diffmas_trace`.
"""

import contextlib
import functools
import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffmas.models.adapted import check_one_adapter
from diffmas.models.running import running
from diffmas.models.support import dropout_in_training, dropout_of
from diffmas.trace import Trace
from diffmas.trace.cache import cache_name
from diffmas.trace.forward_pass import ForwardPass

__all__ = ["after_body", "before_body", "forward", "new_token_mask", "skip_mask"]


class PaddedBatch(NamedTuple):
    """How the caller's batch [B, S] was packed, and the trace that its tokens go to. valid: None where nothing was padded."""

    trace: Trace
    valid: Tensor | None
    B: int
    S: int

    def restore(self, h: Tensor) -> Tensor:
        """[1, n, hidden] -> [B, S, hidden], zeros where there was padding."""
        if self.valid is None:
            return h.view(self.B, self.S, -1)
        return h.new_zeros(self.B, self.S, h.shape[-1]).masked_scatter(self.valid[..., None], h[0])

    def restore_router(self, logits):
        """[n, experts] -> [B * S, experts], as the loss that balances the experts expects them beside the caller's mask."""
        if not isinstance(logits, Tensor) or logits.dim() != 2 or self.valid is None:
            return logits
        return self.restore(logits[None]).flatten(0, 1)


def forward(patch, trace: Trace, forward_pass: ForwardPass, *, head: bool = False, commit: bool = True, **inputs):
    """The body's output, or with `head` the causal LM's, over packed tokens (input_ids [1, n] or inputs_embeds [1, n,
    hidden]). commit: not where the pass repeats itself, after one like it that was checked and committed."""
    if commit:
        _check_forward(patch)
    x = next(iter(inputs.values()))
    module = patch.causal_lm if head else patch.body
    fused_head = head and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")  # which products are to see
    seen = fused_head or forward_pass.work.adapter_ends is not None
    with running(forward_pass, kernels=fused_head) if seen else contextlib.nullcontext():
        output = module(
            **inputs, attention_mask=skip_mask(x.device), position_ids=forward_pass.position_ids(x.device), use_cache=False,
            return_dict=True, diffmas_trace=forward_pass,
        )  # fmt: skip
    if commit:
        forward_pass.ids = x[0] if "input_ids" in inputs else None
        trace.commit(forward_pass)
    return output


@functools.cache
def skip_mask(device: torch.device) -> Tensor:
    """A 4-D mask is passed on untouched by transformers' mask builders; ours is never read."""
    with torch.inference_mode(False):  # whoever asks first
        return torch.zeros(1, 1, 1, 1, device=device)


def _check_forward(patch) -> None:
    """Refuses what would give wrong results without a word: dropout in training, some ways of checkpointing."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError("a forward with a trace ran inside backward: checkpoint layers, not the whole model")
    for attention in patch.attentions:
        if attention.training and (dropout := dropout_of(attention)):
            raise dropout_in_training(attention, dropout)
    if not (patch.body.training and torch.is_grad_enabled()):
        return
    for module in patch.checkpointed:
        if module.gradient_checkpointing:
            how = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
            if how.get("use_reentrant", False):
                raise RuntimeError(
                    "re-entrant activation checkpointing gives wrong gradients with a trace; call "
                    'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
                )


# ---- the hooks on the body -------------------------------------------------------------------------------------------


@torch.compiler.disable
def before_body(patch, body: nn.Module, args: tuple, kwargs: dict):
    """Drops the padding and plans the forward pass, where there is a trace."""
    if args:
        names = list(inspect.signature(type(body).forward).parameters)[1:]
        kwargs = {**dict(zip(names, args)), **kwargs}
    argument = cache_name(kwargs, Trace)
    if argument is None:
        return None
    trace = kwargs[argument]
    if trace.spec is not patch.spec:
        raise ValueError(
            f"{argument}: expected a trace of this model as it is patched now, got a trace of another model, or one from "
            "before it was patched again; make a new trace"
        )
    if kwargs.get("output_attentions", body.config.output_attentions):
        raise ValueError("output_attentions: expected False with a trace, whose attention keeps no weights, got True")
    encoded = kwargs.get("mm_encoder_outputs") or {}
    if any(x is not None for x in (kwargs.get("pixel_values"), kwargs.get("pixel_values_videos"), *encoded.values())):
        raise ValueError("pixel_values: expected text alone with a trace, got images too")
    _check_forward(patch)
    kwargs = {name: x for name, x in kwargs.items() if name not in (argument, "cache_position")}
    name = "inputs_embeds" if kwargs.get("inputs_embeds") is not None else "input_ids"
    x = kwargs.get(name)
    if x is None or x.shape[1] == 0:
        raise ValueError("input_ids: expected input_ids or inputs_embeds of at least one token")
    kind, reserve, positions = "latent" if name == "inputs_embeds" else "prompt", 0, kwargs.get("position_ids")
    if trace.generation is None:
        valid = new_token_mask(kwargs.get("attention_mask"), trace, *x.shape[:2], placed=positions is not None)
    else:  # transformers derives positions and columns from ids that it knows; the trace knows its rows
        x, valid, kind, reserve = trace.generation.next_forward(x, trace.lengths)
        positions = None
    B, S = x.shape[:2]
    check_one_adapter(patch.causal_lm, B)
    if kwargs.get("output_router_logits", getattr(body.config, "output_router_logits", False)):
        if kwargs.get("attention_mask") is not None and kwargs["attention_mask"].shape[1] != S:
            raise ValueError("output_router_logits: expected a mask of the new tokens alone, whose experts the loss balances")
    if positions is not None:
        positions = _positions(positions, B, S)
        positions = positions.flatten() if valid is None else positions[valid]
    forward_pass = trace.plan([S] * B if valid is None else valid.sum(1).tolist(), kind, positions, reserve)
    valid = None if valid is None else valid.to(x.device)
    forward_pass.batch = PaddedBatch(trace, valid, B, S)
    # Not a view of the caller's tensor: torch.compile would compile anew for other strides, and for what it is a view of.
    x = x.flatten(0, 1).clone(memory_format=torch.contiguous_format) if valid is None else x[valid]
    for types in ("token_type_ids", "mm_token_type_ids"):
        given = kwargs.get(types)
        if given is not None:
            if given.shape != (B, S):
                raise ValueError(f"{types}: expected [{B}, {S}], one per new token, got {list(given.shape)}")
            kwargs[types] = (given.flatten() if valid is None else given[valid.to(given.device)])[None]
    kwargs[name] = x[None]
    forward_pass.ids = x if name == "input_ids" else None
    kwargs.update(
        attention_mask=skip_mask(x.device), position_ids=forward_pass.position_ids(x.device), use_cache=False,
        diffmas_trace=forward_pass,
    )  # fmt: skip
    return (), kwargs


def new_token_mask(mask, trace: Trace, B: int, S: int, placed: bool) -> Tensor | None:
    """Which of S new columns are tokens, by a 2-D attention mask [B, at least S]; bool [B, S] on the CPU, None for all of them.

    A row of padding alone appends nothing. Earlier columns are the trace's, which alone says what is seen: in a sequence's,
    there must be all 1s, or one for each of its rows. placed: whether it is known at which positions the tokens are; if not,
    padding is allowed before and after them, and not between. Raises ValueError for a mask that asks for something else.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] < S:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: expected a 2-D mask [{B}, at least {S}] with a trace, got {shape}")
    mask = mask.cpu()
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"attention_mask: expected 0 for padding and 1 for tokens with a trace, got {mask.unique().tolist()}")
    past, new = mask[:, :-S].bool(), mask[:, -S:].bool()
    if not past.all():
        for b, (shown, have) in enumerate(zip(past.sum(1).tolist(), trace.lengths)):
            if shown != have and shown < past.shape[1]:
                raise ValueError(
                    f"attention_mask: expected the {have} rows that sequence {b} of the trace has, got a mask that shows "
                    f"{shown} of them; what a sequence sees is the trace's to say: pass a view without the others "
                    "(Trace.keep, Trace.reading), and a mask of the new tokens"
                )
    if new.all():
        return None
    if not new.any():
        raise ValueError("attention_mask: expected at least one token that is not padding, got none")
    if not placed and (new[:, 1:] > new[:, :-1]).sum(1).add(new[:, 0]).max() > 1:
        raise ValueError(
            "attention_mask: expected padding before and after the tokens of a sequence, got some between them; pass "
            "position_ids, which say where they are, or leave it out of the batch"
        )
    return new


def _positions(positions, B: int, S: int) -> Tensor:
    """position_ids as [B, S] on the CPU; raises ValueError for others than one integer per new token."""
    if not isinstance(positions, Tensor) or positions.is_floating_point() or positions.dtype == torch.bool:
        kind = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise ValueError(f"position_ids: expected a tensor of integers with a trace, got {kind}")
    if positions.dim() > 2 or positions.shape[-1] != S or positions.numel() not in (S, B * S):
        raise ValueError(f"position_ids: expected [{B}, {S}], one per new token, got {list(positions.shape)}")
    return positions.expand(B, S).cpu()


@torch.compiler.disable
def after_body(body: nn.Module, args: tuple, kwargs: dict, output):
    """Ends the forward pass; where `before_body` planned it, commits it and restores the padded shape."""
    forward_pass = kwargs.get("diffmas_trace")
    if forward_pass is None:
        return output
    forward_pass.end(output[0] if isinstance(output, tuple) else output.last_hidden_state)
    batch = forward_pass.batch
    if batch is None:
        return output
    batch.trace.commit(forward_pass)
    if isinstance(output, tuple):  # the states of all layers, if asked for, are a tuple in it
        rest = (tuple(map(batch.restore, x)) if isinstance(x, tuple) else x for x in output[1:])
        return (batch.restore(output[0]), *rest)
    output.last_hidden_state = batch.restore(output.last_hidden_state)
    if getattr(output, "hidden_states", None):
        output.hidden_states = tuple(map(batch.restore, output.hidden_states))
    if getattr(output, "router_logits", None):
        output.router_logits = tuple(map(batch.restore_router, output.router_logits))
    setattr(output, "cache" if hasattr(output, "cache") else "past_key_values", batch.trace)
    return output

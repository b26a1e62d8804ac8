"""Logits of hidden states that are there already, without another forward."""

import torch
from torch import Tensor, nn

__all__ = ["check_head", "logits_of"]


def logits_of(causal_lm: nn.Module, h: Tensor) -> Tensor:
    """head(h), as the model itself scales it; h [n, hidden] after the final norm -> [n, V]."""
    head, config = causal_lm.get_output_embeddings(), causal_lm.config.get_text_config()
    weight = next(head.parameters())
    logits = head(h.to(weight.device, weight.dtype))
    logits = logits * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)  # Cohere's, Granite's
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma's
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.no_grad()
def check_head(causal_lm: nn.Module, body: nn.Module) -> None:
    """Raises ValueError where `logits_of` are not the model's own logits, of one token."""
    device = next(causal_lm.get_input_embeddings().parameters()).device
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    seen: list[Tensor] = []
    hook = body.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    try:
        want = causal_lm(input_ids=ids, use_cache=False).logits[0, -1].float()
    finally:
        hook.remove()
    got = logits_of(causal_lm, seen[0][0, -1:])[0].float()
    if (got - want).abs().max() > 0.02 * want.abs().max():
        raise ValueError("model: expected logits that are its head's of the last hidden states, got others")

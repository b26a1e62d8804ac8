"""The plain Hugging Face way to train latent agents: DynamicCache, torch.cat, left padding, autograd. The peer of `forward`.

What a careful user writes today, with correct masks and positions (the LatentMAS reference code passes no positions and
attends to padding). Autograd keeps every concatenated copy of the cache: memory grows with (steps x trace length).
"""

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from diffmas.patch import causal_lm_of

__all__ = ["plain_loss"]


def _left_pad(rows: list[list[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask


def plain_loss(system, questions, answers) -> torch.Tensor:
    """The loss of `MultiAgentSystem.forward` for trace_content all or latent_only, without a trace; a scalar.

    Positions are those of the unpadded sequences. Rows that latent_only drops stay in the cache and are masked out.
    """
    model = causal_lm_of(system.model)
    body, device = model.base_model, system.device
    questions = system.fields_of(questions)
    cache = DynamicCache()
    past = torch.zeros(len(questions), 0, dtype=torch.long, device=device)  # which cached columns are seen
    at = torch.zeros(len(questions), 1, dtype=torch.long, device=device)  # the next position

    def forward(module, mask, **inputs):
        nonlocal past, at
        positions = (at + mask.cumsum(1) - 1).clamp_min(0)
        past, at = torch.cat((past, mask), 1), at + mask.sum(1, keepdim=True)
        return module(**inputs, attention_mask=past, position_ids=positions, past_key_values=cache, use_cache=True)

    for agent in system.agents[:-1]:
        handed = past.shape[1]
        ids, mask = _left_pad([system.prompt_ids(agent, q) for q in questions], 0, device)
        h = forward(body, mask, input_ids=ids).last_hidden_state[:, -1:]
        prompt_end = past.shape[1]
        for _ in range(agent.latent_steps):
            ones = torch.ones_like(at)
            h = forward(body, ones, inputs_embeds=system.realign(h[:, 0])[:, None]).last_hidden_state
        if system.trace_content == "latent_only":
            past = past.clone()
            past[:, handed:prompt_end] = 0
    targets = [system.answer_ids(a) for a in answers]
    rows = [system.prompt_ids(system.agents[-1], q) + t for q, t in zip(questions, targets)]
    ids, mask = _left_pad(rows, 0, device)
    longest = max(map(len, targets))
    logits = forward(model, mask, input_ids=ids, logits_to_keep=longest + 1).logits[:, :-1]
    labels = torch.full((len(rows), longest), -100, device=device)
    for b, t in enumerate(targets):
        labels[b, longest - len(t) :] = torch.tensor(t, device=device)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=-100)

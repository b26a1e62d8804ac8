"""Do a team's latent steps look like tokens to its model? One question, without gradients, before much is spent on more.

A model has seen nothing but token embeddings. Vectors of another norm, or after which it is less sure of the next token than
anywhere in its prompt, are most likely noise to it. Whoever is trained on them may learn to read them all the same.
"""

import torch
from torch import Tensor

from diffmas.agents.eval_mode import evaluating

__all__ = ["unlike_tokens"]

FAR = 2.0  # times a token's norm, or one in so many: SmolLM2's tokens have 0.56 to 2.3 times their mean
LESS_SURE = 1.0  # nats more than at any token of the prompt
PROMPT = 64  # tokens that are looked at
TOKENS = 4096  # of the vocabulary, whose norms are


@torch.no_grad()
def unlike_tokens(system, question: dict) -> list[str]:
    """A line for each way in which the latent steps for a question are unlike tokens, with what to try; none if they are fine.

    question: its prompt fields. Runs all agents but the last one, and one forward over the first prompt, with hooks on realign;
    nobody else may run the model meanwhile.
    """
    (fields,) = system.fields_of([question])
    lines = []
    silent = [x.name for x in system.agents[:-1] if x.steps(fields) == 0 and x.max_message_tokens is None]
    if silent and system.trace_content == "latent_only" and system.no_latents == "prompt":
        names = ", ".join(silent)
        lines.append(f"T = 0 with trace_content='latent_only': nobody reads {names}; try latent_steps, or trace_content='all'")
    with evaluating(system):
        h, x = _latents(system, fields)
        if not len(x):
            return lines
        ratios = x.float().norm(dim=-1) / _token_norm(system.model).to(x.device)
        prompt = system.prompt_ids(system.agents[0], fields)[:PROMPT]
        text = _entropy(system.model(system.pack([prompt])).logits[0]).max().item()
        head = system.model.get_output_embeddings()
        logits = None if head is None else head(h.to(next(head.parameters()).device))
    low, high = ratios.min().item(), ratios.max().item()
    if low < 1 / FAR or high > FAR:
        lines.append(f"latent steps have {low:.2f} to {high:.2f} times a token's norm; {_advice(system, logits)}")
    if logits is not None and (unsure := _entropy(logits).max().item()) > text + LESS_SURE:
        lines.append(
            f"at latent steps the model's next token has an entropy of up to {unsure:.1f} nats, in the prompt of at most "
            f"{text:.1f}; try fewer steps or another realign than {system.realign.mode!r} (docs/choosing.md)"
        )
    return lines


def _latents(system, fields: dict) -> tuple[Tensor, Tensor]:
    """What realign gets and gives at every latent step, [n, hidden] each."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = system.realign.register_forward_hook(lambda module, args, x: seen.append((args[0].clone(), x.clone())))
    try:
        system.communicate([fields])
    finally:
        handle.remove()
    if not seen:
        return torch.empty(0), torch.empty(0)
    h, x = zip(*seen)
    return torch.cat(h), torch.cat(x)


def _token_norm(model) -> Tensor:
    """The mean norm of a token's embedding."""
    embedding = model.get_input_embeddings()
    weight = next(embedding.parameters())
    step = max(1, len(weight) // TOKENS)
    return embedding(torch.arange(0, len(weight), step, device=weight.device)).float().norm(dim=-1).mean()


def _entropy(logits: Tensor) -> Tensor:
    logp = logits.float().log_softmax(-1)
    return torch.special.entr(logp.exp()).sum(-1)


def _advice(system, logits: Tensor | None) -> str:
    mode, temperature = system.realign.mode, system.realign.temperature
    if mode == "soft_token" and logits is not None:
        tokens = _entropy(logits / temperature).max().exp().item()
        return f"each is a mean of up to {tokens:.0f} tokens: try a lower temperature than {temperature:g}, as 0.5, or 'ridge'"
    return f"try realign='ridge' or 'norm', which give them a token's, instead of {mode!r}"

"""Latent agents in plain Hugging Face code: DynamicCache, torch.cat, left padding, autograd.

Written as a careful user would today, with correct masks and positions (the LatentMAS reference code passes no positions and
attends to padding). Autograd keeps every concatenated copy of the cache: memory grows with (steps x trace length).
"""

import inspect

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from diffmas.agents.eval_mode import evaluating
from diffmas.agents.sampling import end_tokens
from diffmas.models.parts import body_of, causal_lm_of
from diffmas.trace.cache import cache_argument

__all__ = ["plain_generate", "plain_loss"]


def _left_pad(rows: list[list[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask


def _own(system) -> str:
    """What takes a team off the chain."""
    for agent in system.agents:
        if agent.low_rank:
            return f"low_rank of agent {agent.name!r}"
        for option in ("reads", "max_rows", "model", "quantized"):
            if (found := getattr(agent, option)) is not None and not (option == "quantized" and agent is system.agents[-1]):
                return f"{option} of agent {agent.name!r}, {found!r}" if option != "reads" else f"reads of agent {agent.name!r}"
    return f"a {type(system).__name__}, whose agents read otherwise"


class _Plain:
    """A batch of episodes on one cache.

    past [B, columns]: which cached columns each sequence sees; read_at, of the same shape: at which positions. at [B, 1]: each
    sequence's next position. room[b]: tokens that follow the last agent's prompt. cache: a function (config, columns) -> an
    empty cache with room for them, by default a DynamicCache. every_logit: as LatentMAS does, compute the logits of all tokens
    and the hidden states of all layers, instead of the body alone and the logits that are used.
    """

    def __init__(self, system, questions, room: list[int], cache=None, every_logit: bool = False):
        if not system.graph.chain:
            raise ValueError(f"system: expected agents that each read all before them, as it was written, got {_own(system)}")
        if any(agent.max_message_tokens is not None for agent in system.agents[:-1]):
            raise ValueError("system: expected agents that take latent steps alone, got some that write messages")
        self.system, self.questions = system, system.fields_of(questions)
        self.turns = system.tokenize(self.questions, room, "its prompt and answer")
        self.prompts = [turn.ids for turn in self.turns[-1]]
        self.model = causal_lm_of(system.model)
        longest = [
            max(len(turn.ids) for turn in row) + max(turn.steps for turn in row) * (agent.passes or 1)
            for agent, row in zip(system.agents, self.turns)
        ]
        self.cache = cache(self.model.config, sum(longest) + max(room)) if cache else DynamicCache()
        self.every_logit = every_logit
        self.past = self.read_at = torch.zeros(len(self.questions), 0, dtype=torch.long, device=system.device)
        self.at = torch.zeros(len(self.questions), 1, dtype=torch.long, device=system.device)

    def forward(self, module, mask, **inputs):
        """A forward of the model or its body over n new tokens. mask [B, n]: 1 for tokens, 0 for padding."""
        positions = (self.at + mask.cumsum(1) - 1).clamp_min(0)
        self.past, self.at = torch.cat((self.past, mask), 1), self.at + mask.sum(1, keepdim=True)
        self.read_at = torch.cat((self.read_at, positions), 1)
        options = {"position_ids": positions, "use_cache": True, cache_argument(module): self.cache}
        return module(**inputs, attention_mask=self.past, **options)

    def hidden(self, mask, **inputs):
        """The last hidden state of each sequence's last token, [B, 1, d]."""
        if self.every_logit:
            return self.forward(self.model, mask, output_hidden_states=True, **inputs).hidden_states[-1][:, -1:]
        return self.forward(body_of(self.model), mask, **inputs).last_hidden_state[:, -1:]

    def logits(self, mask, ids, count: int):
        """The logits of the last `count` tokens, [B, count, V]."""
        keep = {} if self.every_logit else {"logits_to_keep": count}
        return self.forward(self.model, mask, input_ids=ids, **keep).logits[:, -count:]

    def communicate(self) -> None:
        """All agents but the last take their turns."""
        for agent, turns in zip(self.system.agents[:-1], self.turns):
            if not any(turn.ids for turn in turns):
                continue
            first = self.past.shape[1]
            ids, mask = _left_pad([turn.ids for turn in turns], 0, self.system.device)
            h = self.hidden(mask, input_ids=ids)
            prompt_end = self.past.shape[1]
            steps = [turn.steps for turn in turns]
            if agent.passes is None:
                self.think(h, steps, agent.stop_change)
            elif any(steps):
                self.think_in_passes(h, steps, agent.passes, agent.grad_passes)
            if self.system.trace_content == "latent_only":
                sinks = self.past * (self.past.cumsum(1) <= self.system.sinks)
                self.past = self.past.clone()
                self.past[:, first:prompt_end] = 0
                self.past |= sinks
                if self.system.positions == "reindex":
                    self.reindex()

    def think(self, h, steps: list[int], stop_change: float | None) -> None:
        """Latent steps from the last hidden states h [B, 1, d]; who has taken its own is padded while others go on."""
        ragged = len(set(steps)) > 1 or stop_change is not None
        T = torch.tensor(steps, device=self.system.device)[:, None]
        for t in range(max(steps)):
            mask = (T > t).long() if ragged else torch.ones_like(self.at)
            new = self.hidden(mask, inputs_embeds=self.system.realign(h[:, 0])[:, None])
            if stop_change is not None:
                T = T * ((new - h).norm(dim=-1) >= stop_change * h.norm(dim=-1))
                if not (T > t + 1).any():
                    return
            h = torch.where(mask[..., None] > 0, new, h) if ragged else new

    def think_in_passes(self, h, steps: list[int], passes: int, grad_passes: int | None) -> None:
        """Jacobi iteration: every pass forwards all latent tokens; those of the pass before are masked out."""
        most, start, first = max(steps), self.at, self.past.shape[1]
        mask = (torch.arange(most, device=h.device) < torch.tensor(steps, device=h.device)[:, None]).long()
        states = h.expand(-1, most, -1)
        for j in range(passes):
            if j:
                self.past, self.at = self.past.clone(), start
                self.past[:, first:] = 0
                states = states.detach() if grad_passes == passes - j else states
            x = self.system.realign(torch.cat((h, states[:, :-1]), 1).flatten(0, 1)).unflatten(0, (-1, most))
            states = self.forward(body_of(self.model), mask, inputs_embeds=x).last_hidden_state

    def reindex(self) -> None:
        """Renumbers what each sequence sees 0, 1, 2, ...: every cached key is rotated on, by its model's own RoPE."""
        moved_to = (self.past.cumsum(1) - 1).clamp_min(0)
        rotary, attention = self.model.base_model.rotary_emb, type(self.model.base_model.layers[0].self_attn)
        rotate = inspect.getmodule(attention).apply_rotary_pos_emb
        for layer in self.cache.layers:
            by = F.pad(moved_to - self.read_at, (0, layer.keys.shape[2] - moved_to.shape[1]))  # behind them: unused columns
            cos, sin = (x / rotary.attention_scaling for x in rotary(layer.keys, by))
            layer.keys = rotate(layer.keys, layer.keys, cos, sin)[1]
        self.read_at, self.at = moved_to, self.past.sum(1, keepdim=True)


def plain_loss(system, questions, answers, every_logit: bool = False) -> torch.Tensor:
    """The loss of `MultiAgentSystem.forward` without a trace, a scalar.

    questions, answers: as there. every_logit: as LatentMAS does, compute the logits of all tokens. Positions are those of the
    unpadded sequences. Rows that trace_content="latent_only" drops stay in the cache and are masked out, and so do the steps
    that other sequences take longer.
    """
    targets = [system.answer_ids(a) for a in answers]
    plain = _Plain(system, questions, [len(t) for t in targets], every_logit=every_logit)
    plain.communicate()
    rows = [prompt + t for prompt, t in zip(plain.prompts, targets)]
    ids, mask = _left_pad(rows, 0, system.device)
    longest = max(map(len, targets))
    logits = plain.logits(mask, ids, longest + 1)[:, :-1]
    labels = torch.full((len(rows), longest), -100, device=system.device)
    for b, t in enumerate(targets):
        labels[b, longest - len(t) :] = torch.tensor(t, device=system.device)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=-100)


@torch.no_grad()
def plain_generate(system, questions, max_new_tokens: int, cache=None, every_logit: bool = False) -> list[list[int]]:
    """The greedy tokens of `MultiAgentSystem.generate_tokens` without a trace, [question][token].

    cache: a function (config, columns) -> an empty cache with room for them, by default a DynamicCache.
    """
    plain = _Plain(system, questions, [max_new_tokens] * len(questions), cache, every_logit)
    ends = end_tokens(plain.model, system.tokenizer)
    with evaluating(system):
        plain.communicate()
        ids, mask = _left_pad(plain.prompts, 0, system.device)
        tokens: list[list[int]] = [[] for _ in plain.prompts]
        going = [True] * len(tokens)
        while True:
            logits = plain.logits(mask, ids, 1)[:, -1]
            for b, token in enumerate(logits.argmax(-1).tolist()):
                if going[b]:
                    tokens[b].append(token)
                    going[b] = token not in ends and len(tokens[b]) < max_new_tokens
            if not any(going):
                return tokens
            ids = torch.tensor([[row[-1]] for row in tokens], device=system.device)
            mask = torch.tensor([[int(g)] for g in going], device=system.device)

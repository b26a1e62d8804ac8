"""Decoding on a trace: each step forwards one token per unfinished sequence, packed; finished sequences leave the batch."""

import secrets
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from diffmas.agents.meter import decoded, phase
from diffmas.models.forward import forward
from diffmas.models.patch import patch_of
from diffmas.trace import Trace

__all__ = ["Sampling", "decode"]

RESERVE = 512  # rows a sequence reserves at once for what it decodes


@dataclass
class Sampling:
    """How tokens are chosen, by the names of `MultiAgentSystem.generate`. Raises ValueError for values out of range."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: list[str]

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop: expected a list of non-empty strings, got {self.stop!r}")
        if self.seed is None:
            self.seed = secrets.randbits(31)

    def generator(self, question: int, sample: int) -> torch.Generator:
        """The random stream of one sample; with one each, a result does not depend on how questions are batched."""
        mixed = (self.seed * 1_000_003 + question) * 1_000_033 + sample
        return torch.Generator().manual_seed(mixed % (1 << 63))

    def choose(self, logits: Tensor, generators: list[torch.Generator]) -> list[int]:
        """One token id for each row of logits [n, V]."""
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        logits = logits.float()
        scores = TemperatureLogitsWarper(float(self.temperature))(None, logits)
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(None, scores)
        ladder = scores.double().softmax(-1).cumsum(-1)
        u = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators]).to(ladder.device)
        picked = torch.searchsorted(ladder, u[:, None] * ladder[:, -1:], right=True)[:, 0]
        return picked.clamp_max(logits.shape[-1] - 1).tolist()


def rows_ahead(sampling: Sampling, samples: int) -> int:
    """Trace rows that `decode` needs at first for the answers to one question."""
    return samples * (1 + min(RESERVE, sampling.max_new_tokens))


def end_tokens(model, tokenizer) -> set[int]:
    """The end-of-sequence ids of the model's generation config and of the tokenizer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    return {int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None}


@torch.no_grad()
def decode(system, trace: Trace, prompts: list[list[int]], sampling: Sampling, samples: int, first: int, progress: bool):
    """Decodes the last agent's answers; returns new token ids, [question][sample][token].

    trace: one sequence for each question, with the rows of the other agents. prompts: the last agent's prompt ids. first: the
    number of the first question, from which the samples' seeds follow. The samples of one question share the rows of the
    trace and of the prompt; so do neighbours of the same prompt on an empty trace.
    """
    patch, device = patch_of(system.model), system.device
    ends = end_tokens(patch.causal_lm, system.tokenizer)
    longest_stop = max((len(s) for s in sampling.stop), default=0)
    reserve = min(RESERVE, sampling.max_new_tokens)
    empty = not any(trace.lengths)
    differs = [not (empty and b and prompts[b] == prompts[b - 1]) for b in range(len(prompts))]
    lead = [b for b, new in enumerate(differs) if new]
    reads = [n - 1 for n in accumulate(differs) for _ in range(samples)]  # for each sequence, which of these it reads
    written = trace.select(lead)
    forward_pass = written.plan([len(prompts[b]) for b in lead], "prompt", reserve=reserve if len(reads) == len(lead) else 0)
    ids = torch.tensor([t for b in lead for t in prompts[b]], device=device)[None]
    keep = forward_pass.last_rows().tolist()
    with phase("prefill", written):
        logits = forward(patch, written, forward_pass, head=True, input_ids=ids, logits_to_keep=keep).logits[0]
    logits, trace = logits[reads], written.select(reads)
    active = list(range(len(reads)))  # for each sequence of the trace, its index in `tokens`
    generators = [sampling.generator(first + b, s) for b in range(len(prompts)) for s in range(samples)]
    tokens: list[list[int]] = [[] for _ in reads]

    def finished(i: int) -> bool:
        new = tokens[i]
        if new[-1] in ends or len(new) >= sampling.max_new_tokens:
            return True
        if not longest_stop:
            return False
        tail = system.tokenizer.decode(new[-2 * longest_stop - 8 :], skip_special_tokens=True)
        return any(s in tail for s in sampling.stop)

    with (
        phase("decode", written),
        tqdm(total=sampling.max_new_tokens, desc="decode", unit="step", disable=not progress, leave=False) as bar,
    ):
        while True:
            chosen = sampling.choose(logits, [generators[i] for i in active])
            decoded(len(tokens[active[0]]), logits, chosen)
            for i, token in zip(active, chosen):
                tokens[i].append(token)
            bar.update()
            bar.set_postfix(sequences=len(active), refresh=False)
            going = [j for j, i in enumerate(active) if not finished(i)]
            if not going:
                break
            if len(going) < len(active):
                trace, active = trace.select(going), [active[j] for j in going]
            left = sampling.max_new_tokens - len(tokens[active[0]])  # the same for all that are active
            forward_pass = trace.plan([1] * len(active), "text", reserve=min(RESERVE, left))
            ids = torch.tensor([tokens[i][-1] for i in active], device=device)[None]
            logits = forward(patch, trace, forward_pass, head=True, input_ids=ids).logits[0]
    rows = iter(tokens)
    return [[next(rows) for _ in range(samples)] for _ in prompts]

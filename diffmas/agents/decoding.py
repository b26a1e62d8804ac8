"""Decoding on a trace: each step forwards one token per unfinished sequence, packed; finished sequences leave the batch.

Beams are transformers' own search, on the trace.
"""

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm
from transformers import StoppingCriteria

from diffmas.agents.meter import decoded, phase
from diffmas.agents.sampling import Sampling
from diffmas.models.forward import forward
from diffmas.models.generate import left_padded, with_past
from diffmas.models.next_tokens import RESERVE, NextTokens
from diffmas.models.parts import causal_lm_of
from diffmas.models.patch import patch_of
from diffmas.trace import Trace
from diffmas.trace.cache import cache_argument

__all__ = ["Stops", "decode", "decode_behind", "rows_ahead", "text_before"]


def rows_ahead(sampling: Sampling) -> int:
    """Trace rows that `decode` needs at first for the answers to one question."""
    return sampling.samples * (1 + min(RESERVE, sampling.max_new_tokens))


# ---- where a text ends -----------------------------------------------------------------------------------------------


def text_before(tokenizer, ids: list[int], stop: list[str]) -> str:
    """The text of token ids, without special tokens, cut before the first of the strings `stop`, which may hold some."""
    first = len(ids), ""  # tokens before the first stop string with a special token, and text of the next one before it
    for s in _with_special(tokenizer, stop):
        whole = tokenizer.decode(ids)
        if (at := whole.find(s)) >= 0:
            length = lambda n: len(tokenizer.decode(ids[:n]))  # noqa: E731
            n = bisect_right(range(len(ids) + 1), at, key=length) - 1
            first = min(first, (n, whole[length(n) : at]))
    text = tokenizer.decode(ids[: first[0]], skip_special_tokens=True) + first[1]
    for s in stop:
        text = text.split(s, 1)[0]
    return text


def _with_special(tokenizer, stop: list[str]) -> list[str]:
    return [s for s in stop if any(token in s for token in tokenizer.all_special_tokens)]


class Stops:
    """Whether the end of new token ids has one of these strings."""

    def __init__(self, tokenizer, stop: list[str]):
        self.tokenizer, self.stop, self.special = tokenizer, stop, _with_special(tokenizer, stop)
        self.reach = 2 * max(map(len, stop), default=0) + 8  # tokens

    def __call__(self, ids: list[int]) -> bool:
        if not self.stop:
            return False
        tail = ids[-self.reach :]
        text = self.tokenizer.decode(tail, skip_special_tokens=True)
        if any(s in text for s in self.stop):
            return True
        return bool(self.special) and any(s in self.tokenizer.decode(tail) for s in self.special)


class Rules:
    """The rules for some sequences, which are one question's, or all of them where no rule looks at a text.

    members: the sequences' indices. text [members, columns]: what they have been through.
    """

    def __init__(self, sampling: Sampling, system, members: list[int], text: Tensor):
        """text [S]: before the answer."""
        self.process, self.is_done = sampling.prepared(system, text)
        self.seen = not sampling.together
        self.members, self.text = members, (text.to(system.device) if self.seen else text).expand(len(members), -1)

    def scores(self, logits: Tensor) -> Tensor:
        return self.process(self.text, logits.float()) if self.process else logits

    def append(self, tokens: list[int], scores: Tensor) -> list[bool]:
        """The next token of each sequence; returns which of them end with it."""
        new = torch.tensor(tokens, device=self.text.device)[:, None]
        if self.seen:
            self.text = torch.cat((self.text, new), dim=1)
        else:  # the end is by the newest token and the number of columns: no text is kept, and no device waited for
            self.text = new.expand(-1, self.text.shape[1] + 1)
        return self.is_done(self.text, scores).tolist()

    def keep(self, going: list[bool]) -> None:
        self.members = [i for i, goes in zip(self.members, going) if goes]
        self.text = self.text[torch.tensor(going, device=self.text.device)]


def _rules(system, sampling: Sampling, trace: Trace, prompts: list[list[int]]) -> list[Rules]:
    """In the order of the sequences, the samples of a question side by side."""
    n = sampling.samples
    if sampling.together:
        return [Rules(sampling, system, list(range(n * len(prompts))), torch.zeros(1, dtype=torch.long))]
    texts = with_past(trace, [torch.tensor(prompt, dtype=torch.long) for prompt in prompts])
    return [Rules(sampling, system, list(range(n * b, n * b + n)), text) for b, text in enumerate(texts)]


# ---- the loop --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode(
    system, trace: Trace, prompts: list[list[int]], sampling: Sampling, first: int, progress: bool,
    on_token: Callable[[int, int, int, bool], bool | None] | None = None,
):  # fmt: skip
    """Decodes the last agent's answers; returns new token ids, [question][sample][token].

    trace: one sequence for each question, with the rows of the other agents. prompts: the last agent's prompt ids. first: the
    number of the first question, from which the samples' seeds follow. The samples of one question share the rows of the
    trace and of the prompt; so do neighbours of the same prompt on an empty trace. on_token: see
    `MultiAgentSystem.generate_tokens`.
    """
    if sampling.beams:
        if on_token is not None:
            raise ValueError("on_token: expected None with num_beams, whose tokens are not final before their end")
        return _beam_search(system, trace, prompts, sampling, first)
    patch, samples = patch_of(system.model), sampling.samples
    reserve = min(RESERVE, sampling.max_new_tokens)
    empty = not any(trace.lengths)
    differs = [not (empty and b and prompts[b] == prompts[b - 1]) for b in range(len(prompts))]
    lead = [b for b, new in enumerate(differs) if new]
    reads = [n - 1 for n in accumulate(differs) for _ in range(samples)]  # for each sequence, which of these it reads
    rules = _rules(system, sampling, trace, prompts)
    written = trace.select(lead)
    forward_pass = written.plan([len(prompts[b]) for b in lead], "prompt", reserve=reserve if len(reads) == len(lead) else 0)
    ids = torch.tensor([t for b in lead for t in prompts[b]], device=system.device)[None]
    keep = forward_pass.last_rows().tolist()
    with phase("prefill", written):
        logits = forward(patch, written, forward_pass, head=True, input_ids=ids, logits_to_keep=keep).logits[0]
    of = [(first + b, sample) for b in range(len(prompts)) for sample in range(samples)]
    with (
        phase("decode", written),
        tqdm(total=sampling.max_new_tokens, desc="decode", unit="step", disable=not progress, leave=False) as bar,
    ):
        rows = iter(_tokens(system, written.select(reads), logits[reads], sampling, of, rules, decoded, on_token, bar))
    return [[next(rows) for _ in range(samples)] for _ in prompts]


def decode_behind(system, trace: Trace, logits: Tensor, sampling: Sampling) -> list[list[int]]:
    """The token ids that go on behind each sequence of a trace, which has them then, in part. logits [B, V]: of their first
    ones. sampling: of B questions, without beams, one sample each."""
    B = trace.batch_size
    rules = _rules(system, sampling, trace, [[]] * B)
    return _tokens(system, trace, logits, sampling, [(b, 0) for b in range(B)], rules)


def _tokens(
    system, trace: Trace, logits: Tensor, sampling: Sampling, of: list[tuple[int, int]], rules: list[Rules],
    seen: Callable | None = None, on_token: Callable | None = None, bar: tqdm | None = None,
) -> list[list[int]]:  # fmt: skip
    """For each sequence of the trace its token ids. logits [n, V]: of the first ones. of: the numbers of each one's question
    and sample. seen: told how manieth tokens they are, their logits and ids. bar: of progress."""
    active = list(range(len(of)))  # for each sequence of the trace, its index in `tokens`
    generators, limits = [sampling.generator(*which) for which in of], [sampling.limit(question) for question, _ in of]
    tokens: list[list[int]] = [[] for _ in of]
    next_tokens, stops = NextTokens(patch_of(system.model), system.device), Stops(system.tokenizer, sampling.stop)
    while True:
        parts = logits.split([len(some.members) for some in rules])
        scores = [some.scores(part) for some, part in zip(rules, parts)]
        chosen = sampling.choose(torch.cat(scores), [generators[i] for i in active])
        if seen is not None:
            seen(len(tokens[active[0]]), logits, chosen)
        for i, token in zip(active, chosen):
            tokens[i].append(token)
        if bar is not None:
            bar.update()
            bar.set_postfix(sequences=len(active), refresh=False)
        for some, part in zip(rules, scores):
            done = some.append([tokens[i][-1] for i in some.members], part)
            done = [d or len(tokens[i]) >= limits[i] or stops(tokens[i]) for i, d in zip(some.members, done)]
            if on_token is not None:
                done = [on_token(*of[i], tokens[i][-1], d) or d for i, d in zip(some.members, done)]
            if any(done):
                some.keep([not d for d in done])
        rules = [some for some in rules if some.members]
        going = [i for some in rules for i in some.members]
        if not going:
            return tokens
        if len(going) < len(active):
            place = {i: j for j, i in enumerate(active)}
            trace, active = trace.select([place[i] for i in going]), going
        left = max(limits[i] for i in active) - len(tokens[active[0]])  # all that are active have as many
        logits = next_tokens(trace, torch.tensor([tokens[i][-1] for i in active]), left)


def _beam_search(system, trace: Trace, prompts: list[list[int]], sampling: Sampling, first: int):
    """`decode` with transformers' beam search. Questions go one by one where a rule would see their padding, or for a random
    stream of each."""
    lm, device, arguments = causal_lm_of(system.model), system.device, dict(sampling.arguments)
    together, tokens = sampling.together and not arguments["do_sample"], []
    for batch in [list(range(len(prompts)))] if together else [[b] for b in range(len(prompts))]:
        ids, mask = left_padded([torch.tensor(prompts[b]) for b in batch], arguments["pad_token_id"])
        arguments[cache_argument(lm)] = trace.select(batch)
        if sampling.stop:
            stops = TextStops(Stops(system.tokenizer, sampling.stop), len(ids[0]))
            arguments["stopping_criteria"] = [*(sampling.arguments.get("stopping_criteria") or []), stops]
        with phase("decode"), Drawn(sampling.generator(first + batch[0], 0), device):
            out = lm.generate(ids.to(device), attention_mask=mask.to(device), **arguments)[:, ids.shape[1] :].tolist()
        rows = iter(_without_filling(row, arguments) for row in out)
        tokens += [[next(rows) for _ in range(sampling.samples)] for _ in batch]
    return tokens


class Drawn(TorchFunctionMode):
    """Inside, this thread's `torch.multinomial` draws from a generator like the given one, on a device: transformers' beams
    would draw from the one that the whole process shares."""

    def __init__(self, like: torch.Generator, device: torch.device):
        super().__init__()
        self.generator = torch.Generator(device).manual_seed(like.initial_seed())

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.multinomial, Tensor.multinomial):
            kwargs = {**kwargs, "generator": self.generator}
        return func(*args, **kwargs)


class TextStops(StoppingCriteria):
    """`Stops`, for transformers. before: columns ahead of the new text."""

    def __init__(self, stops: Stops, before: int):
        self.stops, self.before = stops, before

    def __call__(self, input_ids, scores, **_):
        rows = input_ids[:, self.before :].tolist()
        return torch.tensor([self.stops(row) for row in rows], device=input_ids.device)


def _without_filling(row: list[int], arguments: dict) -> list[int]:
    ends, pad = arguments["eos_token_id"], arguments["pad_token_id"]
    ends = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
    end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    while end > 1 and row[end - 1] == pad and pad not in ends:
        end -= 1
    return row[:end]

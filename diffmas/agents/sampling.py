"""Decoding on a trace: each step forwards one token per unfinished sequence, packed; finished sequences leave the batch.

What is chosen from is transformers' to say: its generate builds the logits processors and stopping criteria, and hands them to
`decode` as its decoding loop. Beams are transformers' own search, on the trace.
"""

import secrets
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)  # fmt: skip

from diffmas.agents.meter import decoded, phase
from diffmas.models.forward import forward
from diffmas.models.generate import left_padded, options_of, with_past
from diffmas.models.parts import causal_lm_of
from diffmas.models.patch import patch_of
from diffmas.trace import Trace
from diffmas.trace.cache import cache_argument

__all__ = ["Sampling", "decode", "end_tokens", "rows_ahead", "text_before"]

RESERVE = 512  # rows a sequence reserves at once for what it decodes

# transformers' options that are a processor, a criterion or of its beam search; its other ones do nothing in a loop of ours.
OPTIONS = {
    "bad_words_ids", "begin_suppress_tokens", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty", "eos_token_id", "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty",
    "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "logits_processor", "max_time", "min_new_tokens", "min_p",
    "no_repeat_ngram_size", "num_beams", "pad_token_id", "prefix_allowed_tokens_fn", "remove_invalid_values",
    "renormalize_logits", "repetition_penalty", "sequence_bias", "stopping_criteria", "suppress_tokens", "temperature", "top_h",
    "top_k", "top_p", "typical_p",
}  # fmt: skip
OURS = ("max_new_tokens", "num_return_sequences", "stop_strings")  # and by other names
# Of these, none looks at a text: all sequences may go through one call.
BLIND = (
    TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper, TypicalLogitsWarper,
    EpsilonLogitsWarper, EtaLogitsWarper, LogitNormalization, InfNanRemoveLogitsProcessor, SuppressTokensLogitsProcessor,
    MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria,
)  # fmt: skip
NOTHING = ("bos_token_id", "decoder_start_token_id", "transformers_version")  # of a config, where there is a prompt


@dataclass
class Sampling:
    """How answers are decoded. seed: of all random streams. stop: strings that end an answer. samples: answers to a question.
    arguments: of transformers' generate. together: whether no rule looks at the texts before."""

    max_new_tokens: int
    seed: int
    stop: list[str]
    samples: int
    arguments: dict
    together: bool = True

    @classmethod
    def of(
        cls, system, max_new_tokens: int | None = None, temperature: float | None = None, top_p: float | None = None,
        seed: int | None = None, stop: list[str] | None = None, samples: int | None = None, **options,
    ):  # fmt: skip
        """By the names of `MultiAgentSystem.generate`. Raises ValueError naming what is out of range, unknown or not for us."""
        lm, config = causal_lm_of(system.model), options.pop("generation_config", None)
        given = {**({} if config is None else _said(config)), **options}
        _refuse_others(given)
        for name, short, value in (("num_return_sequences", "samples", samples), ("stop_strings", "stop", stop)):
            if value is not None and name in options:
                raise ValueError(f"{name}: expected it under one name, got {short} too")
        own = options_of(lm, given)  # of the config passed or of the model's, where no argument says it
        stop_strings = given.pop("stop_strings", None)
        stop = stop if stop is not None else [stop_strings] if isinstance(stop_strings, str) else stop_strings or []
        samples = own("num_return_sequences") or 1 if samples is None else samples
        max_new_tokens = own("max_new_tokens") or 256 if max_new_tokens is None else max_new_tokens
        for name in OURS:
            given.pop(name, None)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        if samples < 1:
            raise ValueError(f"samples: expected at least 1, got {samples}")
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop: expected a list of non-empty strings, got {stop!r}")
        chosen = _choice(own, given, temperature, top_p, config is not None)
        ends = given.get("eos_token_id", sorted(end_tokens(lm, system.tokenizer)) or None)
        pad = own("pad_token_id") if own("pad_token_id") is not None else system.tokenizer.pad_token_id
        if pad is None:
            pad = 0 if ends is None else int(torch.as_tensor(ends).flatten()[0])
        given |= {**chosen, "max_new_tokens": max_new_tokens, "eos_token_id": ends, "pad_token_id": pad}
        given["num_beams"] = own("num_beams") or 1
        given["num_return_sequences"] = samples if given["num_beams"] > 1 else 1
        sampling = cls(max_new_tokens, secrets.randbits(31) if seed is None else seed, list(stop), samples, given)
        rules = sampling.prepared(system, torch.zeros(1, dtype=torch.long))  # do all values fit?
        sampling.together = all(type(rule) in BLIND for some in rules for rule in some)
        return sampling

    @property
    def beams(self) -> bool:
        return self.arguments["num_beams"] > 1

    def prepared(self, system, text: Tensor):
        """transformers' logits processors and stopping criteria for what goes on behind `text` [S]."""
        lm, ids = causal_lm_of(system.model), text[None].to(system.device)
        return type(lm).generate(
            lm, ids, attention_mask=torch.ones_like(ids), custom_generate=_what_is_prepared, **self.arguments
        )

    def generator(self, question: int, sample: int) -> torch.Generator:
        """The random stream of one sample; with one each, a result does not depend on how questions are batched."""
        mixed = (self.seed * 1_000_003 + question) * 1_000_033 + sample
        return torch.Generator().manual_seed(mixed % (1 << 63))

    def choose(self, scores: Tensor, generators: list[torch.Generator]) -> list[int]:
        """One token id for each row of processed logits [n, V]."""
        if not self.arguments["do_sample"]:
            return scores.argmax(-1).tolist()
        ladder = scores.double().softmax(-1).cumsum(-1)
        u = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators]).to(ladder.device)
        picked = torch.searchsorted(ladder, u[:, None] * ladder[:, -1:], right=True)[:, 0]
        return picked.clamp_max(scores.shape[-1] - 1).tolist()


def _what_is_prepared(model, input_ids, logits_processor, stopping_criteria, generation_config, **_):
    return logits_processor, stopping_criteria


def _said(config: GenerationConfig) -> dict:
    """What a config says that transformers does not say by itself."""
    if not isinstance(config, GenerationConfig):
        raise ValueError(f"generation_config: expected a GenerationConfig, got {type(config).__name__}")
    return {k: v for k, v in config.to_diff_dict().items() if k not in NOTHING and v is not None}


def _refuse_others(given: dict) -> None:
    for name in ("max_length", "min_length"):
        if given.get(name):
            raise ValueError(f"{name}: expected {name[:3]}_new_tokens, since prompts differ in length, got {given[name]}")
    if unknown := sorted(given.keys() - OPTIONS - set(OURS) - {"max_length", "min_length"}):
        raise ValueError(
            f"options: expected names of transformers' logits processors, stopping criteria and beam search, got {unknown[0]!r}"
        )


def _choice(own, given: dict, temperature, top_p, configured: bool) -> dict:
    """do_sample, temperature, top_p and top_k. What nobody says is not transformers' default but this project's."""
    if temperature is not None and temperature < 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    plain = GenerationConfig()

    def said(name: str, value, otherwise):
        value = own(name) if value is None else value
        return otherwise if value is None or (name not in given and value == getattr(plain, name)) else value

    if temperature is not None or "do_sample" in given:
        do_sample = given["do_sample"] if temperature is None else temperature > 0
    else:  # a config that does not say so does not sample, and neither do beams
        do_sample = bool(own("do_sample")) or not (configured or (own("num_beams") or 1) > 1)
    if not do_sample:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {
        "do_sample": True, "temperature": float(said("temperature", temperature, 0.6)),
        "top_p": top_p if top_p is not None else said("top_p", None, 0.95), "top_k": said("top_k", None, 0),
    }  # fmt: skip


def rows_ahead(sampling: Sampling) -> int:
    """Trace rows that `decode` needs at first for the answers to one question."""
    return sampling.samples * (1 + min(RESERVE, sampling.max_new_tokens))


def end_tokens(model, tokenizer) -> set[int]:
    """The end-of-sequence ids of the model's generation config and of the tokenizer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    return {int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None}


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


def _stops(tokenizer, ids: list[int], stop: list[str]) -> bool:
    """Whether the end of new token ids has one of these strings."""
    tail = ids[-2 * max(map(len, stop)) - 8 :]
    text = tokenizer.decode(tail, skip_special_tokens=True)
    return any(s in text for s in stop) or any(s in tokenizer.decode(tail) for s in _with_special(tokenizer, stop))


class Rules:
    """The rules for some sequences, which are one question's, or all of them where no rule looks at a text.

    members: the sequences' indices. text [members, columns]: what they have been through.
    """

    def __init__(self, sampling: Sampling, system, members: list[int], text: Tensor):
        """text [S]: before the answer."""
        self.process, self.is_done = sampling.prepared(system, text)
        self.members, self.text = members, text.to(system.device).expand(len(members), -1)

    def scores(self, logits: Tensor) -> Tensor:
        return self.process(self.text, logits.float()) if self.process else logits

    def append(self, tokens: list[int], scores: Tensor) -> list[bool]:
        """The next token of each sequence; returns which of them end with it."""
        self.text = torch.cat((self.text, torch.tensor(tokens, device=self.text.device)[:, None]), dim=1)
        return self.is_done(self.text, scores).tolist()

    def keep(self, going: list[bool]) -> None:
        self.members = [i for i, goes in zip(self.members, going) if goes]
        self.text = self.text[torch.tensor(going, device=self.text.device)]


def _rules(system, sampling: Sampling, trace: Trace, prompts: list[list[int]]) -> list[Rules]:
    """In the order of the sequences, the samples of a question side by side."""
    n = sampling.samples
    if sampling.together:
        return [Rules(sampling, system, list(range(n * len(prompts))), torch.zeros(1, dtype=torch.long))]
    texts = with_past(trace, [torch.tensor(prompt) for prompt in prompts])
    return [Rules(sampling, system, list(range(n * b, n * b + n)), text) for b, text in enumerate(texts)]


# ---- the loop --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode(system, trace: Trace, prompts: list[list[int]], sampling: Sampling, first: int, progress: bool):
    """Decodes the last agent's answers; returns new token ids, [question][sample][token].

    trace: one sequence for each question, with the rows of the other agents. prompts: the last agent's prompt ids. first: the
    number of the first question, from which the samples' seeds follow. The samples of one question share the rows of the
    trace and of the prompt; so do neighbours of the same prompt on an empty trace.
    """
    if sampling.beams:
        return _beam_search(system, trace, prompts, sampling, first)
    patch, device, samples = patch_of(system.model), system.device, sampling.samples
    reserve = min(RESERVE, sampling.max_new_tokens)
    empty = not any(trace.lengths)
    differs = [not (empty and b and prompts[b] == prompts[b - 1]) for b in range(len(prompts))]
    lead = [b for b, new in enumerate(differs) if new]
    reads = [n - 1 for n in accumulate(differs) for _ in range(samples)]  # for each sequence, which of these it reads
    rules = _rules(system, sampling, trace, prompts)
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
    with (
        phase("decode", written),
        tqdm(total=sampling.max_new_tokens, desc="decode", unit="step", disable=not progress, leave=False) as bar,
    ):
        while True:
            parts = logits.split([len(some.members) for some in rules])
            scores = [some.scores(part) for some, part in zip(rules, parts)]
            chosen = sampling.choose(torch.cat(scores), [generators[i] for i in active])
            decoded(len(tokens[active[0]]), logits, chosen)
            for i, token in zip(active, chosen):
                tokens[i].append(token)
            bar.update()
            bar.set_postfix(sequences=len(active), refresh=False)
            for some, part in zip(rules, scores):
                done = some.append([tokens[i][-1] for i in some.members], part)
                if sampling.stop:
                    done = [d or _stops(system.tokenizer, tokens[i], sampling.stop) for i, d in zip(some.members, done)]
                if any(done):
                    some.keep([not d for d in done])
            rules = [some for some in rules if some.members]
            going = [i for some in rules for i in some.members]
            if not going:
                break
            if len(going) < len(active):
                place = {i: j for j, i in enumerate(active)}
                trace, active = trace.select([place[i] for i in going]), going
            left = sampling.max_new_tokens - len(tokens[active[0]])  # the same for all that are active
            forward_pass = trace.plan([1] * len(active), "text", reserve=min(RESERVE, left))
            ids = torch.tensor([tokens[i][-1] for i in active], device=device)[None]
            logits = forward(patch, trace, forward_pass, head=True, input_ids=ids).logits[0]
    rows = iter(tokens)
    return [[next(rows) for _ in range(samples)] for _ in prompts]


def _beam_search(system, trace: Trace, prompts: list[list[int]], sampling: Sampling, first: int):
    """`decode` with transformers' beam search. Questions go one by one where a rule would see their padding, or for a random
    stream of each."""
    lm, device, arguments = causal_lm_of(system.model), system.device, dict(sampling.arguments)
    together, tokens = sampling.together and not arguments["do_sample"], []
    for batch in [list(range(len(prompts)))] if together else [[b] for b in range(len(prompts))]:
        ids, mask = left_padded([torch.tensor(prompts[b]) for b in batch], arguments["pad_token_id"])
        arguments[cache_argument(lm)] = trace.select(batch)
        if sampling.stop:
            stops = TextStops(system.tokenizer, sampling.stop, len(ids[0]))
            arguments["stopping_criteria"] = [*(sampling.arguments.get("stopping_criteria") or []), stops]
        with phase("decode"), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(sampling.generator(first + batch[0], 0).initial_seed())
            out = lm.generate(ids.to(device), attention_mask=mask.to(device), **arguments)[:, ids.shape[1] :].tolist()
        rows = iter(_without_filling(row, arguments) for row in out)
        tokens += [[next(rows) for _ in range(sampling.samples)] for _ in batch]
    return tokens


class TextStops(StoppingCriteria):
    """`_stops`, for transformers. before: columns ahead of the new text."""

    def __init__(self, tokenizer, stop: list[str], before: int):
        self.tokenizer, self.stop, self.before = tokenizer, stop, before

    def __call__(self, input_ids, scores, **_):
        rows = input_ids[:, self.before :].tolist()
        return torch.tensor([_stops(self.tokenizer, row, self.stop) for row in rows], device=input_ids.device)


def _without_filling(row: list[int], arguments: dict) -> list[int]:
    ends, pad = arguments["eos_token_id"], arguments["pad_token_id"]
    ends = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
    end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    while end > 1 and row[end - 1] == pad and pad not in ends:
        end -= 1
    return row[:end]

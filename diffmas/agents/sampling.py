"""How answers are decoded: what `MultiAgentSystem.generate` was asked for, and what nobody said.

What is chosen from is transformers' to say: its generate builds the logits processors and stopping criteria from its own
options, and hands them to the loop of `diffmas.agents.decoding`.
"""

import secrets
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig
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

from diffmas.models.generate import options_of
from diffmas.models.parts import causal_lm_of

__all__ = ["Sampling", "end_tokens", "stream"]

# transformers' options that are a processor, a criterion or of its beam search; its other ones do nothing in a loop of ours.
OPTIONS = {
    "bad_words_ids", "begin_suppress_tokens", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty", "eos_token_id", "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty",
    "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "logits_processor", "max_time", "min_new_tokens", "min_p",
    "no_repeat_ngram_size", "num_beams", "pad_token_id", "prefix_allowed_tokens_fn", "remove_invalid_values",
    "renormalize_logits", "repetition_penalty", "sequence_bias", "stopping_criteria", "suppress_tokens", "temperature", "top_h",
    "top_k", "top_p", "typical_p",
}  # fmt: skip
OURS = {"max_new_tokens", "num_return_sequences", "stop_strings"}  # and by other names
# What transformers takes where a config leaves it out, of its options that are not off then.
DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "length_penalty": 1.0, "early_stopping": False}
# Of these, none looks at a text: all sequences may go through one call.
BLIND = (
    TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper, TypicalLogitsWarper,
    EpsilonLogitsWarper, EtaLogitsWarper, LogitNormalization, InfNanRemoveLogitsProcessor, SuppressTokensLogitsProcessor,
    MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria,
)  # fmt: skip
NOTHING = ("bos_token_id", "decoder_start_token_id", "transformers_version")  # of a config, where there is a prompt


@dataclass
class Sampling:
    """How answers are decoded. max_new_tokens: the most that a question has. limits: each question's own, if they differ. seed:
    of all random streams, or each question's own. stop: strings that end an answer. samples: answers to a question. arguments:
    of transformers' generate. together: whether no rule looks at the texts before."""

    max_new_tokens: int
    seed: int | list[int]
    stop: list[str]
    samples: int
    arguments: dict
    limits: list[int] | None = None
    together: bool = True

    @classmethod
    def of(
        cls, system, max_new_tokens: int | list[int] | None = None, temperature: float | None = None,
        top_p: float | None = None, seed: int | list[int] | None = None, stop: list[str] | None = None,
        samples: int | None = None, **options,
    ):  # fmt: skip
        """By the names of `MultiAgentSystem.generate`. Raises ValueError naming what is out of range, unknown or not for us."""
        lm, config = causal_lm_of(system.model), options.pop("generation_config", None)
        _refuse_others({**({} if config is None else _said(config)), **options})
        given = {**({} if config is None else _taken(config)), **options}
        for name, short, value in (("num_return_sequences", "samples", samples), ("stop_strings", "stop", stop)):
            if value is not None and name in options:
                raise ValueError(f"{name}: expected it under one name, got {short} too")
        own = options_of(lm, given)  # of the model's config, where neither argument nor a config passed says it
        stop_strings = own("stop_strings")
        stop = stop if stop is not None else [stop_strings] if isinstance(stop_strings, str) else stop_strings or []
        samples = own("num_return_sequences") or 1 if samples is None else samples
        max_new_tokens = own("max_new_tokens") or 256 if max_new_tokens is None else max_new_tokens
        given = {name: x for name, x in given.items() if name not in OURS}
        limits = max_new_tokens if isinstance(max_new_tokens, list) else None
        each = [max_new_tokens] if limits is None else limits
        if min(each, default=0) < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        max_new_tokens = max(each)
        if samples < 1:
            raise ValueError(f"samples: expected at least 1, got {samples}")
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop: expected a list of non-empty strings, got {stop!r}")
        chosen = _choice(own, given, temperature, top_p, bool(lm.generation_config.do_sample))
        ends = given.get("eos_token_id", sorted(end_tokens(lm, system.tokenizer)) or None)
        pad = own("pad_token_id") if own("pad_token_id") is not None else system.tokenizer.pad_token_id
        if pad is None:
            pad = 0 if ends is None else int(torch.as_tensor(ends).flatten()[0])
        given |= {**chosen, "max_new_tokens": max_new_tokens, "eos_token_id": ends, "pad_token_id": pad, "stop_strings": None}
        given["num_beams"] = own("num_beams") or 1
        given["num_return_sequences"] = samples if given["num_beams"] > 1 else 1
        if limits is not None and given["num_beams"] > 1:
            raise ValueError(f"max_new_tokens: expected one number for all questions with num_beams, got {limits}")
        sampling = cls(max_new_tokens, secrets.randbits(31) if seed is None else seed, list(stop), samples, given, limits)
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

    def rules(self, system) -> list:
        """transformers' logits processors, in their order."""
        return list(self.prepared(system, torch.zeros(1, dtype=torch.long))[0])

    def check_count(self, questions: int) -> None:
        """Raises ValueError for a list that has not one entry for each question."""
        for name, given in (("max_new_tokens", self.limits), ("seed", self.seed)):
            if isinstance(given, list) and len(given) != questions:
                raise ValueError(f"{name}: expected one for each of {questions} questions, got {len(given)}")

    def limit(self, question: int) -> int:
        """The most tokens of an answer to this question."""
        return self.max_new_tokens if self.limits is None else self.limits[question]

    def seed_of(self, question: int) -> int:
        """That from which a question's random streams follow. A question with a seed of its own is answered as if it were
        alone."""
        seed, question = (self.seed[question], 0) if isinstance(self.seed, list) else (self.seed, question)
        return stream(seed, question)

    def generator(self, question: int, sample: int) -> torch.Generator:
        """The random stream of one sample; with one each, a result does not depend on how questions are batched."""
        return torch.Generator().manual_seed((self.seed_of(question) * 1_000_033 + sample) % (1 << 63))

    def choose(self, scores: Tensor, generators: list[torch.Generator]) -> list[int]:
        """One token id for each row of processed logits [n, V]."""
        if not self.arguments["do_sample"]:
            return scores.argmax(-1).tolist()
        ladder = scores.double().softmax(-1).cumsum(-1)
        u = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators]).to(ladder.device)
        picked = torch.searchsorted(ladder, u[:, None] * ladder[:, -1:], right=True)[:, 0]
        return picked.clamp_max(scores.shape[-1] - 1).tolist()


def stream(seed: int, question: int = 0) -> int:
    """From which all random streams of a question follow. question: of those that share the seed."""
    return seed * 1_000_003 + question


def _what_is_prepared(model, input_ids, logits_processor, stopping_criteria, generation_config, **_):
    return logits_processor, stopping_criteria


def _said(config: GenerationConfig) -> dict:
    """What a config says that transformers does not say by itself, as far as it tells the two apart: before version 5 a value
    that is its default looks like one that was left out."""
    if not isinstance(config, GenerationConfig):
        raise ValueError(f"generation_config: expected a GenerationConfig, got {type(config).__name__}")
    return {k: v for k, v in config.to_diff_dict().items() if k not in NOTHING and v is not None}


def _taken(config: GenerationConfig) -> dict:
    """A config as it is, in the place of the model's own: what it leaves out is off, or transformers' default."""
    taken = {name: x for name, x in vars(config).items() if name in OPTIONS | OURS}
    taken = {name: x for name, x in taken.items() if x is not None or not name.endswith("_token_id")}
    return taken | {name: x for name, x in DEFAULTS.items() if taken.get(name) is None}


def _refuse_others(given: dict) -> None:
    for name in ("max_length", "min_length"):
        if given.get(name):
            raise ValueError(f"{name}: expected {name[:3]}_new_tokens, since prompts differ in length, got {given[name]}")
    if unknown := sorted(given.keys() - OPTIONS - OURS - {"max_length", "min_length"}):
        raise ValueError(
            f"options: expected names of transformers' logits processors, stopping criteria and beam search, got {unknown[0]!r}"
        )


def _choice(own, given: dict, temperature, top_p, model_samples: bool) -> dict:
    """do_sample, temperature, top_p and top_k. What nobody says is not transformers' default but this project's, unless the
    model's own config samples: then it is taken as it is. given: also what was taken from a config that was passed."""
    if temperature is not None and temperature < 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")

    def said(name: str, otherwise):
        value = own(name)
        if name in given:
            return otherwise if value is None else value
        if value is None or value == DEFAULTS[name]:  # before version 5, transformers has it where nobody said it
            return DEFAULTS[name] if model_samples else otherwise
        return value

    if temperature is not None or "do_sample" in given:
        do_sample = bool(given["do_sample"]) if temperature is None else temperature > 0
    else:  # beams do not sample unless somebody says so
        do_sample = bool(own("do_sample")) or (own("num_beams") or 1) == 1
    if not do_sample:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {
        "do_sample": True, "temperature": float(said("temperature", 0.6) if temperature is None else temperature),
        "top_p": said("top_p", 0.95) if top_p is None else top_p, "top_k": said("top_k", 0),
    }  # fmt: skip


def end_tokens(model, tokenizer) -> set[int]:
    """The end-of-sequence ids of the model's generation config and of the tokenizer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    return {int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None}

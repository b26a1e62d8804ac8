"""transformers' generate on a trace.

transformers counts the past as part of its input. It is given the token ids that the trace knows, so that processors, n-gram
rules and assistants see the text there is; rows without a token, such as latent steps, have no column in it.
"""

import copy
import functools
import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation import MaxLengthCriteria, MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer

from diffmas.models.forward import new_token_mask
from diffmas.models.next_tokens import RESERVE, NextTokens
from diffmas.trace import Trace
from diffmas.trace.cache import cache_name

__all__ = ["Generation", "generate", "left_padded", "options_of", "with_past"]


@dataclass
class Generation:
    """The state of a generate in progress, for the forwards on its trace.

    width: columns of transformers' input. first: the column of each sequence's first new token. before: each sequence's rows
    when it began. longest: tokens that a sequence may generate, 0 where that is not known. reserve: rows for them.
    """

    width: int = 0
    longest: int = 0
    first: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    reserve: int = 0

    def columns(self, lengths: list[int]) -> int:
        """How many columns transformers takes a trace of sequences of these lengths to hold: those before the first new token,
        and what was written since."""
        if not self.first:
            return max(lengths)
        earliest = self.first.index(min(self.first))
        return self.first[earliest] + lengths[earliest] - self.before[earliest]

    def left(self, lengths: list[int]) -> int:
        """How many tokens are still to be written, those of the next forward included; 0 where it is the prompt's, or where
        that is not known. All that are chosen are written but the last."""
        written = self.columns(lengths) - self.width
        return max(self.longest - 1 - written, 0) if written >= 0 else 0

    def next_forward(self, x: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor | None, str, int]:
        """The new columns of transformers' input x [B, S, ...], which of them are tokens (None: all), their kind, and how many
        tokens will follow."""
        at = self.columns(lengths)
        if at >= self.width:
            return x, None, "text", 0
        if x.shape[1] >= self.width:
            x = x[:, at:]  # assisted decoding begins with the whole input, the past included
        valid = torch.arange(at, at + x.shape[1])[None] >= torch.tensor(self.first)[:, None]
        return x, None if valid.all() else valid, "prompt", self.reserve


class Watched(StoppingCriteria):
    """The caller's criteria, and how many columns each sequence had when it first met one."""

    def __init__(self, criteria):
        self.criteria, self.ends = StoppingCriteriaList(criteria), None

    def __call__(self, input_ids, scores, **kwargs):
        done = self.criteria(input_ids, scores, **kwargs)
        if self.ends is None:
            self.ends = torch.full_like(done, torch.iinfo(torch.long).max, dtype=torch.long)
        self.ends = self.ends.minimum(torch.where(done, input_ids.shape[1], self.ends))
        return done


class OnlyNew(BaseStreamer):
    """A streamer that is shown the prompt as it was passed, without the past. prompt: [B, S], or None if there are no ids."""

    def __init__(self, streamer, prompt: Tensor | None):
        self.streamer, self.prompt, self.begun = streamer, prompt, False

    def put(self, value):
        self.streamer.put(value if self.begun or self.prompt is None else self.prompt.cpu())
        self.begun = True

    def end(self):
        self.streamer.end()


# What transformers' decoding passes to a forward, beside the cache; all that says where a token goes, the trace knows.
ALWAYS = {"input_ids", "attention_mask", "position_ids", "cache_position", "use_cache", "logits_to_keep", "return_dict"}


def with_replays(lm: nn.Module, device: torch.device) -> nn.Module:
    """The causal LM as one generate without beams calls it: of the forwards on a trace, those of a token a sequence may be
    replays of a CUDA graph. device: of the token ids. Nothing is put on the model, which others may call meanwhile: it is a
    copy that shares all but its `forward`, or, where no forward can be a replay, the model itself."""
    next_tokens, output = NextTokens(lm.diffmas_patch, device), None
    if not next_tokens.graphs:
        return lm

    @functools.wraps(lm.forward)  # transformers looks at its arguments
    def forward(*args, **kwargs):
        nonlocal output
        name, ids = cache_name(kwargs, Trace), kwargs.get("input_ids")
        given = {k for k, x in kwargs.items() if x is not None and x is not False}
        trace = None if name is None else kwargs[name]
        plain = not args and ids is not None and ids.shape[1] == 1 and given <= {*ALWAYS, name}
        # A custom decoding loop may call it without a trace, or with one that no generate runs on.
        if output is not None and plain and trace is not None and trace.generation is not None:
            if left := trace.generation.left(trace.lengths):
                tokens = ids[:, 0].clone()  # the trace keeps them, and the caller may write the next ones there
                return output(logits=next_tokens(trace, tokens, left)[:, None], **{name: trace})
        found = lm.forward(*args, **kwargs)
        output = type(found) if name in found else None
        return found

    copied = copy.copy(lm)
    copied.forward = forward
    return copied


def generate(self, inputs=None, *args, **kwargs):
    """transformers' generate; with a Trace as past_key_values, `input_ids` [B, S] are the new tokens only.

    attention_mask: of the new tokens, padded on the left. max_length, min_length: counted without the past. Processors,
    stopping criteria and assistants see the trace's token ids before the new ones (`Trace.token_ids`; none for latent steps; a
    batch is padded on the left), with inputs_embeds only what is generated; streamers see the new ones. Returns what
    transformers returns, without the past. The trace then holds the prompt and all generated tokens of each sequence but its
    last. Beams and several samples per prompt work on forks, and leave the trace as it was. Raises ValueError naming the
    argument that does not fit.

        >>> trace = Trace(model, batch_size=1)
        >>> model.generate(torch.tensor([[3, 4, 5]]), past_key_values=trace, max_new_tokens=2).shape
        torch.Size([1, 5])
        >>> trace.lengths
        [4]
    """
    original = type(self).generate
    kwargs.update(zip(list(inspect.signature(original).parameters)[2:], args))
    argument = cache_name(kwargs, Trace)
    if argument is None:
        return original(self, inputs, **kwargs)
    trace = kwargs[argument]
    generation = Generation()
    if not trace.claim(generation):
        raise ValueError(f"{argument}: expected a trace that no other generate runs on; give each generate a fork of it")
    try:
        return _generate(self, trace, argument, inputs, kwargs)
    finally:
        if trace.generation is generation:
            trace.generation = None


def _generate(self, trace: Trace, argument: str, inputs, kwargs: dict):
    option = options_of(self, kwargs)
    if option("use_cache") is False:
        raise ValueError("use_cache: expected True, a trace is the cache, got False")
    if option("prefill_chunk_size") is not None:
        raise ValueError("prefill_chunk_size: expected None with a trace; call the model on all chunks but the last before")
    if kwargs.get("position_ids") is not None:
        raise ValueError("position_ids: expected None in generate with a trace, which goes on at its next positions")
    ids = kwargs.pop("input_ids", None) if inputs is None else inputs
    embeds = kwargs.get("inputs_embeds")
    new = ids if embeds is None else embeds
    if new is None:
        raise ValueError("input_ids: expected the new tokens, got neither input_ids nor inputs_embeds")
    if new.shape[0] != trace.batch_size:
        raise ValueError(f"input_ids: expected a batch of {trace.batch_size}, the trace's, got {new.shape[0]}")
    B, S = new.shape[:2]
    # Ids are put together again without the padding between them, embeddings stay in their columns.
    mask = new_token_mask(kwargs.pop("attention_mask", None), trace, B, S, placed=embeds is None)
    mask = torch.ones(B, S, dtype=torch.bool) if mask is None else mask
    if not mask[:, -1].all():
        raise ValueError("attention_mask: expected left-padded sequences of at least one token, got padding at the end")
    counts, before = mask.sum(1).tolist(), trace.lengths
    longest = option("max_new_tokens") or max((option("max_length") or 0) - S, 0)
    known, known_mask, eos = ids, mask, option("eos_token_id")
    if embeds is None:
        filling = option("pad_token_id")
        if filling is None:
            filling = 0 if eos is None else int(torch.as_tensor(eos).flatten()[0])
        known, known_mask = left_padded(with_past(trace, [row[m] for row, m in zip(ids.cpu(), mask)]), filling)
        known = known.to(ids)
        for name in ("max", "min"):
            # 20 was what transformers before 5 had for "not set".
            if option(f"{name}_length") not in (None, 0, type(self.generation_config)().max_length):
                if option(f"{name}_new_tokens") is None:
                    kwargs[f"{name}_length"] = option(f"{name}_length") + known.shape[1] - S
    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = OnlyNew(kwargs["streamer"], ids)
    watched, eos = _watch(kwargs, option, eos)
    copies = max(option("num_beams") or 1, option("num_return_sequences") or 1)
    reserve, width, generation = min(longest, RESERVE), known_mask.shape[1], trace.generation
    each = [b for b in range(B) for _ in range(copies)]
    generation.longest = longest
    generation.width, generation.reserve = width, reserve if (option("num_beams") or 1) == 1 else 0
    generation.before, generation.first = [before[b] for b in each], [width - counts[b] for b in each]
    running = trace
    if copies > 1:
        running = kwargs[argument] = trace.select(each)
        running.generation, trace.generation = generation, None
    if (option("num_beams") or 1) > 1:  # which beam will write the rows is not known beforehand
        running.make_room(S + reserve)
    if ids is not None:
        kwargs["input_ids"] = known
    try:
        lm = self if (option("num_beams") or 1) > 1 else with_replays(self, new.device)
        output = type(self).generate(lm, attention_mask=known_mask.to(new.device, torch.long), **kwargs)
    finally:
        if running is not trace:
            running.generation = None
    sequences = output if isinstance(output, Tensor) else output.sequences
    text = sequences if ids is None else sequences[:, known.shape[1] :]
    if copies == 1:
        ends = _ends(text, eos, watched, 0 if ids is None else known.shape[1])
        trace.drop_newest([have - was - n - end + 1 for have, was, n, end in zip(trace.lengths, before, counts, ends)])
    if ids is not None:
        sequences = torch.cat((ids.repeat_interleave(len(text) // B, 0), text), dim=1)
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output


def options_of(model, kwargs: dict):
    """What transformers will take for an option: of the arguments, None included, of the config passed, of the model's."""
    passed, own = kwargs.get("generation_config"), model.generation_config
    unsaid = type(own)()  # None everywhere since transformers 5

    def option(name: str):
        if name in kwargs:
            return kwargs[name]
        given = getattr(passed, name, None)
        said = given is not None and given != getattr(unsaid, name, None)
        return given if said else next((x for c in (own, passed) if (x := getattr(c, name, None)) is not None), None)

    return option


def _watch(kwargs: dict, option, eos) -> tuple[Watched | None, object]:
    """Puts what ends sequences one by one under watch, and in its place among the arguments; the end-of-sequence ids that hold,
    since the caller's criterion for them goes before the config's."""
    criteria, watched = list(kwargs.get("stopping_criteria") or []), []
    if option("stop_strings") is not None and kwargs.get("tokenizer") is not None:
        watched.append(StopStringCriteria(stop_strings=option("stop_strings"), tokenizer=kwargs["tokenizer"]))
        kwargs["stop_strings"] = None
    for criterion in list(criteria):
        if hasattr(criterion, "eos_token_id"):
            eos = criterion.eos_token_id
        elif not isinstance(criterion, (MaxLengthCriteria, MaxTimeCriteria)):  # these end all sequences
            criteria.remove(criterion)
            watched.append(criterion)
    if not watched:
        return None, eos
    watched = Watched(watched)
    kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, watched])
    return watched, eos


def _ends(text: Tensor, eos, watched: Watched | None, columns: int) -> list[int]:
    """How many tokens each row of `text` [B, new] has before the filling behind its end; columns: before the text.

    Without end-of-sequence ids, transformers fills nothing.
    """
    full = torch.full((len(text),), text.shape[1], device=text.device)
    if eos is None:
        return full.tolist()
    stops = torch.isin(text, torch.as_tensor(eos, device=text.device).flatten())
    ends = torch.where(stops.any(1), stops.long().argmax(1) + 1, full)
    if watched is not None and watched.ends is not None:
        ends = ends.minimum(watched.ends - columns)
    return ends.tolist()


def with_past(trace: Trace, rows: list[Tensor]) -> list[Tensor]:
    """Each sequence's new token ids, behind those of its rows in the trace that have one."""
    known = [trace.token_ids(b) for b in range(trace.batch_size)]
    return [torch.cat((past[past >= 0], row)) for past, row in zip(known, rows)]


def left_padded(rows: list[Tensor], filling: int) -> tuple[Tensor, Tensor]:
    """Rows of ids as one tensor, padded on the left, and the mask of what is no padding, bool; [B, longest] each."""
    width = max(map(len, rows))
    mask = torch.arange(width)[None] >= torch.tensor([width - len(row) for row in rows])[:, None]
    return torch.full(mask.shape, filling).masked_scatter(mask, torch.cat(rows)), mask

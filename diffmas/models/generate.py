"""transformers' generate on a trace.

transformers counts the past as part of the input. Tokens that no layer sees stand in for it, and are cut off afterwards.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffmas.trace import Trace
from diffmas.trace.cache import cache_name

__all__ = ["Generation", "generate"]

MOST_RESERVED = 512  # rows that a sequence reserves at once for generated tokens


@dataclass
class Generation:
    """The state of a generate in progress, for the forwards on its trace.

    past, new: how many tokens of its input stand in for the past, and how many are new. reserve: tokens that it may generate,
    as far as that is known. kind: of the segments that the next forward writes.
    """

    past: int = 0
    new: int = 0
    reserve: int = 0
    kind: str = "prompt"

    def next_forward(self, x: Tensor) -> tuple[Tensor, str, int]:
        """The new tokens in transformers' input x [B, S, ...], their kind, and how many tokens will follow."""
        if self.kind == "text":
            return x, "text", 0
        self.kind = "text"  # the prompt is written by the first forward of a generate
        if x.shape[1] >= self.past + self.new:
            x = x[:, self.past :]  # assisted decoding begins with the whole input, the stand-ins included
        return x, "prompt", self.reserve


def generate(self, inputs=None, *args, **kwargs):
    """transformers' generate; with a Trace as past_key_values, `input_ids` [B, S] are the new tokens only.

    attention_mask: of the new tokens, padded on the left. max_length, min_length: counted without the past. Returns what
    transformers returns, also without the past. The trace then holds the prompt and all generated tokens of each sequence but
    its last. Beams and several samples per prompt work on forks, and leave the trace as it was. Raises ValueError naming the
    argument that does not fit.

        >>> trace = Trace(model, batch_size=1)
        >>> model.generate(torch.tensor([[3, 4, 5]]), past_key_values=trace, max_new_tokens=2).shape
        torch.Size([1, 5])
        >>> trace.lengths
        [4]
    """
    original = type(self).generate
    argument = cache_name(kwargs, Trace)
    if argument is None:
        return original(self, inputs, *args, **kwargs)
    trace = kwargs[argument]
    generation = Generation()
    if not trace.claim(generation):
        raise ValueError(f"{argument}: expected a trace that no other generate runs on; give each generate a fork of it")
    try:
        return _generate(self, trace, argument, inputs, args, kwargs)
    finally:
        if trace.generation is generation:
            trace.generation = None


def _generate(self, trace: Trace, argument: str, inputs, args: tuple, kwargs: dict):
    sources = [kwargs, *(vars(c) for c in (kwargs.get("generation_config"), self.generation_config) if c is not None)]
    option = lambda name: next((s[name] for s in sources if s.get(name) is not None), None)  # noqa: E731
    if option("use_cache") is False:
        raise ValueError("use_cache: expected True, a trace is the cache, got False")
    ids = kwargs.pop("input_ids", None) if inputs is None else inputs
    embeds = kwargs.get("inputs_embeds")
    new = ids if embeds is None else embeds
    if new is None:
        raise ValueError("input_ids: expected the new tokens, got neither input_ids nor inputs_embeds")
    if new.shape[0] != trace.batch_size:
        raise ValueError(f"input_ids: expected a batch of {trace.batch_size}, the trace's, got {new.shape[0]}")
    (B, S), past = new.shape[:2], trace.get_seq_length()
    mask = kwargs.pop("attention_mask", None)
    if mask is not None and (mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] < S):
        raise ValueError(f"attention_mask: expected a 2-D mask [{B}, at least {S}], got {list(mask.shape)}")
    mask = new.new_ones(B, S, dtype=torch.long) if mask is None else mask[:, -S:].long()
    if not mask[:, -1].all():
        raise ValueError("attention_mask: expected left-padded sequences of at least one token, got padding at the end")
    lengths = [have + n for have, n in zip(trace.lengths, mask.sum(1).tolist())]
    if past:
        seen = torch.arange(past)[None] >= past - torch.tensor(trace.lengths)[:, None]
        if ids is not None:
            # A token of the prompt stands in, so that repetition penalties meet no token that they would not have met.
            seen_id = ids.gather(1, mask.argmax(1, keepdim=True).to(ids.device))
            ids = torch.cat((seen_id.expand(B, past), ids), dim=1)
        mask = torch.cat((seen.to(mask), mask), dim=1)
        if embeds is not None:
            kwargs["inputs_embeds"] = torch.cat((embeds.new_zeros(B, past, embeds.shape[-1]), embeds), dim=1)
        for name in ("max", "min"):
            # 20 was what transformers before 5 had for "not set".
            if option(f"{name}_length") not in (None, 0, type(self.generation_config)().max_length):
                if option(f"{name}_new_tokens") is None:
                    kwargs[f"{name}_length"] = option(f"{name}_length") + past
    beams = option("num_beams") or 1
    copies = max(beams, option("num_return_sequences") or 1)
    longest = min(option("max_new_tokens") or max((option("max_length") or 0) - past - S, 0), MOST_RESERVED)
    running, generation = trace, trace.generation
    generation.past, generation.new, generation.reserve = past, S, longest if beams == 1 else 0
    if copies > 1:
        running = kwargs[argument] = trace.select([b for b in range(B) for _ in range(copies)])
        running.generation, trace.generation = generation, None
    if beams > 1:  # which beam will write the rows is not known beforehand
        running.make_room(S + longest)
    if ids is not None:
        kwargs["input_ids"] = ids
    try:
        output = type(self).generate(self, *args, attention_mask=mask, **kwargs)
    finally:
        if running is not trace:
            running.generation = None
    sequences = output if isinstance(output, Tensor) else output.sequences
    if ids is not None:
        sequences = sequences[:, past:]
    if copies == 1:
        text = sequences if ids is None else sequences[:, S:]
        may_stop = option("stop_strings") or kwargs.get("stopping_criteria")
        ends = _ends(text, option("eos_token_id"), option("pad_token_id") if may_stop else None)
        trace.drop_newest([have - n - end + 1 for have, n, end in zip(trace.lengths, lengths, ends)])
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output


def _ends(text: Tensor, eos, pad) -> list[int]:
    """How many tokens each row of `text` [B, new] has before the filling behind its end."""
    eos = torch.as_tensor([] if eos is None else eos, device=text.device).flatten()
    stops = torch.isin(text, eos)
    # Only the filling tells where a row ended that ended at a stop string.
    filling = text.shape[1] if pad is None else (text != pad).long().cumsum(1).argmax(1) + 1
    return torch.where(stops.any(1), stops.long().argmax(1) + 1, filling).tolist()

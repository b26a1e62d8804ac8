"""Around methods of vLLM's `GPUModelRunner`, version 1, which the runners of other devices inherit."""

import weakref
from collections.abc import Iterator

import numpy as np

from diffmas.serving.vllm.course import Course
from diffmas.serving.vllm.latents import Latents, Scheduled
from diffmas.serving.vllm.limits import teams_of

__all__ = ["adapters", "after_forward", "before_forward", "latents_of", "seeds", "start"]

_LATENTS: weakref.WeakKeyDictionary[object, Latents] = weakref.WeakKeyDictionary()  # by runner


def latents_of(runner) -> Latents | None:
    return _LATENTS.get(runner)


def _scheduled(runner, tokens: np.ndarray) -> Iterator[Scheduled]:
    """tokens [requests]: of each in this step."""
    batch, first = runner.input_batch, np.cumsum(tokens) - tokens
    for i, request in enumerate(batch.req_ids):
        params = runner.requests[request].sampling_params
        course = None if params is None else Course.read(params.extra_args)
        if course is not None:
            start = int(batch.num_computed_tokens_cpu[i])
            yield Scheduled(i, request, course, start, start + int(tokens[i]), int(first[i]))


def start(original):
    """Around `initialize_kv_cache`, which comes after the weights and before the first request."""

    def started(self, *args, **kwargs):
        if (teams := teams_of(self.vllm_config)) and self not in _LATENTS:
            _LATENTS[self] = Latents(self.get_model(), teams)
        return original(self, *args, **kwargs)

    return started


def before_forward(original):
    """Around `_preprocess`, which gives what the model is called with: its second value is the input embeddings."""

    def placed(self, scheduler_output, *args, **kwargs):
        given = original(self, scheduler_output, *args, **kwargs)
        if (latents := _LATENTS.get(self)) is not None:
            latents.put_in(given[1], _scheduled(self, _tokens(self, scheduler_output)))
        return given

    return placed


def after_forward(original):
    """Around `execute_model`, which leaves what the sampler needs in `execute_model_state`."""

    def taken(self, scheduler_output, *args, **kwargs):
        given = original(self, scheduler_output, *args, **kwargs)
        if (latents := _LATENTS.get(self)) is not None and (state := self.execute_model_state) is not None:
            latents.vectors = {request: kept for request, kept in latents.vectors.items() if request in self.requests}
            batch = _scheduled(self, _tokens(self, scheduler_output))
            latents.take_out(state.sample_hidden_states, ((one.i, one) for one in batch))
        return given

    return taken


def seeds(original):
    """Around `sample_tokens`. What is sampled in the middle of a prompt is thrown away, and vLLM rewinds its generator. Those
    of CPUs cannot be, which would end the engine: there, they are put aside."""

    def sampled(self, *args, **kwargs):
        if self.device.type != "cpu":
            return original(self, *args, **kwargs)
        generators, batch = self.input_batch.generators, self.input_batch.num_reqs
        aside = {i: generators.pop(i) for i in np.flatnonzero(self.discard_request_mask.np[:batch]).tolist() if i in generators}
        try:
            return original(self, *args, **kwargs)
        finally:
            generators |= aside

    return sampled


def _tokens(runner, scheduler_output) -> np.ndarray:
    return np.array([scheduler_output.num_scheduled_tokens[request] for request in runner.input_batch.req_ids])


def adapters(original):
    """Around `set_active_loras`."""

    def mapped(self, input_batch, *args, **kwargs):
        latents = _LATENTS.get(self)
        return original(self, input_batch if latents is None else Mapped(self, latents), *args, **kwargs)

    return mapped


class Mapped:
    """A batch as `set_active_loras` asks it, where a team's request has the adapter of the agent whose tokens it computes."""

    def __init__(self, runner, latents: Latents):
        self.runner, self.latents = runner, latents

    def make_lora_inputs(self, num_scheduled_tokens: np.ndarray, num_sampled_tokens: np.ndarray):
        """See `InputBatch.make_lora_inputs`."""
        batch = self.runner.input_batch
        numbers = batch.request_lora_mapping[: batch.num_reqs].copy()
        loras = {lora.lora_int_id: lora for lora in batch.lora_id_to_lora_request.values()}
        for one in _scheduled(self.runner, num_scheduled_tokens):
            lora = self.latents.lora(one)
            numbers[one.i] = lora.lora_int_id if lora else 0
            loras |= {lora.lora_int_id: lora} if lora else {}
        used = {loras[number] for number in set(numbers.tolist()) if number}
        return tuple(numbers.repeat(num_sampled_tokens)), tuple(numbers.repeat(num_scheduled_tokens)), used

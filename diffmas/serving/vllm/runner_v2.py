"""vLLM's model runner V2: a `ModelState` that knows teams, and what of the runner no `ModelState` reaches.

Tried with that runner itself on a CPU, its kernels in Triton's interpreter. On a GPU it has not run.
"""

from collections.abc import Iterator

from torch import Tensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from diffmas.serving.vllm.course import Course
from diffmas.serving.vllm.latents import Latents, Scheduled
from diffmas.serving.vllm.limits import teams_of

__all__ = ["TeamState", "adapters", "after_forward", "state_class"]


class TeamState(DefaultModelState):
    """vLLM's own state of a language model, where a vector goes in at each latent step."""

    def __init__(self, vllm_config, model, encoder_cache, device):
        super().__init__(vllm_config, model, encoder_cache, device)
        self.latents = Latents(model, teams_of(vllm_config))
        self.courses: dict[str, Course] = {}  # of the requests in the batch that are a team's

    def add_request(self, req_index, new_req_data):
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        if params is not None and (course := Course.read(params.extra_args)) is not None:
            self.courses[new_req_data.req_id] = course

    def remove_request(self, req_id):
        """One that has ended, was aborted, or is preempted."""
        super().remove_request(req_id)
        self.courses.pop(req_id, None)
        self.latents.vectors.pop(req_id, None)

    def prepare_inputs_embeds(self, scheduled_encoder_inputs, input_batch, req_states):
        embeds = super().prepare_inputs_embeds(scheduled_encoder_inputs, input_batch, req_states)
        self.latents.put_in(embeds, self.scheduled(input_batch))
        return embeds

    def take_out(self, input_batch, hidden: Tensor) -> None:
        """hidden [tokens, hidden]: what the model gave for all tokens of the batch."""
        last = input_batch.query_start_loc_np[1:] - 1
        self.latents.take_out(hidden, ((int(last[one.i]), one) for one in self.scheduled(input_batch)))

    def scheduled(self, input_batch) -> Iterator[Scheduled]:
        for i, request in enumerate(input_batch.req_ids):
            if (course := self.courses.get(request)) is not None:
                start = int(input_batch.num_computed_tokens_np[i])
                end = start + int(input_batch.num_scheduled_tokens[i])
                yield Scheduled(i, request, course, start, end, int(input_batch.query_start_loc_np[i]))


def state_class(original):
    """Around `resolve_model_state_cls`."""

    def resolved(vllm_config, model):
        found = original(vllm_config, model)
        if not teams_of(vllm_config):
            return found
        if found is not DefaultModelState:
            raise ValueError(f"model: expected one with vLLM's DefaultModelState, got {found.__name__}")
        return TeamState

    return resolved


def adapters(original):
    """Around `update_requests`, after which the runner counts adapters and maps them: a team's request has the one of the agent
    whose tokens it computes."""

    def updated(self, scheduler_output, *args, **kwargs):
        given = original(self, scheduler_output, *args, **kwargs)
        if isinstance(self.model_state, TeamState) and self.lora_config:
            for request, tokens in scheduler_output.num_scheduled_tokens.items():
                if (course := self.model_state.courses.get(request)) is not None:
                    index = self.req_states.req_id_to_index[request]
                    start = int(self.req_states.num_computed_tokens_np[index])
                    lora = self.model_state.latents.lora(Scheduled(index, request, course, start, start + tokens, 0))
                    self.lora_state.remove_request(request)
                    self.lora_state.add_request(request, index, lora)
        return given

    return updated


def after_forward(original):
    """Around `execute_model`, which leaves what the sampler needs in `execute_model_state`."""

    def taken(self, *args, **kwargs):
        given = original(self, *args, **kwargs)
        if isinstance(self.model_state, TeamState) and (state := self.execute_model_state) is not None:
            self.model_state.take_out(state.input_batch, state.hidden_states)
        return given

    return taken

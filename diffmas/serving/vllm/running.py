"""In the worker: vectors of latent steps go in where their stand-ins are, and hidden states become the next ones.

Around methods of vLLM's `GPUModelRunner` (version 1), which the runners of other devices inherit. What is kept of a request is
found by its id; nothing is put on vLLM's objects.
"""

import functools
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from diffmas.agents.file import read_map
from diffmas.agents.realign import Realign
from diffmas.serving.vllm.course import Course
from diffmas.serving.vllm.limits import TeamConfig, teams_of

__all__ = ["adapters", "after_forward", "before_forward", "start"]


class Embeddings(nn.Module):
    """The input and output embeddings of vLLM's model as `Realign` reads them, in the same memory."""

    def __init__(self, model: nn.Module):
        super().__init__()
        found = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
        heads = [m for m in found if isinstance(m, ParallelLMHead)]
        inputs = [m for m in found if m not in heads]
        if len(inputs) != 1 or len(heads) > 1:
            raise ValueError(f"expected one input embedding and at most one head, got {len(inputs)} and {len(heads)}")
        if not all(isinstance(m.quant_method, UnquantizedEmbeddingMethod) for m in found):
            raise ValueError("expected embeddings that are not quantized")
        e_in, e_out = (m.weight.detach()[: m.org_vocab_size] for m in (inputs[0], (heads or inputs)[0]))
        self.inputs = nn.Embedding(*e_in.shape, _weight=e_in, _freeze=True)
        self.head = nn.Linear(e_out.shape[1], e_out.shape[0], bias=False, device="meta")
        self.head.weight = nn.Parameter(e_out, requires_grad=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.inputs

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class Latents:
    """What a runner knows of its teams. vectors: the input of a request's next position, where that is a latent step."""

    def __init__(self, runner, teams: dict[str, TeamConfig]):
        embeddings = Embeddings(runner.get_model())
        self.realign = {name: _realign(embeddings, team) for name, team in teams.items()}
        self.loras = {name: [lora and LoRARequest(*lora) for lora in team["loras"]] for name, team in teams.items()}
        self.vectors: dict[str, tuple[int, Tensor]] = {}

    @torch.inference_mode()
    def put_in(self, runner, embeds: Tensor) -> None:
        """embeds [tokens, hidden]: what the model is about to read."""
        rows, vectors = [], []
        for i, request, course, start in _requests(runner):
            if course.is_latent(start):
                position, vector = self.vectors.pop(request, (None, None))
                if position != start:
                    raise RuntimeError(f"request {request}: expected the vector of position {start}, got that of {position}")
                rows.append(int(runner.query_start_loc.np[i]))
                vectors.append(vector)
        if rows:
            embeds[torch.tensor(rows, device=embeds.device)] = torch.stack(vectors).to(embeds.dtype)

    @torch.inference_mode()
    def take_out(self, runner, scheduled: dict[str, int], hidden: Tensor) -> None:
        """scheduled: tokens of each request in this step. hidden [requests, hidden]: of the last one of each."""
        self.vectors = {request: kept for request, kept in self.vectors.items() if request in runner.requests}
        wanted: dict[str, list[tuple[int, str, int]]] = {}
        for i, request, course, start in _requests(runner):
            if course.is_latent(end := start + scheduled[request]):
                wanted.setdefault(course.team, []).append((i, request, end))
        for team, rows in wanted.items():
            vectors = self.realign[team](hidden[torch.tensor([i for i, _, _ in rows], device=hidden.device)])
            self.vectors |= {request: (end, vector) for (_, request, end), vector in zip(rows, vectors)}


class Mapped:
    """A batch as `set_active_loras` asks it, where a team's request has the adapter of the agent whose tokens it computes."""

    def __init__(self, runner, loras: dict[str, list[LoRARequest | None]]):
        self.runner, self.loras = runner, loras

    def make_lora_inputs(self, num_scheduled_tokens: np.ndarray, num_sampled_tokens: np.ndarray):
        """See `InputBatch.make_lora_inputs`."""
        batch = self.runner.input_batch
        numbers = batch.request_lora_mapping[: batch.num_reqs].copy()
        loras = {lora.lora_int_id: lora for lora in batch.lora_id_to_lora_request.values()}
        for i, _, course, start in _requests(self.runner):
            lora = self.loras[course.team][course.agent_at(start)]
            numbers[i] = lora.lora_int_id if lora else 0
            loras |= {lora.lora_int_id: lora} if lora else {}
        used = {loras[number] for number in set(numbers.tolist()) if number}
        return tuple(numbers.repeat(num_sampled_tokens)), tuple(numbers.repeat(num_scheduled_tokens)), used


def _realign(embeddings: Embeddings, team: TeamConfig) -> Callable[[Tensor], Tensor]:
    """The embeddings do not change any more: what it needs of them is computed once."""
    realign = Realign(embeddings, team["realign"], temperature=team["temperature"])
    if team["realign"] == "learned":
        learned = read_map(team["directory"], realign.weight.shape)
        realign.weight = nn.Parameter(learned.to(embeddings.inputs.weight.device), requires_grad=False)
    return functools.partial(realign.eval(), solved=realign.solved())


def _requests(runner) -> Iterator[tuple[int, str, Course, int]]:
    """Of the teams: row in the batch, id, course, and the position of the first token in this step."""
    batch = runner.input_batch
    for i, request in enumerate(batch.req_ids):
        params = runner.requests[request].sampling_params
        course = None if params is None else Course.read(params.extra_args)
        if course is not None:
            yield i, request, course, int(batch.num_computed_tokens_cpu[i])


_LATENTS: weakref.WeakKeyDictionary[object, Latents] = weakref.WeakKeyDictionary()  # by runner


def start(original):
    """Around `initialize_kv_cache`, which comes after the weights and before the first request."""

    def started(self, *args, **kwargs):
        if (teams := teams_of(self.vllm_config)) and self not in _LATENTS:
            _LATENTS[self] = Latents(self, teams)
        return original(self, *args, **kwargs)

    return started


def before_forward(original):
    """Around `_preprocess`, which gives what the model is called with: its second value is the input embeddings."""

    def placed(self, *args, **kwargs):
        given = original(self, *args, **kwargs)
        if (latents := _LATENTS.get(self)) is not None:
            latents.put_in(self, given[1])
        return given

    return placed


def after_forward(original):
    """Around `execute_model`, which leaves what the sampler needs in `execute_model_state`."""

    def taken(self, scheduler_output, *args, **kwargs):
        given = original(self, scheduler_output, *args, **kwargs)
        if (latents := _LATENTS.get(self)) is not None and (state := self.execute_model_state) is not None:
            latents.take_out(self, scheduler_output.num_scheduled_tokens, state.sample_hidden_states)
        return given

    return taken


def adapters(original):
    """Around `set_active_loras`."""

    def mapped(self, input_batch, *args, **kwargs):
        latents = _LATENTS.get(self)
        return original(self, input_batch if latents is None else Mapped(self, latents.loras), *args, **kwargs)

    return mapped

"""In the worker, whichever runner it has: vectors of latent steps go in where their stand-ins are, and hidden states become the
next ones. What is kept of a request is found by its id; nothing is put on vLLM's objects.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

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
from diffmas.serving.vllm.limits import TeamConfig

__all__ = ["Latents", "Scheduled"]


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


class Scheduled(NamedTuple):
    """A team's request in one step of the engine. i: its number in the batch. start, end: the positions that the step computes.
    first: the row of the batch that position start has."""

    i: int
    request: str
    course: Course
    start: int
    end: int
    first: int


class Latents:
    """What a runner knows of its teams. vectors: the input of a request's next position, where that is a latent step."""

    def __init__(self, model: nn.Module, teams: dict[str, TeamConfig]):
        embeddings = Embeddings(model)
        self.realign = {name: _realign(embeddings, team) for name, team in teams.items()}
        self.loras = {name: [lora and LoRARequest(*lora) for lora in team["loras"]] for name, team in teams.items()}
        self.vectors: dict[str, tuple[int, Tensor]] = {}

    def lora(self, scheduled: Scheduled) -> LoRARequest | None:
        """The adapter of the agent whose tokens the step computes."""
        return self.loras[scheduled.course.team][scheduled.course.agent_at(scheduled.start)]

    @torch.inference_mode()
    def put_in(self, embeds: Tensor, batch: Iterable[Scheduled]) -> None:
        """embeds [tokens, hidden]: what the model is about to read."""
        rows, vectors = [], []
        for one in batch:
            if one.course.is_latent(one.start):
                position, vector = self.vectors.pop(one.request, (None, None))
                if position != one.start:
                    raise RuntimeError(f"request {one.request}: expected the vector of {one.start}, got that of {position}")
                rows.append(one.first)
                vectors.append(vector)
        if rows:
            embeds[torch.tensor(rows, device=embeds.device)] = torch.stack(vectors).to(embeds.dtype)

    @torch.inference_mode()
    def take_out(self, hidden: Tensor, batch: Iterable[tuple[int, Scheduled]]) -> None:
        """hidden [rows, hidden]. batch: beside each request its row, which is that of its last position in this step."""
        wanted: dict[str, list[tuple[int, Scheduled]]] = {}
        for row, one in batch:
            if one.course.is_latent(one.end):
                wanted.setdefault(one.course.team, []).append((row, one))
        for team, found in wanted.items():
            vectors = self.realign[team](hidden[torch.tensor([row for row, _ in found], device=hidden.device)])
            self.vectors |= {one.request: (one.end, vector) for (_, one), vector in zip(found, vectors)}


def _realign(embeddings: Embeddings, team: TeamConfig) -> Callable[[Tensor], Tensor]:
    """The embeddings do not change any more: what it needs of them is computed once."""
    realign = Realign(embeddings, team["realign"], temperature=team["temperature"])
    if team["realign"] == "learned":
        learned = read_map(team["directory"], realign.weight.shape)
        realign.weight = nn.Parameter(learned.to(embeddings.inputs.weight.device), requires_grad=False)
    return functools.partial(realign.eval(), solved=realign.solved())

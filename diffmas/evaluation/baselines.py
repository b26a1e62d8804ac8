"""Ways to answer the same questions with the same model, behind one interface: `Method`.

Latent         a system as it is (DiffMAS when it is trained)
latent_mas     the same agents and latent steps without the trained adapter (LatentMAS, arXiv 2511.20639)
single_agent   the last agent alone
TextAgents     the agents write text to each other instead of K/V states
"""

import contextlib
import secrets
import time
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from diffmas.agents import adapters
from diffmas.agents.system import Agent, MultiAgentSystem, evaluating

__all__ = ["Answers", "Latent", "Method", "TextAgents", "latent_mas", "single_agent"]

MESSAGES = "messages"  # the field of a prompt that takes what the earlier agents wrote


@dataclass
class Answers:
    """texts[question][sample]; tokens: decoded by all agents together; seconds: wall time of the whole run."""

    texts: list[list[str]]
    tokens: int
    seconds: float


class Method(Protocol):
    """questions: see `MultiAgentSystem.forward`; generation: as `MultiAgentSystem.generate` takes it."""

    def answer(self, questions, samples: int = 1, batch_size: int | None = None, **generation) -> Answers: ...

    def loss(self, questions, answers: list[str], batch_size: int | None = None) -> tuple[float, int]:
        """(sum of the answer tokens' negative log-likelihoods in nats, number of answer tokens)."""
        ...


class _Clock:
    """Seconds between entering and leaving, with the device's work done at both ends."""

    def __init__(self, device: torch.device):
        self.device = device

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __enter__(self):
        self.start = self._now()
        return self

    def __exit__(self, *_):
        self.seconds = self._now() - self.start


def _batches(n: int, size: int | None):
    step = size or n
    return [slice(first, first + step) for first in range(0, n, step)]


def _generate(system, questions, **options) -> tuple[list[list[str]], int]:
    """Texts [question][sample] and the number of tokens decoded."""
    tokens = system.generate_tokens(questions, **options)
    texts = [[system._text(sample, options.get("stop")) for sample in row] for row in tokens]
    return texts, sum(len(sample) for row in tokens for sample in row)


@torch.no_grad()
def _loss(system, questions, answers) -> tuple[float, int]:
    with evaluating(system):
        out = system(questions, answers, num_items_in_batch=1)  # the sum
    return float(out.loss), int((out.labels != -100).sum())


class Latent:
    """A system as a method. adapter: False switches its adapter off while it runs."""

    def __init__(self, system: MultiAgentSystem, adapter: bool = True):
        self.system, self.bare = system, not adapter and hasattr(system.model, "peft_config")
        if self.bare:
            adapters.will_switch(system.model)

    def _model(self):
        return adapters.switched_off(self.system.model) if self.bare else contextlib.nullcontext()

    def answer(self, questions, samples: int = 1, batch_size: int | None = None, **generation) -> Answers:
        with self._model(), _Clock(self.system.device) as clock:
            texts, tokens = _generate(self.system, questions, samples=samples, batch_size=batch_size, **generation)
        return Answers(texts, tokens, clock.seconds)

    def loss(self, questions, answers, batch_size: int | None = None) -> tuple[float, int]:
        with self._model():
            parts = [_loss(self.system, questions[b], answers[b]) for b in _batches(len(questions), batch_size)]
        return sum(nll for nll, _ in parts), sum(n for _, n in parts)


def _with_agents(system: MultiAgentSystem, agents: list[Agent], **options) -> MultiAgentSystem:
    """Other agents on the same model, all of them with its active adapter (or none)."""
    return MultiAgentSystem(
        system.model, system.tokenizer, agents, **{"realign": "none", "chat_template": system.chat_template, **options}
    )  # fmt: skip


def latent_mas(system: MultiAgentSystem) -> Latent:
    """The system's agents and latent steps on the bare model; a learned realignment is replaced by ridge's."""
    learned = system.realign.mode == "learned"
    options = {k: v for k, v in system.describe().items() if k in ("trace_content", "no_latents", "positions", "temperature")}
    bare = _with_agents(system, system.agents, realign="ridge" if learned else "none", **options)
    if not learned:
        bare.realign = system.realign  # no second solve
    return Latent(bare, adapter=False)


def single_agent(system: MultiAgentSystem, agent: Agent | None = None, adapter: bool = False) -> Latent:
    """One agent, the last one by default, without a trace to read."""
    return Latent(_with_agents(system, [agent or system.agents[-1]]), adapter)


class TextAgents:
    """Each agent but the last writes a message; the next ones read all messages so far.

    A prompt takes them as its field {messages}; one without that field has them put before it. max_message_tokens: the
    most tokens of a message. message, separator: how messages are written down. last_reads_only: only the last agent
    reads messages. Samples of a question are whole runs of their own, messages included.
    """

    def __init__(
        self, system: MultiAgentSystem, max_message_tokens: int = 256, adapter: bool = False, *,
        message: str = "{name}: {text}", separator: str = "\n\n", last_reads_only: bool = False,
    ):  # fmt: skip
        if max_message_tokens < 1:
            raise ValueError(f"max_message_tokens: expected at least 1, got {max_message_tokens}")
        self.max_message_tokens = max_message_tokens
        self.message, self.separator, self.last_reads_only = message, separator, last_reads_only
        # A turn with messages before it, and one without.
        self._turns = []
        for agent in system.agents:
            takes = f"{{{MESSAGES}}}" in agent.prompt
            after = agent if takes else replace(agent, prompt=f"{{{MESSAGES}}}\n\n{agent.prompt}")
            self._turns.append(
                (agent.name, Latent(_with_agents(system, [agent]), adapter), Latent(_with_agents(system, [after]), adapter))
            )

    def _read(self, turn, questions: list[dict], messages: list[str]) -> tuple[Latent, list[dict]]:
        _, first, later = turn
        questions = [{**q, MESSAGES: m} for q, m in zip(questions, messages)]
        return (later if any(messages) else first), questions

    def _communicate(self, questions: list[dict], batch_size, generation) -> tuple[list[str], int]:
        """What the agents before the last wrote, for each question, and the number of tokens it took."""
        messages, total = [""] * len(questions), 0
        for i, turn in enumerate(self._turns[:-1]):
            method, read = self._read(turn, questions, [""] * len(questions) if self.last_reads_only else messages)
            options = {**generation, "max_new_tokens": self.max_message_tokens, "seed": generation["seed"] + i + 1}
            written = method.answer(read, 1, batch_size, **options)
            total += written.tokens
            said = [self.message.format(name=turn[0], text=text[0].strip()) for text in written.texts]
            messages = [self.separator.join(filter(None, pair)) for pair in zip(messages, said)]
        return messages, total

    def answer(self, questions, samples: int = 1, batch_size: int | None = None, **generation) -> Answers:
        generation = {**generation, "seed": secrets.randbits(30) if generation.get("seed") is None else generation["seed"]}
        fields = [f for f in MultiAgentSystem.fields_of(questions) for _ in range(samples)]
        with _Clock(self._turns[-1][1].system.device) as clock:
            messages, total = self._communicate(fields, batch_size, generation)
            method, read = self._read(self._turns[-1], fields, messages)
            final = method.answer(read, 1, batch_size, **generation)
        texts = [text for (text,) in final.texts]
        return Answers([texts[i : i + samples] for i in range(0, len(texts), samples)], total + final.tokens, clock.seconds)

    def loss(self, questions, answers, batch_size: int | None = None) -> tuple[float, int]:
        """Of the answers after messages that were decoded greedily."""
        fields = MultiAgentSystem.fields_of(questions)
        messages, _ = self._communicate(fields, batch_size, {"temperature": 0.0, "seed": 0})
        method, read = self._read(self._turns[-1], fields, messages)
        return method.loss(read, answers, batch_size)

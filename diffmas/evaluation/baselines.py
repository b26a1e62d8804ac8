"""Ways to answer the same questions with the same model, behind one interface: `Method`.

Latent         a system as it is: DiffMAS (arXiv 2604.21794) when it is trained
latent_mas     the same agents and latent steps without the trained adapter: LatentMAS (arXiv 2511.20639)
single_agent   the last agent alone
TextAgents     the agents exchange text instead of K/V states
"""

import contextlib
import secrets
import time
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from diffmas.agents import adapters
from diffmas.agents.eval_mode import evaluating
from diffmas.agents.system import Agent, MultiAgentSystem

__all__ = ["Answers", "Latent", "Method", "TextAgents", "latent_mas", "single_agent"]

MESSAGES = "messages"  # the prompt field with the earlier agents' messages


@dataclass
class Answers:
    """What a method answered.

    texts[question][sample]. tokens: decoded by all agents together, for all samples. seconds: wall time of answering.
    """

    texts: list[list[str]]
    tokens: int
    seconds: float


class Method(Protocol):
    """A way to answer questions. questions: as in `MultiAgentSystem.forward`; batch_size: of them at once, by default all."""

    def answer(self, questions, samples: int = 1, batch_size: int | None = None, **generation) -> Answers:
        """Answers every question `samples` times. generation: other arguments of `MultiAgentSystem.generate`."""
        ...

    def loss(self, questions, answers: list[str], batch_size: int | None = None) -> tuple[float, int]:
        """The sum of the answer tokens' negative log-likelihoods, in nats, and the number of these tokens."""
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
    """Texts [question][sample], and the number of decoded tokens."""
    tokens = system.generate_tokens(questions, **options)
    texts = [[system.text_of(sample, options.get("stop")) for sample in row] for row in tokens]
    return texts, sum(len(sample) for row in tokens for sample in row)


@torch.no_grad()
def _loss(system, questions, answers) -> tuple[float, int]:
    with evaluating(system):
        out = system(questions, answers, num_items_in_batch=1)  # the sum
    return float(out.loss), int((out.labels != -100).sum())


class Latent:
    """A system as a method. adapter: False switches its adapter off while it answers."""

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
    """A system of other agents on the same model, all of them with its active adapter, if there is one."""
    chat = {"chat_template": system.chat_template, "chat_options": system.chat_options}
    return MultiAgentSystem(system.model, system.tokenizer, agents, **{"realign": "none", **chat, **options})


def latent_mas(system: MultiAgentSystem) -> Latent:
    """LatentMAS (arXiv 2511.20639): the system's agents and latent steps on the bare model, without training.

    A learned realignment becomes "ridge"; other modes stay.
    """
    learned = system.realign.mode == "learned"
    shared = ("trace_content", "no_latents", "positions", "temperature", "sinks")
    options = {k: v for k, v in system.describe().items() if k in shared}
    bare = _with_agents(system, system.agents, realign="ridge" if learned else "none", **options)
    if not learned:
        bare.realign = system.realign  # no second solve
    return Latent(bare, adapter=False)


def single_agent(system: MultiAgentSystem, agent: Agent | None = None, adapter: bool = False) -> Latent:
    """One agent alone, by default the last one. adapter: whether the model has the system's adapter."""
    return Latent(_with_agents(system, [agent or system.agents[-1]]), adapter)


class TextAgents:
    """Each agent but the last writes a message; the next ones read all messages so far.

    A prompt takes the messages as its field {messages}; without that field they stand before it. Every sample of a question
    has messages of its own.

    max_message_tokens: at most, of one message. adapter: whether the model has the system's adapter. message: a format string
    of one message. separator: between messages. last_reads_only: only the last agent reads messages. Raises ValueError for
    max_message_tokens < 1.
    """

    def __init__(
        self, system: MultiAgentSystem, max_message_tokens: int = 256, adapter: bool = False, *,
        message: str = "{name}: {text}", separator: str = "\n\n", last_reads_only: bool = False,
    ):  # fmt: skip
        if max_message_tokens < 1:
            raise ValueError(f"max_message_tokens: expected at least 1, got {max_message_tokens}")
        self.max_message_tokens = max_message_tokens
        self.message, self.separator, self.last_reads_only = message, separator, last_reads_only
        # (name, the agent before the first message, the agent after it)
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
        """The messages of all agents but the last, one text for each question, and the number of decoded tokens."""
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
        """As in `Method`; the messages are decoded greedily."""
        fields = MultiAgentSystem.fields_of(questions)
        messages, _ = self._communicate(fields, batch_size, {"temperature": 0.0, "seed": 0})
        method, read = self._read(self._turns[-1], fields, messages)
        return method.loss(read, answers, batch_size)

"""Ways to answer the same questions with the same model, behind one interface: `Method`.

Latent         a system as it is: DiffMAS (arXiv 2604.21794) when it is trained
latent_mas     the same agents and latent steps without the trained adapter: LatentMAS (arXiv 2511.20639)
stitch         the agents write independently, and what they wrote is joined
c2c            the last agent alone, with what another model has read: `evaluation.c2c`
single_agent   the last agent alone
TextAgents     the agents exchange text instead of K/V states; trained on their own right answers by `evaluation.text_sft`
"""

import contextlib
import secrets
from dataclasses import dataclass, field, fields, replace
from typing import Protocol

import torch

from diffmas.agents import adapters
from diffmas.agents.eval_mode import evaluating
from diffmas.agents.graph import Graph, Read
from diffmas.agents.member import Member
from diffmas.agents.meter import Cost, Decoding, measuring, phase
from diffmas.agents.options import Options
from diffmas.agents.sampling import Sampling
from diffmas.agents.system import Agent, MultiAgentSystem
from diffmas.trace.views import JOINS

__all__ = [
    "Answers", "Latent", "Method", "Stitched", "TextAgents", "Turn", "latent_mas", "single_agent", "stitch", "with_agents",
]  # fmt: skip

MESSAGES = "messages"  # the prompt field with the earlier agents' messages


@dataclass
class Answers:
    """What a method answered.

    texts[question][sample]. tokens: decoded by all agents together, for all samples. seconds: wall time of answering. cost:
    where the time went, and what was written to the trace. decoding: how sure the model was of the tokens of `texts`.
    """

    texts: list[list[str]]
    tokens: int
    seconds: float
    cost: Cost = field(default_factory=Cost)
    decoding: Decoding = field(default_factory=Decoding)


class Method(Protocol):
    """A way to answer questions. questions: as in `MultiAgentSystem.forward`; batch_size: of them at once, by default all."""

    def answer(self, questions, samples: int = 1, batch_size: int | None = None, **generation) -> Answers:
        """Answers every question `samples` times. generation: other arguments of `MultiAgentSystem.generate`."""
        ...

    def loss(
        self, questions, answers: list[str], batch_size: int | None = None, seed: int | list[int] | None = None
    ) -> tuple[float, int]:  # fmt: skip
        """The sum of the answer tokens' negative log-likelihoods, in nats, and the number of these tokens. seed: of messages
        that are sampled; with the seed of `answer`, they are those that its answers read."""
        ...


def _batches(n: int, size: int | None):
    step = size or n
    return [slice(first, first + step) for first in range(0, n, step)]


@torch.no_grad()
def _loss(system, questions, answers, seeds: list[int]) -> tuple[float, int]:
    with evaluating(system), system.realign.unchanging():
        trace = system.communicate(system.fields_of(questions), seeds=seeds)  # of messages, as in generate_tokens
        out = system(questions, answers, num_items_in_batch=1, trace=trace)  # the sum
    return float(out.loss), int((out.labels != -100).sum())


class Latent:
    """A system as a method.

    adapter: with which adapter it answers: the system's own (True), none (False), or another that its model has, by name
    (`diffmas.agents.file.add_adapter`). Raises ValueError for a name that it has not.
    """

    def __init__(self, system: MultiAgentSystem, adapter: bool | str = True):
        known = getattr(system.model, "peft_config", {})
        if isinstance(adapter, str) and adapter not in known:
            raise ValueError(f"adapter: expected True, False or one of {sorted(known)}, got {adapter!r}")
        self.system, self.adapter = system, adapter if known else True
        if self.adapter is not True:
            adapters.will_switch(system.model)

    def switched(self):
        """Inside, the model has the adapter that the method answers with."""
        if self.adapter is True:
            return contextlib.nullcontext()
        model = self.system.model
        return adapters.switched_to(model, self.adapter) if self.adapter else adapters.switched_off(model)

    def answer(self, questions, samples: int = 1, batch_size: int | None = None, **generation) -> Answers:
        with self.switched(), measuring(self.system.device) as meter:
            texts, lengths = _generate(self.system, questions, samples=samples, batch_size=batch_size, **generation)
        tokens = sum(map(sum, lengths)) + meter.cost.rows["decode"]
        return Answers(texts, tokens, meter.cost.total, meter.cost, meter.decoding)

    def loss(self, questions, answers, batch_size: int | None = None, seed=None) -> tuple[float, int]:
        sampling = Sampling.of(self.system, seed=seed)
        seeds = [sampling.seed_of(i) for i in range(len(questions))]
        with self.switched():
            parts = [_loss(self.system, questions[b], answers[b], seeds[b]) for b in _batches(len(questions), batch_size)]
        return sum(nll for nll, _ in parts), sum(n for _, n in parts)


def _generate(system, questions, **options) -> tuple[list[list[str]], list[list[int]]]:
    """Texts and numbers of tokens, [question][sample]."""
    tokens = system.generate_tokens(questions, **options)
    texts = [[system.text_of(sample, options.get("stop")) for sample in row] for row in tokens]
    return texts, [[len(sample) for sample in row] for row in tokens]


def with_agents(system: Member, agents: list[Agent], kind=MultiAgentSystem, **options) -> MultiAgentSystem:
    """A system of other agents on the same model, all of them with its active adapter, if there is one."""
    chat = {"chat_template": system.chat_template, "chat_options": system.chat_options}
    return kind(system.model, system.tokenizer, agents, **{"realign": "none", **chat, **options})


# Options that another team of a system's agents has otherwise, or from `with_agents`.
OWN = ("realign", "adapter_scope", "chat_template", "chat_options")


def _team(system: MultiAgentSystem, kind=MultiAgentSystem, **options) -> MultiAgentSystem:
    """The system's agents, with its options but `adapter_scope`, as another kind of team. A learned realignment, which belongs
    to an adapter, becomes "ridge"; other modes stay."""
    if system.others:
        raise ValueError(f"agents: expected agents of one model for another team of them, got others: {sorted(system.others)}")
    learned = system.realign.mode == "learned"
    described = system.describe()
    shared = {option.name: described[option.name] for option in fields(Options) if option.name not in OWN}
    team = with_agents(system, system.agents, kind, realign="ridge" if learned else "none", **shared, **options)
    if not learned:
        team.realign = system.realign  # no second solve
    return team


def latent_mas(system: MultiAgentSystem) -> Latent:
    """LatentMAS (arXiv 2511.20639): the system's agents and latent steps on the bare model, without training.

    As published, agents hand on all rows (trace_content="all") or their latent steps alone ("latent_only"), and hidden states
    go through W of realign="ridge", or are only rescaled ("norm"): the system's own options hold here, so that training is
    all that differs from it. A learned realignment becomes "ridge". Two faults of the published code are mended. It pads
    prompts on the left, and later agents attend to the padding and count positions over it: here nothing is padded. And it
    cuts the cache to its last T rows, without the first tokens that a pretrained model uses as attention sink: here the rows
    that each agent's latent steps wrote are kept, at their own positions, and the system's `sinks`.
    """
    return Latent(_team(system), adapter=False)


class Stitched(MultiAgentSystem):
    """Agents that do not read each other, whatever their `reads`: all write at once, and the last one reads all of them.

    join: where it has their rows (`diffmas.agents.graph.Read`): "shift" puts each agent's, as a block, behind those of the one
    before it. Other arguments: of `MultiAgentSystem`. It is trained as that is, by `diffmas.Trainer`. Raises ValueError for a
    join other than shift and reindex with positions="reindex", which are then the same.

        >>> team = Stitched(model, tokenizer, system.agents)
        >>> team(["where is the key"], ["in the garden"]).loss.backward()
    """

    def __init__(self, *args, join: str = "shift", **options):
        positions = options.get("positions", "keep")
        known = ("shift", "reindex") if positions == "reindex" else JOINS
        if join not in known:
            raise ValueError(f"join: expected one of {known} with positions={positions!r}, got {join!r}")
        self.join = join  # the constructor builds for the graph
        super().__init__(*args, **options)

    def own_options(self) -> dict:
        return {"join": self.join}

    @property
    def graph(self) -> Graph:
        *others, last = self.agents
        reads = [Read(agent.name, "reindex" if self.positions == "reindex" else self.join) for agent in others]
        return Graph.of([*(replace(agent, reads=[]) for agent in others), replace(last, reads=reads)])


def stitch(system: MultiAgentSystem, adapter: bool | str = False, join: str = "shift") -> Latent:
    """The system's agents as `Stitched`. adapter: as in `Latent`; join: as in `Stitched`."""
    return Latent(_team(system, Stitched, join=join), adapter)


def single_agent(system: MultiAgentSystem, agent: Agent | None = None, adapter: bool | str = False) -> Latent:
    """One agent alone, by default the last one. adapter: as in `Latent`."""
    return Latent(with_agents(system, [replace(agent or system.agents[-1], reads=None)]), adapter)


@dataclass
class Turn:
    """What one of several text agents read and wrote. By sequence, the samples of a question side by side: prompts (without the
    chat template), texts, and tokens of the texts. most: tokens that a text may have."""

    agent: Agent
    prompts: list[str]
    texts: list[str]
    lengths: list[int]
    most: int


class TextAgents:
    """Each agent but the last writes a message; the next ones read all messages so far, or those of the agents that they read.

    A prompt takes the messages as its field {messages}; without that field they stand before it. Every sample of a question
    has messages of its own. Samples that read the same, as those of the first agent do, share the rows of their prompt. What
    another model only encodes (`Encoder`), the system's model reads and answers as text.

    max_message_tokens: at most, of one message, where its agent does not say; one that does has its message_temperature, too.
    adapter: as in `Latent`. message: a format string of one message. separator: between messages. last_reads_only: only the
    last agent reads messages. Raises ValueError for max_message_tokens < 1.
    """

    def __init__(
        self, system: MultiAgentSystem, max_message_tokens: int = 256, adapter: bool | str = False, *,
        message: str = "{name}: {text}", separator: str = "\n\n", last_reads_only: bool = False,
    ):  # fmt: skip
        if max_message_tokens < 1:
            raise ValueError(f"max_message_tokens: expected at least 1, got {max_message_tokens}")
        self.max_message_tokens = max_message_tokens
        self.message, self.separator, self.last_reads_only = message, separator, last_reads_only
        # For each agent, itself before the first message and after it.
        self._readers = []
        self._reads = system.graph.reads
        for agent in system.agents:
            member, agent = system.writer(agent), replace(agent, reads=None, model=None, low_rank=False)
            takes = f"{{{MESSAGES}}}" in agent.prompt
            after = agent if takes else replace(agent, prompt=f"{{{MESSAGES}}}\n\n{agent.prompt}")
            self._readers.append([Latent(with_agents(member, [a]), adapter) for a in (agent, after)])

    def _read(self, i: int, questions: list[dict], messages: list[str]) -> tuple[Latent, list[dict]]:
        """Agent i as a method, and the questions as it reads them."""
        first, later = self._readers[i]
        if self.last_reads_only and i < len(self._readers) - 1:
            messages = [""] * len(messages)
        return (later if any(messages) else first), [{**q, MESSAGES: m} for q, m in zip(questions, messages)]

    def _turn(self, i: int, questions: list[dict], messages: list[str], batch_size, generation) -> Turn:
        with phase("hand-over"):
            method, read = self._read(i, questions, messages)
            (agent,) = method.system.agents
            prompts = [agent.render(fields) for fields in read]
        if i < len(self._readers) - 1:
            own = agent.max_message_tokens  # whoever writes messages in the team chooses their words as there
            how = {} if own is None else {"temperature": agent.message_temperature or 0.0}
            most = self.max_message_tokens if own is None else own
            generation = {**generation, **how, "max_new_tokens": most, "seed": generation["seed"] + i + 1}
        with method.switched():
            texts, lengths = _generate(method.system, read, batch_size=batch_size, samples=1, **generation)
        most = Sampling.of(method.system, generation.get("max_new_tokens")).max_new_tokens
        return Turn(agent, prompts, [text for (text,) in texts], [n for (n,) in lengths], most)

    def _turns(self, questions: list[dict], batch_size, generation):
        """The turns of all agents but the last, and what the last one reads, at the end."""
        turns: list[Turn] = []
        said: list[list[str]] = []  # by agent, of each sequence
        for i in range(len(self._readers) - 1):
            turns.append(self._turn(i, questions, self._messages(i, said, len(questions)), batch_size, generation))
            with phase("hand-over"):
                name, texts = turns[-1].agent.name, turns[-1].texts
                said.append([self.message.format(name=name, text=text.strip()) for text in texts])
        return turns, self._messages(-1, said, len(questions))

    def _messages(self, i: int, said: list[list[str]], sequences: int) -> list[str]:
        """What agent i reads, for each sequence."""
        with phase("hand-over"):
            read = [said[edge.agent] for edge in self._reads[i]]
            return [self.separator.join(filter(None, some)) for some in zip(*read)] if read else [""] * sequences

    def write(self, questions, samples: int = 1, batch_size: int | None = None, **generation) -> tuple[list[Turn], Answers]:
        """Like `answer`; also returns the turns of all agents, each of all samples of all questions."""
        if samples < 1:
            raise ValueError(f"samples: expected at least 1, got {samples}")
        generation = {**generation, "seed": secrets.randbits(30) if generation.get("seed") is None else generation["seed"]}
        fields = [f for f in MultiAgentSystem.fields_of(questions) for _ in range(samples)]
        batch_size = batch_size and batch_size * samples  # of sequences
        with measuring(self._readers[-1][0].system.device) as meter:
            turns, messages = self._turns(fields, batch_size, generation)
            meter.decoding = Decoding()  # of the answers, not of the messages
            turns.append(self._turn(len(self._readers) - 1, fields, messages, batch_size, generation))
        texts = [turns[-1].texts[i : i + samples] for i in range(0, len(fields), samples)]
        tokens = sum(sum(turn.lengths) for turn in turns)
        return turns, Answers(texts, tokens, meter.cost.total, meter.cost, meter.decoding)

    def answer(self, questions, samples: int = 1, batch_size: int | None = None, **generation) -> Answers:
        return self.write(questions, samples, batch_size, **generation)[1]

    def loss(self, questions, answers, batch_size: int | None = None, seed: int | None = None) -> tuple[float, int]:
        """As in `Method`; messages of agents that do not say how theirs are chosen are decoded greedily."""
        fields = MultiAgentSystem.fields_of(questions)
        seed = secrets.randbits(30) if seed is None else seed
        _, messages = self._turns(fields, batch_size, {"temperature": 0.0, "seed": seed})
        method, read = self._read(len(self._readers) - 1, fields, messages)
        return method.loss(read, answers, batch_size)

"""MultiAgentSystem: agents that share one model and communicate through its K/V states (DiffMAS, arXiv 2604.21794).

All K/V rows of an agent's turn (`diffmas.agents.turns`) land on the trace, which the next agent attends to. The last agent's
forward gives the loss, or its decoding loop the text (`diffmas.agents.answers`).
"""

from collections.abc import Callable

import torch
from torch import nn

from diffmas.agents import adapters, gradients, prompts
from diffmas.agents.agent import Agent
from diffmas.agents.answers import answer_loss, answer_tokens
from diffmas.agents.board import Board
from diffmas.agents.chat import check_chat
from diffmas.agents.checks import check_others, check_patched, check_team
from diffmas.agents.choice import Choices
from diffmas.agents.decoding import text_before
from diffmas.agents.described import readings
from diffmas.agents.gradient_report import GradientReport
from diffmas.agents.graph import Graph, home
from diffmas.agents.low_rank import check_low_rank
from diffmas.agents.member import Member, default_chat
from diffmas.agents.options import Options
from diffmas.agents.output import SystemOutput
from diffmas.agents.prompts import Turn
from diffmas.agents.realign import Realign
from diffmas.agents.rounds import unrolled
from diffmas.agents.sampling import Sampling
from diffmas.agents.saving import Saving
from diffmas.agents.turns import think
from diffmas.models.parts import causal_lm_of
from diffmas.models.patch import patch_model
from diffmas.trace import Trace
from diffmas.trace.views import SINKS

__all__ = ["Agent", "MultiAgentSystem", "SystemOutput"]


class MultiAgentSystem(Saving):
    """Agents over one patched model; the last agent answers (DiffMAS, arXiv 2604.21794).

    model: a transformers causal LM or a PEFT model around one; it is patched if it is not yet. A new system is in its mode,
        train or eval.
    tokenizer: the model's. Its chat template is used if it has one, unless chat_template is False. chat_options: what else
        the template reads, such as {"enable_thinking": False}.
    agents: in the order of their turns; the last one answers. By default each reads all that was written before it; `Agent`'s
        reads make other shapes of teams (`diffmas.agents.graph`), which may share a forward; who takes turns in rounds becomes
        as many agents (`diffmas.agents.rounds`).
    realign: none | norm | ridge | soft_token | learned, the map from hidden states to input embeddings
        (`diffmas.agents.realign`); temperature is soft_token's.
    grad_scope: full | detach_trace (gradients reach the last agent only) | last_k (the last `last_k` agents).
    trace_content: all | latent_only (an agent hands on its latent steps and its message without its prompt).
    sinks: the first so many tokens of a sequence stay with latent_only, whoever wrote them: pretrained models use them as
        attention sink (StreamingLLM, arXiv 2309.17453), and without them their attention breaks.
    positions: keep | reindex (renumbered from 0), the positions of the rows that latent_only hands on.
    adapter_scope: shared | per_role (one PEFT adapter for each `Agent.role`) | final_only (the last agent has the
        adapter, the others the bare model).
    latent_grad_clip: the largest norm of the gradient that a latent step hands to the hidden state before it, for each
        sequence, in norms of what its answer's last hidden states get (`diffmas.agents.gradient_clip`); None: no limit. In
        training by `forward` without a trace.
    others: other models by name. `diffmas.agents.Other`: an agent with that name as its `model` takes its turns there, and
        agents of the system's model read its rows through a projector. `diffmas.agents.Encoder`: it encodes the agent's prompt.
    no_latents: prompt | skip, whether an agent without a message hands on its prompt or has no turn where its T is 0. At T = 0
        for all, "skip" is the last agent alone, as the paper's T = 0 is; the default is not.

    Raises ValueError naming the argument that does not fit, for no agents, and for two agents of one name.

        >>> agents = [Agent("planner", "plan {question}", latent_steps=4), Agent("solver", "answer {question}")]
        >>> system = MultiAgentSystem(model, tokenizer, agents)
        >>> system(["where is the key"], ["in the garden"]).loss.backward()
        >>> system.generate(["where is the key"], max_new_tokens=8, temperature=0)
        [['...']]
    """

    def __init__(
        self, model: nn.Module, tokenizer, agents: list[Agent], realign: str = "ridge", grad_scope: str = "full",
        trace_content: str = "all", *, last_k: int | None = None, adapter_scope: str = "shared",
        no_latents: str = "prompt", positions: str = "keep", chat_template: bool | None = None, temperature: float = 1.0,
        sinks: int = SINKS, chat_options: dict | None = None, latent_grad_clip: float | None = None,
        others: dict[str, Member] | None = None,
    ):  # fmt: skip
        super().__init__()
        options = Options(
            realign, grad_scope, trace_content, last_k, adapter_scope, no_latents, positions, chat_template, temperature,
            sinks, chat_options, latent_grad_clip,
        )  # fmt: skip
        others, agents = others or {}, unrolled(agents)
        check_team(model, agents, adapter_scope, trace_content, sinks, others)
        check_others(model, tokenizer, agents, others, options)
        self.agents_without_grad = options.agents_without_grad(len(agents))  # the first so many
        self.chat_template = default_chat(tokenizer, chat_template)
        check_chat(tokenizer, self.chat_template, chat_options or {}, [agent for agent in agents if agent.model is None])
        if not hasattr(causal_lm_of(model), "diffmas_patch"):
            patch_model(model)
        self.model, self.tokenizer, self.agents = model, tokenizer, list(agents)
        self.grad_scope, self.last_k, self.trace_content = grad_scope, last_k, trace_content
        self.adapter_scope, self.no_latents, self.positions, self.sinks = adapter_scope, no_latents, positions, sinks
        self.chat_options, self.latent_grad_clip = chat_options, latent_grad_clip
        self.together = True  # whether agents that do not read each other share a forward; not while a gradient report watches
        self.agreement = None  # what processes that share a sharded model tell each other before they run it (diffmas.training)
        self.realign = Realign(model, realign, temperature=temperature).train(model.training)
        self.others = nn.ModuleDict(others)
        self.training = model.training
        self.choices = Choices(self.graph, model).train(model.training)
        check_patched(model, agents)
        check_low_rank(self)
        if adapter_scope != "shared" or any(agent.low_rank for agent in agents):
            adapters.will_switch(model)
        if adapter_scope == "per_role":
            own = [agent for agent in agents if self.writer(agent) is self and not agent.low_rank]
            adapters.train_roles(model, list(dict.fromkeys(agent.adapter for agent in own)))

    @property
    def graph(self) -> Graph:
        """Who reads whom. Raises ValueError naming an agent whose `reads` do not fit."""
        return Graph.of(self.agents, "reindex" if self.positions == "reindex" else "shift", readings(self.others))

    def member(self, agent: Agent) -> Member:
        """What reads an agent's prompt: the system itself, or one of its others."""
        return self if agent.model is None else self.others[agent.model]

    def writer(self, agent: Agent) -> Member:
        """What writes an agent's rows: as `member`, but the system itself where another model only encodes."""
        return self if home(agent, readings(self.others)) is None else self.others[agent.model]

    # ---- text to tokens ----------------------------------------------------------------------------------------------

    def prompt_ids(self, agent: Agent, fields: dict) -> list[int]:
        """The token ids of an agent's prompt, chat template included."""
        member = self.member(agent)
        return super().prompt_ids(agent, fields) if member is self else member.prompt_ids(agent, fields)

    def answer_ids(self, answer: str | list[int]) -> list[int]:
        """The token ids of an answer, closed by the end-of-sequence token; those that were decoded stay as they are."""
        return prompts.answer_ids(self.tokenizer, answer)

    def tokenize(
        self, questions: list[dict], room: list[int], what: str = "its prompt", trace: Trace | None = None
    ) -> list[list[Turn]]:
        """The turns of all agents, prompt ids and T, [agent][question]; an agent without a turn has no ids.

        room[b]: tokens that follow the last agent's prompt. trace: what the others have written, if they had their turns; then
        the last agent's alone. Raises ValueError naming the question, before any agent runs, for a field that is missing and
        for what will not fit in the context.
        """
        if trace is not None and trace.batch_size != len(questions):
            raise ValueError(f"trace: expected {len(questions)} sequences, one for each question, got {trace.batch_size}")
        return prompts.tokenize(self, questions, room, what, None if trace is None else trace.next_positions)

    fields_of = staticmethod(prompts.fields_of)

    # ---- one agent ---------------------------------------------------------------------------------------------------

    def think(
        self, agent: Agent, questions: list[dict], trace: Trace, turns: list[Turn] | None = None, least_steps: int = 0,
        seeds: list[int] | None = None,
    ) -> Trace:  # fmt: skip
        """An agent's turn: one forward over its prompts on top of the trace, T latent steps without logits, its message.

        questions: one dict of prompt fields for each sequence of the trace. turns: the agent's row of `tokenize`, to save a
        second tokenization. least_steps: where no T is as large, more forwards follow, whose rows are dropped: processes that
        share a model run it equally often. seeds: as in `communicate`. Returns the trace for the next agent.
        """
        return think(self, agent, questions, trace, turns, least_steps, seeds)

    def communicate(self, questions: list[dict], trace: Trace | None = None, turns=None, least_steps=(), seeds=None) -> Trace:
        """All agents but the last take their turns; returns the trace that the last one reads.

        questions: dicts of prompt fields. trace: to go on from; a new one by default. turns: the result of `tokenize`.
        least_steps: of each agent (`think`). seeds: of each question, for messages that are sampled.
        """
        board = Board(self, Trace(self.model, batch_size=len(questions)) if trace is None else trace, seeds)
        for group in board.groups:
            board.write(group, questions, turns, least_steps)
        return board.read(len(self.agents) - 1, questions)

    # ---- the last agent ----------------------------------------------------------------------------------------------

    def forward(
        self, questions, answers: list | None = None, num_items_in_batch=None, trace: Trace | None = None,
        share: bool = False,
    ) -> SystemOutput:  # fmt: skip
        """The loss of a batch of answers, or without answers the logits of their first token.

        questions: list of str, or of dicts whose fields fill the agents' prompts. answers: list of str, one per question,
        or of lists of token ids, as `generate_tokens` returns them.
        num_items_in_batch: answer tokens over all accumulated micro-batches, as Hugging Face's Trainer counts them; the loss
        is then the sum over this batch divided by it. trace: what the other agents have written (`communicate`, or a memory of
        theirs that was saved, `Trace.load`), a sequence for each question; the last agent's rows are added to it. By default
        the others take their turns now. share: of a question that is there several times, with several answers, they take them
        once, and all its answers read, and teach, the same rows. Returns a `SystemOutput`. Raises ValueError naming what does
        not fit.
        """
        return answer_loss(self, questions, answers, num_items_in_batch, trace, share)

    @torch.no_grad()
    def generate(
        self, questions, max_new_tokens: int | list[int] | None = None, temperature: float | None = None,
        top_p: float | None = None, seed: int | list[int] | None = None, *, stop: list[str] | None = None,
        samples: int | None = None, batch_size: int | None = None, progress: bool = False, trace: Trace | None = None,
        **options,
    ) -> list[list[str]]:  # fmt: skip
        """The last agent's texts, [question][sample].

        questions: as in `forward`. max_new_tokens: per sample. temperature: 0 takes the likeliest token. top_p: in (0, 1].
        seed: None draws one. max_new_tokens and seed may be lists, with one for each question: each answer is then that of its
        question alone. stop (or stop_strings): strings that end an answer; they are cut off, and may hold special tokens.
        samples (or num_return_sequences): answers per question. batch_size: questions at once, all by default. progress: show a
        bar. trace: as in `forward`, and left as it is: the last agent answers, the others have had their turns. options: of
        transformers' generate, as it takes them: generation_config, top_k, min_p, repetition_penalty, num_beams,
        logits_processor, stopping_criteria and all else that chooses tokens or ends a text. Rules about text see the trace's
        tokens and the prompt (`Trace.token_ids`).

        A generation_config takes the place of the model's own as it is: what it leaves out is transformers' default. Without
        one, what is not given is the model's own; where that does not sample and does not say, temperature 0.6, top_p 0.95 and
        no top_k. 256 tokens where nobody says it. Decoding ends at an end-of-sequence token of the model or the tokenizer, a
        stop string or max_new_tokens. A result depends on the seed and on the place of its question in the list. It depends on
        batch_size only as far as sums round differently, which can tip a close choice: torch's products and activations do for
        other numbers of rows, attention does from 1024 rows on. Raises ValueError naming what does not fit, before any agent
        runs.

            >>> system.generate(["where is the key"], max_new_tokens=4, seed=0, samples=2)
            [['...', '...']]
            >>> system.generate(["where is the key"], max_new_tokens=4, num_beams=3, repetition_penalty=1.2)
            [['...']]
        """
        sampling = Sampling.of(self, max_new_tokens, temperature, top_p, seed, stop, samples, **options)
        tokens = answer_tokens(self, questions, sampling, batch_size, progress, trace)
        return [[self.text_of(t, sampling.stop) for t in row] for row in tokens]

    @torch.no_grad()
    def generate_tokens(
        self, questions, max_new_tokens: int | list[int] | None = None, temperature: float | None = None,
        top_p: float | None = None, seed: int | list[int] | None = None, *, stop: list[str] | None = None,
        samples: int | None = None, batch_size: int | None = None, progress: bool = False, trace: Trace | None = None,
        on_token: Callable[[int, int, int, bool], bool | None] | None = None, **options,
    ) -> list[list[list[int]]]:  # fmt: skip
        """Like `generate`, but returns token ids, [question][sample][token], with the end-of-sequence token.

        on_token: told each token as it is chosen: the numbers of question and sample, its id, and whether it is the last one.
        An answer for which it returns True ends there. Not with beams.

            >>> seen = []
            >>> tell = lambda question, sample, token, last: seen.append(token)
            >>> system.generate_tokens(["where is the key"], max_new_tokens=4, seed=0, on_token=tell) == [[seen]]
            True
        """
        sampling = Sampling.of(self, max_new_tokens, temperature, top_p, seed, stop, samples, **options)
        return answer_tokens(self, questions, sampling, batch_size, progress, trace, on_token)

    def text_of(self, ids: list[int], stop: list[str] | None = None) -> str:
        """The text of new token ids, without special tokens, cut before the first `stop` string."""
        return text_before(self.tokenizer, ids, stop or [])

    def gradient_report(self, questions, answers: list[str], num_items_in_batch=None) -> GradientReport:
        """Where the gradient of the answers' loss goes: norms by agent, latent step and layer, of the parameters' gradient and
        of dL/d(rows).

        Arguments: as in `forward`. Runs the loss and its backward once, in the mode the system is in, and leaves
        gradients, weights and random state as they are; nobody else may run the model meanwhile. Returns a `GradientReport`.
        Raises ValueError for a system without trainable parameters.

            >>> system.gradient_report(["where is the key"], ["in the garden"]).norm > 0
            True
        """
        return gradients.report(self, questions, answers, num_items_in_batch)

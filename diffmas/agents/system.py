"""MultiAgentSystem: agents that share one model and communicate through its K/V states (DiffMAS, arXiv 2604.21794).

One token's way through an agent: its prompt is packed with the prompts of the batch (no padding) and run through the body
in one forward; the last hidden state of each sequence is realigned and fed back T times (`think`); all K/V rows land on
the trace, which the next agent attends to. The last agent's forward gives the loss, or its decoding loop the text
(`diffmas.agents.sampling`).
"""

import contextlib
import threading
import weakref
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from diffmas.agents import adapters, prompts
from diffmas.agents.adapters import ADAPTER_SCOPES
from diffmas.agents.latent import latent_steps
from diffmas.agents.prompts import Agent
from diffmas.agents.realign import Realign
from diffmas.agents.sampling import Sampling, decode, rows_ahead
from diffmas.models.forward import forward
from diffmas.models.parts import causal_lm_of
from diffmas.models.patch import patch_model, patch_of
from diffmas.trace import Trace

__all__ = ["Agent", "MultiAgentSystem", "SystemOutput", "evaluating"]

GRAD_SCOPES = ("full", "detach_trace", "last_k")
TRACE_CONTENTS = ("all", "latent_only")
NO_LATENTS = ("prompt", "skip")


@dataclass
class SystemOutput(ModelOutput):
    """loss: mean (or sum / num_items_in_batch) negative log-likelihood of the answer tokens. logits [B, A, V]:
    logits[b, t] predicts labels[b, t]. labels [B, A], -100 behind shorter answers. Without answers: loss and labels are
    None, A is 1: the first token of the answer. trace: what the agents and the solver left."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None
    trace: Trace | None = None


# Modules in eval mode for somebody: for how many, and the mode before. By submodule, since systems share a model.
_EVALUATING: weakref.WeakKeyDictionary[nn.Module, tuple[int, bool]] = weakref.WeakKeyDictionary()
_EVALUATING_LOCK = threading.Lock()


@contextlib.contextmanager
def evaluating(module: nn.Module):
    """`module` in eval mode; a submodule is back in its own when the last of those who asked for it, in any thread, is done."""
    modules = list(module.modules())
    with _EVALUATING_LOCK:
        for m in modules:
            users, mode = _EVALUATING.get(m) or (0, m.training)
            _EVALUATING[m] = users + 1, mode
        module.eval()
    try:
        yield
    finally:
        with _EVALUATING_LOCK:
            for m in modules:
                users, mode = _EVALUATING.pop(m)
                if users > 1:
                    _EVALUATING[m] = users - 1, mode
                else:
                    m.training = mode


class MultiAgentSystem(nn.Module):
    """Agents over one patched model; the last agent answers.

    model: a transformers causal LM or a PEFT model around one; it is patched if it is not yet. tokenizer: its tokenizer;
    a chat template is used if it has one (chat_template=False: never). realign: see `diffmas.agents.realign`.
    grad_scope: full | detach_trace (only the last agent learns) | last_k (the last `last_k` agents learn).
    trace_content: all | latent_only (an agent's prompt is dropped when it hands on).
    adapter_scope: shared | per_role (one PEFT adapter per agent, of the agent's name) | final_only (the others run the
    bare model). no_latents: what an agent with T = 0 hands on: prompt (its prompt's K/V) | skip (it does not run).
    positions: keep | reindex, how rows kept by latent_only are numbered. A new system is in the model's mode, train or eval.

    Raises ValueError naming the argument for anything else, for no agents and for two agents of one name.
    """

    def __init__(
        self, model: nn.Module, tokenizer, agents: list[Agent], realign: str = "ridge", grad_scope: str = "full",
        trace_content: str = "all", *, last_k: int | None = None, adapter_scope: str = "shared",
        no_latents: str = "prompt", positions: str = "keep", chat_template: bool | None = None, temperature: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        for name, value, allowed in (
            ("grad_scope", grad_scope, GRAD_SCOPES), ("trace_content", trace_content, TRACE_CONTENTS),
            ("adapter_scope", adapter_scope, ADAPTER_SCOPES), ("no_latents", no_latents, NO_LATENTS),
            ("positions", positions, ("keep", "reindex")),
        ):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
        if not agents:
            raise ValueError("agents: expected at least one agent, got an empty list")
        names = [agent.name for agent in agents]
        if len(set(names)) != len(names):
            raise ValueError(f"agents: expected distinct names, got {names}")
        if (grad_scope == "last_k") != (last_k is not None) or (last_k is not None and not 1 <= last_k <= len(agents)):
            raise ValueError(f"last_k: expected 1 to {len(agents)} with grad_scope='last_k' and None otherwise, got {last_k!r}")
        if adapter_scope != "shared" and not hasattr(model, "peft_config"):
            raise ValueError(f"adapter_scope: {adapter_scope!r} needs a PEFT model, got {type(model).__name__}")
        if adapter_scope == "per_role" and (missing := [n for n in names if n not in model.peft_config]):
            raise ValueError(f"adapter_scope: 'per_role' needs an adapter for every agent, the model has none for {missing}")
        if not hasattr(causal_lm_of(model), "diffmas_patch"):
            patch_model(model)
        self.model, self.tokenizer, self.agents = model, tokenizer, list(agents)
        self.grad_scope, self.last_k, self.trace_content = grad_scope, last_k, trace_content
        self.adapter_scope, self.no_latents, self.positions = adapter_scope, no_latents, positions
        self.chat_template = bool(getattr(tokenizer, "chat_template", None)) if chat_template is None else chat_template
        self.realign = Realign(model, realign, temperature=temperature).train(model.training)
        self.training = model.training
        if adapter_scope != "shared":
            adapters.will_switch(model)
        if adapter_scope == "per_role":
            adapters.train_roles(model, names)

    # ---- text to tokens ----------------------------------------------------------------------------------------------

    def prompt_ids(self, agent: Agent, fields: dict) -> list[int]:
        """The token ids of an agent's prompt, chat template included."""
        return prompts.prompt_ids(self.tokenizer, agent, fields, self.chat_template)

    def answer_ids(self, answer: str) -> list[int]:
        """The token ids of an answer, closed by the end-of-sequence token."""
        return prompts.answer_ids(self.tokenizer, answer)

    def tokenize(self, questions: list[dict], room: list[int], what: str = "its prompt") -> list[list[list[int]]]:
        """The prompt ids of all agents, [agent][question][token]; an agent that is skipped has empty ones.

        room[b]: tokens that follow the last agent's prompt. Raises ValueError naming the question, before any agent runs,
        for a field that is missing and for what will not fit in the context.
        """
        return prompts.tokenize(self, questions, room, what)

    fields_of = staticmethod(prompts.fields_of)

    def skips(self, agent: Agent) -> bool:
        """Whether an agent does not run: it has no latent steps, and `no_latents` says so."""
        return agent.latent_steps == 0 and self.no_latents == "skip"

    # ---- one agent ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def _pack(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor([t for row in rows for t in row], dtype=torch.long, device=self.device)[None]

    def think(self, agent: Agent, questions: list[dict], trace: Trace, ids: list[list[int]] | None = None) -> Trace:
        """An agent's turn: one forward over its prompts on top of the trace, then T latent steps without logits.

        ids: what `tokenize` gave for this agent. Returns the trace that it hands on.
        """
        T = agent.latent_steps
        if self.skips(agent):
            return trace
        if ids is None:
            what = f"its prompt and {T} latent steps"
            starts = trace.next_positions
            ids = [prompts.prompt_that_fits(self, agent, b, row, starts[b], T, what) for b, row in enumerate(questions)]
        patch = patch_of(self.model)
        trace.agent = agent.name
        forward_pass = trace.plan([len(row) for row in ids], "prompt", reserve=T)
        h = forward(patch, trace, forward_pass, input_ids=self._pack(ids)).last_hidden_state[0]
        h = h[forward_pass.last_rows().to(h.device)]  # not always where the embeddings are
        latent_steps(patch, self.realign, trace, h, T)
        if self.trace_content == "latent_only":
            trace = trace.keep(kind="latent", positions=self.positions)
        return trace

    def _trace_for(self, ids: list[list[list[int]]], room: list[int]) -> Trace:
        """An empty trace with rows for all prompts and latent steps and room[b] tokens after them: it need not grow."""
        rows = sum(room) + sum(len(row) for turn in ids for row in turn)
        rows += sum(agent.latent_steps for agent in self.agents[:-1]) * len(room)
        return Trace(self.model, len(room), capacity=max(1, -(-rows // len(room))))

    def communicate(self, questions: list[dict], trace: Trace | None = None, ids=None) -> Trace:
        """All agents but the last take their turns; returns the trace that the last one reads. ids: of `tokenize`."""
        trace = Trace(self.model, batch_size=len(questions)) if trace is None else trace
        learning = {"full": 0, "detach_trace": len(self.agents) - 1}.get(self.grad_scope, len(self.agents) - (self.last_k or 0))
        for i, agent in enumerate(self.agents[:-1]):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= learning), adapters.of_agent(self, i):
                trace = self.think(agent, questions, trace, None if ids is None else ids[i])
        return trace

    # ---- the last agent ----------------------------------------------------------------------------------------------

    def forward(self, questions, answers: list[str] | None = None, num_items_in_batch=None) -> SystemOutput:
        """questions: list of str, or of dicts whose fields fill the agents' prompts; answers: list of str.

        num_items_in_batch: answer tokens over all accumulated micro-batches (Hugging Face Trainer); the loss is then the
        sum over this batch divided by it. Raises ValueError naming what does not fit.
        """
        questions = self.fields_of(questions)
        if isinstance(answers, str):
            raise ValueError("answers: expected a list, got one str")
        if answers is not None and len(answers) != len(questions):
            raise ValueError(f"answers: expected one for each of {len(questions)} questions, got {len(answers)}")
        adapters.check_checkpointing(self)
        targets = [self.answer_ids(a) for a in answers] if answers is not None else [[] for _ in questions]
        what = "its prompt and answer" if answers is not None else "its prompt"
        ids = self.tokenize(questions, [len(t) for t in targets], what)
        trace = self.communicate(questions, self._trace_for(ids, [len(t) for t in targets]), ids)
        rows = [p + t for p, t in zip(ids[-1], targets)]
        trace.agent = self.agents[-1].name
        forward_pass = trace.plan([len(r) for r in rows], "prompt")
        # The rows whose next token is an answer token: the last of the prompt and all of the answer but its end.
        first, predict = 0, []
        for p, t in zip(ids[-1], targets):
            predict.append(torch.arange(max(len(t), 1)) + first + len(p) - 1)
            first += len(p) + len(t)
        keep = torch.cat(predict).tolist()  # a list: it goes to wherever the last hidden states are
        with adapters.of_agent(self, len(self.agents) - 1):
            output = forward(
                patch_of(self.model), trace, forward_pass, head=True, input_ids=self._pack(rows), logits_to_keep=keep
            )
        logits = output.logits[0]
        if answers is None:
            return SystemOutput(logits=logits[:, None], trace=trace)
        labels = self._pack(targets)[0].to(logits.device)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        total = F.cross_entropy(wide, labels, reduction="sum")
        loss = total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        counts = [len(t) for t in targets]
        return SystemOutput(loss=loss, logits=_padded(logits, counts, 0.0), labels=_padded(labels, counts, -100), trace=trace)

    @torch.no_grad()
    def generate(
        self, questions, max_new_tokens: int = 256, temperature: float = 0.6, top_p: float = 0.95,
        seed: int | None = None, *, stop: list[str] | None = None, samples: int = 1, batch_size: int | None = None,
        progress: bool = False,
    ) -> list:  # fmt: skip
        """The last agent's text for each question: list[str], or list[list[str]] for samples > 1.

        temperature 0 is greedy. A result depends on the seed and on the place of its question in the list, not on how
        the list is batched. Decoding ends at an end-of-sequence token, at a `stop` string (cut off) or at max_new_tokens.
        progress: show a bar. Raises ValueError naming what does not fit.
        """
        tokens = self.generate_tokens(
            questions, max_new_tokens, temperature, top_p, seed, stop=stop, samples=samples, batch_size=batch_size,
            progress=progress,
        )  # fmt: skip
        texts = [[self._text(t, stop) for t in row] for row in tokens]
        return texts if samples > 1 else [row[0] for row in texts]

    @torch.no_grad()
    def generate_tokens(
        self, questions, max_new_tokens: int = 256, temperature: float = 0.6, top_p: float = 0.95,
        seed: int | None = None, *, stop: list[str] | None = None, samples: int = 1, batch_size: int | None = None,
        progress: bool = False,
    ) -> list[list[list[int]]]:  # fmt: skip
        """As `generate`, but the new token ids (the end-of-sequence token included), [question][sample][token]."""
        questions = self.fields_of(questions)
        if samples < 1:
            raise ValueError(f"samples: expected at least 1, got {samples}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        sampling = Sampling(max_new_tokens, temperature, top_p, seed, stop or [])
        ids = self.tokenize(questions, [max_new_tokens] * len(questions), "its prompt and answer")
        tokens, step = [], batch_size or len(questions)
        with evaluating(self):
            for first in range(0, len(questions), step):
                batch = [rows[first : first + step] for rows in ids]
                trace = self._trace_for(batch, [rows_ahead(sampling, samples)] * len(batch[0]))
                trace = self.communicate(questions[first : first + step], trace, batch)
                trace.agent = self.agents[-1].name
                with adapters.of_agent(self, len(self.agents) - 1):
                    tokens += decode(self, trace, batch[-1], sampling, samples, first, progress)
        return tokens

    def _text(self, ids: list[int], stop: list[str] | None) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        for s in stop or []:
            text = text.split(s, 1)[0]
        return text

    # ---- files -------------------------------------------------------------------------------------------------------

    def describe(self) -> dict:
        """The agents and options, as plain data."""
        return {
            "agents": [asdict(agent) for agent in self.agents], "realign": self.realign.mode,
            "grad_scope": self.grad_scope, "last_k": self.last_k, "trace_content": self.trace_content,
            "adapter_scope": self.adapter_scope, "no_latents": self.no_latents, "positions": self.positions,
            "chat_template": self.chat_template, "temperature": self.realign.temperature,
        }  # fmt: skip

    def save_pretrained(self, path) -> None:
        """Writes the PEFT adapter (if there is one) and `agents.json` to a directory."""
        from diffmas.agents.file import save

        save(self, path)

    @classmethod
    def from_pretrained(cls, path, model=None, tokenizer=None, **model_options) -> "MultiAgentSystem":
        """Reads back what `save_pretrained` wrote. model: a loaded base model, a directory or hub name, or None for the
        one named in the file. Raises ValueError for a file of another model."""
        from diffmas.agents.file import load

        return load(cls, path, model, tokenizer, **model_options)


def _padded(packed: Tensor, counts: list[int], fill) -> Tensor:
    """[sum(counts), ...] -> [B, max(counts), ...]."""
    if len(set(counts)) == 1:
        return packed.unflatten(0, (len(counts), counts[0]))
    return nn.utils.rnn.pad_sequence(packed.split(counts), batch_first=True, padding_value=fill)

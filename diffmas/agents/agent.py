"""An agent of a team, as it is described."""

import math
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass
from string import Formatter

from diffmas.agents.graph import reads_of
from diffmas.agents.selection import BUDGETED, check_by, check_count
from diffmas.formats import FORMATS

__all__ = ["Agent"]


@dataclass(frozen=True)
class Agent:
    """A role in a system.

    name: unique in the system. prompt: a format string with fields of the question, such as "{question}". latent_steps: T,
    how many latent steps follow the prompt; the last agent decodes text instead. An integer, or for each question its own: the
    name of the question's field that has it, or a function of the question's fields (which cannot be saved). system: a system
    message. stop_change: ends a question's latent steps before T, after the first step that changes its last hidden state by
    less than this, |h_t - h_(t-1)| / |h_(t-1)|; None takes all T. Waits for the device at each step. role: with adapter_scope
    "per_role" the agents of a role have one adapter, of its name; None is a role of the agent's own, named as it is. passes: J,
    how many forwards over all latent tokens at once stand for the T steps (`diffmas.agents.jacobi`); None, or J >= T: one by
    one. grad_passes: gradients go through the last so many of them; None: through all. reads: the names of the agents whose
    rows it reads, out of those before it, in this order; or {"agent": name, "positions": ..., "select": ...} for where it has
    them, and which of them (`diffmas.agents.graph.Read`). None: all before it; []: nobody. max_rows: it reads at most so many
    rows, `sinks` included; where there are more, the best ones, max_rows_by: last (the default), similarity or attention
    (`diffmas.agents.selection`), those of one kind, prompt, latent or text, before all others, or every, as far apart as the
    budget allows. model: the name of another model that takes the turn (`MultiAgentSystem`'s others), and whose
    rows are read through its projector; None is the system's own. max_message_tokens: behind its latent steps it writes a text
    of at most so many tokens, whose rows are read like the others (`diffmas.agents.messages`); with latent_steps 0 it says that
    alone; None: no text. message_temperature: None or 0 takes the likeliest tokens. rounds: it takes so many turns, in rounds
    with its neighbours in the list that take as many (`diffmas.agents.rounds`); None: one. later_prompt: of all rounds but the
    first, if it is another. quantized: whoever reads its rows has them in this format, int8, fp8 or int4, in training rounded
    to its numbers (`diffmas.agents.quantized`); None: as they are. low_rank: it takes its turn on the bare model, and who reads
    its rows has them as its own adapter makes them of the hidden states there (`diffmas.agents.low_rank`). Nobody reads the
    agent that answers: latent_steps, messages and quantized do nothing in its turn.

    Raises ValueError for T < 0, stop_change <= 0, passes < 1, grad_passes that are not 1 to passes, passes together with
    stop_change, reads that are no list of agents, max_rows < 1, an unknown max_rows_by, max_message_tokens < 1, a negative
    message_temperature, or one without messages, rounds < 1, a later_prompt without rounds, an unknown format, low_rank
    that is no bool or comes with quantized, an empty name, role or model, or a prompt that is no string.

        >>> Agent("planner", "Plan how to answer: {question}", latent_steps=10).render({"question": "2 + 2?"})
        'Plan how to answer: 2 + 2?'
        >>> Agent("planner", "Plan: {question}", latent_steps="steps").steps({"question": "2 + 2?", "steps": 3})
        3
    """

    name: str
    prompt: str
    latent_steps: int | str | Callable = 0
    system: str | None = None
    stop_change: float | None = None
    role: str | None = None
    passes: int | None = None
    grad_passes: int | None = None
    reads: list | None = None  # then a tuple of `Read`
    max_rows: int | None = None
    max_rows_by: str | None = None
    model: str | None = None
    max_message_tokens: int | None = None
    message_temperature: float | None = None
    rounds: int | None = None
    later_prompt: str | None = None
    quantized: str | None = None
    low_rank: bool = False

    def __post_init__(self):
        T = self.latent_steps
        if isinstance(T, bool) or not (isinstance(T, int) and T >= 0 or isinstance(T, str) and T or callable(T)):
            raise ValueError(
                f"agent {self.name!r}: latent_steps: expected an integer >= 0, the name of a field or a function, got {T!r}"
            )
        if self.stop_change is not None and not 0 < self.stop_change < math.inf:
            raise ValueError(f"agent {self.name!r}: stop_change: expected a number > 0 or None, got {self.stop_change!r}")
        J, k = self.passes, self.grad_passes
        if J is not None and (isinstance(J, bool) or not isinstance(J, int) or J < 1):
            raise ValueError(f"agent {self.name!r}: passes: expected an integer >= 1 or None, got {J!r}")
        if J is not None and self.stop_change is not None:
            raise ValueError(f"agent {self.name!r}: stop_change: expected None with passes, got {self.stop_change!r}")
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or J is None or not 1 <= k <= J):
            most = "None without passes" if J is None else f"1 to {J} passes or None"
            raise ValueError(f"agent {self.name!r}: grad_passes: expected {most}, got {k!r}")
        if not self.name:
            raise ValueError("name: expected a name for every agent, got an empty one")
        if self.role is not None and not (isinstance(self.role, str) and self.role):
            raise ValueError(f"agent {self.name!r}: role: expected a name or None, got {self.role!r}")
        if self.model is not None and not (isinstance(self.model, str) and self.model):
            raise ValueError(f"agent {self.name!r}: model: expected the name of another model or None, got {self.model!r}")
        if not isinstance(self.prompt, str):
            raise ValueError(f"agent {self.name!r}: prompt: expected a format string, got {type(self.prompt).__name__}")
        check_count(f"agent {self.name!r}: rounds", self.rounds)
        if self.later_prompt is not None and (self.rounds is None or not isinstance(self.later_prompt, str)):
            wanted = "None without rounds" if self.rounds is None else "a format string or None"
            raise ValueError(f"agent {self.name!r}: later_prompt: expected {wanted}, got {self.later_prompt!r}")
        if self.quantized is not None and not (isinstance(self.quantized, str) and self.quantized in FORMATS):
            raise ValueError(f"agent {self.name!r}: quantized: expected one of {[*FORMATS]} or None, got {self.quantized!r}")
        if not isinstance(self.low_rank, bool):
            raise ValueError(f"agent {self.name!r}: low_rank: expected True or False, got {self.low_rank!r}")
        if self.low_rank and self.quantized is not None:
            raise ValueError(f"agent {self.name!r}: quantized: expected None with low_rank, got {self.quantized!r}")
        object.__setattr__(self, "reads", reads_of(self.name, self.reads))
        check_count(f"agent {self.name!r}: max_rows", self.max_rows)
        check_by(f"agent {self.name!r}: max_rows_by", self.max_rows_by, "max_rows", self.max_rows, BUDGETED)
        check_message(self.name, self.max_message_tokens, self.message_temperature)

    def described(self) -> dict:
        """As plain data, which `Agent(**data)` takes."""
        reads = None if self.reads is None else [read.described() for read in self.reads]
        return {**asdict(self), "reads": reads}

    @property
    def adapter(self) -> str:
        """The name of its adapter, where each role has its own."""
        return self.role or self.name

    def render(self, fields: dict) -> str:
        """The prompt with the question's fields filled in; raises ValueError naming a field that is not there."""
        for _, name, _, _ in Formatter().parse(self.prompt):
            if name is not None and (not name or name.split(".")[0].split("[")[0] not in fields):
                raise ValueError(
                    f"agent {self.name!r}: its prompt needs the field {{{name}}}, the question has {sorted(fields)}"
                )
        return self.prompt.format_map(fields)

    def steps(self, fields: dict) -> int:
        """T for a question; raises ValueError for a field that is not there, or a value that is no integer >= 0."""
        T = self.latent_steps
        if isinstance(T, int):
            return T
        if callable(T):
            given, T = "from its function", T(fields)
        elif T not in fields:
            raise ValueError(f"agent {self.name!r}: latent_steps: expected a field {T!r}, the question has {sorted(fields)}")
        else:
            given, T = f"in the field {T!r}", fields[T]
            T = int(T) if isinstance(T, str) and T.isdecimal() else T  # as a command line has it
        try:
            if not isinstance(T, bool) and operator.index(T) >= 0:
                return operator.index(T)
        except TypeError:
            pass
        raise ValueError(f"agent {self.name!r}: latent_steps: expected an integer >= 0 {given}, got {T!r}")

    def check(self, fields: dict) -> None:
        """Raises ValueError naming a field of the prompt or of the latent steps that a question lacks, or that does not fit."""
        self.render(fields)
        self.steps(fields)


def check_message(name: str, tokens: int | None, temperature: float | None) -> None:
    """Raises ValueError naming what does not fit of the message that an agent of this name writes."""
    check_count(f"agent {name!r}: max_message_tokens", tokens)
    where = f"agent {name!r}: message_temperature"
    if temperature is not None and tokens is None:
        raise ValueError(f"{where}: expected None without max_message_tokens, got {temperature!r}")
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if temperature is not None and not (number and 0 <= temperature < math.inf):
        raise ValueError(f"{where}: expected a number >= 0 or None, got {temperature!r}")

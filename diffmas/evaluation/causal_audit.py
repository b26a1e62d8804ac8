"""Does a team communicate? The last agent answers the same questions after its messages were taken away or exchanged.

A message is what an agent handed on: its rows on the trace that the last agent reads. All agents write once. Every condition
is another view of these rows, and only the last agent answers anew:

own      the messages as they are
none     without the message
other    another question's message in its place
noise    noise of equal norm in its place: each row's keys and values, by head, in a random direction

of all agents' messages, and of each agent's alone with the others' as they are (its "none" is all but that agent). What an
earlier agent told later ones stays in theirs: only the way to the last agent is cut.

Positions: what stays keeps its own, and so does the last agent's prompt. A message from another question is read as one block
whose last row is where the last row of the own one was, so that its distance from the reader is the same if the lengths differ.
A longer one may so begin before the sinks and before position 0, an order that was never trained: where messages differ much
in length, "other" may lose by that and not by what it says.
The first `sinks` tokens of a sequence, a pretrained model's attention sink, are no part of a message and always stay, under
every condition. They may hold text of the first agent's prompt, which the last agent then always reads: what its first words
tell is not audited.

A team communicates where its own messages make more answers right than another question's, with the 95 % interval of the
paired difference above 0. Less does not say so: without a message, or with noise, a model may fail because it never saw such a
trace. Intervals are not corrected for the number of conditions.
"""

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from diffmas.agents import adapters
from diffmas.agents.decoding import decode
from diffmas.agents.eval_mode import evaluating
from diffmas.agents.sampling import Sampling
from diffmas.agents.system import MultiAgentSystem
from diffmas.evaluation.metrics import Difference, difference_of_means, difference_of_rates, wilson
from diffmas.evaluation.run import shares_right
from diffmas.evaluation.scorer import Scorer
from diffmas.trace import Segment, Trace
from diffmas.training.data import question_and_answer

__all__ = ["CHANGES", "Condition", "audit", "communicates"]

CHANGES = ("own", "none", "other", "noise")


@dataclass
class Condition:
    """How the last agent answers under one condition.

    change: one of CHANGES. agent: whose message is changed; None: all agents'. accuracy: share of right samples; [low, high]:
    its 95 % Wilson interval over questions. nll: of a gold answer, in nats, the mean over questions. gain: the accuracy with
    the own messages less this one's; saved: this nll less that with the own messages; None for "own" itself.

    scores, nlls, texts: by question, in the order of the rows.
    """

    change: str
    agent: str | None
    accuracy: float
    low: float
    high: float
    nll: float
    gain: Difference | None
    saved: Difference | None
    scores: list[float] = field(default_factory=list, repr=False)
    nlls: list[float] = field(default_factory=list, repr=False)
    texts: list[list[str]] = field(default_factory=list, repr=False)


def audit(
    system: MultiAgentSystem, rows: list[dict], samples: int = 1, scorer: Scorer | None = None, batch_size: int | None = None,
    kind: str | None = None, seed: int | None = 0, progress: Callable[[str], None] | None = None, *,
    max_new_tokens: int | None = None, temperature: float | None = None, top_p: float | None = None,
    stop: list[str] | None = None,
) -> list[Condition]:  # fmt: skip
    """The conditions of a team, "own" first, then those of all agents together, then agent by agent.

    rows, samples, scorer, batch_size: as in `evaluate`. kind: only rows of this kind are a message ("latent": latent steps);
    None: all that an agent hands on. seed: of the samples, the same under each condition, of messages that are sampled, of
    who gets whose message, and of the noise. Others: of `MultiAgentSystem.generate`. Partners have different answers where that
    can be.

    Raises ValueError for fewer than two rows, a row that does not fit, or a team that hands on no such message.

        >>> conditions = audit(system, rows, max_new_tokens=4)
        >>> [(c.change, c.agent) for c in conditions[:5]]
        [('own', None), ('none', None), ('other', None), ('noise', None), ('none', 'planner')]
        >>> communicates(conditions)
        False
    """
    if len(rows) < 2:
        raise ValueError(f"rows: expected at least two, to give one question's message to another, got {len(rows)}")
    questions, golds = map(list, zip(*(question_and_answer(row, f"rows[{i}]") for i, row in enumerate(rows))))
    sampling = Sampling.of(system, max_new_tokens, temperature, top_p, seed, stop, samples)
    system.tokenize(
        MultiAgentSystem.fields_of(questions), [sampling.max_new_tokens] * len(rows), "its prompt and answer"
    )  # do they fit?
    found: dict[tuple, dict[int, tuple]] = {}  # by condition: for each row its texts and nll
    with evaluating(system), torch.no_grad():
        for batch, partners in batches(golds, sampling.seed, batch_size):
            done = len(found[("own", None)]) if found else 0
            if progress:
                progress(f"{done} of {len(rows)} questions")
            asked = [questions[i] for i in batch]
            trace = system.communicate(asked, seeds=[sampling.seed_of(i) for i in batch])
            for name, view in conditions_of(trace, partners, kind, system.sinks, sampling.seed, batch):
                answered = _answer(system, view, asked, [golds[i] for i in batch], done, sampling)
                found.setdefault(name, {}).update(zip(batch, answered))
    if len(found) == 1:
        raise ValueError(f"system: expected agents that hand on rows{f' of kind {kind!r}' if kind else ''}, got none")
    return _conditions(found, golds, rows, scorer or Scorer())


def communicates(conditions: list[Condition], agent: str | None = None) -> bool:
    """Whether the own messages (of one agent: its own) make more answers right than another question's, with the interval of
    the paired difference above 0. Raises ValueError for an agent without a message."""
    for c in conditions:
        if (c.change, c.agent) == ("other", agent):
            return c.gain.low > 0
    known = sorted({c.agent for c in conditions if c.agent})
    raise ValueError(f"agent: expected None or one of {known}, got {agent!r}")


# ---- who gets whose message --------------------------------------------------------------------------------------------


def batches(golds: list[str], seed: int, size: int | None):
    """Batches of rows, and for each row of a batch the place in it of the one whose message it gets.

    Rows get each other's in pairs (three rows in a circle, if the number is odd), so that partners are in one batch whatever
    its size. In the order of the answers, those half the rows apart differ, unless one answer is that of more than half.
    """
    order = list(range(len(golds)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda i: golds[i])
    half = len(order) // 2
    circles = [[order[i], order[i + half]] for i in range(half)]
    if len(order) % 2:
        circles[-1].append(order[-1])
    step = max(1, (size or len(order)) // 2)
    for first in range(0, half, step):
        some = circles[first : first + step]
        batch = [i for circle in some for i in circle]
        place = {i: at for at, i in enumerate(batch)}
        yield batch, [place[circle[(k + 1) % len(circle)]] for circle in some for k in range(len(circle))]


# ---- the conditions as views -------------------------------------------------------------------------------------------


def conditions_of(trace: Trace, partners: list[int], kind: str | None, sinks: int, seed: int, batch: list[int]):
    """(change, agent) and the view, for every condition; only "own" if nobody wrote a message."""
    table = _message_table(trace, kind, sinks)
    authors = list(dict.fromkeys(s.agent for row in table for s, mine in row if mine))
    yield ("own", None), trace
    if not authors:
        return
    noisy = _Noisy(trace, table, seed, batch)
    for agent in [None, *authors] if len(authors) > 1 else [None]:
        whose = set(authors) if agent is None else {agent}
        yield ("none", agent), trace.reading([_replaced(row, [], whose) for row in table])
        yield ("other", agent), trace.reading([_replaced(row, table[p], whose) for row, p in zip(table, partners)])
        yield ("noise", agent), noisy.view(whose)


def _message_table(trace: Trace, kind: str | None, sinks: int) -> list[list[tuple[Segment, bool]]]:
    """By sequence, the segments and whether each is (part of) a message; cut where the sinks end."""
    table: list[list[tuple[Segment, bool]]] = [[] for _ in range(trace.batch_size)]
    before = [0] * trace.batch_size
    for s in trace.segments:
        row, sink = table[s.sequence], min(s.length, max(0, sinks - before[s.sequence]))
        before[s.sequence] += s.length
        if sink:
            row.append((s._replace(length=sink), False))
        if sink < s.length:
            row.append((s.skip(sink), kind in (None, s.kind)))
    return table


def _replaced(row, other, whose: set) -> list[Segment]:
    """The segments of a row with what `whose` agents wrote in `other` in the place of their messages."""
    given: dict = {}
    for s, mine in other:
        if mine and s.agent in whose:
            given.setdefault(s.agent, []).append(s)
    ends = {s.agent: s.next_position for s, mine in row if mine}
    out = []
    for s, mine in row:
        if not mine or s.agent not in whose:
            out.append(s)
        elif block := given.pop(s.agent, None):
            move = ends[s.agent] - block[-1].next_position
            out += [x._replace(offset=x.offset + move) for x in block]
    return out


class _Noisy:
    """A trace of its own, with a copy of all rows of another and noise for those of messages."""

    def __init__(self, trace: Trace, table, seed: int, batch: list[int]):
        """table: of `_message_table`. batch: the numbers of the rows, from which the noise follows."""
        masks = [torch.tensor([mine for s, mine in row for _ in range(s.length)], dtype=torch.bool) for row in table]
        generators = [torch.Generator().manual_seed((seed * 1_000_003 + i) % (1 << 63)) for i in batch]
        kv = []
        for layer in range(len(trace)):
            own = [trace.keys_values(layer, b) for b in range(trace.batch_size)]
            noise = [tuple(_noise(x[m], g) for x in pair) for pair, m, g in zip(own, masks, generators)]
            kv.append(tuple(torch.cat(x) for x in zip(*own, *noise)))
        # The same segments in the new rows: all own ones first, then the noise.
        self.table, self.noise, at = [], [], 0
        after = sum(trace.lengths)
        for row in table:
            self.table.append([])
            self.noise.append([])
            for s, mine in row:
                self.table[-1].append((s._replace(start=at), mine))
                self.noise[-1].append(s._replace(start=after) if mine else None)
                at, after = at + s.length, after + s.length * mine
        rows = [[s for s, _ in row] + [s for s in new if s] for row, new in zip(self.table, self.noise)]
        self.trace = Trace.of_rows(trace.spec, rows, trace.next_positions, kv)

    def view(self, whose: set) -> Trace:
        """A view with noise for the messages of these agents."""
        return self.trace.reading(
            [
                [new if mine and s.agent in whose else s for (s, mine), new in zip(row, noise)]
                for row, noise in zip(self.table, self.noise)
            ]
        )


def _noise(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random directions of the norms of x, [n, Hkv, D]."""
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.device)
    return (noise * (x.float().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))).to(x.dtype)


# ---- answers -----------------------------------------------------------------------------------------------------------


def _answer(system, trace: Trace, asked: list[dict], golds: list[str], first: int, sampling: Sampling):
    """For each question its texts, and the nll of its gold answer, with the last agent reading `trace`."""
    out = system(asked, golds, trace=trace.fork(1)[0])
    nlls = F.cross_entropy(out.logits.float().transpose(1, 2), out.labels, reduction="none").sum(1).tolist()
    last = system.agents[-1]
    trace = trace.fork(1)[0]
    trace.agent = last.name
    with adapters.of_agent(system, len(system.agents) - 1):
        prompts = [system.prompt_ids(last, fields) for fields in asked]
        tokens = decode(system, trace, prompts, sampling, first, False)
    return [([system.text_of(t, sampling.stop) for t in row], nll) for row, nll in zip(tokens, nlls)]


def _conditions(found: dict[tuple, dict[int, tuple]], golds: list[str], rows: list[dict], scorer: Scorer) -> list[Condition]:
    conditions = []
    for (change, agent), answered in found.items():
        texts, nlls = map(list, zip(*(answered[i] for i in range(len(golds)))))
        scores = shares_right(scorer, texts, golds, rows)
        accuracy = statistics.fmean(scores)
        own = conditions[0] if conditions else None
        conditions.append(
            Condition(
                change, agent, accuracy, *wilson(accuracy, len(golds)), statistics.fmean(nlls),
                own and difference_of_rates(own.scores, scores), own and difference_of_means(nlls, own.nlls),
                scores, nlls, texts,
            )
        )  # fmt: skip
    return conditions

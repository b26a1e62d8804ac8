"""Who waits, and the one thread that owns all models.

A batch is the question that has waited longest, and all others that wait for the same team with the same settings, as far as
they fit in. Its answers have limits and seeds of their own; one that is long does not keep the others from ending. Whoever
comes while a batch runs waits for the next one.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from diffmas.agents import adapters
from diffmas.agents.board import Board
from diffmas.agents.decoding import decode
from diffmas.agents.eval_mode import evaluating
from diffmas.agents.prompts import Turn, encodes
from diffmas.agents.sampling import Sampling, stream
from diffmas.models.next_tokens import RESERVE
from diffmas.serving.team import Question
from diffmas.trace import Trace

__all__ = ["AgentOutput", "Batcher", "Closed", "Job", "Overloaded", "without_frames"]

log = logging.getLogger(__name__)


class Overloaded(Exception):
    """As many wait as may."""


class Closed(Exception):
    """Nobody is answered any more."""


@dataclass
class AgentOutput:
    """What an agent did for one question. text, if that was asked: its message, or of one that writes none what it would have
    written in place of its latent steps; of agents of other models None, since these write no text here. message_tokens: of its
    message."""

    name: str
    prompt_tokens: int
    latent_steps: int
    text: str | None = None
    message_tokens: int = 0


@dataclass(eq=False)
class Job:
    """A question on its way. The worker writes; whoever asked reads when it is told.

    deadline: of `time.monotonic`. tell: called, in the worker's thread, when there is something new; it must not wait.
    tokens: of each sample, so far. ends: why a sample is at its end, stop | length, written after its last token. agents: all
    but the last. error: why there will be no answer. done: whether nothing comes any more.
    """

    question: Question
    deadline: float
    tell: Callable[[], object]
    tokens: list[list[int]] = field(default_factory=list)
    ends: list[str | None] = field(default_factory=list)
    agents: list[AgentOutput] = field(default_factory=list)
    error: Exception | None = None
    done: bool = False
    cancelled: bool = False

    def __post_init__(self):
        samples = self.question.settings.samples
        self.tokens, self.ends = [[] for _ in range(samples)], [None] * samples

    @property
    def gone(self) -> bool:
        """Whether nobody wants the answer any more."""
        return self.cancelled or self.done or time.monotonic() > self.deadline

    def finish(self, error: Exception | None = None) -> None:
        if not self.done:
            self.error, self.done = error, True
            self.tell()


class Batcher:
    """A queue and its worker.

    max_batch: sequences at once, samples counted. max_waiting: questions that may wait. The worker has as many of torch's
    threads as whoever makes the batcher. Ends with `close`; used as a context, at its end.
    """

    def __init__(self, max_batch: int = 16, max_waiting: int = 128):
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self._waiting: deque[Job] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._worker = threading.Thread(target=self._work, args=(torch.get_num_threads(),), name="diffmas", daemon=True)
        self._worker.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    # ---- by whoever asks ---------------------------------------------------------------------------------------------

    def check_room(self) -> None:
        """Raises Overloaded if nobody else may wait."""
        with self._changed:
            if len(self._waiting) >= self.max_waiting:
                raise Overloaded(f"expected at most {self.max_waiting} waiting requests")

    def submit(self, job: Job) -> None:
        """Raises Overloaded, or Closed after `close`."""
        with self._changed:
            if self._closed:
                raise Closed("the server is shutting down")
            self.check_room()
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody wants the answer: if it runs, it leaves its batch with the next token."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)

    def close(self) -> None:
        """Ends what runs, and fails what waits."""
        with self._changed:
            self._closed, left = True, list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for job in left:
            job.finish(Closed("the server is shutting down"))
        self._worker.join()

    # ---- the worker --------------------------------------------------------------------------------------------------

    def _work(self, threads: int) -> None:
        torch.set_num_threads(threads)  # each thread has a number of its own
        while jobs := self._next():
            self._answer(jobs)
            del jobs  # whoever waits holds nothing

    def _next(self) -> list[Job]:
        """The jobs of the next batch; none when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return []
            first, room = self._waiting[0].question, self.max_batch
            jobs = []
            for job in list(self._waiting):
                question = job.question
                fits = not jobs or question.settings.samples <= room
                if fits and (question.team, question.settings) == (first.team, first.settings):
                    jobs.append(job)
                    self._waiting.remove(job)
                    room -= question.settings.samples
            return jobs

    def _answer(self, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if not job.gone]
        try:
            if jobs:
                self._run(jobs)
        except Exception as error:
            if len(jobs) > 1:  # whose fault it is, or that there are too many, shows one by one
                log.warning("a batch of %d failed, one by one now: %s", len(jobs), error)
            else:
                log.exception("a question failed")
                jobs[0].finish(without_frames(error))
        else:
            for job in jobs:
                job.finish(Closed("the server is shutting down") if self._closed else None)
            return
        for job in jobs if len(jobs) > 1 else ():
            if any(job.tokens):  # it may have been sent already
                job.finish(RuntimeError("the batch failed"))
            else:
                job.agents.clear()
                self._answer([job])

    @torch.no_grad()
    def _run(self, jobs: list[Job]) -> None:
        """All turns of a batch, as `MultiAgentSystem.generate_tokens` has them; who is gone leaves after each agent's."""
        first = jobs[0].question
        system, settings = first.team.system, first.settings
        trace = Trace(system.model, len(jobs), capacity=max(map(_rows, jobs)))
        with evaluating(system), system.realign.unchanging():
            board = Board(system, trace, [stream(job.question.seed) for job in jobs])
            for group in board.groups:
                asked = [job.question.fields for job in jobs]
                texts = {}
                for i in group if settings.agent_output else ():
                    if system.agents[i].model is None and system.agents[i].max_message_tokens is None:
                        texts[i] = self._texts(jobs, board.read(i, asked), i)
                turns = [list(row) for row in zip(*(job.question.turns for job in jobs))]
                board.write(group, asked, turns)
                for i in group:
                    self._tell_turn(jobs, i, board.written(i), turns[i], texts.get(i))
                stay = [b for b, job in enumerate(jobs) if not self._left(job)]
                jobs = [jobs[b] for b in stay]
                if not jobs:
                    return
                if len(stay) < len(turns[0]):
                    board.select(stay)
            trace = board.read(len(system.agents) - 1, [job.question.fields for job in jobs])
            limits, seeds = [job.question.max_new_tokens for job in jobs], [job.question.seed for job in jobs]
            system.generate_tokens(
                [job.question.fields for job in jobs], limits, seed=seeds, trace=trace,
                on_token=lambda *what: self._take(jobs, *what), **settings.options(),
            )  # fmt: skip

    def _tell_turn(self, jobs: list[Job], i: int, trace: Trace, turns: list[Turn], texts: list[str | None] | None) -> None:
        """What agent i has done. trace: with its latent rows and its message."""
        team, asked = jobs[0].question.team, jobs[0].question.settings.agent_output
        system = team.system
        name, taken = system.agents[i].name, [0] * len(jobs)
        for s in trace.segments:
            taken[s.sequence] += s.length * ((s.agent, s.kind) == (name, "latent"))
        if encodes(system, system.agents[i]):  # whose prompt is latent rows
            taken = [n - len(turn.ids) for n, turn in zip(taken, turns)]
        for b, (job, turn, steps) in enumerate(zip(jobs, turns, taken)):
            said = _written(trace, b, name) if turn.message else []
            text = team.text_of(said) if said and asked else texts and texts[b]
            job.agents.append(AgentOutput(name, len(turn.ids), steps, text, len(said)))

    def _left(self, job: Job) -> bool:
        return job.gone or self._closed

    def _take(self, jobs: list[Job], b: int, sample: int, token: int, last: bool) -> bool:
        """A token of a batch's answers; returns whether its answer has to end."""
        job = jobs[b]
        if self._left(job):
            return True
        job.tokens[sample].append(token)
        if last:
            job.ends[sample] = job.question.team.why_ended(job.tokens[sample], job.question.settings.stop)
        if None in job.ends:
            job.tell()
        else:
            job.finish()  # it does not wait for the rest of its batch
        return False

    def _texts(self, jobs: list[Job], trace: Trace, i: int) -> list[str | None]:
        """What agent i would write, were it the last one; None where it has no turn. trace: what it reads, left as it is."""
        team, settings = jobs[0].question.team, jobs[0].question.settings
        texts: list[str | None] = [None] * len(jobs)
        asked = [b for b, job in enumerate(jobs) if job.question.turns[i].ids]
        if not asked:
            return texts
        questions = [jobs[b].question for b in asked]
        limits, seeds = [q.max_new_tokens for q in questions], [q.seed for q in questions]
        sampling = Sampling.of(team.system, limits, seed=seeds, **{**settings.options(), "samples": 1})
        prompts, ends = [q.turns[i].ids for q in questions], lambda n, *_: self._left(jobs[asked[n]])
        with adapters.of_agent(team.system, i):
            tokens = decode(team.system, trace.select(asked), prompts, sampling, 0, False, ends)
        for b, row in zip(asked, tokens):
            texts[b] = team.text_of(row[0], settings.stop)
        return texts


def _written(trace: Trace, sequence: int, agent: str) -> list[int]:
    """The token ids of an agent's message in a sequence."""
    rows = [s for s in trace.segments if s.sequence == sequence]
    own = np.repeat([(s.agent, s.kind) == (agent, "text") for s in rows], [s.length for s in rows])
    return trace.token_ids(sequence)[torch.from_numpy(own)].tolist()


def _rows(job: Job) -> int:
    """Of the trace, that a question is sure to need, and some for its answers."""
    question = job.question
    answers = question.settings.samples * min(RESERVE, question.max_new_tokens)
    return sum(turn.most for turn in question.turns) + answers


def without_frames(error: Exception) -> Exception:
    """An error that does not keep what its frames held, such as a trace."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error

"""vLLM in the place of a `Batcher`: the server's jobs go into its continuous batch, whichever team they are for."""

import asyncio
import concurrent.futures
import logging
import threading
import uuid

from diffmas.agents.decoding import Stops
from diffmas.agents.prompts import Turn
from diffmas.serving.batcher import AgentOutput, Closed, Job, Overloaded, without_frames
from diffmas.serving.team import Question
from diffmas.serving.vllm.teams import Teams

__all__ = ["Engine"]

log = logging.getLogger(__name__)


class Engine:
    """An `AsyncLLM` on an event loop of its own thread.

    max_batch: answers at once. max_waiting: questions beside as many as that. options: of vLLM's `AsyncEngineArgs`. Ends with
    `close`; used as a context, at its end. Raises ValueError for options that do not go with teams.
    """

    def __init__(self, teams: Teams, max_batch: int = 16, max_waiting: int = 128, **options):
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.teams, self.most = teams, max_batch + max_waiting
        given = {"skip_tokenizer_init": True, "max_num_seqs": max_batch, **teams.engine_options(), **options}
        self._jobs: dict[Job, concurrent.futures.Future] = {}
        self._lock, self._closed = threading.Lock(), False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="diffmas-vllm", daemon=True)
        self._thread.start()

        async def start():
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**given))

        try:
            self._engine = asyncio.run_coroutine_threadsafe(start(), self._loop).result()
        except BaseException:
            self._end_loop()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def check_room(self) -> None:
        """Raises Overloaded if nobody else may wait."""
        if len(self._jobs) >= self.most:
            raise Overloaded(f"expected at most {self.most} requests at once")

    def submit(self, job: Job) -> None:
        """Raises Overloaded, or Closed after `close`."""
        with self._lock:
            if self._closed:
                raise Closed("the server is shutting down")
            self.check_room()
            self._jobs[job] = asyncio.run_coroutine_threadsafe(self._answer(job), self._loop)
        self._jobs[job].add_done_callback(lambda _: self._jobs.pop(job, None))

    def cancel(self, job: Job) -> None:
        """Nobody wants the answer: vLLM drops its requests."""
        job.cancelled = True
        if (future := self._jobs.get(job)) is not None:
            future.cancel()

    def close(self) -> None:
        """Ends what runs."""
        with self._lock:
            self._closed, left = True, dict(self._jobs)
        for job, future in left.items():
            future.cancel()
            job.finish(Closed("the server is shutting down"))
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._end_loop()
        self._engine = None  # it would end itself once more when Python does

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    # ---- in the loop -------------------------------------------------------------------------------------------------

    async def _stop(self) -> None:
        self._engine.shutdown()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _answer(self, job: Job) -> None:
        question = job.question
        try:
            await self._agents(job)
            stops = Stops(question.team.system.tokenizer, list(question.settings.stop))
            async for sample, tokens, ended in self._tokens(question):
                if job.ends[sample] is None:
                    ended = _take(job.tokens[sample], tokens, stops) or ended
                    job.ends[sample] = question.team.why_ended(job.tokens[sample], question.settings.stop) if ended else None
                    job.tell()
                if None not in job.ends:
                    break
            job.finish()
        except asyncio.CancelledError:
            job.finish(Closed("the request was cancelled"))
            raise
        except Exception as error:
            if not isinstance(error, ValueError):
                log.exception("a question failed")
            job.finish(without_frames(error))

    async def _tokens(self, question: Question):
        """Yields a sample's number, its next tokens and whether they are its last."""
        from vllm.sampling_params import RequestOutputKind

        prompt, params = self.teams.request(question)
        params.detokenize, params.output_kind, params.stop = False, RequestOutputKind.DELTA, []
        outputs = self._engine.generate(prompt, params, uuid.uuid4().hex)
        try:
            async for output in outputs:
                for part in output.outputs:
                    yield part.index, list(part.token_ids), part.finish_reason is not None
        finally:  # one that is left is aborted
            await outputs.aclose()

    async def _agents(self, job: Job) -> None:
        """What each agent but the last does, and with `agent_output` would write, each a request of its own."""
        question = job.question
        thinkers = list(zip(question.team.agents, question.turns))[:-1]
        texts = [None] * len(thinkers)
        if question.settings.agent_output:
            texts = await asyncio.gather(*(self._text(question, n) for n in range(len(thinkers))))
        job.agents += [AgentOutput(agent.name, len(turn.ids), turn.steps, text) for (agent, turn), text in zip(thinkers, texts)]

    async def _text(self, question: Question, n: int) -> str | None:
        if not question.turns[n].ids:
            return None
        turns, settings = [*question.turns[:n], Turn(question.turns[n].ids, 0)], question.settings._replace(samples=1)
        shorter = Question(question.team, question.fields, turns, question.max_new_tokens, question.seed, settings)
        stops, text = Stops(question.team.system.tokenizer, list(settings.stop)), []
        async for _, tokens, _ in self._tokens(shorter):
            if _take(text, tokens, stops):
                break
        return question.team.text_of(text, settings.stop)


def _take(taken: list[int], tokens: list[int], stops: Stops) -> bool:
    """Appends tokens one by one; returns whether a stop string has ended them."""
    for token in tokens:
        taken.append(token)
        if stops(taken):
            return True
    return False

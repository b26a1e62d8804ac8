"""The core of the suite: cases, providers, the correctness gate, interleaved timing. It knows no op and no pytest.

A *case* says what is measured (op, phase, regime, shape). A *problem* is a case with its inputs, its float64 answer, and its
least possible work. A *provider* is one way to do that work. It makes a *trial* of a problem: the call to be timed, and how to
read its result; where it does not apply it raises `Cannot` with the reason. A *contest* holds the trials of one problem. It
checks each against the float64 answer and times the right ones in turns (A B C A B C ..., on a GPU launch by launch), so that a
noisy machine disturbs all of them alike. A canary in every round says whether it was.
"""

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from diffmas.benchmarks.machine import Graph, Machine, canary, in_turns, peak_bytes, sample

__all__ = ["OURS", "Cannot", "Case", "Contest", "Problem", "Provider", "Senseless", "Trial", "drowned", "error"]

OURS = "diffmas"
SAMPLE_SECONDS = 2e-3  # a sample lasts at least this long, so that the clock's own step does not count
GPU_REPEATS = 10  # calls of a sample at most: events are exact, and each call waits for a cold cache
LONG = 2.0  # seconds of a call that is warm after its gate, on a CPU: on a GPU it may have been a compiler's
LAUNCH_BOUND_TOKENS = 64  # up to so many tokens, launches bound an op on a GPU
LEAST = 1e-6  # seconds of a call in a graph: what a first sample says below is noise, and would make all others hopeless
NOISE = "no number: it takes less than the spread of its samples"
HOPELESS, HOPELESS_ROUNDS = 10, 2  # a provider this many times slower than the fastest takes part in this many rounds only


class Cannot(Exception):
    """This provider does not run this case: a row with the reason instead of a number."""


class Senseless(Cannot):
    """This case means nothing for this provider: no row."""


@dataclass(frozen=True)
class Case:
    """What is measured. Fields that mean nothing for an op stay 0 or "".

    N: rows of the trace that each sequence sees in the end (the longest, if they differ); n: new tokens per sequence; T: latent
    steps of each agent but the last. heads: "query/key-value". model, layers: of end-to-end cases; note: what else to know.
    """

    op: str
    regime: str
    phase: str = "forward"
    N: int = 0
    n: int = 0
    batch: int = 1
    heads: str = ""
    D: int = 0
    dtype: str = "float32"
    T: int = 0
    agents: int = 0
    model: str = ""
    layers: int = 0
    note: str = ""
    quick: bool = field(default=False, compare=False)  # part of `--quick`

    @property
    def key(self) -> str:
        shape = [f"{k}={v}" for k, v in self.columns().items() if v and k not in ("op", "phase", "regime", "note")]
        return " ".join([self.op, self.regime, self.phase, *shape])

    def columns(self) -> dict:
        return {k: v for k, v in asdict(self).items() if k != "quick"}


@dataclass
class Trial:
    """One provider's work on one problem.

    call: what is timed. read: its result -> the outputs that the gate compares, in the problem's layout. reset: run before each
    sample, untimed. seconds: filled by the call itself with the time of its parts. answer: compared with in the place of the
    problem's reference; only for a part of ours left out on purpose ("diffmas, ..."), which has another result.
    """

    call: Callable
    read: Callable[[object], dict[str, Tensor]]
    reset: Callable[[], None] | None = None
    seconds: dict[str, list[float]] | None = None
    answer: Callable[[torch.dtype], dict[str, Tensor]] | None = None


@dataclass
class Problem:
    """inputs: whatever the module's providers take. reference(dtype) -> outputs by name, in that precision.

    The gate's budget is 4 x the error of the same-precision reference, at least 256 float32 eps or 2.5 of a shorter dtype's:
    more than our own tests allow, because peers round intermediate results. `tolerance` replaces it where the reference is not
    of the same precision. peers_lack: outputs that a peer may leave out, but not diffmas.
    flops, read and copied bytes: the least an implementation can do; 0: no roofline is given. units: how often a call does what
    is reported (layers x steps, say). The time of a call and of its parts is divided by it, memory is not.
    """

    case: Case
    inputs: object
    reference: Callable[[torch.dtype], dict[str, Tensor]]
    flops: float = 0
    read: float = 0
    copied: float = 0
    tolerance: float | None = None
    peers_lack: tuple[str, ...] = ()
    units: int = 1

    @property
    def graph(self) -> bool:
        """Whether calls are timed in a CUDA graph."""
        return not self.case.layers and 0 < self.case.n <= LAUNCH_BOUND_TOKENS


Provider = Callable[[Problem], Trial]


def error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest difference in any output, relative to that output's largest value; infinite for what does not fit."""
    worst = 0.0
    for name, right in want.items():
        given = got.get(name)
        if given is None or given.shape != right.shape:
            return math.inf
        right = right.double()
        gap = (given.double() - right).abs().max() / right.abs().max().clamp_min(1e-30)
        worst = max(worst, float(gap) if torch.isfinite(gap) else math.inf)
    return worst


def drowned(times: list[float]) -> bool:
    """Whether the samples tell no time: their median is below their spread. Only a difference can be so, as a graph's is."""
    middle = statistics.median(times)
    return middle < statistics.median(abs(t - middle) for t in times)


class Contest:
    """All providers of one problem, gated.

    trials: the right ones by name. errors: of everything that ran. notes: why a provider has no number.
    """

    def __init__(self, problem: Problem, providers: dict[str, Provider], device: str = "cpu"):
        self.problem, self.device = problem, device
        self.trials: dict[str, Trial] = {}
        self.errors: dict[str, float] = {}
        self.notes: dict[str, str] = {}
        self.peaks: dict[str, int] = {}
        self._once: dict[str, float] = {}  # seconds of one call, roughly
        self._repeats: dict[str, int] = {}  # calls that make a sample
        self._graphs: dict[str, Graph] = {}
        self._uncaptured: dict[str, str] = {}
        self._canary: list[float] = []
        if "torch._dynamo" in sys.modules:  # or the limit of recompilations is reached; not later: others' code would go, too
            torch._dynamo.reset()
        want = problem.reference(torch.float64)
        self.budget = problem.tolerance
        if self.budget is None:
            dtype = getattr(torch, problem.case.dtype)
            # A sum in another order, or probabilities rounded to a short dtype, is rounding and no error.
            floor = (256 if dtype == torch.float32 else 2.5) * torch.finfo(dtype).eps
            self.budget = max(4 * error(problem.reference(dtype), want), floor)
        for name, provider in providers.items():
            self._enter(name, provider, want)

    def _enter(self, name: str, provider: Provider, want: dict[str, Tensor]) -> None:
        """One call: its peak memory is measured, its result is compared."""
        try:
            trial = provider(self.problem)
            if trial.reset:
                trial.reset()
            gc.disable()  # earlier garbage, freed in the middle of the call, would count as its own
            start = time.perf_counter()
            result, peak = peak_bytes(trial.call, self.device)
            self._once[name] = time.perf_counter() - start
            got = trial.read(result)
            if trial.answer and not name.startswith(f"{OURS},"):
                raise ValueError("an answer of its own, which only a part of ours left out may have")
            want = trial.answer(torch.float64) if trial.answer else want
        except Senseless:
            return
        except Cannot as reason:
            self.notes[name] = str(reason)
            return
        except Exception as reason:
            if name == OURS:
                raise
            self.notes[name] = f"failed: {type(reason).__name__}: {reason}"[:160]  # a peer's failure costs no other row
            return
        finally:
            gc.enable()
        lacks = () if name == OURS else [output for output in self.problem.peers_lack if output not in got]
        self.errors[name] = error(got, {output: right for output, right in want.items() if output not in lacks})
        if self.errors[name] <= self.budget:
            self.trials[name], self.peaks[name] = trial, peak
        else:
            self.notes[name] = f"wrong result: error {self.errors[name]:.1e}, budget {self.budget:.1e}"

    # ---- time --------------------------------------------------------------------------------------------------------

    def _sample(self, name: str, repeats: int) -> float:
        trial = self.trials[name]
        if trial.reset:
            trial.reset()
        return self._graphs[name].sample() if name in self._graphs else sample(trial.call, repeats, self.device)

    def _capture(self, name: str) -> None:
        trial = self.trials[name]
        if trial.reset:
            trial.reset()
        try:
            self._graphs[name] = Graph(trial.call, self.device)
        except Exception as reason:
            self._uncaptured[name] = f"timed with its launches, as it is not captured: {reason}".splitlines()[0][:160]

    def warm_up(self) -> None:
        """Warms every provider up, decides how many calls make a sample, and forgets the parts measured so far."""
        gpu = self.device != "cpu"
        for name, trial in self.trials.items():
            if gpu and self.problem.graph:
                self._capture(name)
            if gpu or self._once[name] < LONG:
                least = LEAST if name in self._graphs else 1e-7
                self._once[name] = max(min(self._sample(name, 1) for _ in range(2)), least)
            repeats = max(1, math.ceil(SAMPLE_SECONDS / self._once[name]))
            self._repeats[name] = Graph.CALLS if name in self._graphs else min(repeats, GPU_REPEATS) if gpu else repeats
            if trial.seconds is not None:
                trial.seconds.clear()

    def round_seconds(self) -> float:
        return sum(self._once[name] * self._repeats[name] for name in self.trials if not self._hopeless(name))

    def rounds(self, seconds: float, least: int, most: int) -> int:
        """How many rounds fit `seconds`, within [least, most]."""
        return min(most, max(least, int(seconds / self.round_seconds())))

    def _hopeless(self, name: str) -> bool:
        return self._once[name] > HOPELESS * min(self._once[right] for right in self.trials)

    def sample(self, name: str, turn: int) -> float | None:
        """Seconds per unit of one sample in round `turn`; None where a provider far behind sits out."""
        if turn >= HOPELESS_ROUNDS and self._hopeless(name):
            return None
        return self._sample(name, self._repeats[name]) / self.problem.units

    def round(self, turn: int) -> dict[str, float]:
        """Seconds per unit of a sample of everybody who takes part in round `turn`. Each round begins with another one: none is
        always the one that finds the caches, or the clock, in its favour."""
        names = [name for name in self.trials if turn < HOPELESS_ROUNDS or not self._hopeless(name)]
        first = turn % max(1, len(names))
        names = names[first:] + names[:first]
        self._canary.append(canary(self.device).sing())
        launched = [name for name in names if self.device != "cpu" and name not in self._graphs]
        for name in launched:
            if self.trials[name].reset:
                self.trials[name].reset()
        calls, repeats = [self.trials[name].call for name in launched], [self._repeats[name] for name in launched]
        seconds = dict(zip(launched, in_turns(calls, repeats, self.device))) if launched else {}
        seconds |= {name: self._sample(name, self._repeats[name]) for name in names if name not in seconds}
        return {name: seconds[name] / self.problem.units for name in names}

    # ---- results -----------------------------------------------------------------------------------------------------

    def rows(self, samples: dict[str, list[float]], machine: Machine) -> list[dict]:
        """Long form: one row per provider, and one per part of an end-to-end call.

        ratio: median over rounds of this provider's time / ours in the same round (above 1: diffmas is faster).
        spread: median absolute deviation / median. canary: its median time in these rounds / the best that it ever took.
        """
        problem, out = self.problem, []
        song = statistics.median(self._canary) if self._canary else None
        roof = machine.seconds(problem.flops, problem.read, problem.copied, problem.case.dtype) / problem.units
        noise = {name for name in self._graphs if name in samples and drowned(samples[name])}
        right = samples.get(OURS) if OURS not in noise else None
        for name in (*self.trials, *self.notes):
            row = problem.case.columns() | {"provider": name, "error": self.errors.get(name), "budget": self.budget}
            if name in self.notes:
                out.append(row | {"why": self.notes[name]})
                continue
            if name in noise:
                out.append(row | {"why": NOISE})
                continue
            row |= _summary(samples[name], right) | {"peak_bytes": self.peaks[name], "why": self._uncaptured.get(name)}
            row["canary"] = song
            if roof:
                row["roofline_percent"] = 100 * roof / row["seconds"]
            out.append(row)
            ours = self._parts(OURS) if OURS in self.trials else {}
            for phase, parts in self._parts(name).items():
                out.append(row | {"phase": phase, "peak_bytes": None} | _summary(parts, ours.get(phase)))
        return out

    def _parts(self, name: str) -> dict[str, list[float]]:
        """Seconds per unit of the parts of each call."""
        return {part: [t / self.problem.units for t in times] for part, times in (self.trials[name].seconds or {}).items()}


def _summary(times: list[float], ours: list[float] | None) -> dict:
    middle = statistics.median(times)
    spread = statistics.median(abs(t - middle) for t in times) / middle if middle else 0.0
    ratio = statistics.median(t / o for t, o in zip(times, ours)) if ours and min(ours) > 0 else None
    return {"seconds": middle, "spread": spread, "rounds": len(times), "ratio": ratio}

"""One training step of a system, through diffmas and in plain Hugging Face code: time, peak memory, and agreement.

Times are measured interleaved in one process. Memory is the growth of the resident set during one step, or on a GPU the
allocator's peak; each way is measured in a spawned process of its own, so that nothing earlier counts.
"""

import gc
import multiprocessing
import os
import statistics
import time
from dataclasses import dataclass

import torch

from diffmas.evaluation.plain_hf import plain_loss

__all__ = ["StepComparison", "compare_training_step"]

WAYS = ("diffmas", "plain")


@dataclass
class StepComparison:
    """Seconds and bytes of one step, forward and backward, by way; and the largest differences between the ways."""

    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    loss_difference: float  # relative
    gradient_difference: float  # relative to the largest gradient

    @property
    def speedup(self) -> float:
        return self.seconds["plain"] / self.seconds["diffmas"]

    @property
    def memory_ratio(self) -> float:
        return self.peak_bytes["plain"] / max(self.peak_bytes["diffmas"], 1)


def step(way: str, system, questions, answers) -> torch.Tensor:
    """A forward and backward; returns the loss."""
    system.zero_grad(set_to_none=True)
    loss = system(questions, answers).loss if way == "diffmas" else plain_loss(system, questions, answers)
    loss.backward()
    return loss.detach()


def _resident() -> tuple[int, int]:
    """Resident bytes now, and the largest since the last reset."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file if line.startswith(("VmRSS", "VmHWM")))
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))


def _measure_memory(way: str, make, args, pipe) -> None:
    system, questions, answers = make(*args)
    if system.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(way, system, questions, answers)
        pipe.send(torch.cuda.max_memory_allocated() - before)
        return
    step(way, system, questions[:1], answers[:1])  # one-time allocations of libraries
    system.zero_grad(set_to_none=True)
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM
    before, _ = _resident()
    step(way, system, questions, answers)
    pipe.send(_resident()[1] - before)


def peak_bytes(way: str, make, args: tuple) -> int:
    """Bytes by which memory grows during one step, in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    receive, send = spawn.Pipe(duplex=False)
    # Freed blocks go back to the system at once, so that the resident set follows what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    try:
        process = spawn.Process(target=_measure_memory, args=(way, make, args, send))
        process.start()
        send.close()
        measured = receive.recv()
        process.join()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process that measured the memory of {way!r} ended with exit code {process.exitcode}") from None
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
    return measured


def compare_training_step(make, args: tuple = (), repeats: int = 5) -> StepComparison:
    """Measures one training step both ways, and compares losses and gradients.

    make(*args) -> (system, questions, answers): a module-level function, since other processes call it too. repeats: steps
    that are timed; seconds are their median.
    """
    system, questions, answers = make(*args)
    system.train()
    losses, gradients = {}, {}
    for way in WAYS:  # warm up, and check before anything is timed
        losses[way] = float(step(way, system, questions, answers))
        gradients[way] = {n: p.grad.clone() for n, p in system.named_parameters() if p.grad is not None}
    largest = max(float(g.abs().max()) for g in gradients["plain"].values())
    apart = max(float((gradients["diffmas"][n] - g).abs().max()) for n, g in gradients["plain"].items())
    seconds = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            start = time.perf_counter()
            step(way, system, questions, answers)
            if system.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[way].append(time.perf_counter() - start)
    return StepComparison(
        {way: statistics.median(s) for way, s in seconds.items()},
        {way: peak_bytes(way, make, args) for way in WAYS},
        abs(losses["diffmas"] - losses["plain"]) / abs(losses["plain"]),
        apart / largest,
    )

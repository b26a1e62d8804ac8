"""One run on a GPU, of at most so many seconds, that tells most of what there is to know: `make gpu-run`.

    python3 benchmarks/gpu_run.py --out runs/gpu --budget 520
    python3 benchmarks/gpu_run.py --dry                          # on a CPU: the same steps in tiny shapes
    python3 benchmarks/gpu_run.py --report                       # tables, plot and markdown again from what is stored

The machine may be without network: nothing is installed or fetched. Build the extension beforehand (`make gpu-run` does, where
there is no GPU either) and take the folder along with diffmas/libdiffmas.so and diffmas/build_info.json.

First correctness, then the numbers that decide most, then what is left. Each step is a process of its own with a limit, and
writes each row to rows.jsonl in --out as soon as it is known; what the process prints is in logs/. What crashes or hangs costs
itself alone, and a step whose cases are not through is started again without it. Another run into the same folder takes only
what has not come to a good end. This process never touches the GPU.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder, whose modules are diffmas.benchmarks

from diffmas.benchmarks.gpu.record import Record  # noqa: E402

__all__ = ["PLAN", "Step", "take"]

CORES = os.cpu_count() or 1
WORKERS = max(1, min(14, CORES - 2))
LEAST = 5.0  # seconds that are worth a start
SLOWER = 10  # a CPU that others use too
CLOSING = 25.0  # seconds of the budget that tables and plot take


@dataclass(frozen=True)
class Step:
    """what, arguments: a function of gpu/steps.py and what it is given. seconds: its limit. beside: a name; steps in a row that
    share it run side by side. under: a program that watches it. dry: whether a dry run on a CPU takes it."""

    name: str
    seconds: float
    what: str
    arguments: dict = field(default_factory=dict)
    beside: str = ""
    under: tuple[str, ...] = ()
    dry: bool = False


def _tests(name: str, seconds: float, file: str, only: str, **more) -> Step:
    options = {k: more.pop(k) for k in ("workers",) if k in more}
    return Step(name, seconds, "tests", dict(files=[f"tests/{f}.py" for f in file.split()], only=only, **options), **more)


def _of(module: str, peers: str = "", **where) -> dict:
    return dict(module=f"bench_{module}", where=where, peers=[p for p in peers.split(" | ") if p])


def _rows(name: str, seconds: float, *groups: dict, dry: bool = False) -> Step:
    """In one process, since each takes seconds to import what it needs."""
    return Step(name, seconds, "rows", dict(groups=groups), dry=dry)


# A kernel each. The first words are those of the test's name.
SMOKES = {
    "triton inject": ("test_triton", "test_inject and one_token"),
    "triton step": ("test_triton", "test_attention and one_query_long_view"),
    "triton tokens": ("test_triton", "test_attention and ragged and not last_tokens"),
    "triton prompt": ("test_triton", "test_attention and prefill_on_trace and not last_tokens"),
    "triton offset": ("test_triton", "test_attention and offset and not last_tokens and not test_attention_at and not three"),
    "triton quantised step": ("test_triton", "test_quantised_rows and one_query_long_view"),
    "triton quantised prompt": ("test_triton", "test_quantised_rows and prefill_on_trace"),
    "triton last tokens": ("test_triton", "test_attention_backward_of_the_last_tokens and prefill"),
    "triton merge": ("test_triton", "test_merge_states and 37"),
    "triton reposition": ("test_triton", "test_reposition and 37"),
    "triton linear": ("test_triton_layer", "test_linear and not together and (one_row or seventeen_rows)"),
    "triton linears together": ("test_triton_layer", "test_linears_together and mlp_one_row"),
    "triton adapter of many rows": ("test_triton_layer", "test_what_lora_adds and seventy"),
    "triton lora grad": ("test_triton_layer", "test_lora_grad and 1200"),
    "triton norm": ("test_triton_layer", "test_norm and 576"),
    "triton gate": ("test_triton_layer", "test_gate and 1536"),
    "fused layers": ("test_triton_model", "test_a_training_step or test_generation"),
    "cuda inject": ("test_cuda", "test_inject and one_token"),
    "cuda few queries": ("test_cuda", "test_attention and one_query_long_view"),
    "cuda few queries at an offset": ("test_cuda", "test_attention and offset"),
    "cuda many queries": ("test_cuda", "test_attention_of_many_queries and gqa2"),
    "cuda many queries, D = 128": ("test_cuda", "test_attention_of_many_queries and d128"),
    "cuda prompt": ("test_cuda", "test_forward_of_many_queries and gqa2"),
    "cuda prompt, D = 128": ("test_cuda", "test_forward_of_many_queries and d128"),
    "an op in a graph": ("test_gpu", "test_ops_in_a_graph"),
    "latent steps in a graph": ("test_gpu", "test_latent_steps_as_a_graph"),
    "latent steps with gradients in graphs": ("test_gpu", "test_latent_steps_with_gradients"),
    "decoding in a graph": ("test_gpu", "test_decoding_as_a_graph"),
}
SANITIZED = {
    ("memcheck", "triton"): ("test_triton", "test_attention and ragged and not last_tokens"),
    ("memcheck", "triton linear"): ("test_triton_layer", "test_linear and not together and (odd or seventeen_rows)"),
    ("memcheck", "cuda"): ("test_cuda", "test_attention and (one_query_long_view or ragged)"),
    ("racecheck", "cuda"): ("test_cuda", "test_attention and one_query_long_view"),
    ("memcheck", "wgmma"): ("test_cuda", "test_attention_of_many_queries and d128"),
    ("memcheck", "wgmma forward"): ("test_cuda", "test_forward_of_many_queries and long_d128"),
    ("racecheck", "wgmma"): ("test_cuda", "test_attention_of_many_queries and d128"),
    ("racecheck", "wgmma forward"): ("test_cuda", "test_forward_of_many_queries and long_d128"),
    ("synccheck", "wgmma"): ("test_cuda", "test_attention_of_many_queries and d128"),
    ("synccheck", "wgmma forward"): ("test_cuda", "test_forward_of_many_queries and long_d128"),
}
TESTS = "test_gpu test_cuda test_triton test_triton_layer test_triton_model"
LONG = ["prompt", "prompt on a trace", "prompt on 63 segments"]
FLEX = "flex | flex, flash"
SDPA = "sdpa | sdpa, flash | sdpa, cudnn"
TUNED = [("fwd", 128, 128), ("fwd", 16, 128), ("dq", 64, 128), ("dkv", 64, 128)]

PLAN = [
    Step("environment", 60, "environment", dry=True),
    *(_tests(f"smoke: {n}", 75, *x, beside="smokes", dry=n == "triton inject") for n, x in SMOKES.items()),
    _tests("tests", 150, TESTS, "not random_views", workers=WORKERS),
    _rows("decoding and latent steps", 110, _of("attention", f"{SDPA} | flashinfer", regime="latent step"),
          _of("latent_run", "DynamicCache"), _of("deferred", dtype="bfloat16"), dry=True),
    _rows("prompts", 120, _of("attention", f"{SDPA} | flash-attn 4", regime="prompt", dtype="bfloat16"), _of("parts")),
    _rows("linears, norms and gates", 100, _of("linear", "PEFT | LoRA in 16 bits"), _of("layer", "eager | compiled | Liger")),
    _rows("quantised rows", 60, _of("quantized")),
    _rows("inject", 40, _of("inject", "eager | eager + cat"), dry=True),
    _rows("segments and offsets", 120, _of("attention", SDPA, regime=LONG[1:]), _of("offset", f"{SDPA} | flashinfer"),
          _of("readers", "sdpa | flashinfer"),
          _of("attention", f"{SDPA} | torch varlen | flash-attn 4", regime="short prompts")),
    _rows("compiled peers", 150, _of("attention", FLEX, regime=LONG, n=4096, heads="16/8", dtype="bfloat16"),
          _of("attention", FLEX, regime="short prompts", heads="16/8"),
          _of("inject", "eager + cat | compiled + static", n=[8192, 65536], heads="16/8", phase="forward")),
    Step("tiles", 60, "tiles", dict(lines=TUNED, most=6)),
    *(_tests(f"{tool}: {n}", 90, *x, beside="sanitizers", under=("compute-sanitizer", "--error-exitcode", "9", "--tool", tool))
      for (tool, n), x in SANITIZED.items()),
    _tests("random views", 300, "test_triton test_cuda", "random_views", workers=WORKERS),
]  # fmt: skip


# ---- running them ----------------------------------------------------------------------------------------------------


class Run:
    """The folder, the clock and the terminal of one run."""

    def __init__(self, out: Path, budget: float, dry: bool, console):
        (out / "logs").mkdir(parents=True, exist_ok=True)
        self.out, self.dry, self.console = out, dry, console
        self.start, self.budget = time.monotonic(), budget
        earlier = Record(out).rows()
        self.record = Record(out, 1 + max((row["run"] for row in earlier), default=0))

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.start)

    def say(self, text: str) -> None:
        self.console.print(f"{time.monotonic() - self.start:4.0f} s  {text}", markup=False, highlight=False, soft_wrap=True)

    def end(self, step: Step, status: str, seconds: float) -> None:
        self.record.add(step.name, "end", status=status, seconds=round(seconds, 1))
        self.say(f"{step.name}: {status}, {seconds:.0f} s")


def command(step: Step, run: Run) -> list[str]:
    given = dict(out=str(run.out), run=run.record.run, step=step.name, what=step.what, dry=run.dry, arguments=step.arguments)
    return [*step.under, sys.executable, "-m", "diffmas.benchmarks.gpu.steps", json.dumps(given)]


def _launch(step: Step, run: Run, seconds: float) -> str:
    """One process (and what it starts) -> ok | failed (it says so itself) | hung | crashed: why."""
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    if step.under:  # every tensor an allocation of its own, so that what lies beyond it is nobody's
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with open(run.out / "logs" / f"{step.name.replace(': ', '-').replace(' ', '_')}.txt", "a") as log:
        process = subprocess.Popen(
            command(step, run), cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # also what outlives it
            except ProcessLookupError:
                pass
            process.wait()
    if code is None or code == -signal.SIGALRM:
        return "hung"
    if code < 0 or code == 70:
        return f"crashed: {signal.Signals(-code).name if code < 0 else 'the GPU was lost'}"
    return "ok" if code == 0 else "failed"


def _take(step: Step, run: Run) -> None:
    start, limit = time.monotonic(), min(step.seconds * (SLOWER if run.dry else 1), run.left())
    used = lambda: time.monotonic() - start
    status = "no time left"
    while limit - used() >= LEAST or (status == "no time left" and limit >= LEAST):
        try:
            status = _launch(step, run, limit - used())
        except OSError as error:  # no such program
            status = f"not here: {error.strerror}: {step.under[0] if step.under else error}"
        if status in ("ok", "failed") or not run.record.blame(step.name, status):
            break
        run.say(f"{step.name}: {status}; again without what was tried")
    run.end(step, status, used())


def take(plan: list[Step], run: Run) -> None:
    """Takes the steps that have not yet come to a good end, in their order, until the budget is spent."""
    done = run.record.finished()
    wanted = [step for step in plan if step.name not in done]
    if len(wanted) < len(plan):
        run.say(f"{len(plan) - len(wanted)} of {len(plan)} steps are known")
    for _, group in groupby(wanted, lambda step: step.beside or step.name):
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda step: _take(step, run), group))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="the folder, new or of an earlier run")
    parser.add_argument("--budget", type=float, default=520, help="seconds")
    parser.add_argument("--only", default="", help="steps whose name has this text")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--report", action="store_true", help="run nothing: the tables of what is stored")
    args = parser.parse_args()
    from rich.console import Console

    console, out = Console(), args.out.resolve()
    plan = [step for step in PLAN if args.only in step.name and (step.dry or not args.dry)]
    if not plan:
        parser.error(f"--only: expected a text of a step's name ({', '.join(step.name for step in PLAN)}), got {args.only!r}")
    if not args.report:
        if not args.dry and not (shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()):
            along = "diffmas/libdiffmas.so and diffmas/build_info.json"
            parser.error(f"expected a GPU, found none: take {ROOT} to one, with {along}; or --dry")
        take(plan, Run(out, args.budget - CLOSING, args.dry, console))
    from diffmas.benchmarks.gpu.report import write  # it imports torch

    return write(Record(out), out, console)


if __name__ == "__main__":
    sys.exit(main())

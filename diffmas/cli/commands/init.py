"""diffmas init, diffmas schema: a config to begin with, and what an editor needs to complete it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from diffmas.cli.terminal import console

__all__ = ["init", "schema"]

TEXT = """\
# diffmas train {file}           then: diffmas evaluate {file} --adapter {runs}
# Paths below are relative to this file. Keys that are not here: diffmas/cli/config.py, or `diffmas schema` for an editor.
model: {model}   # a hub name, a directory or a .gguf file
dtype: bfloat16
output_dir: runs/{task}

task: {task}   # its questions, agents, prompts and verdicts; `diffmas tasks` lists all. For a team of your own write `agents:`
latent_steps: {steps}       # T of every agent but the last

system:
  realign: ridge          # none | norm | ridge | soft_token | learned: from hidden states to input embeddings
  grad_scope: full        # full | detach_trace | last_k: how far back the answer's loss goes
  trace_content: all      # all | latent_only: whether an agent hands on its prompt, too
  adapter_scope: shared   # shared | per_role | final_only
  # Agents that hand on latent vectors alone learned it with these (docs/training.md, benchmarks/studies/facts.yaml):
  # {{realign: soft_token, temperature: 0.5, trace_content: latent_only, adapter_scope: per_role, latent_grad_clip: 0.2}}
  # chat_options: {{enable_thinking: false}}   # what the chat template reads besides the messages

lora: {{r: 8, alpha: 16}}

data:
  {train}
  validation_fraction: 0.1

recipe: default           # default: trains a pretrained model as it is | paper: arXiv 2604.21794
training:                 # any field of transformers.TrainingArguments goes over the recipe
  num_train_epochs: 1
  eval_strategy: epoch
gradient_report_steps: 20 # norms of the gradient by agent, latent step and layer, every so many steps; 0: never

generation: {{temperature: 0.6, top_p: 0.95, seed: 0}}

evaluation:
  # data: FILE
  methods: [single, text, latent_mas, diffmas]
  limit: 200              # questions
"""


# By kind, a task that has rows to train on.
LIKE = {"math": "gsm8k", "options": "openbookqa", "code": "mbpp"}


def init(
    task: Annotated[str, typer.Argument(help="one of `diffmas tasks`")],
    model: Annotated[str, typer.Option(help="a hub name, a directory or a GGUF file")] = "Qwen/Qwen3-0.6B",
    output: Annotated[Path, typer.Option(help="the file to write")] = Path("config.yaml"),
):
    """Write a commented config for a published task."""
    from diffmas.evaluation.tasks import task as find

    found = find(task)
    if output.exists():
        raise ValueError(f"--output: expected no file, found {output}")
    train = "# train: FILE           # the set in its published form, instead of the hub's"
    if found.kind == "facts":
        train = "# limit: 512            # of the rows that are made here: 20,000"
    if "train" not in found.splits:
        train = 'train: FILE             # this task is published without: lines of {"question": ..., "answer": ...}'
        train += f"\n  # task: {LIKE[found.kind]:<16}# instead of that line: what another task has to train on"
    values = dict(file=output, runs=output.parent / "runs" / found.name, model=json.dumps(model), task=found.name, train=train)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(TEXT.format(**values, steps=found.latent_steps), encoding="utf-8")
    first = "" if "train" in found.splits else "your rows into data.train, then "
    console.print(f"{output}: next, {first}diffmas train {output}", highlight=False, soft_wrap=True)
    return {"file": output}


def schema():
    """Print the JSON schema of config.yaml; an editor's YAML server takes it."""
    from diffmas.cli.schema import schema as of_config

    typer.echo(json.dumps(of_config(), indent=1))

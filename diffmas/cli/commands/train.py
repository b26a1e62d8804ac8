"""diffmas train."""

import atexit
import math
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from diffmas.cli.methods import TRAINED
from diffmas.cli.terminal import ConfigFile, console, errors, goes_on, warn

__all__ = ["train"]


def train(
    config: ConfigFile,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest whole checkpoint in output_dir")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="start afresh and remove an earlier run's checkpoints in output_dir")
    ] = False,
    method: Annotated[
        str, typer.Option(help=f"one of {', '.join(TRAINED)}; all but diffmas are baselines and go to OUTPUT_DIR-METHOD")
    ] = "diffmas",
):
    """Train LoRA adapters as a config says; under torchrun on several GPUs.

    Methods besides diffmas, the team itself:

    text_sft: text agents answer the training questions, each
    evaluation.samples times; one shared adapter is trained on all that
    they wrote where the answer is right.

    stitch: agents that do not read each other.

    c2c: the last agent alone, its prompt's rows fused with those of the
    config's c2c; the projector is trained.
    """
    from diffmas.cli.build import trained_as
    from diffmas.cli.config import load

    settings = trained_as(load(config), method)
    # Torch is not waited for before.
    from diffmas.cli.made_with import made_with
    from diffmas.cli.train import trainer_of
    from diffmas.training import checkpoints, end_processes

    earlier = [] if resume else checkpoints(settings.output_dir)
    if resume and overwrite:
        raise ValueError("--overwrite: expected it without --resume, got both")
    if earlier and not overwrite:
        raise ValueError(
            f"{settings.output_dir}: expected no checkpoints of an earlier run, found {earlier[-1].name}; go on from it with "
            "--resume, remove it with --overwrite, or choose another output_dir"
        )
    # What text agents wrote is gone on from, too: training starts with it where it was interrupted before its first checkpoint.
    only_texts = method == "text_sft" and not checkpoints(settings.output_dir) and _texts(settings.output_dir) is not None
    if resume and only_texts:
        errors.print(f"no checkpoint in {settings.output_dir}: step 0, with what text agents wrote before", highlight=False)
    goes_on(lambda: _how_on(config, method, settings.output_dir, earlier))
    trainer = trainer_of(settings, method, resume, lambda text: errors.print(f"{text} ...", highlight=False))
    if trainer.is_world_process_zero():
        console.print(_table(summary := _summary(settings, trainer)))
        for path in earlier:
            shutil.rmtree(path)
    earlier.clear()
    if method == "diffmas" and not resume:
        _look_at_latents(trainer)
    result = trainer.train(resume_from_checkpoint=(resume and not only_texts) or None)
    trainer.save_model()
    atexit.register(end_processes)  # not now: others may be behind, or another command follow in this process
    if trainer.is_world_process_zero():
        _say_in_the_card(settings, trainer, made_with())
        best = f", best eval_loss {trainer.state.best_metric:.4f}" if trainer.state.best_metric is not None else ""
        console.print(f"{result.global_step} steps, training loss {result.training_loss:.4f}{best}", highlight=False)
        console.print(f"adapter and agents.json: {settings.output_dir}", highlight=False, soft_wrap=True)
        numbers = {"training_loss": result.training_loss, "best_eval_loss": trainer.state.best_metric}
        made = {**made_with(), "seed": trainer.args.seed}
        return {"made_with": made, **summary, "steps": result.global_step, **numbers, "history": trainer.state.log_history}


def _how_on(config, method: str, output_dir: str, earlier: list[Path]) -> str:
    """What to do after Ctrl-C. earlier: another run's checkpoints, which are still there and are to be removed."""
    from diffmas.training import last_checkpoint

    again = f"diffmas train {config}" + (f" --method {method}" if method != "diffmas" else "")
    if earlier:
        return f"no checkpoint was due yet: `{again} --overwrite` starts again"
    newest = last_checkpoint(output_dir)
    if newest is None and method == "text_sft":
        newest = _texts(output_dir)
    return f"`{again} --resume` goes on from {newest}" if newest else f"no checkpoint was due yet: `{again}` starts again"


def _texts(output_dir: str) -> Path | None:
    """What text agents wrote for method text_sft."""
    file = Path(output_dir) / "right_turns_train.json"
    return file if file.is_file() else None


def _say_in_the_card(settings, trainer, made: dict) -> None:
    from diffmas.agents.facts import add_facts

    arguments, state, held_out = trainer.args, trainer.state, trainer.eval_dataset
    data = {
        "train": settings.data.train and Path(settings.data.train).name,
        "task": settings.training_task,
        "part": settings.data.part,
    }
    data = {name: value for name, value in data.items() if value}
    data |= {"rows": len(trainer.train_dataset), "validation rows": len(held_out or [])}
    best = {} if state.best_metric is None else {"lowest eval_loss": f"{state.best_metric:.4g}"}
    rows = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    training = {
        "recipe": settings.recipe, "steps": state.global_step, "rows a step": rows, "learning rate": arguments.learning_rate,
        "seed": arguments.seed, **best,
    }  # fmt: skip
    add_facts(settings.output_dir, data=data, training=training, made_with=made)


def _look_at_latents(trainer) -> None:
    """Where this process has the model alone: are latent steps like tokens before anything is trained?"""
    from diffmas.agents.latent_check import unlike_tokens
    from diffmas.training.data import question_and_answer

    if trainer.args.world_size > 1 or trainer.is_deepspeed_enabled:
        return
    for line in unlike_tokens(trainer.model, question_and_answer(trainer.train_dataset[0])[0]):
        warn(line)


def _summary(settings, trainer) -> dict:
    system, arguments, rows, held_out = trainer.model, trainer.args, trainer.train_dataset, trainer.eval_dataset
    schedule = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
    step = (arguments.train_batch_size, arguments.gradient_accumulation_steps, arguments.world_size)
    return {
        "model": settings.model, "agents": [{"name": a.name, "latent_steps": a.latent_steps} for a in system.agents],
        "trainable": sum(p.numel() for p in system.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in system.parameters()), "adapter_scope": system.adapter_scope,
        "lora": vars(settings.lora), "rows": len(rows), "validation_rows": len(held_out or []), "rows_a_step": step,
        "learning_rate": arguments.learning_rate, "schedule": schedule, "device": str(arguments.device),
        "output_dir": settings.output_dir,
    }  # fmt: skip


def _table(of: dict) -> Table:
    out = Table(title="diffmas train", show_header=False)
    out.add_column(no_wrap=True)
    out.add_column(overflow="fold")
    *readers, last = of["agents"]
    step = " x ".join(map(str, of["rows_a_step"]))
    for name, value in (
        ("model", of["model"]),
        ("agents", ", ".join(f"{a['name']} (T={a['latent_steps']})" for a in readers) + f" -> {last['name']}"),
        (
            "trainable",
            f"{of['trainable']:,} of {of['parameters']:,} parameters ({100 * of['trainable'] / of['parameters']:.2f} %)",
        ),
        ("adapter", f"{of['adapter_scope']}, r={of['lora']['r']}, alpha={of['lora']['alpha']}"),
        ("data", f"{of['rows']} rows, {of['validation_rows']} for validation"),
        ("step", f"{math.prod(of['rows_a_step'])} rows = {step} (micro-batch x accumulation x processes)"),
        ("learning rate", f"{of['learning_rate']:g}, {of['schedule']}"),
        ("device", of["device"]),
        ("output", of["output_dir"]),
    ):
        out.add_row(name, Text(value))
    return out

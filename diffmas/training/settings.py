"""Settings of training as transformers' TrainingArguments: ones that train a pretrained model as they are, and the paper's."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["RECIPES", "default_arguments"]

# What of these is the paper's own, and what is ours, is in docs/training.md.
# default: for a LoRA on a pretrained model (docs/training.md). A norm of 1 is below that of an untrained team's gradient, so
# that one bad batch weighs no more than others. The first steps are short: AdamW does not know the size of gradients yet.
RECIPES = {
    "default": {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "learning_rate": 5e-4, "warmup_steps": 0.05,
        "max_grad_norm": 1.0, "num_train_epochs": 3,
    },
    "paper": {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 64, "learning_rate": 5e-5, "warmup_steps": 0,
        "max_grad_norm": 1.0, "num_train_epochs": 1,
    },
}  # fmt: skip


def default_arguments(output_dir, recipe: str = "default", **overrides) -> TrainingArguments:
    """TrainingArguments for a team of agents.

    recipe: "default", which is ours (a learning rate of 5e-4 after a warm-up of 5 % of the steps, 4 micro-batches of 4 rows, 3
    epochs), or "paper": what is known of the DiffMAS paper's settings (arXiv 2604.21794: 5e-5, 64 accumulated micro-batches, 1
    epoch, where the paper has 1 or 10 by task), the rest of it ours (one row each, no warm-up). Both: AdamW and cosine decay as
    in the paper, gradients clipped to norm 1. overrides: any other TrainingArguments; save_steps and eval_steps without a
    strategy mean "steps". With an eval_strategy among them, checkpoints follow it, and training ends by loading the one with
    the lowest eval_loss. Raises ValueError for an unknown recipe.

        >>> default_arguments(directory, max_steps=10).learning_rate
        0.0005
        >>> default_arguments(directory, "paper").gradient_accumulation_steps
        64
    """
    from transformers import TrainingArguments  # which waits for torch; a config needs the names of recipes alone

    if recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {tuple(RECIPES)}, got {recipe!r}")
    options = {
        **RECIPES[recipe], "lr_scheduler_type": "cosine", "optim": "adamw_torch", "logging_steps": 1, "save_strategy": "epoch",
        "save_total_limit": 3, "report_to": ["tensorboard"], "remove_unused_columns": False,
    }  # fmt: skip
    if not {"save_strategy", "eval_strategy"} & overrides.keys():
        overrides |= {f"{name}_strategy": "steps" for name in ("save", "eval") if overrides.get(f"{name}_steps") is not None}
    # transformers 4 takes whole steps, and a share of the steps by another name.
    by_ratio = any(f.name == "warmup_ratio" and f.default == 0.0 for f in fields(TrainingArguments))
    if "warmup_ratio" in overrides:
        del options["warmup_steps"]
    elif "warmup_steps" not in overrides and by_ratio:
        options["warmup_ratio"] = options.pop("warmup_steps")
    evaluating = str(getattr(overrides.get("eval_strategy"), "value", overrides.get("eval_strategy", "no")))
    if evaluating != "no":
        options["save_strategy"] = evaluating
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
        options |= best | ({"save_steps": overrides["eval_steps"]} if overrides.get("eval_steps") else {})
        if str(overrides.get("save_strategy", evaluating)) == "no":
            options["load_best_model_at_end"] = False
        elif overrides.get("load_best_model_at_end") is None:
            _check_saving({**options, **overrides}, evaluating)
    return TrainingArguments(output_dir=str(output_dir), **{**options, **overrides})


def _check_saving(options: dict, evaluating: str) -> None:
    """What transformers would refuse by the name of an option that we have set: raises ValueError by the user's."""
    saving = str(getattr(options["save_strategy"], "value", options["save_strategy"]))
    otherwise = "the checkpoint with the lowest eval_loss is loaded at the end, unless load_best_model_at_end is false"
    if saving not in (evaluating, "best"):
        raise ValueError(f"save_strategy: expected that of evaluation, {evaluating!r}, got {saving!r}; {otherwise}")
    steps = (options.get("save_steps"), options.get("eval_steps"))
    if saving == "steps" and all(n is not None and n >= 1 for n in steps) and steps[0] % steps[1]:  # below 1: shares of all
        raise ValueError(f"save_steps: expected a multiple of eval_steps, {steps[1]:g}, got {steps[0]:g}; {otherwise}")

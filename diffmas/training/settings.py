"""The settings of the DiffMAS paper as transformers' TrainingArguments."""

from transformers import TrainingArguments

__all__ = ["default_arguments"]


def default_arguments(output_dir, **overrides) -> TrainingArguments:
    """TrainingArguments with the settings of the DiffMAS paper (arXiv 2604.21794).

    These are AdamW, a learning rate of 5e-5 with cosine decay, and 64 accumulated micro-batches of one row. overrides: any
    other TrainingArguments. With an eval_strategy among them, checkpoints follow it, and training ends by loading the one
    with the lowest eval_loss.

        >>> default_arguments(directory, max_steps=10).learning_rate
        5e-05
    """
    options = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 64, "learning_rate": 5e-5,
        "lr_scheduler_type": "cosine", "optim": "adamw_torch", "num_train_epochs": 3, "logging_steps": 1,
        "save_strategy": "epoch", "save_total_limit": 3, "report_to": ["tensorboard"], "remove_unused_columns": False,
    }  # fmt: skip
    evaluating = str(getattr(overrides.get("eval_strategy"), "value", overrides.get("eval_strategy", "no")))
    if evaluating != "no":
        options["save_strategy"] = evaluating
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
        options |= best | ({"save_steps": overrides["eval_steps"]} if overrides.get("eval_steps") else {})
        if str(overrides.get("save_strategy", evaluating)) == "no":
            options["load_best_model_at_end"] = False
    return TrainingArguments(output_dir=str(output_dir), **{**options, **overrides})

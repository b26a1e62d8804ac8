"""Training: transformers' Trainer with a multi-agent system as its model, and PEFT LoRA as what learns.

The whole episode of a batch (all agents, the answer's loss) is one forward of the system. That is what makes
DistributedDataParallel right, also when ranks take different numbers of latent steps, and lets accumulation, schedules,
logging, evaluation, checkpoints and early stopping be transformers' own.

A checkpoint is a directory `checkpoint-N`: the PEFT adapter and agents.json as `MultiAgentSystem.save_pretrained` writes
them, transformers' optimizer.pt, scheduler.pt, rng_state*.pth and trainer_state.json, and last manifest.json with the
SHA-256 of each of these files: a checkpoint without it, or with another byte anywhere, is not whole.
"""

import contextlib
import hashlib
import logging
import re
import shutil
from pathlib import Path

import torch
import transformers
from transformers import TrainingArguments

from diffmas.agents.adapters import add_lora, lora_config
from diffmas.agents.file import AGENTS_FILE, load_weights, read_json, write_json
from diffmas.agents.system import MultiAgentSystem
from diffmas.training.data import Collator, check_row

__all__ = [
    "NonFiniteLoss", "Trainer", "add_lora", "check_checkpoint", "checkpoints", "default_arguments", "last_checkpoint",
    "lora_config",
]  # fmt: skip

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"  # {file: SHA-256}, written last
RESUME_FILES = ("trainer_state.json", AGENTS_FILE, "optimizer.pt", "scheduler.pt")


class NonFiniteLoss(FloatingPointError):
    """The loss or its gradients became NaN or infinite; the weights are those of the last good step."""


# ---- the paper's settings --------------------------------------------------------------------------------------------


def default_arguments(output_dir, **overrides) -> TrainingArguments:
    """TrainingArguments with the settings of the DiffMAS paper: AdamW, lr 5e-5, cosine, 64 accumulated micro-batches.

    With an eval_strategy in `overrides`, checkpoints follow it and the one of the lowest eval_loss is loaded at the end.
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


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while block := data.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_manifest(path: Path) -> None:
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != MANIFEST)
    write_json(path / MANIFEST, {file.relative_to(path).as_posix(): _sha256(file) for file in files})


def _check_manifest(path: Path) -> dict[str, str]:
    """The manifest of a checkpoint whose files are as they were written; raises ValueError naming one that is not."""
    if not path.is_dir():
        raise ValueError(f"{path}: expected the directory of a checkpoint, found none")
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict):
        raise ValueError(f"{path / MANIFEST}: expected an object of file names, got {type(manifest).__name__}")
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file}: expected this file of a checkpoint, found none")
        if _sha256(file) != expected:
            raise ValueError(
                f"{file}: expected a whole file, got a damaged one of {file.stat().st_size} bytes (its SHA-256 is not that of "
                f"{MANIFEST})"
            )
    return manifest


def check_checkpoint(path) -> Path:
    """Returns the path of a whole checkpoint to resume from; raises ValueError naming the file that is missing or damaged."""
    path = Path(path)
    manifest = _check_manifest(path)
    missing = [name for name in RESUME_FILES if name not in manifest]
    if not any(name.startswith("rng_state") for name in manifest):
        missing.append("rng_state.pth")
    if missing:
        raise ValueError(f"{path}: expected a checkpoint to resume from, {MANIFEST} has no {', '.join(missing)}")
    return path


def checkpoints(output_dir) -> list[Path]:
    """The checkpoints of a run, whole or not, in the order of their steps."""
    paths = (p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name))
    return sorted(paths, key=lambda p: int(p.name.split("-")[1]))


def last_checkpoint(output_dir) -> Path | None:
    """The newest whole checkpoint of a run, None without one; damaged ones are skipped with a warning."""
    for path in reversed(checkpoints(output_dir)):
        try:
            return check_checkpoint(path)
        except ValueError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
    return None


# ---- the trainer -----------------------------------------------------------------------------------------------------


def _may_leave_unused(system: MultiAgentSystem) -> bool:
    """Whether DistributedDataParallel has to look for parameters without a gradient.

    A shared adapter always has one, through the last agent. One role's adapter has none where grad_scope cuts it off or
    where T = 0 leaves nobody to read its last hidden state; the answer must be the same on ranks of different T.
    """
    return system.adapter_scope == "per_role" or system.realign.mode == "learned"


class Trainer(transformers.Trainer):
    """transformers' Trainer for a `MultiAgentSystem`.

    system: its PEFT adapter is what learns; a plain model gets LoRA first (peft_config, by default `lora_config()`).
    args: TrainingArguments, by default `default_arguments("diffmas-output")`. train_dataset, eval_dataset: lists of rows
    or any dataset of them (see `diffmas.training.data`). Everything else is transformers' own.

    A loss or gradient that is not finite stops training with `NonFiniteLoss` before it reaches the weights.
    train(resume_from_checkpoint=True) goes on from the newest whole checkpoint, bit for bit as if it had not stopped.

    Raises ValueError for an empty data set, for any row that lacks the answer or a field of a prompt (a data set with a
    length is read once), and for options that do not apply. Rows too long for the context are found when they are reached.
    """

    def __init__(
        self, system: MultiAgentSystem, args: TrainingArguments | None = None, *, train_dataset=None, eval_dataset=None,
        peft_config=None, data_collator=None, **options,
    ):  # fmt: skip
        if not isinstance(system, MultiAgentSystem):
            raise ValueError(f"system: expected a MultiAgentSystem, got {type(system).__name__}")
        args = default_arguments("diffmas-output") if args is None else args
        for name in ("label_smoothing_factor", "neftune_noise_alpha", "fsdp", "deepspeed"):
            if getattr(args, name, None):
                raise ValueError(f"{name}: expected it to be off for a multi-agent system, got {getattr(args, name)!r}")
        sets = [("train_dataset", train_dataset)]
        sets += (
            [(f"eval_dataset[{k!r}]", v) for k, v in eval_dataset.items()]
            if isinstance(eval_dataset, dict)
            else [("eval_dataset", eval_dataset)]
        )
        for name, rows in sets:
            self._check_rows(system, name, rows)
        if not hasattr(system.model, "peft_config"):
            system.model = add_lora(system.model, config=peft_config)
        elif peft_config is not None:
            raise ValueError("peft_config: expected None for a model that has an adapter, got a config")
        if not any(p.requires_grad for p in system.parameters()):
            raise ValueError("system: expected trainable parameters, got a frozen adapter; load it with trainable=True")
        args.remove_unused_columns = False  # its columns are not the parameters of a forward
        args.logging_nan_inf_filter = False  # it hides what must stop training, and waits for the device at every step
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = _may_leave_unused(system)
        if args.n_gpu > 1:  # DataParallel replicates modules, which no trace survives; DDP is started with torchrun
            logger.warning("training on one of %d GPUs; start it with torchrun to use them all", args.n_gpu)
            args._n_gpu = 1
        for name in ("hf_device_map", "quantization_method"):  # a placed or quantised model is not moved
            if getattr(system.model, name, None) is not None:
                setattr(system, name, getattr(system.model, name))
        self._bad_losses, self._good_checkpoint = None, None
        super().__init__(
            model=system, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset,
            data_collator=data_collator or Collator(system.tokenizer), **options,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = True
        self.label_names = ["labels"]

    @staticmethod
    def _check_rows(system, name: str, rows) -> None:
        if rows is None or not hasattr(rows, "__len__"):
            return
        if not len(rows):
            raise ValueError(f"{name}: expected at least one row, got an empty data set")
        for i in range(len(rows)):
            check_row(rows[i], f"{name}[{i}]", system.agents)

    # ---- loss --------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of the answer tokens' losses / num_items_in_batch (the mean without it), as transformers expects it."""
        outputs = model(inputs["questions"], inputs["answers"], num_items_in_batch=num_items_in_batch)
        loss = outputs["loss"]
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP takes the mean over ranks, the items are of all ranks
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        bad = ~loss.isfinite()  # stays on the device until the optimizer is to step
        self._bad_losses = bad if self._bad_losses is None else self._bad_losses | bad
        if self.accelerator.sync_gradients:
            self._check_finite()
        return loss

    def _check_finite(self) -> None:
        """Before an optimizer step; ranks agree, so that none waits for one that stopped."""
        bad, self._bad_losses = self._bad_losses, None
        what = "loss"
        if self.accelerator.scaler is None:  # with a scaler, infinite gradients are how it finds its scale
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            if grads:
                norms = torch._foreach_norm(grads)
                bad_grads = ~torch.stack([n.to(bad.device) for n in norms]).isfinite().all()
                bad, what = bad | bad_grads, "loss or gradient"
        bad = self.accelerator.reduce(bad.float(), "sum")
        if bad.item():
            kept = self._good_checkpoint or last_checkpoint(self.args.output_dir)
            raise NonFiniteLoss(
                f"step {self.state.global_step + 1}: expected a finite {what}, got NaN or infinity; training stopped before "
                f"it reached the weights. Last good checkpoint: {kept or 'none'}"
            )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        return loss.detach(), outputs["logits"].detach(), outputs["labels"].detach()

    # ---- files -------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, **options):
        """As transformers' train; resume_from_checkpoint=True takes the newest checkpoint that is whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir}: expected a whole checkpoint to resume from, found none")
        self._bad_losses = None
        self._good_checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        with self._checkpointing():
            return super().train(
                resume_from_checkpoint=str(resume_from_checkpoint) if resume_from_checkpoint else None, **options
            )

    @contextlib.contextmanager
    def _checkpointing(self):
        """Activation checkpointing is switched on at the model itself, in its only form that is right with a trace."""
        name = "activation_checkpointing" if hasattr(self.args, "activation_checkpointing") else "gradient_checkpointing"
        if not getattr(self.args, name):
            yield
            return
        options = {"use_reentrant": False, **(getattr(self.args, name + "_kwargs") or {})}
        own = {key: options.pop(key) for key in ("every_n_layers", "offload") if key in options}
        setattr(self.args, name, False)
        try:
            getattr(self.model.model, name + "_enable")(**{name + "_kwargs": options}, **own)
            yield
        finally:
            setattr(self.args, name, True)

    def _save(self, output_dir=None, state_dict=None):
        if not self.args.should_save:
            return
        output_dir = Path(output_dir or self.args.output_dir)
        for name, p in self.model.named_parameters():
            if p.requires_grad and not p.isfinite().all():
                raise NonFiniteLoss(
                    f"{output_dir}: not written, {name} is not finite. Last good checkpoint: {self._good_checkpoint or 'none'}"
                )
        self.model.save_pretrained(output_dir)

    def _save_checkpoint(self, model, trial, *args, **kwargs):
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial, *args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        path = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        self.accelerator.wait_for_everyone()  # each rank wrote its random state
        if self.args.should_save:
            _write_manifest(path)
            self._rotate(path, limit)
        self._good_checkpoint = path

    def _rotate(self, newest: Path, limit: int | None) -> None:
        """Removes the oldest checkpoints above the limit, as transformers does, but only once the newest is whole."""
        kept = {newest.name, Path(self.state.best_model_checkpoint or newest).name}
        found = sorted(checkpoints(newest.parent), key=lambda p: p.stat().st_mtime)
        surplus = len(found) - limit if limit and limit > 0 else 0
        for path in [p for p in found if p.name not in kept][: max(surplus, 0)]:
            shutil.rmtree(path, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        check_checkpoint(resume_from_checkpoint)
        load_weights(model or self.model, resume_from_checkpoint)

    def _load_best_model(self):
        logger.info("loading the best adapter, of %s", self.state.best_model_checkpoint)
        _check_manifest(Path(self.state.best_model_checkpoint))
        load_weights(self.model, self.state.best_model_checkpoint)

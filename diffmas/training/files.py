"""What a run writes, and how it goes on from there: the part of the Trainer that knows checkpoints.

A checkpoint holds the adapter as `MultiAgentSystem.save_pretrained` writes it, the state of the optimizer as the engine does,
and a manifest, which comes last. diffmas.training.checkpoint knows what is on the disk.
"""

import contextlib
import logging
import math
from pathlib import Path

import torch
import transformers
from transformers import EarlyStoppingCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from diffmas.models.local import local
from diffmas.training.checkpoint import (
    check_checkpoint,
    check_engine_of,
    check_manifest,
    last_checkpoint,
    remove_oldest,
    write_manifest,
)
from diffmas.training.losses import NonFiniteLoss
from diffmas.training.sharded import load_whole, save_optimizer, save_whole, tensor_parallel

__all__ = ["Files"]

logger = logging.getLogger(__name__)


def _go_on_stopping(callbacks: list, state: TrainerState) -> bool:
    """Gives the callbacks that stop early their counts in a run's state, which transformers would begin anew at 0.

    Returns whether one of them has stopped that run.
    """
    found: dict[str, list] = {}
    for callback in callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            found.setdefault(type(callback).__name__, []).append(callback)
    for name, several in found.items():
        saved = state.stateful_callbacks.get(name, [])  # of several, those of the last checkpoint come last
        for callback, kept in zip(several, saved[-len(several) :] if isinstance(saved, list) else [saved]):
            callback.early_stopping_patience_counter = kept["attributes"]["early_stopping_patience_counter"]
    stopping = [callback for several in found.values() for callback in several]
    return any(callback.early_stopping_patience_counter >= callback.early_stopping_patience for callback in stopping)


def _mean_loss(history: list[dict]) -> float:
    """The mean over the steps of a log, whose losses are means since the entry before; NaN if none was logged."""
    total, at = 0.0, 0
    for log in history:
        if "loss" in log:
            total, at = total + log["loss"] * (log["step"] - at), log["step"]
    return total / at if at else math.nan


class Files(transformers.Trainer):
    """A Trainer whose model is a `MultiAgentSystem`. Its subclass says which `_engine` it has, whether it is `_sharded`, and
    who watches the gradient (`_monitor`); it reads `_good_checkpoint`, the last one that was written or loaded."""

    def train(self, resume_from_checkpoint=None, **options):
        """Like transformers' train; resume_from_checkpoint=True takes the newest whole checkpoint.

        From a checkpoint of the run's end, be it the last step or early stopping, nothing is trained: the weights and the
        state are as the run left them.

        Raises ValueError naming a checkpoint that is damaged or of another system, and if True finds none.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir}: expected a whole checkpoint to resume from, found none")
        self._bad_losses = None
        self._good_checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self._good_checkpoint is not None:
            check_engine_of(self._good_checkpoint, self._engine)
        if self._good_checkpoint is not None and (ended := self._ended(self._good_checkpoint)):
            return ended
        directory = Path(self.args.output_dir) if self.is_world_process_zero() else None
        with self._checkpointing(), self._monitor.running(directory):
            return super().train(
                resume_from_checkpoint=str(resume_from_checkpoint) if resume_from_checkpoint else None, **options
            )

    def _ended(self, checkpoint: Path) -> TrainOutput | None:
        """The outcome of the run if the checkpoint is of its end, with what is then loaded; else None.

        transformers would take one more step before it looks at the number of steps.
        """
        state = TrainerState.load_from_json(str(check_checkpoint(checkpoint) / "trainer_state.json"))
        if not _go_on_stopping(self.callback_handler.callbacks, state) and state.global_step < self._last_step():
            return None
        logger.warning("%s is of the run's end, nothing is left to train", checkpoint)
        self._load_from_checkpoint(checkpoint)
        state.is_local_process_zero, state.is_world_process_zero = self.is_local_process_zero(), self.is_world_process_zero()
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        loss = _mean_loss(state.log_history)
        return TrainOutput(state.global_step, loss, {"train_loss": loss, "total_flos": state.total_flos})

    def _last_step(self) -> int:
        """The number of optimizer steps of the whole run, as transformers counts them."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        per_epoch = max(math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps), 1)
        return math.ceil(self.args.num_train_epochs * per_epoch)

    @contextlib.contextmanager
    def _checkpointing(self):
        """Switches activation checkpointing on at the model itself, in the non-reentrant form that a trace needs."""
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

    def save_model(self, output_dir=None, _internal_call=False):
        """Writes what `MultiAgentSystem.save_pretrained` does. Where processes share the weights, all of them have to ask."""
        if not self._sharded:
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir)  # transformers would gather the base model too

    def _save(self, output_dir=None, state_dict=None):
        if not (self.args.should_save or self._sharded):
            return
        output_dir = Path(output_dir or self.args.output_dir)
        bad = [n for n, p in self.model.named_parameters() if p.requires_grad and not local(p).isfinite().all()]
        if self._sharded and self.accelerator.reduce(torch.tensor(float(len(bad)), device=self.args.device), "sum").item():
            bad = bad or ["a weight of another process"]
        if bad:
            raise NonFiniteLoss(
                f"{output_dir}: not written, {bad[0]} is not finite. Last good checkpoint: {self._good_checkpoint or 'none'}"
            )
        self.model.save_pretrained(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self._sharded and not self.is_deepspeed_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        if self.is_deepspeed_enabled:  # both without the base model once more
            self.model_wrapped.save_checkpoint(str(output_dir), exclude_frozen_parameters=True)
        elif self.is_fsdp_enabled:
            save_optimizer(self.accelerator, self.optimizer, self.model, output_dir)
        else:
            save_whole(self.optimizer, output_dir, self.args.should_save)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not tensor_parallel(self.model):
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_whole(self.optimizer, checkpoint)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _save_checkpoint(self, model, trial, *args, **kwargs):
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial, *args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        path = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        self.accelerator.wait_for_everyone()  # each rank wrote its random state
        if self.args.should_save:
            write_manifest(path)  # transformers would have removed older ones before this one was whole
            remove_oldest(path.parent, limit, keep={path.name, Path(self.state.best_model_checkpoint or path).name})
        self._good_checkpoint = path

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if not (self.is_deepspeed_enabled and resume_from_checkpoint):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.model_wrapped.load_checkpoint(str(resume_from_checkpoint), load_module_strict=False)  # no base model in it
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        check_checkpoint(resume_from_checkpoint)
        (model or self.model).load_weights(resume_from_checkpoint)

    def _load_best_model(self):
        logger.info("loading the best adapter, of %s", self.state.best_model_checkpoint)
        check_manifest(self.state.best_model_checkpoint)
        self.model.load_weights(self.state.best_model_checkpoint)

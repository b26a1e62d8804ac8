"""Training: transformers' Trainer with a multi-agent system as its model; a PEFT LoRA adapter is what it trains.

The whole episode of a batch, all agents and the answers' loss, is one forward of the system. DistributedDataParallel is then
right, also when ranks take different numbers of latent steps, and accumulation, schedules, logging, evaluation, checkpoints
and early stopping are transformers' own. Where processes share one model's weights: diffmas.training.sharded.
"""

import contextlib
import logging
import math
from pathlib import Path

import torch
import transformers
from transformers import EarlyStoppingCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from diffmas.agents.adapters import add_lora
from diffmas.agents.file import check_description
from diffmas.agents.system import MultiAgentSystem
from diffmas.models.adapted import check_held
from diffmas.models.local import is_spread, local, reshard
from diffmas.models.parts import trained_beside_the_text
from diffmas.training.arguments import adopted, check_arguments, wants_ids
from diffmas.training.checkpoint import (
    check_checkpoint,
    check_engine_of,
    check_manifest,
    last_checkpoint,
    remove_oldest,
    write_manifest,
)
from diffmas.training.data import Collator, check_row
from diffmas.training.gradients import GradientMonitor
from diffmas.training.losses import as_causal_lm, token_losses
from diffmas.training.settings import default_arguments
from diffmas.training.sharded import (
    TENSOR_PARALLEL,
    check_engine,
    engine_of,
    gather_once,
    load_whole,
    prepare,
    save_optimizer,
    save_whole,
    tensor_parallel,
)

__all__ = ["NonFiniteLoss", "Trainer"]

logger = logging.getLogger(__name__)


class NonFiniteLoss(FloatingPointError):
    """The loss or its gradients became NaN or infinite; the weights are those of the last good step."""


def _may_leave_unused(system: MultiAgentSystem) -> bool:
    """Whether DistributedDataParallel has to look for parameters without a gradient.

    A shared adapter always gets one through the last agent. The adapter of one role gets none if grad_scope cuts it off, or
    if T = 0 and no latent step reads the agent's last hidden state. Ranks may differ in T, and this answer may not. Text gives
    none to an adapter in a vision tower.
    """
    return system.adapter_scope == "per_role" or system.realign.mode == "learned" or trained_beside_the_text(system.model)


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


class Trainer(transformers.Trainer):
    """transformers' Trainer for a `MultiAgentSystem`.

    system: its PEFT adapter is trained; a plain model gets one first. peft_config: for that one, by default `lora_config()`.
    args: TrainingArguments, by default `default_arguments("diffmas-output")`; they stay as they are. docs/training.md lists the
        few fields that are refused.
    train_dataset, eval_dataset: rows of questions and answers (`diffmas.training.data`), as lists or datasets.
    compute_loss_func: (outputs, labels, num_items_in_batch=...) -> another loss, as for a causal LM: outputs["logits"]
        [B, 1 + A, V] at t predict labels [B, 1 + A] at t + 1, which are -100 where there is no answer token.
    gradient_report_steps: every so many steps, norms of the gradient go to the log, and to gradients.csv and gradients.png in
        output_dir: of the parameters by layers, and of dL/d(rows) and dL/dh by agent and latent step. 0: never.
    explosion_factor: one warning, with a gradient report of that step (of the answers' own loss), when the gradient's norm
        before clipping is more than so many times its running median. None: no warning.
    options: other arguments of transformers' Trainer.

    The loss of an evaluation is the mean over the tokens of its answers, on however many devices and in whatever batches.

    A loss or gradient that is not finite stops training with `NonFiniteLoss` before it reaches the weights.
    train(resume_from_checkpoint=True) goes on from the newest whole checkpoint, bit for bit as if it had not stopped.

    Raises ValueError for an empty data set, for any row that lacks the answer or a field of a prompt (a data set with a
    length is read once), and for options that do not apply. Rows too long for the context are found when they are reached.

        >>> args = default_arguments(directory, max_steps=1, report_to=[])
        >>> Trainer(system, args, train_dataset=rows).train().global_step
        {'loss': ...}
        1
        >>> system.save_pretrained(directory)
    """

    def __init__(
        self, system: MultiAgentSystem, args: TrainingArguments | None = None, *, train_dataset=None, eval_dataset=None,
        compute_loss_func=None, peft_config=None, data_collator=None, gradient_report_steps: int = 0,
        explosion_factor: float | None = 100.0, **options,
    ):  # fmt: skip
        if not isinstance(system, MultiAgentSystem):
            raise ValueError(f"system: expected a MultiAgentSystem, got {type(system).__name__}")
        args = default_arguments("diffmas-output") if args is None else args
        evaluated = eval_dataset if isinstance(eval_dataset, dict) else {None: eval_dataset}
        sets = {"train_dataset": train_dataset}
        sets |= {"eval_dataset" if k is None else f"eval_dataset[{k!r}]": rows for k, rows in evaluated.items()}
        check_arguments(args, sets)
        if args.save_strategy != "no":
            check_description(system.describe())  # not when the first checkpoint is due
        for name, rows in sets.items():
            self._check_rows(system, name, rows)
        if not hasattr(system.model, "peft_config"):
            system.model = add_lora(system.model, config=peft_config)
        elif peft_config is not None:
            raise ValueError("peft_config: expected None for a model that has an adapter, got a config")
        if options.get("processing_class") not in (None, system.tokenizer):
            raise ValueError("processing_class: expected None or the system's own tokenizer, got another")
        if not any(p.requires_grad for p in system.parameters()):
            raise ValueError("system: expected trainable parameters, got a frozen adapter; load it with trainable=True")
        check_held(system.model)
        args = adopted(args, _may_leave_unused(system))
        # transformers does not move a placed or quantized model, nor one that it has sharded as it loaded it
        for name in ("hf_device_map", "quantization_method", *TENSOR_PARALLEL):
            if getattr(system.model, name, None) is not None and (name not in TENSOR_PARALLEL or tensor_parallel(system)):
                setattr(system, name, getattr(system.model, name))
        self._bad_losses, self._good_checkpoint = None, None
        self._token_losses: list[torch.Tensor] = []  # of an evaluation's rows: the sum over tokens, and how many they are
        self._monitor = GradientMonitor(system, gradient_report_steps, explosion_factor)
        only_model = args.save_only_model
        if tensor_parallel(system):  # transformers refuses a checkpoint with the optimizer's state, which is written here
            args.save_only_model = True
        self._set_up(
            system, args, train_dataset=train_dataset, eval_dataset=eval_dataset, data_collator=data_collator,
            compute_loss_func=compute_loss_func, **options,
        )  # fmt: skip
        self.args.save_only_model = only_model
        self._engine = engine_of(self)
        check_engine(system, self.args, self.accelerator.state)
        if self.is_deepspeed_enabled:
            self._monitor.without_gradients()
        zero3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        self._sharded = self.is_fsdp_enabled or zero3 or tensor_parallel(system)
        self._batches = self.accelerator.num_processes  # at once, of rows of their own
        if tensor_parallel(system):
            self._batches //= self.get_tp_size()
        if self._sharded:
            prepare(system, self.is_fsdp_enabled or zero3)
            self._monitor.alone = False
        self._monitor.log = self.log
        self.add_callback(self._monitor)

    def _set_up(self, system: MultiAgentSystem, args: TrainingArguments, *, data_collator, **options) -> None:
        """transformers' own part of the construction."""
        collator = data_collator or Collator(system.tokenizer, system.tokenize if wants_ids(args) else None)
        super().__init__(model=system, args=args, data_collator=collator, **options)
        self.model_accepts_loss_kwargs = True
        self.label_names = ["labels"]

    _check_row = staticmethod(check_row)

    def _check_rows(self, system, name: str, rows) -> None:
        if rows is None or not hasattr(rows, "__len__"):
            return
        if not len(rows):
            raise ValueError(f"{name}: expected at least one row, got an empty data set")
        for i in range(len(rows)):
            self._check_row(rows[i], f"{name}[{i}]", system.agents)

    # ---- loss --------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The sum of the answer tokens' losses divided by num_items_in_batch, or their mean without it; or what
        compute_loss_func makes of it."""
        outputs = model(inputs["questions"], inputs["answers"], num_items_in_batch=num_items_in_batch)
        if self.compute_loss_func is None:
            loss = outputs["loss"]
        else:
            shifted = as_causal_lm(outputs)
            count = (shifted["labels"] != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = self.compute_loss_func(shifted, shifted["labels"], num_items_in_batch=count)
        if self.is_deepspeed_enabled and model.training:
            self._check_before_backward(loss)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self._batches  # DDP takes the mean over ranks; the count is over all ranks
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        step = self.state.global_step + 1
        gather_once(model, self.accelerator.state)
        with self._monitor.micro_batch(step, inputs, num_items_in_batch):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.is_fsdp_enabled:
            reshard(model)
        bad = ~loss.isfinite()  # stays on the device until the optimizer is to step
        self._bad_losses = bad if self._bad_losses is None else self._bad_losses | bad
        if self.accelerator.sync_gradients:
            self._before_step(step)
        return loss

    def _check_before_backward(self, loss) -> None:
        """DeepSpeed's backward takes the step too: raises NonFiniteLoss on all ranks if any has a bad loss."""
        if self.accelerator.reduce((~loss.detach().isfinite()).float(), "sum").item():
            raise NonFiniteLoss(
                f"step {self.state.global_step + 1}: expected a finite loss, got NaN or infinity; training stopped before it "
                f"reached the weights. Last good checkpoint: {self._good_checkpoint or last_checkpoint(self.args.output_dir)}"
            )

    def _before_step(self, step: int) -> None:
        """Raises NonFiniteLoss on all ranks if any has a bad loss or gradient; called before every optimizer step."""
        bad, self._bad_losses = self._bad_losses, None
        what, scaler = "loss", self.accelerator.scaler
        parameters, norms = [p for p in self.model.parameters() if p.grad is not None], []
        if parameters and (scaler is None or self._monitor.needs_norms(step)):
            grads = [local(p.grad) for p in parameters]
            norms = torch.stack([n.to(bad.device) for n in torch._foreach_norm(grads)])
            if self._sharded and self._monitor.needs_norms(step):
                of_all = [1.0 if is_spread(p.grad) else self.accelerator.num_processes for p in parameters]
                norms = self.accelerator.reduce(norms.square() / norms.new_tensor(of_all), "sum").sqrt()
            if scaler is None:  # which finds its scale by infinite gradients
                bad, what = bad | ~norms.isfinite().all(), "loss or gradient"
        bad = self.accelerator.reduce(bad.float(), "sum").item()
        if self._monitor.needs_norms(step):
            scale = 1.0 if scaler is None else scaler.get_scale()
            norms = [norm / scale for norm in norms.tolist()] if parameters else []
            directory = Path(self.args.output_dir) if self.is_world_process_zero() else None
            self._monitor.before_step(step, parameters, norms, scale * self._batches, directory)
        if bad:
            kept = self._good_checkpoint or last_checkpoint(self.args.output_dir)
            raise NonFiniteLoss(
                f"step {step}: expected a finite {what}, got NaN or infinity; training stopped before it reached the weights. "
                f"Last good checkpoint: {kept or 'none'}"
            )

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):
        """As transformers' own, with the mean over tokens as loss, which is the same however rows are batched."""
        self._token_losses = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._token_losses:
            nll, tokens = torch.cat(self._token_losses).cpu().double().sum(0).tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = nll / tokens
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
            tokens = (outputs["labels"] != -100).sum(1)
            # By row, since the last batch may repeat rows, to have one for each process; of another loss, a share of the mean.
            of_row = token_losses(outputs).sum(1) if loss is outputs["loss"] else loss.detach() * tokens
        weighed = torch.stack((of_row.float(), tokens.float()), dim=1)
        self._token_losses.append(self.accelerator.gather_for_metrics(weighed) if self._batches > 1 else weighed)
        if prediction_loss_only:
            return loss.detach(), None, None
        return loss.detach(), outputs["logits"].detach(), outputs["labels"].detach()

    # ---- files -------------------------------------------------------------------------------------------------------

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

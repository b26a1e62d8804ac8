"""Training: transformers' Trainer with a multi-agent system as its model; a PEFT LoRA adapter is what it trains.

The whole episode of a batch, all agents and the answers' loss, is one forward of the system. DistributedDataParallel is then
right, also when ranks take different numbers of latent steps, and accumulation, schedules, logging, evaluation, checkpoints
and early stopping are transformers' own. What it writes: diffmas.training.files. Where processes share one model's weights:
diffmas.training.sharded.
"""

from pathlib import Path

import torch
from transformers import TrainingArguments

from diffmas.agents.adapters import add_lora
from diffmas.agents.file import check_description
from diffmas.agents.system import MultiAgentSystem
from diffmas.models.adapted import check_held
from diffmas.models.local import is_spread, local, reshard
from diffmas.models.parts import trained_beside_the_text
from diffmas.models.patch import check_trainable
from diffmas.training.annealing import Annealing
from diffmas.training.arguments import adopted, check_arguments, wants_ids
from diffmas.training.checkpoint import last_checkpoint
from diffmas.training.collecting import no_collections
from diffmas.training.data import Collator, check_row
from diffmas.training.files import Files
from diffmas.training.gradients import GradientMonitor
from diffmas.training.losses import NonFiniteLoss, as_causal_lm, token_losses
from diffmas.training.settings import default_arguments
from diffmas.training.sharded import TENSOR_PARALLEL, check_engine, engine_of, gather_once, prepare, tensor_parallel

__all__ = ["Trainer"]


def _may_leave_unused(system: MultiAgentSystem) -> bool:
    """Whether DistributedDataParallel has to look for parameters without a gradient.

    A shared adapter always gets one through the last agent. The adapter of one role gets none if grad_scope cuts it off, or
    if T = 0 and no latent step reads the agent's last hidden state. Ranks may differ in T, and this answer may not. Text gives
    none to an adapter in a vision tower.
    """
    learned = system.realign.mode == "learned" or len(system.choices.weights) > 0
    if system.others or system.adapter_scope == "per_role" or learned:
        return True
    return trained_beside_the_text(system.model)


class Trainer(Files):
    """transformers' Trainer for a `MultiAgentSystem`.

    system: its PEFT adapters are trained, the projectors of other models, and how rows are chosen (by learned); a plain model
        gets an adapter first, but where there are projectors to train. peft_config: for that one, by default `lora_config()`.
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
    length is read once), for options that do not apply, and for a model with attention dropout. Rows too long for the context
    are found when they are reached.

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
            if system.others and peft_config is None:
                system.model.requires_grad_(False)
            else:
                system.model = add_lora(system.model, config=peft_config)
        elif peft_config is not None:
            raise ValueError("peft_config: expected None for a model that has an adapter, got a config")
        if options.get("processing_class") not in (None, system.tokenizer):
            raise ValueError("processing_class: expected None or the system's own tokenizer, got another")
        if not any(p.requires_grad for p in system.parameters()):
            raise ValueError("system: expected trainable parameters, got a frozen adapter; load it with trainable=True")
        check_held(system.model)
        for model in (system.model, *(other.model for other in system.others.values())):
            check_trainable(model)
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
        if self._sharded and system.others:
            raise ValueError(f"system: expected one model with {self._engine}, got others beside it, which it does not shard")
        if self._sharded and len(system.choices.weights):
            raise ValueError(f"system: expected no rows chosen by what is learned with {self._engine}, got some")
        if self._sharded:
            prepare(system, self.is_fsdp_enabled or zero3)
            self._monitor.alone = False
        self._monitor.log = self.log
        self._monitor.alone &= not system.others  # whose gradients a report does not tell apart
        self.add_callback(self._monitor)
        self.add_callback(Annealing(system.others.values()))

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
        with self._monitor.micro_batch(step, inputs, num_items_in_batch), no_collections():
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

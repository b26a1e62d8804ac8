"""One rank of a two-process run over gloo, for test_engines.py: optimizer steps under an engine, everything written to files.

torchrun --nproc_per_node 2 worker.py OUTPUT_DIR CASE...
"""

import os
import signal
import sys
from pathlib import Path

import tiny_systems
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from diffmas.training import Trainer, default_arguments


def fsdp(**options):
    return dict(fsdp="full_shard", fsdp_config={"version": 2, **options})


SHARDED = fsdp(state_dict_type="SHARDED_STATE_DICT")
CHECKPOINTED = dict(gradient_checkpointing=True)

# name -> (latent steps of each process, options of the system, TrainingArguments)
STEPS = {
    "fsdp": ((4, 4), {}, fsdp()),
    "fsdp T=0": ((0, 0), {}, fsdp()),
    "fsdp keep": ((4, 4), {}, fsdp(reshard_after_forward=False)),
    "fsdp checkpointing": ((4, 4), {}, {**fsdp(), **CHECKPOINTED}),
    "fsdp T=0 checkpointing": ((0, 0), {}, {**fsdp(), **CHECKPOINTED}),
    "fsdp T=1,3": ((1, 3), {}, fsdp()),
    "fsdp T=0,2": ((0, 2), {"realign": "learned"}, fsdp()),
    "fsdp roles": ((1, 3), {"adapter_scope": "per_role"}, {**fsdp(), **CHECKPOINTED}),
    "fsdp learned": ((3, 3), {"realign": "learned", "trace_content": "latent_only"}, fsdp()),
    "fsdp soft": ((2, 2), {"realign": "soft_token"}, fsdp(reshard_after_forward=False)),
    "fsdp detach": ((2, 2), {"grad_scope": "detach_trace"}, fsdp()),
    "fsdp bf16": ((0, 0), {}, {**fsdp(), "bf16": True}),
}
RESUMED = {"fsdp resumed": fsdp(), "fsdp resumed sharded": SHARDED}
KILLED = {"fsdp killed": fsdp()}
GIVEN = dict(
    max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.0, use_cpu=True,
    ddp_backend="gloo", report_to=[], disable_tqdm=True, save_strategy="no",
)  # fmt: skip


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x.detach().clone()


def weights(model):
    return {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}


class Record(TrainerCallback):
    """The gradients as the optimizer gets them; None counts as zero."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.grads = {
            n: torch.zeros_like(p) if p.grad is None else whole(p.grad) for n, p in model.named_parameters() if p.requires_grad
        }


class Recording(Trainer):
    seen = ()

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.seen = (*self.seen, *zip(inputs["questions"], inputs["answers"]))
        return super().compute_loss(model, inputs, *args, **kwargs)


def trainer_of(directory: Path, steps, options: dict, arguments: dict, pretend: bool = True, **more) -> Recording:
    AcceleratorState._reset_state()
    args = default_arguments(directory, **{**GIVEN, **arguments})
    assert args.world_size == 2
    if args.fsdp and pretend:  # accelerate shards on accelerators alone; torch does it anywhere
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Recording(
        tiny_systems.system(steps[args.process_index], **options), args,
        train_dataset=tiny_systems.rows(8), eval_dataset=tiny_systems.rows(5), **more,
    )  # fmt: skip


def step(directory: Path, steps, options, arguments) -> dict:
    """A step, an evaluation, and back from what is saved."""
    trainer = trainer_of(directory, steps, options, arguments, callbacks=[record := Record()])
    loss = trainer.train().training_loss
    sharded = [type(m).__name__ for m in trainer.model.modules() if type(m).__name__.startswith("FSDP")]
    found = {"seen": trainer.seen, "grads": record.grads, "loss": loss, "sharded": sharded}
    found["eval_loss"] = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    found["weights"] = weights(trainer.model)
    if steps[0] != steps[1]:  # the teams of the two processes are not the same
        return found
    with torch.no_grad():
        for p in trainer.model.parameters():
            if p.requires_grad:
                p.zero_()
    trainer.model.load_weights(directory)
    return {**found, "loaded": weights(trainer.model)}


def resume(directory: Path, arguments) -> dict:
    """Three steps, and the last two of them from the first's checkpoint."""
    arguments = {**arguments, "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    trainer = trainer_of(directory, (2, 2), {}, arguments)
    trainer.train()
    again = trainer_of(directory, (2, 2), {}, arguments)
    again.train(resume_from_checkpoint=str(directory / "checkpoint-1"))
    return {"weights": weights(trainer.model), "resumed": weights(again.model), "log": again.state.log_history}


def stop(directory: Path) -> dict:
    """Errors of one process, and what no process can do."""
    errors = {}

    def error(name, run):
        try:
            run()
        except (RuntimeError, ValueError) as raised:
            errors[name] = f"{type(raised).__name__}: {raised}"

    trainer = trainer_of(directory, (1, 1), {}, fsdp())
    long = [{"question": "lamp " * 200, "answer": "the key"}] if trainer.args.process_index else tiny_systems.rows(1)
    error("row", lambda: trainer.model([long[0]["question"]], [long[0]["answer"]]))
    error("generate", lambda: trainer.model.generate(["where is the key"]))
    error("report", lambda: trainer.model.gradient_report(["where is the key"], ["the key"]))
    error("cpu", lambda: trainer_of(directory, (1, 1), {}, fsdp(), pretend=False))
    error("version", lambda: trainer_of(directory, (1, 1), {}, fsdp(version=1)))
    error("own checkpointing", lambda: trainer_of(directory, (1, 1), {}, fsdp(activation_checkpointing=True)))
    return {"errors": errors}


def die(directory: Path, arguments) -> None:
    """The second process is killed while the second checkpoint is written."""
    arguments = {**arguments, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}

    class Dying(Recording):
        def _save_rng_state(self, output_dir):
            if self.state.global_step == 2 and self.args.process_index == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            super()._save_rng_state(output_dir)

    trainer = trainer_of(directory, (1, 1), {}, arguments)
    trainer.__class__ = Dying
    trainer.train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    for name in sys.argv[2:]:
        if name in STEPS:
            found = step(output / name, *STEPS[name])
        elif name in RESUMED:
            found = resume(output / name, RESUMED[name])
        elif name in KILLED:
            found = die(output / name, KILLED[name])
        else:
            found = stop(output / name)
        torch.save(found, output / f"{name}-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()

"""One rank of a two-process run over gloo, for test_engines.py: optimizer steps under an engine, everything written to files.

torchrun --nproc_per_node 2 engine_worker.py OUTPUT_DIR CASE...
"""

import sys
from pathlib import Path

import tiny_systems
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from diffmas.training import Trainer, default_arguments

FSDP = dict(fsdp="full_shard", fsdp_config={"version": 2, "reshard_after_forward": True})

KEEP = dict(fsdp="full_shard", fsdp_config={**FSDP["fsdp_config"], "reshard_after_forward": False})
OWN = dict(fsdp="full_shard", fsdp_config={**FSDP["fsdp_config"], "activation_checkpointing": True})
CHECKPOINTED = dict(gradient_checkpointing=True)

# name -> (latent steps of each process, options of the system, TrainingArguments)
CASES = {
    "fsdp": ((4, 4), {}, FSDP),
    "fsdp T=0": ((0, 0), {}, FSDP),
    "fsdp keep": ((4, 4), {}, KEEP),
    "fsdp checkpointing": ((4, 4), {}, {**FSDP, **CHECKPOINTED}),
    "fsdp T=0 checkpointing": ((0, 0), {}, {**FSDP, **CHECKPOINTED}),
    "fsdp own checkpointing": ((4, 4), {}, OWN),
    "fsdp T=1,3": ((1, 3), {}, FSDP),
    "fsdp T=0,2": ((0, 2), {}, FSDP),
    "fsdp roles": ((1, 3), {"adapter_scope": "per_role"}, {**FSDP, **CHECKPOINTED}),
    "fsdp learned": ((0, 3), {"realign": "learned", "trace_content": "latent_only"}, FSDP),
    "fsdp soft": ((2, 2), {"realign": "soft_token"}, KEEP),
    "fsdp detach": ((2, 2), {"grad_scope": "detach_trace"}, FSDP),
    "fsdp bf16": ((4, 4), {}, {**FSDP, "bf16": True}),
}


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x.clone()


class Record(TrainerCallback):
    """The gradients as the optimizer gets them; None counts as zero."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.grads = {
            n: torch.zeros_like(p) if p.grad is None else whole(p.grad) for n, p in model.named_parameters() if p.requires_grad
        }


class Recording(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.seen += zip(inputs["questions"], inputs["answers"])
        return super().compute_loss(model, inputs, *args, **kwargs)


def run(name: str, output: Path) -> None:
    AcceleratorState._reset_state()
    T, options, more = CASES[name]
    given = dict(
        max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.0, use_cpu=True,
        ddp_backend="gloo", report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    args = default_arguments(output / name, **{**given, **more})
    if args.fsdp:  # accelerate shards on accelerators alone; torch does it anywhere
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = Recording(
        tiny_systems.system(T[args.process_index], **options), args, callbacks=[record := Record()],
        train_dataset=tiny_systems.rows(8), eval_dataset=tiny_systems.rows(5),
    )  # fmt: skip
    trainer.seen = []
    loss = trainer.train().training_loss
    if args.process_index == 0:
        print([n for n, m in trainer.model.named_modules() if type(m).__name__.startswith("FSDP")], type(trainer.model), flush=True)
    found = {"seen": trainer.seen, "grads": record.grads, "loss": loss}
    torch.save(found, output / f"{name}-{args.process_index}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        run(name, Path(sys.argv[1]))
    torch.distributed.destroy_process_group()

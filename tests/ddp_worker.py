"""One rank of a two-process run over gloo, for test_training.py: one optimizer step per case, everything written to a file.

torchrun --nproc_per_node 2 ddp_worker.py OUTPUT_DIR
"""

import sys
from pathlib import Path

import tiny_systems
import torch
from transformers import TrainerCallback, TrainingArguments

from diffmas.training import Trainer, default_arguments, end_processes

# name -> (latent steps of each rank, options of the system, TrainingArguments)
CASES = {
    "same": ((2, 2), {}, {}),
    "different": ((1, 3), {}, {}),
    "per_role": ((1, 3), {"adapter_scope": "per_role"}, {}),
    "unused": ((0, 2), {"adapter_scope": "per_role"}, {}),
    "iterable": ((2, 2), {}, {}),
}
if hasattr(TrainingArguments, "ddp_static_graph"):  # the second step relies on what the first one has shown
    static = dict(ddp_static_graph=True, gradient_accumulation_steps=1, per_device_train_batch_size=4)
    CASES["static"] = ((1, 3), {}, {**static, "max_steps": 2, "learning_rate": 0.0})


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(tiny_systems.rows(8))


def build(latent_steps: int, options: dict):
    return tiny_systems.system(latent_steps, **options)


class Record(TrainerCallback):
    """The gradients as the optimizer gets them; None counts as zero."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.grads = {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
        }


class Recording(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.seen += zip(inputs["questions"], inputs["answers"])
        return super().compute_loss(model, inputs, *args, **kwargs)


def main(output: Path) -> None:
    torch.set_num_threads(1)
    for name, (steps, options, more) in CASES.items():
        given = dict(
            max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.0, use_cpu=True,
            ddp_backend="gloo", report_to=[], disable_tqdm=True, save_strategy="steps", save_steps=1,
        )  # fmt: skip
        args = default_arguments(output / name, **{**given, **more})
        assert args.world_size == 2
        trainer = Recording(
            build(steps[args.process_index], options), args, callbacks=[record := Record()],
            train_dataset=Stream() if name == "iterable" else tiny_systems.rows(8), eval_dataset=tiny_systems.rows(5),
        )  # fmt: skip
        trainer.seen = []
        trainer.train()
        assert trainer.model_wrapped.static_graph == (name == "static")
        trainer.save_model()
        found = {
            "seen": trainer.seen[-4:], "grads": record.grads, "find_unused": trainer.args.ddp_find_unused_parameters,
            "eval_loss": trainer.evaluate()["eval_loss"],
        }  # fmt: skip
        torch.save(found, output / f"{name}-{args.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_processes()

"""One rank of a two-process run over gloo, for test_engines.py: optimizer steps under an engine, everything written to files.

torchrun --nproc_per_node 2 worker.py OUTPUT_DIR CASE...
"""

import importlib.util
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import tiny_systems
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from cases import GIVEN, KILLED, LAUNCHED, MEASURED, MEMORY, NORM, REPORTED, RESUMED, RESUMING, STEPS, STOPPED, fsdp
from launched import no_compiling, write_team
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from diffmas import patch_model, unpatch_model
from diffmas.benchmarks import engine_memory
from diffmas.cli.main import app
from diffmas.models import linears, probe
from diffmas.models.local import of_all_heads
from diffmas.training import Trainer, default_arguments, end_processes
from diffmas.training.sharded import check_engine


def gradient(p):
    """As the optimizer gets it; None counts as zero."""
    if hasattr(p, "ds_id") or hasattr(p, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(p).clone()
    return torch.zeros_like(p) if p.grad is None else whole(p.grad)


def whole(x):
    if hasattr(x, "ds_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([x]):
            return x.detach().clone()
    return x.full_tensor() if isinstance(x, DTensor) else x.detach().clone()


def weights(model):
    return {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}


# Linears long enough to be fused; weights that rounding is little amplified by from step to step.
BASE = dict(
    seed=5, initializer_range=0.1, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=32,
)  # fmt: skip
# A layer's weights, or the root's; its gradients; a linear and its adapter in one op; realign's W.
GATHERED, REDUCED, FUSED, SOLVED = [], [], [], []


def count_gathers():
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

    gather, reduce = group.foreach_all_gather, group.foreach_reduce
    group.foreach_all_gather = lambda *args, **options: GATHERED.append(1) or gather(*args, **options)
    group.foreach_reduce = lambda *args, **options: REDUCED.append(1) or reduce(*args, **options)


def count_fused():
    run = linears.run
    linears.run = lambda x, weight, bias, a, *rest: FUSED.append(a) or run(x, weight, bias, a, *rest)


def count_solved():
    solve = torch.linalg.solve
    torch.linalg.solve = lambda *args, **options: SOLVED.append(1) or solve(*args, **options)


class Record(TrainerCallback):
    """The gradients as the optimizer gets them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if not args.deepspeed:
            self.grads = {n: gradient(p) for n, p in model.named_parameters() if p.requires_grad}


class Recording(Trainer):
    seen, grads = (), None

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.seen = (*self.seen, *zip(inputs["questions"], inputs["answers"]))
        if self.is_deepspeed_enabled and model.training and "step" not in vars(model):  # its backward ends with its step
            step = model.step

            def recording():
                self.grads = {n: gradient(p) for n, p in self.model.named_parameters() if p.requires_grad}
                step()

            model.step = recording
        return super().compute_loss(model, inputs, *args, **kwargs)


def model_of(directory: Path | None = None):
    """The base model. directory: of a case, under a directory that has the model on disk; for one of TP it is spread over the
    processes by heads, for one of ZeRO-3 it comes in parts."""
    if directory is None:
        return tiny_systems.model(**BASE)
    from transformers.distributed import DistributedConfig

    spread = {"distributed_config": DistributedConfig(tp_plan="auto")} if directory.name.startswith("tp") else {}
    return AutoModelForCausalLM.from_pretrained(directory.parent / "base", **spread)


def system_of(T: int, options: dict, directory: Path | None = None):
    return tiny_systems.system(T, base=model_of(directory), **options)


def with_other_weights(system):
    """As they are after some training."""
    with torch.no_grad():
        for p in system.parameters():
            if p.requires_grad:
                p.mul_(-2)
    return system


def trainer_of(directory: Path, steps, options: dict, arguments: dict, pretend: bool = True, **more) -> Recording:
    AcceleratorState._reset_state()
    args = default_arguments(directory, **{**GIVEN, **arguments})
    assert args.world_size == 2
    if pretend and (args.fsdp or args.deepspeed or directory.name.startswith("tp")):  # accelerate knows of accelerators alone
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Recording(
        system_of(steps[args.process_index], options, directory), args,
        train_dataset=tiny_systems.rows(8), eval_dataset=tiny_systems.rows(5), **more,
    )  # fmt: skip


def step(directory: Path, steps, options, arguments) -> dict:
    """A step, an evaluation, and back from what is saved."""
    more = {"gradient_report_steps": int(directory.name in REPORTED), "callbacks": [record := Record()]}
    trainer = trainer_of(directory, steps, options, arguments, **more)
    before = len(GATHERED), len(REDUCED)
    FUSED.clear()
    SOLVED.clear()
    loss = trainer.train().training_loss
    sharded = [type(m).__name__ for m in trainer.model.modules() if type(m).__name__.startswith("FSDP")]
    found = {"seen": trainer.seen, "grads": trainer.grads or record.grads, "loss": loss, "sharded": sharded}
    found["norm"] = next((x[NORM] for x in trainer.state.log_history if NORM in x), None)
    found["gathered"], found["reduced"], found["fused"] = len(GATHERED) - before[0], len(REDUCED) - before[1], len(FUSED)
    found["eval_loss"] = trainer.evaluate()["eval_loss"]
    found["solved"] = len(SOLVED)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()  # the first process writes
    found["weights"] = weights(trainer.model)
    if steps[0] != steps[1]:  # the teams of the two processes are not the same
        return found
    with torch.no_grad():
        for p in trainer.model.parameters():
            if p.requires_grad:
                p.zero_()
    trainer.model.load_weights(directory)
    found["loaded"] = weights(trainer.model)
    if not options:
        trainer.model.load_weights(directory.parent / f"alone T={steps[0]}")
        found["of one process"] = weights(trainer.model)
    return found


def resume(directory: Path, arguments) -> dict:
    """Three steps, and the last two of them from the first's checkpoint."""
    arguments = {**arguments, **RESUMING}
    trainer = trainer_of(directory, (2, 2), {}, arguments)
    trainer.train()
    again = trainer_of(directory, (2, 2), {}, arguments)
    again.train(resume_from_checkpoint=str(directory / "checkpoint-1"))
    return {"weights": weights(trainer.model), "resumed": weights(again.model), "log": again.state.log_history}


def stop(directory: Path, arguments) -> dict:
    """Errors of one process, and what no process can do."""
    errors = {}

    def error(name, run):
        try:
            run()
        except (FloatingPointError, RuntimeError, ValueError) as raised:
            errors[name] = f"{type(raised).__name__}: {raised}"

    def loss(outputs, labels, num_items_in_batch=None):
        return outputs["logits"].sum() * (torch.nan if os.environ["RANK"] == "1" else 1.0)

    trainer = trainer_of(directory, (1, 1), {}, arguments, compute_loss_func=loss)
    before = weights(trainer.model)
    error("nan", trainer.train)
    after = weights(trainer.model)
    same = all(torch.equal(x, after[name]) for name, x in before.items())
    if directory.name == "zero2 stop":
        return {"errors": errors, "same": same}
    trainer = trainer_of(directory, (1, 1), {}, arguments)
    long = [{"question": "lamp " * 200, "answer": "the key"}] if trainer.args.process_index else tiny_systems.rows(1)
    error("row", lambda: trainer.model([long[0]["question"]], [long[0]["answer"]]))
    if "deepspeed" in arguments:
        return {"errors": errors, "same": same}
    error("generate", lambda: trainer.model.generate(["where is the key"]))
    error("report", lambda: trainer.model.gradient_report(["where is the key"], ["the key"]))
    first, *others = trainer.model.agents
    trainer.model.agents = [replace(first, latent_steps="T", passes=2, grad_passes=1), *others]
    error("grad passes", lambda: check_engine(trainer.model, trainer.args, trainer.accelerator.state))
    trainer.model.agents = [first, *others]
    trainer.accelerator.state.fsdp_plugin.fsdp_version = 1  # whose plugin cannot be made on a CPU
    error("version", lambda: check_engine(trainer.model, trainer.args, trainer.accelerator.state))
    error("cpu", lambda: trainer_of(directory, (1, 1), {}, fsdp(), pretend=False))
    error("own checkpointing", lambda: trainer_of(directory, (1, 1), {}, fsdp(activation_checkpointing=True)))
    return {"errors": errors, "same": same}


def patched(directory: Path) -> dict:
    """A patched model by itself, all of its weights trained: gradients, tokens, rows; and a layer that one process refuses."""
    torch.distributed.init_process_group("gloo")
    questions, answers = (list(x) for x in zip(*((r["question"], r["answer"]) for r in tiny_systems.rows(3))))
    found = {}
    for name, where in (("alone", None), ("tp", directory)):
        model = model_of(where).train()
        for realign in ("ridge", "soft_token"):
            system = tiny_systems.system(1, lora=False, base=model, realign=realign)
            output = system(questions, answers)
            output.loss.backward()
            grads = {n: whole(p.grad) for n, p in system.named_parameters()}
            model.zero_grad()
            found[name, realign] = {
                "loss": output.loss.item(), "grads": grads, "heads": output.trace.keys_values(0, 0)[0].shape[1],
                "text": system.generate(questions, max_new_tokens=6, temperature=0),
            }  # fmt: skip
    mesh = next(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    norm = torch.nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()]))  # as some versions spread norms
    (of_all_heads(norm, model) * (1 + mesh.get_rank())).sum().backward()
    found["norm"] = whole(norm.grad)
    unpatch_model(model)
    mismatch = probe.mismatch
    if os.environ["RANK"] == "1":
        probe.mismatch = lambda *_: "it is refused here"
    try:
        patch_model(model)
    except ValueError as error:
        found["error"] = str(error)
    probe.mismatch = mismatch
    return {**found, "plain": not hasattr(model, "diffmas_patch")}


def environment_of(config: str) -> dict[str, str]:
    """What `accelerate launch --config_file` tells its processes of the engine."""
    script = ["--config_file", f"examples/accelerate/{config}.yaml", "--num_processes", "2", "train.py"]
    found = {}
    with mock.patch("torch.distributed.run.run", lambda _: found.update(os.environ)):
        launch_command(launch_command_parser().parse_args(script))
    return {name: value for name, value in found.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def launch(directory: Path, kind: str) -> None:
    """`diffmas train`, as one of the configs for accelerate launches it. kind: what accelerate would find of accelerators."""
    output, name, begin = directory.parent, directory.name.removeprefix("launch "), PartialState.__init__

    def pretending(self, *args, **options):
        begin(self, *args, **options)
        self._shared_state["distributed_type"] = getattr(DistributedType, kind)

    config = write_team(output / f"{name}-{os.environ['RANK']}.yaml", directory.name)
    others = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    AcceleratorState._reset_state()
    with (
        mock.patch.object(PartialState, "__init__", pretending),
        mock.patch.dict(os.environ, others, clear=True),
    ):
        os.environ.update(environment_of(name))
        assert not app(["train", str(config)], standalone_mode=False), "an exit status"


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
    if importlib.util.find_spec("deepspeed") is not None:
        no_compiling()
    count_gathers()
    count_fused()
    count_solved()
    output = Path(sys.argv[1])
    if os.environ["RANK"] == "0":
        for T in {steps[0] for name, (steps, options, _) in STEPS.items() if name in sys.argv[2:] and not options}:
            with_other_weights(system_of(T, {})).save_pretrained(output / f"alone T={T}")
        model_of().save_pretrained(output / "base.partial")
        tiny_systems.tokenizer().save_pretrained(output / "base.partial")
        MEASURED.save(output / "memory")
        tiny_systems.write_jsonl(output / "rows.jsonl", tiny_systems.rows(8))
        (output / "base.partial").rename(output / "base")
    while not (output / "base").is_dir():  # no group of processes yet
        time.sleep(0.1)
    for name in sys.argv[2:]:
        if name in STEPS:
            found = step(output / name, *STEPS[name])
        elif name in RESUMED:
            found = resume(output / name, RESUMED[name])
        elif name in MEMORY:
            found = {}
            for engine in MEMORY[name]:
                AcceleratorState._reset_state()
                found[engine] = engine_memory.measure(engine, MEASURED, output / "memory")
        elif name in LAUNCHED:
            found = launch(output / name, LAUNCHED[name])
        elif name in KILLED:
            found = die(output / name, KILLED[name])
        else:
            found = stop(output / name, STOPPED[name]) if name in STOPPED else patched(output / name)
        torch.save(found, output / f"{name}-{os.environ['RANK']}.pt")
    end_processes()

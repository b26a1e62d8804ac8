"""Memory of one training step on each of two processes, by engine: what is alive, beside what `diffmas plan` says.

    python -m diffmas.benchmarks.engine_memory              # all engines, over gloo, on a CPU
    python -m diffmas.benchmarks.engine_memory --r 0 --engine zero2 --engine fsdp2

A team around a Qwen3 of random weights trains for two steps; the second one is measured, as the optimizer has its state then.
Counted are tensors (`live_bytes`), not the resident set: a CPU's allocator keeps what was freed.
"""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config, TrainerCallback

from diffmas import Agent, MultiAgentSystem, patch_model
from diffmas.benchmarks.live_bytes import LiveBytes
from diffmas.models.local import local
from diffmas.training import Trainer, add_lora, default_arguments, end_processes, lora_config
from diffmas.training.plan import Episode, plan, sizes_of

__all__ = ["ENGINES", "PARTS", "Team", "measure", "planned"]

PARTS = ("weights", "trained", "pools", "activations")
MB = 1e6


def zero(stage: int, **options) -> dict:
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    sizes = {"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000}  # of the model's size, as they are of a real one's
    config = {"zero_optimization": {"stage": stage, **sizes, **options}, **dict.fromkeys(names, "auto")}
    return {"deepspeed": config | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}}


# name -> its name in `diffmas plan`, TrainingArguments
ENGINES = {
    "ddp": ("DDP", {}),
    "zero2": ("ZeRO-2", zero(2)),
    "fsdp2_kept": ("FSDP2, kept", {"fsdp": "full_shard", "fsdp_config": {"version": 2, "reshard_after_forward": False}}),
    "fsdp2": ("FSDP2", {"fsdp": "full_shard", "fsdp_config": {"version": 2}}),
    # Every weight of so small a model is below DeepSpeed's threshold, and would stay whole.
    "zero3": ("ZeRO-3", zero(3, stage3_param_persistence_threshold=0)),
    "tp": ("tensor parallel", {}),
}


@dataclass(frozen=True)
class Team:
    """What is trained. prompt, answer: tokens. batch: questions of a process, or with tensor parallelism of all. r: of the
    LoRA; 0: all weights are trained."""

    hidden: int = 256
    layers: int = 4
    vocabulary: int = 2048
    agents: int = 3
    prompt: int = 64
    latent_steps: int = 2
    answer: int = 24
    batch: int = 4
    r: int = 8
    dtype: str = "bfloat16"
    checkpointing: bool = False

    @property
    def config(self) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=8, num_key_value_heads=4, head_dim=self.hidden // 8,
            tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip

    def save(self, directory: Path) -> None:
        """Its base model, as `measure` reads it."""
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(self.config).save_pretrained(directory / "base")

    @property
    def episode(self) -> Episode:
        return Episode(self.agents, self.prompt, self.latent_steps, self.answer, self.batch)

    def system(self, model: nn.Module) -> MultiAgentSystem:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="<pad>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<pad>", pad_token="<pad>", eos_token="<eos>")
        steps = [*[self.latent_steps] * (self.agents - 1), 0]
        agents = [Agent(f"agent{i}", "{question}", latent_steps=T) for i, T in enumerate(steps)]
        if self.r:
            model = add_lora(model, config=lora_config(r=self.r))
        model = patch_model(model.train(), fuse=False)  # as on a GPU
        return MultiAgentSystem(model, tokenizer, agents, realign="none")

    def rows(self, count: int) -> list[dict]:
        return [
            {"question": " ".join("ab"[i % 2] for _ in range(self.prompt)), "answer": "a " * (self.answer - 1)}
            for i in range(count)
        ]


class _Measured(Trainer):
    """A Trainer that says where a step is."""

    live: LiveBytes

    def compute_loss(self, model, inputs, *args, **options):
        self.live.kind = "activations"
        loss = super().compute_loss(model, inputs, *args, **options)
        self.live.kind = "temporary"
        self.live.shapes = dict.fromkeys(self.shapes, "gradients")
        return loss

    def training_step(self, *args):
        loss = super().training_step(*args)
        self.live.shapes, self.live.kind = {}, "step"
        return loss


class _SecondStep(TrainerCallback):
    def __init__(self, live: LiveBytes, all_trained: bool):
        self.live, self.all_trained = live, all_trained

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == 1:
            base = [p for p in model.parameters() if self.all_trained or not p.requires_grad]
            self.live.see(map(local, base), "weights")
            self.live.rename({kind: "trained" for kind in [*self.live.now] if kind not in ("weights", "gathered")})
            self.live.restart()

    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step == 1:
            self.found = self.live.most, self.live.at_peak


@contextlib.contextmanager
def counted(live: LiveBytes):
    """Inside, what engines gather and what traces keep is counted as such."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    from diffmas.trace.pool import GradPools, Pool

    places = [(Pool, "_allocate", "pools"), (GradPools, "_zeros", "pools")]
    places += [(FSDPParamGroup, name, "gathered") for name in ("unshard", "wait_for_unshard")]
    with contextlib.suppress(ImportError):
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

        places.append((PartitionedParameterCoordinator, "fetch_sub_module", "gathered"))
    with contextlib.ExitStack() as stack:
        for place in places:
            stack.enter_context(live.of(*place))
        yield


def measure(engine: str, team: Team, directory: Path) -> dict[str, int]:
    """Bytes of a training step on this process, by part, and all of them at their largest. All processes have to ask, with
    nothing left of accelerate's state of another engine."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    gc.collect()  # transformers asks whether arguments for ZeRO-3 are alive
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]  # of another engine
    given = dict(
        max_steps=2, per_device_train_batch_size=team.batch, gradient_accumulation_steps=1, use_cpu=True, ddp_backend="gloo",
        report_to=[], disable_tqdm=True, save_strategy="no", gradient_checkpointing=team.checkpointing, logging_strategy="no",
    )  # fmt: skip
    live = LiveBytes("trained")
    with live, counted(live):
        spread = {}
        if engine == "tp":
            from transformers.distributed import DistributedConfig

            spread = {"distributed_config": DistributedConfig(tp_plan="auto")}
        # Before the arguments: for ZeRO-3 DeepSpeed would otherwise take weights apart as they come, in a dtype of its own.
        model = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=team.dtype, **spread)
        args = default_arguments(directory / engine, **{**given, **ENGINES[engine][1]})
        args.world_size  # noqa: B018  begins the group of processes
        if engine != "ddp":  # accelerate knows of accelerators alone
            PartialState().distributed_type = DistributedType.MULTI_GPU
        system = team.system(model)
        second = _SecondStep(live, not team.r)
        trainer = _Measured(system, args, train_dataset=team.rows(4 * team.batch), callbacks=[second])
        trainer.live = live
        trainer.shapes = {tuple(p.shape) for p in system.parameters() if p.requires_grad}
        del model
        trainer.train()
    most, at_peak = second.found
    return {
        "weights": most["weights"] + most["gathered"], "trained": most["trained"] + most["gradients"], "pools": most["pools"],
        "activations": most["activations"], "temporary": most["temporary"], "peak": at_peak.total(),
    }  # fmt: skip


def planned(engine: str, team: Team, processes: int = 2) -> dict[str, int]:
    """What `diffmas plan` says of the same, by part, and all of them."""
    sizes = sizes_of(team.config, team.r or None, getattr(torch, team.dtype))
    needs = {need.engine: need for need in plan(sizes, processes, team.episode, team.checkpointing)}
    need = needs[ENGINES[engine][0]]
    return {**dict(zip(PARTS, (need.weights, need.optimizer, need.pools, need.activations))), "peak": need.total}


def of_this_process(engine: str, team: Team, directory: Path) -> None:
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False  # compiled for minutes, for its inference alone
    found = measure(engine, team, directory)
    (directory / f"{engine}-{os.environ['RANK']}.json").write_text(json.dumps(found))
    end_processes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", action="append", choices=[*ENGINES], help="may be given several times; all")
    for field in fields(Team):
        if field.type == "bool":
            parser.add_argument("--" + field.name, action="store_true")
        else:
            parser.add_argument("--" + field.name.replace("_", "-"), type=type(field.default), default=field.default)
    parser.add_argument("--of-a-process", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    team = Team(**{field.name: getattr(given, field.name) for field in fields(Team)})
    if given.of_a_process is not None:
        return of_this_process(given.engine[-1], team, given.of_a_process)
    print(f"MB on one of two processes, measured / by formula; {team}\n")
    print(f"| engine | {' | '.join(PARTS)} | at once | beside it, at most |\n|---|" + "---|" * (len(PARTS) + 2))
    with tempfile.TemporaryDirectory() as directory:
        team.save(Path(directory))
        for engine in given.engine or ENGINES:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
            command += ["diffmas.benchmarks.engine_memory", *sys.argv[1:], "--engine", engine, "--of-a-process", directory]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"| {engine} | failed: {next((x for x in done.stderr.splitlines() if 'Error' in x), done.returncode)} |")
                continue
            found, said = json.loads((Path(directory) / f"{engine}-0.json").read_text()), planned(engine, team)
            shown = [f"{found[part] / MB:.2f} / {said[part] / MB:.2f}" for part in (*PARTS, "peak")]
            print(f"| {engine} | {' | '.join(shown)} | {found['temporary'] / MB:.2f} |", flush=True)


if __name__ == "__main__":
    main()

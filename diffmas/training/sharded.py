"""Training with a model whose weights several processes share: FSDP2 by accelerate, ZeRO by DeepSpeed, tensor parallelism by
transformers.

With tensor parallelism all processes have the same rows, and run the same by themselves. FSDP2 and ZeRO-3 gather a layer's
weights when the layer runs, forward and backward, and add up gradients as soon as its backward is done. All processes have to
run the same layers equally often, in the same order: `prepare` sees to it, or `check_engine` says before the first step what
does not allow it. DistributedDataParallel and ZeRO-2 wait for each other once for each episode, and need none of this.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from diffmas.agents.system import MultiAgentSystem
from diffmas.models.local import gathers, spread_like, whole
from diffmas.models.parts import attention_layers
from diffmas.models.patch import patch_of

__all__ = [
    "TENSOR_PARALLEL", "Agreement", "check_engine", "engine_of", "gather_once", "load_whole", "prepare", "save_optimizer",
    "save_whole", "tensor_parallel",
]  # fmt: skip

TENSOR_PARALLEL = ("is_distributed_loading_by_transformers", "tp_size", "config")  # what its Trainer asks a model for
WHOLE_FILE = "optimizer_tp.pt"


def tensor_parallel(system: MultiAgentSystem) -> bool:
    """Whether transformers has spread the model over processes as it loaded it."""
    return bool(getattr(system.model, "is_distributed_loading_by_transformers", False))


def engine_of(trainer) -> str:
    """Which of diffmas.training.checkpoint's OPTIMIZER has the optimizer's state."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
    return "tensor parallelism" if tensor_parallel(trainer.model) else "one process or DDP"


class Agreement:
    """What processes tell each other before an episode: how many latent steps each agent takes at most, or what went wrong.

    Called with the steps of each agent, gives those that all processes take. As a context it tells the others of an error
    inside, which then raise RuntimeError with its message instead of waiting for this process. Once for each episode: one small
    message between all processes.
    """

    def __call__(self, steps: list[int]) -> list[int]:
        found = self._tell((steps, None))
        for rank, (_, error) in enumerate(found):
            if error is not None:
                raise RuntimeError(f"process {rank} stopped: {error}")
        return [max(each) for each in zip(*(steps for steps, _ in found))]

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, _) -> None:
        if isinstance(error, Exception):
            self._tell((None, f"{kind.__name__}: {error}"))

    @staticmethod
    def _tell(mine: tuple) -> list[tuple]:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        return found


def check_engine(system: MultiAgentSystem, args, state) -> None:
    """Raises ValueError for a way of sharding, or for a team, that processes could not run in step. state: accelerate's."""
    plugin, deepspeed = getattr(state, "fsdp_plugin", None), getattr(state, "deepspeed_plugin", None)
    if tensor_parallel(system) and system.model.tp_size != args.world_size:
        raise ValueError(
            f"distributed_config: expected tensor parallelism over all {args.world_size} processes, got tp_size="
            f"{system.model.tp_size}; a model that is sharded in another way is what fsdp in the TrainingArguments is for"
        )
    wanted = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wanted and plugin is None:  # accelerate says nothing, and each process would train all of the model
        raise ValueError(
            "fsdp: expected processes on several accelerators, which are what accelerate shards a model over, got "
            f"{args.world_size} on {args.device.type}"
        )
    if tensor_parallel(system) or plugin is not None or deepspeed is not None and deepspeed.zero_stage == 3:
        alone = "each would choose its tokens alone, and nothing sees to it that they are the same"
        why = alone if tensor_parallel(system) else "all would have to decode equally many tokens"
        for agent in system.agents[:-1]:
            if agent.low_rank:
                raise ValueError(
                    f"agent {agent.name!r}: low_rank: expected False where processes share the model's weights, got True: its "
                    "readers' attention needs all of their adapter's"
                )
            if agent.max_message_tokens is not None:
                raise ValueError(
                    f"agent {agent.name!r}: max_message_tokens: expected None where processes share the model's weights, got "
                    f"{agent.max_message_tokens}: {why}"
                )
    if plugin is None and deepspeed is None:
        return
    if deepspeed is not None and deepspeed.zero_stage != 3:
        return  # weights are whole
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(f"fsdp: expected FSDP2 (fsdp_version: 2), got version {plugin.fsdp_version}")
    if (
        plugin is not None and plugin.activation_checkpointing
    ):  # its wrappers rename the layers, and do not switch to an agent's adapter in backward
        raise ValueError("fsdp_activation_checkpointing: expected it to be off; gradient_checkpointing=True does the same")
    for name, config in getattr(system.model, "peft_config", {}).items():
        if getattr(config, "bias", "none") != "none":
            raise ValueError(f"adapter {name!r}: expected bias='none' where processes share the weights, got {config.bias!r}")
    for agent in system.agents[:-1]:
        if agent.stop_change is not None:
            raise ValueError(f"agent {agent.name!r}: stop_change: expected None where processes share the model's weights")
        fixed = isinstance(agent.latent_steps, int)
        if agent.grad_passes is not None and not fixed:
            raise ValueError(
                f"agent {agent.name!r}: grad_passes: expected None where processes share the model's weights and its steps "
                f"depend on the question, got {agent.grad_passes}: all have to run equally many passes with gradients"
            )
        if system.no_latents == "skip" and not fixed:
            raise ValueError(
                f"no_latents: expected 'prompt' where processes share the model's weights and the steps of agent "
                f"{agent.name!r} depend on the question, got 'skip': all have to run its prompt, or none"
            )


def save_optimizer(accelerator, optimizer, model, directory) -> None:
    """In accelerate's own form: optimizer.bin, or with SHARDED_STATE_DICT a directory of each process's part."""
    from accelerate.utils import save_fsdp_optimizer

    save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, directory)


def save_whole(optimizer, directory, writes: bool) -> None:
    """Of tensor parallelism: optimizer_tp.pt, with whole tensors. All processes have to call; writes: whether this one does."""
    described = optimizer.state_dict()
    of_all = lambda x: whole(x) if isinstance(x, Tensor) else x
    described["state"] = {i: {key: of_all(x) for key, x in state.items()} for i, state in described["state"].items()}
    if writes:
        torch.save(described, Path(directory) / WHOLE_FILE)


def load_whole(optimizer, directory) -> None:
    """Gives each process its part of what `save_whole` wrote."""
    optimizer.load_state_dict(torch.load(Path(directory) / WHOLE_FILE, map_location="cpu", weights_only=True))
    for p, state in optimizer.state.items():
        for key, x in state.items():
            if isinstance(x, Tensor) and x.shape == p.shape:
                state[key] = spread_like(x, p)


def gather_once(model, state) -> None:
    """Where FSDP2 is not to give a layer's weights back after a forward, it keeps them for the backward of all forwards too;
    who takes a step then has to `reshard`."""
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and not plugin.reshard_after_forward:
        for module in model.modules():
            if gathers(type(module)):
                module.set_reshard_after_backward(False)


def prepare(system: MultiAgentSystem, layers_in_step: bool) -> None:
    """Makes a system ready to run in step with the other processes. layers_in_step: they have rows of their own, and are to be
    sharded by decoder layers."""
    system.agreement = Agreement()
    if not layers_in_step:
        return
    system.realign.keep()
    layers = {id(child): module for module in system.model.modules() for child in module.children()}
    attentions = attention_layers(patch_of(system.model).body)
    system._no_split_modules = sorted({type(layers[id(a)]).__name__ for a in attentions})

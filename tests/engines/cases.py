"""What two processes are started for: cases by name, each of one engine."""

from diffmas.benchmarks.engine_memory import Team


def fsdp(**options):
    return dict(fsdp="full_shard", fsdp_config={"version": 2, **options})


SHARDED = fsdp(state_dict_type="SHARDED_STATE_DICT")
CHECKPOINTED = dict(gradient_checkpointing=True)

REPORTED, NORM = ("fsdp learned", "tp roles"), "gradient/parameters"
CLIPPED = {"latent_grad_clip": 0.05}
SOFT = {"realign": "soft_token"}  # of a random model's, the steps that rounding changes least
ROLES = {"adapter_scope": "per_role", **SOFT}  # without a latent step, parts of a role's adapter get no gradient

# name -> (latent steps of each process, options of the system, TrainingArguments)
STEPS = {
    "fsdp": ((4, 4), {}, fsdp()),
    "fsdp T=0": ((0, 0), {}, fsdp()),
    "fsdp keep": ((4, 4), {}, fsdp(reshard_after_forward=False)),
    "fsdp keep checkpointing": ((4, 4), {}, {**fsdp(reshard_after_forward=False), **CHECKPOINTED}),
    "fsdp checkpointing": ((4, 4), {}, {**fsdp(), **CHECKPOINTED}),
    "fsdp T=0 checkpointing": ((0, 0), {}, {**fsdp(), **CHECKPOINTED}),
    "fsdp T=1,3": ((1, 3), SOFT, fsdp()),
    "fsdp T=0,2": ((0, 2), SOFT, fsdp()),
    "fsdp roles": ((0, 2), ROLES, {**fsdp(), **CHECKPOINTED}),
    "fsdp learned": ((1, 1), {"realign": "learned", "trace_content": "latent_only"}, fsdp()),
    "fsdp soft": ((2, 2), SOFT, fsdp(reshard_after_forward=False)),
    "fsdp detach": ((2, 2), {"grad_scope": "detach_trace"}, fsdp()),
    "fsdp clip": ((1, 3), CLIPPED, fsdp()),
    "fsdp passes T=2,4": ((2, 4), {"passes": 3, **SOFT}, fsdp()),
    "fsdp parallel T=1,3": ((1, 3), {"parallel": True, **SOFT}, {**fsdp(), **CHECKPOINTED}),
    "fsdp bf16": ((0, 0), {}, {**fsdp(), "bf16": True}),
}
ALL_ROWS = dict(per_device_train_batch_size=4)  # both processes have them
TP = {
    "tp": ((4, 4), {}, ALL_ROWS),
    "tp T=0": ((0, 0), {}, ALL_ROWS),
    "tp checkpointing": ((4, 4), {}, {**ALL_ROWS, **CHECKPOINTED}),
    "tp T=0 checkpointing": ((0, 0), {}, {**ALL_ROWS, **CHECKPOINTED}),
    "tp roles": ((1, 1), {"adapter_scope": "per_role"}, {**ALL_ROWS, **CHECKPOINTED}),
    "tp clip": ((2, 2), CLIPPED, ALL_ROWS),
    "tp soft": ((2, 2), {"realign": "soft_token"}, ALL_ROWS),
}
STEPS |= TP


def zero(stage: int, **options):
    config = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **options}}
    config |= {name: "auto" for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")}
    config["bf16"] = {"enabled": "auto"}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return dict(deepspeed=config, per_device_train_batch_size=4, gradient_accumulation_steps=1)


ZERO = {
    "zero2": ((4, 4), {}, zero(2)),
    "zero2 accumulation": ((1, 1), {}, {**zero(2), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "zero2 T=0": ((0, 0), {}, zero(2)),
    "zero2 checkpointing": ((4, 4), {}, {**zero(2), **CHECKPOINTED}),
    "zero2 T=0 checkpointing": ((0, 0), {}, {**zero(2), **CHECKPOINTED}),
    "zero2 bf16": ((0, 0), {}, {**zero(2), "bf16": True}),
    "zero2 roles": ((0, 2), ROLES, zero(2)),
    "zero2 T=1,3": ((1, 3), {}, zero(2)),
    "zero3": ((4, 4), {}, zero(3)),
    "zero3 T=0": ((0, 0), {}, zero(3)),
    "zero3 accumulation": ((1, 1), {}, {**zero(3), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "zero3 checkpointing": ((4, 4), {}, {**zero(3), **CHECKPOINTED}),
    "zero3 T=0 checkpointing": ((0, 0), {}, {**zero(3), **CHECKPOINTED}),
    "zero3 bf16": ((0, 0), {}, {**zero(3), "bf16": True}),
    "zero3 T=1,3": ((1, 3), {"realign": "learned"}, zero(3)),
    "zero3 roles": ((0, 2), ROLES, {**zero(3), **CHECKPOINTED}),
    "zero3 clip": ((1, 3), CLIPPED, zero(3)),
    "zero3 soft": ((2, 2), {"realign": "soft_token"}, zero(3)),
}
STEPS |= ZERO
RESUMED = {"fsdp resumed": fsdp(), "fsdp resumed sharded": SHARDED, "tp resumed": ALL_ROWS}
RESUMED |= {"zero2 resumed": zero(2), "zero3 resumed": zero(3)}
STOPPED = {"fsdp stop": fsdp(), "zero2 stop": zero(2), "zero3 stop": zero(3)}
KILLED = {"fsdp killed": fsdp(), "tp killed": ALL_ROWS, "zero3 killed": zero(3)}
LAUNCHED = {"launch ddp": "MULTI_CPU"} | {f"launch {name}": "MULTI_GPU" for name in ("fsdp2", "fsdp2_kept", "zero3")}
MEMORY = {"fsdp memory": ("fsdp2_kept", "fsdp2"), "tp memory": ("tp",), "zero memory": ("zero2", "zero3")}
MEASURED = Team(hidden=128, layers=2, vocabulary=512, agents=2, prompt=24, latent_steps=1, answer=8)
GIVEN = dict(
    max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.0, use_cpu=True,
    ddp_backend="gloo", report_to=[], disable_tqdm=True, save_strategy="no",
)  # fmt: skip
RESUMING = dict(max_steps=3, save_strategy="steps", save_steps=1, learning_rate=1e-2)

# An engine's cases, all in one start of two processes; the last one ends it.
FSDP = tuple(name for name in STEPS if name.startswith("fsdp"))
FSDP += ("fsdp resumed", "fsdp resumed sharded", "fsdp stop", "fsdp memory", "launch ddp", "launch fsdp2", "launch fsdp2_kept")
FSDP += ("fsdp killed",)
TENSOR_PARALLEL = ("tp patched", *TP, "tp resumed", "tp memory", "tp killed")
DEEPSPEED = (*ZERO, "zero2 resumed", "zero3 resumed", "zero2 stop", "zero3 stop", "zero memory", "launch zero3", "zero3 killed")

"""Which of transformers' TrainingArguments a team can be trained with: what is refused, and what the trainer sets itself."""

import copy
import logging
from dataclasses import MISSING, fields

from transformers import TrainingArguments

__all__ = ["REFUSED", "adopted", "check_arguments", "wants_ids"]

logger = logging.getLogger(__name__)

# Fields that would do nothing here, or something wrong, and what to do instead. Some are of older transformers only.
REFUSED = {
    "jit_mode_eval": "torch.jit cannot trace a forward that takes text",
    "label_names": "the labels of a batch are 'labels'",
    "label_smoothing_factor": "another loss than that of the answers goes in as compute_loss_func=",
    "mp_parameters": "DistributedDataParallel, under torchrun, trains the adapter on several GPUs",
    "neftune_noise_alpha": "noise in the embeddings would not reach the latent steps; dropout of the LoRA does",
    "parallelism_config": "DistributedDataParallel, under torchrun, trains the adapter on several GPUs",
    "past_index": "agents hand on a trace, which needs no past in the outputs",
    "push_to_hub": "`system.push_to_hub(repo)` after training, or `diffmas export --push-to-hub`, takes a team to the hub",
    "save_safetensors": "adapters are written as safetensors",
    "torch_compile": "compile the decoder layers before training: `for layer in body.layers: layer.compile()`",
    "use_cache": "a system has its trace",
    "use_ipex": "PyTorch has its CPU kernels itself",
    "use_legacy_prediction_loop": "evaluation weighs batches by their tokens, which that loop does not",
    "use_liger_kernel": "a patched model keeps its own layers",
}


def _off(name: str, value) -> bool:
    """Whether a field says what holds anyway."""
    defaults = {f.name: f.default for f in fields(TrainingArguments) if f.default is not MISSING}
    default = defaults.get(name)  # None for a field of another transformers
    return value == default or (not value and not default) or (name, value) == ("label_names", ["labels"])


def _by_length(args: TrainingArguments) -> str:
    """The name of the field by which rows are sampled by their length, or an empty string."""
    if getattr(args, "group_by_length", False):
        return "group_by_length"
    strategy = getattr(args, "train_sampling_strategy", "random")
    return "train_sampling_strategy" if strategy in ("group_by_length", "batch_rebalance") else ""


def check_arguments(args: TrainingArguments, sets: dict) -> None:
    """Raises ValueError naming a field that has no effect here or a wrong one, and what to do instead. sets: of rows, by
    name."""
    for name, instead in REFUSED.items():
        if not _off(name, value := getattr(args, name, None)):
            raise ValueError(f"{name}: expected it to be off for a multi-agent system, got {value!r}; {instead}")
    optim = str(getattr(args.optim, "value", args.optim))
    if "lomo" in optim or "layerwise" in optim:
        raise ValueError(f"optim: expected an optimizer that steps after all of the backward pass, got {optim!r}")
    if name := _by_length(args):
        for where, rows in sets.items():
            if rows is not None and args.length_column_name not in (getattr(rows, "column_names", None) or ()):
                raise ValueError(
                    f"{name}: expected a datasets.Dataset with a column {args.length_column_name!r} (length_column_name), "
                    f"since rows are text, got {where} without"
                )
    if args.accelerator_config.dispatch_batches:
        raise ValueError("accelerator_config: expected dispatch_batches=False, got True; batches hold text, which is not sent")


def adopted(args: TrainingArguments, unused_parameters: bool) -> TrainingArguments:
    """A copy of the arguments as a trainer of a team takes them; the caller's stay as they are.

    unused_parameters: whether a step may leave a trainable parameter without gradient. Raises ValueError if
    ddp_static_graph says that none does, and where torch has no static graph.
    """
    if getattr(args, "ddp_static_graph", None):
        if unused_parameters:
            raise ValueError(
                "ddp_static_graph: expected it to be off where a step may leave an adapter or a learned realignment without "
                "gradient, got True"
            )
        if args.gradient_accumulation_steps > 1:
            raise ValueError(
                "ddp_static_graph: expected gradient_accumulation_steps=1 with it, since torch's static graph fails in a "
                f"backward that does not synchronize, got {args.gradient_accumulation_steps}"
            )
    args = copy.copy(args)
    args.accelerator_config = copy.copy(args.accelerator_config)
    args.accelerator_config.dispatch_batches = False  # an IterableDataset's batches would be sent from the first process
    args.remove_unused_columns = False  # it would remove every column that is no parameter of forward
    args.dataloader_pin_memory &= args.device.type != "cpu"  # torch warns of it at each epoch and evaluation
    args.logging_nan_inf_filter = False  # it hides losses that must stop training, and waits for the device each step
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = unused_parameters
    if args.include_num_input_tokens_seen == "all":
        args.include_num_input_tokens_seen = "non_padding"  # a team reads no padding
    if args.n_gpu > 1:  # DataParallel replicates modules, which no trace survives; DDP is started with torchrun
        logger.warning("training on one of %d GPUs; start it with torchrun to use them all", args.n_gpu)
        args._n_gpu = 1
    return args


def wants_ids(args: TrainingArguments) -> bool:
    """Whether something of the trainer needs the token ids that a batch is read as."""
    counted = args.include_num_input_tokens_seen not in (False, "no") or getattr(args, "include_tokens_per_second", False)
    return counted or "inputs" in args.include_for_metrics

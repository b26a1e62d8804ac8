"""Every field of transformers' TrainingArguments has an effect on the training of a team, or is refused, or is known to do
nothing by itself."""

import copy
from dataclasses import fields

import numpy as np
import pytest
import tiny_systems as tiny
import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from diffmas import MultiAgentSystem
from diffmas.training import Trainer, check_checkpoint, default_arguments
from diffmas.training.arguments import REFUSED

# Whose effect on a team is tested here, in test_training.py, in test_cli.py, or in engines/.
TESTED = """
    output_dir per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps learning_rate
    lr_scheduler_type warmup_steps warmup_ratio optim weight_decay max_grad_norm bf16 activation_checkpointing
    gradient_checkpointing average_tokens_across_devices logging_steps logging_strategy report_to eval_strategy
    eval_steps per_device_eval_batch_size save_strategy save_steps save_total_limit load_best_model_at_end
    metric_for_best_model greater_is_better seed use_cpu ddp_backend ddp_find_unused_parameters ddp_static_graph
    accelerator_config train_sampling_strategy group_by_length length_column_name include_num_input_tokens_seen
    include_tokens_per_second include_for_metrics include_inputs_for_metrics enable_jit_checkpoint auto_find_batch_size
    batch_eval_metrics prediction_loss_only eval_accumulation_steps eval_on_start eval_do_concat_batches
    eval_use_gather_object dataloader_num_workers dataloader_persistent_workers dataloader_prefetch_factor
    torch_empty_cache_steps skip_memory_metrics full_determinism save_only_model disable_tqdm fsdp fsdp_config
    deepspeed
""".split()

# What transformers, accelerate or torch do by themselves, around the forward and backward of a system.
INHERITED = """
    lr_scheduler_kwargs optim_args optim_target_modules adam_beta1 adam_beta2 adam_epsilon adafactor fp16 bf16_full_eval
    fp16_full_eval fp16_opt_level fp16_backend half_precision_backend tf32 activation_checkpointing_kwargs
    gradient_checkpointing_kwargs logging_dir logging_first_step log_on_each_node log_level log_level_replica run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id eval_delay save_on_each_node ignore_data_skip
    restore_callback_states_from_checkpoint data_seed no_cuda use_mps_device dataloader_drop_last dataloader_pin_memory
    dataloader_multiprocessing_context dataloader_in_order ddp_bucket_cap_mb ddp_broadcast_buffers ddp_timeout
    per_gpu_train_batch_size per_gpu_eval_batch_size debug
""".split()

# Set by the trainer, whatever they were (diffmas.training.arguments).
SET = ["remove_unused_columns", "logging_nan_inf_filter", "_n_gpu"]

# Read by scripts alone, or only together with another field, which is refused.
HARMLESS = """
    do_train do_eval do_predict resume_from_checkpoint overwrite_output_dir local_rank ray_scope tpu_num_cores tpu_metrics_debug
    hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision push_to_hub_model_id
    push_to_hub_organization push_to_hub_token fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap
    liger_kernel_config torch_compile_backend torch_compile_mode torchdynamo
""".split()

HERE = {f.name for f in fields(TrainingArguments)}
QUIET = dict(report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no")


@pytest.fixture(autouse=True)
def no_leftover_precision(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


def arguments(path, **options):
    given = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, warmup_steps=0, max_steps=1)
    return default_arguments(path, **{**given, **QUIET, **options})


def trainer_of(path, system=None, cls=Trainer, metrics=None, callbacks=None, rows=8, loss=None, **options):
    return cls(
        system or tiny.system(), arguments(path, **options), train_dataset=tiny.rows(rows), eval_dataset=tiny.rows(6),
        compute_metrics=metrics, callbacks=callbacks, compute_loss_func=loss,
    )  # fmt: skip


def test_every_field_is_known():
    kinds = {"TESTED": TESTED, "INHERITED": INHERITED, "SET": SET, "HARMLESS": HARMLESS, "REFUSED": REFUSED}
    where: dict[str, list] = {}
    for kind, names in kinds.items():
        for name in names:
            where.setdefault(name, []).append(kind)
    assert {name: found for name, found in where.items() if len(found) > 1} == {}
    unknown = sorted(HERE - where.keys())
    assert not unknown, (
        f"TrainingArguments has new fields, {unknown}: find out what each does to the training of a team, then refuse it "
        "(REFUSED in diffmas/training/arguments.py) or add it to a list of this file"
    )


# ---- refused ---------------------------------------------------------------------------------------------------------

VALUES = {
    "label_names": ["answer"],
    "label_smoothing_factor": 0.1, "mp_parameters": "{}", "neftune_noise_alpha": 5.0, "parallelism_config": object(),
    "past_index": 0, "save_safetensors": False,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REFUSED.keys() & HERE))
def test_what_has_no_effect_is_refused(name, tmp_path):
    args = arguments(tmp_path)
    setattr(args, name, VALUES.get(name, True))
    with pytest.raises(ValueError, match=f"^{name}: expected it to be off for a multi-agent system, got .*; .{{15}}"):
        Trainer(tiny.system(), args, train_dataset=tiny.rows(2))


def test_what_depends_on_the_value(tmp_path):
    def refused(message, system=None, **options):
        args = arguments(tmp_path)
        for name, value in options.items():
            setattr(args, name, value)
        with pytest.raises(ValueError, match=message):
            Trainer(system or tiny.system(), args, train_dataset=tiny.rows(2))

    for optim in ("lomo", "galore_adamw_layerwise"):
        refused(f"optim: expected an optimizer that steps after all of the backward pass, got '{optim}'", optim=optim)
    sampling = (
        {"train_sampling_strategy": "group_by_length"} if "train_sampling_strategy" in HERE else {"group_by_length": True}
    )
    refused(rf"{next(iter(sampling))}: expected a datasets.Dataset with a column 'length'.*got train_dataset", **sampling)
    config = copy.copy(arguments(tmp_path).accelerator_config)
    config.dispatch_batches = True
    refused("accelerator_config: expected dispatch_batches=False, got True", accelerator_config=config)
    if "ddp_static_graph" in HERE:
        refused("ddp_static_graph: expected it to be off", tiny.system(adapter_scope="per_role"), ddp_static_graph=True)
        static = dict(ddp_static_graph=True, gradient_accumulation_steps=2)
        refused("ddp_static_graph: expected gradient_accumulation_steps=1 with it", **static)
    args = arguments(tmp_path, label_names=["labels"])  # what holds anyway is taken
    with pytest.raises(ValueError, match="processing_class: expected None or the system's own tokenizer, got another"):
        Trainer(tiny.system(), args, train_dataset=tiny.rows(2), processing_class=tiny.tokenizer())


@pytest.mark.parametrize(
    "options, said",
    [
        ({"eval_strategy": "steps", "eval_steps": 2, "save_steps": 3}, "save_steps: expected a multiple of .*, 2, got 3"),
        ({"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "epoch"}, "save_strategy: .*'steps', got 'epoch'"),
        ({"eval_strategy": "epoch", "save_strategy": "steps"}, "save_strategy: .*'epoch', got 'steps'"),
    ],
)
def test_saving_that_does_not_go_with_evaluation_is_refused_by_the_users_names(options, said, tmp_path):
    """transformers speaks of load_best_model_at_end, which the user never wrote."""
    with pytest.raises(ValueError, match=said):
        default_arguments(tmp_path, **options)
    otherwise = default_arguments(tmp_path, **options, load_best_model_at_end=False)
    assert otherwise.save_strategy == options.get("save_strategy", "steps")


def test_steps_without_a_strategy_are_meant(tmp_path):
    saved = default_arguments(tmp_path, save_steps=2)
    assert (saved.save_strategy, saved.save_steps, saved.eval_strategy) == ("steps", 2, "no")
    both = default_arguments(tmp_path, eval_steps=2, save_steps=4)
    assert (both.save_strategy, both.eval_strategy, both.eval_steps, both.save_steps) == ("steps", "steps", 2, 4)


def test_rows_are_sampled_by_a_column_of_lengths(tmp_path):
    import datasets
    import pyarrow

    by_length = (
        {"train_sampling_strategy": "group_by_length"} if "train_sampling_strategy" in HERE else {"group_by_length": True}
    )
    table = pyarrow.Table.from_pylist([{**row, "length": i} for i, row in enumerate(tiny.rows(8))])
    rows = datasets.Dataset(table, fingerprint="rows")
    trainer = Trainer(tiny.system(), arguments(tmp_path, **by_length), train_dataset=rows)
    assert len(next(iter(trainer.get_train_dataloader()))["answers"]) == 2
    assert type(trainer.get_train_dataloader().sampler).__name__ != "RandomSampler"


# ---- nobody else's arguments -----------------------------------------------------------------------------------------


def test_the_callers_arguments_stay_as_they_are(tmp_path):
    args = arguments(
        tmp_path, eval_strategy="steps", save_strategy="steps", save_steps=1, save_total_limit=2, gradient_checkpointing=True,
        include_num_input_tokens_seen=True,
    )  # fmt: skip
    before, config = dict(vars(args)), copy.copy(args.accelerator_config)
    trainer = Trainer(tiny.system(), args, train_dataset=tiny.rows(8), eval_dataset=tiny.rows(6))
    trainer.train()
    assert vars(args) == before and args.accelerator_config == config
    assert not trainer.args.remove_unused_columns and args.remove_unused_columns is before["remove_unused_columns"]


# ---- loss and evaluation ---------------------------------------------------------------------------------------------


def weights_of(trainer):
    trainer.train()
    return tiny.trainable(trainer.model)


def test_a_loss_function_of_transformers_trains_as_the_own_loss(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        calls.append(labels.shape)
        return ForCausalLMLoss(outputs["logits"], labels, len(tiny.VOCAB), num_items_in_batch=num_items_in_batch)

    def twice(outputs, labels, num_items_in_batch=None):
        return 2 * loss(outputs, labels, num_items_in_batch)

    calls = []
    own, same, other = (
        weights_of(trainer_of(tmp_path, loss=f, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0))
        for f in (None, loss, twice)
    )
    assert len(calls) == 4 and all(len(shape) == 2 for shape in calls)
    start = tiny.trainable(tiny.system())
    for name in start:
        torch.testing.assert_close(same[name], own[name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(other[name] - start[name], 2 * (own[name] - start[name]), rtol=1e-3, atol=1e-6)
    losses = [trainer_of(tmp_path, loss=f).evaluate()["eval_loss"] for f in (None, loss, twice)]
    assert losses == pytest.approx([losses[0], losses[0], 2 * losses[0]], rel=1e-6)


def test_the_loss_of_an_evaluation_is_the_mean_over_tokens(tmp_path):
    questions, answers = map(list, zip(*((r["question"], r["answer"]) for r in tiny.rows(6))))
    with torch.no_grad():
        loss = tiny.system().eval()(questions, answers).loss.item()
    for batch in (1, 2, 4):
        trainer = trainer_of(tmp_path, per_device_eval_batch_size=batch)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)
        assert trainer.predict(tiny.rows(6)).metrics["test_loss"] == pytest.approx(loss, rel=1e-6)


class Halved(Trainer):
    """A subclass with a loss of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (loss / 2, outputs) if return_outputs else loss / 2


def test_the_loss_of_a_subclass_is_evaluated(tmp_path):
    halved, whole = (trainer_of(tmp_path, cls=cls, per_device_eval_batch_size=2).evaluate() for cls in (Halved, Trainer))
    assert halved["eval_loss"] == pytest.approx(whole["eval_loss"] / 2, rel=1e-6)


# ---- inputs ----------------------------------------------------------------------------------------------------------


def tokens_read(system, rows) -> list[list[int]]:
    return [
        [t for agent in system.agents for t in system.prompt_ids(agent, {"question": r["question"]})]
        + system.answer_ids(r["answer"])
        for r in rows
    ]


def test_tokens_are_counted(tmp_path):
    trainer = trainer_of(tmp_path, rows=4, include_num_input_tokens_seen=True)
    trainer.train()
    rows = tokens_read(trainer.model, tiny.rows(4))
    # The first transformers to count counts the padding of a micro-batch too.
    most = len(rows) * max(map(len, rows)) if TrainingArguments.include_num_input_tokens_seen is False else sum(map(len, rows))
    assert sum(map(len, rows)) <= trainer.state.num_input_tokens_seen <= most
    assert any(log.get("num_input_tokens_seen") for log in trainer.state.log_history)


def test_metrics_see_what_was_read(tmp_path):
    seen = []
    trainer = trainer_of(
        tmp_path,
        include_for_metrics=["inputs", "loss"],
        per_device_eval_batch_size=4,
        metrics=lambda p: seen.append(p) or {"n": 1},
    )
    assert trainer.evaluate()["eval_n"] == 1
    (prediction,) = seen
    assert [[int(t) for t in row if t != -100] for row in prediction.inputs] == tokens_read(trainer.model, tiny.rows(6))
    assert prediction.predictions.shape[:2] == prediction.label_ids.shape and prediction.losses.shape == (6,)
    assert "input_ids" not in next(iter(trainer_of(tmp_path).get_eval_dataloader())), "made for those who want them"


# ---- the others ------------------------------------------------------------------------------------------------------

ALIKE = [
    {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2},
    {"eval_on_start": True, "eval_strategy": "steps"}, {"eval_accumulation_steps": 1},
    {"eval_do_concat_batches": False}, {"eval_use_gather_object": True}, {"batch_eval_metrics": True},
    {"prediction_loss_only": True}, {"torch_empty_cache_steps": 1}, {"skip_memory_metrics": False}, {"full_determinism": True},
    {"weight_decay": 0.0, "average_tokens_across_devices": False},
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The weights after a step, and the evaluation that follows."""
    torch.set_num_threads(1)
    trainer = trainer_of(tmp_path_factory.mktemp("plain"), per_device_eval_batch_size=4)
    return weights_of(trainer), trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("options", ALIKE, ids=lambda options: next(iter(options)))
def test_what_changes_no_weight(options, tmp_path, plain, monkeypatch):
    counted = []

    def metrics(prediction, compute_result=True):
        counted.append(
            sum(np.shape(p)[0] for p in prediction.predictions)
            if options.get("eval_do_concat_batches") is False
            else len(prediction.predictions)
        )
        return {"n": sum(counted)} if compute_result else {}

    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        trainer = trainer_of(tmp_path, metrics=metrics, per_device_eval_batch_size=4, **options)
        weights = weights_of(trainer)
        counted.clear()
        found = trainer.evaluate()
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert all(torch.equal(plain[0][name], p) for name, p in weights.items())
    assert found["eval_loss"] == pytest.approx(plain[1], rel=1e-6)
    assert found.get("eval_n") == (None if "prediction_loss_only" in options else 6)


class NoRoom(Trainer):
    """Out of memory for more than two rows."""

    sizes: list

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.sizes.append(len(inputs["answers"]))
        if len(inputs["answers"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_a_batch_size_that_fits_is_found(tmp_path):
    NoRoom.sizes = []
    trainer = trainer_of(
        tmp_path,
        cls=NoRoom,
        auto_find_batch_size=True,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=1,
        max_steps=4,
    )
    assert trainer.train().global_step == 4
    assert max(NoRoom.sizes[-4:]) == 2 and NoRoom.sizes[0] == 3


class Asked(TrainerCallback):
    """Asks for a checkpoint as SIGTERM does, before the second step."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1:
            for callback in self.trainer.callback_handler.callbacks:
                if hasattr(callback, "jit_manager"):
                    callback.jit_manager.is_checkpoint_requested = True


@pytest.mark.skipif("enable_jit_checkpoint" not in HERE, reason="transformers 4 has no enable_jit_checkpoint to look at")
def test_a_checkpoint_on_demand_is_whole(tmp_path):
    trainer = trainer_of(tmp_path, enable_jit_checkpoint=True, max_steps=4, callbacks=[asked := Asked()])
    asked.trainer = trainer
    trainer.train()
    (path,) = tmp_path.glob("checkpoint-*")
    check_checkpoint(path)
    whole, resumed = (trainer_of(tmp_path / name, max_steps=4) for name in ("whole", "resumed"))
    resumed.train(resume_from_checkpoint=str(path))
    weights = weights_of(whole)
    assert all(torch.equal(weights[name], p) for name, p in tiny.trainable(resumed.model).items())


def test_a_checkpoint_of_weights_alone_is_not_resumed(tmp_path):
    trainer_of(tmp_path, save_strategy="steps", save_steps=1, save_only_model=True).train()
    with pytest.raises(ValueError, match="expected a checkpoint to resume from, manifest.json has no optimizer.pt"):
        check_checkpoint(tmp_path / "checkpoint-1")
    again = MultiAgentSystem.from_pretrained(tmp_path / "checkpoint-1", tiny.model())
    assert again.tokenizer.get_vocab() == tiny.tokenizer().get_vocab()

"""Training that is stopped, and goes on."""

import pytest
import tiny_systems as tiny
import torch
from test_training import Stop, arguments, no_leftover_precision  # noqa: F401
from transformers import EarlyStoppingCallback, TrainerCallback

from diffmas.training import NonFiniteLoss, Trainer


def test_stops_early_and_loads_the_best(tmp_path):
    args = arguments(tmp_path, max_steps=10, eval_strategy="steps", eval_steps=1)
    system = tiny.system()
    for p in system.parameters():
        if p.requires_grad:
            p.register_hook(torch.neg)  # uphill: the first evaluation is the best
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = Trainer(system, args, train_dataset=tiny.rows(8), eval_dataset=tiny.rows(6), callbacks=[stop])
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.state.global_step == len(losses) == 3 and losses[0] == min(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-6)


def uphill(path, patience, stop=None, resume=False, **options):
    """A run that gets worse with each step, with an evaluation and a checkpoint after each."""
    system = tiny.system()
    for p in system.parameters():
        if p.requires_grad:
            p.register_hook(torch.neg)
    callbacks = [EarlyStoppingCallback(patience), *([Stop(stop)] if stop else [])]
    args = arguments(path, max_steps=6, eval_strategy="steps", eval_steps=1, **options)
    trainer = Trainer(system, args, train_dataset=tiny.rows(8), eval_dataset=tiny.rows(6), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def test_a_run_that_stopped_early_stays_ended(tmp_path):
    first = uphill(tmp_path, 2)
    again = uphill(tmp_path, 2, resume=True)
    assert first.state.global_step == again.state.global_step == 3 and not (tmp_path / "checkpoint-4").exists()
    assert again.state.log_history == [log for log in first.state.log_history if "train_runtime" not in log]
    best = tiny.trainable(first.model)
    assert all(torch.equal(best[n], p) for n, p in tiny.trainable(again.model).items()), "the best weights are loaded"
    assert uphill(tmp_path, 4, resume=True).state.global_step == 5, "more patience goes on, from the count that was kept"


def test_an_interrupted_run_stops_as_early_as_a_whole_one(tmp_path):
    assert uphill(tmp_path, 2, stop=2).state.global_step == 2
    resumed, whole = uphill(tmp_path, 2, resume=True), uphill(tmp_path / "whole", 2)
    assert resumed.state.global_step == whole.state.global_step == 3
    losses = [[log["eval_loss"] for log in t.state.log_history if "eval_loss" in log] for t in (resumed, whole)]
    assert losses[0] == losses[1]


class Poison(TrainerCallback):
    """Makes the adapter NaN behind the trainer's back."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == self.step:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))


def test_a_loss_that_is_nan_stops_and_keeps_the_last_checkpoint(tmp_path):
    args = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=2)
    system = tiny.system()
    trainer = Trainer(system, args, train_dataset=tiny.rows(8), callbacks=[Poison(3)])
    with pytest.raises(NonFiniteLoss, match=r"step 4: expected a finite loss or gradient.*checkpoint-2$"):
        trainer.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(NonFiniteLoss, match="not written.*is not finite.*checkpoint-2"):
        trainer.save_model()
    assert not (tmp_path / "agents.json").exists()
    again = tiny.system()
    Trainer(again, args, train_dataset=tiny.rows(8)).train(resume_from_checkpoint=True)
    assert all(p.isfinite().all() for p in again.parameters())


def test_an_infinite_gradient_does_not_reach_the_weights(tmp_path):
    system = tiny.system()
    before = tiny.trainable(system)
    parameter = next(p for p in system.parameters() if p.requires_grad)
    parameter.register_hook(lambda g: torch.full_like(g, float("inf")))
    trainer = Trainer(system, arguments(tmp_path, max_steps=2), train_dataset=tiny.rows(8))
    with pytest.raises(NonFiniteLoss, match="Last good checkpoint: none"):
        trainer.train()
    assert all(torch.equal(before[n], p) for n, p in tiny.trainable(system).items())

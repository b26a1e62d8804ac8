"""What training tells of gradients, and stops for."""

import csv
import json
import math
import shutil

import pytest
import tiny_systems as tiny
import torch
from test_training import Stop, arguments, no_leftover_precision  # noqa: F401
from transformers import TrainerCallback

from diffmas import MultiAgentSystem
from diffmas.training import Trainer, add_lora, lora_config, plot_gradients
from diffmas.training.explosion import Explosion


def dropping(seed: int = 0):
    """A system whose adapters have dropout: a report that used up random numbers would show."""
    model = add_lora(tiny.model(seed), config=lora_config(r=2, alpha=4, dropout=0.2))
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return MultiAgentSystem(model, tiny.tokenizer(), tiny.agents())


def lines_of(path) -> list[dict]:
    with (path / "gradients.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reports_while_training(tmp_path, checkpointing, monkeypatch):
    """Norms at every second step, of the loss of both micro-batches; not a bit of the weights changes by it."""
    from matplotlib.axes import Axes

    weights = []
    for name, every in (("without", 0), ("with", 2)):
        args = arguments(
            tmp_path / name, max_steps=4, report_to=["tensorboard"], save_strategy="no", gradient_checkpointing=checkpointing
        )  # fmt: skip
        torch.manual_seed(0)
        system = dropping()
        trainer = Trainer(system, args, train_dataset=tiny.rows(8), gradient_report_steps=every, explosion_factor=None)
        trainer.train()
        weights.append(tiny.trainable(system))
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert not list((tmp_path / "without").glob("gradients.*"))
    lines = lines_of(tmp_path / "with")
    assert {line["step"] for line in lines} == {"2", "4"}
    logged = {log["step"]: log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log}
    reported = {log["step"]: log for log in trainer.state.log_history if "gradient/parameters" in log}
    assert set(reported) == {2, 4}
    for step in (2, 4):
        of_step = [line for line in lines if line["step"] == str(step)]
        pick = lambda of_step=of_step, **want: [  # noqa: E731
            float(x["norm"]) for x in of_step if all(x[k] == v for k, v in want.items())
        ]
        (whole,) = pick(quantity="parameters", layers="")
        assert whole == pytest.approx(logged[step], rel=1e-4)
        assert math.hypot(*pick(quantity="parameters")[1:]) == pytest.approx(whole, rel=1e-5)
        for agent, kind, steps in (("planner", "prompt", "0"), ("planner", "latent", "12"), ("solver", "answer", "0")):
            (segment,) = pick(quantity="rows", agent=agent, kind=kind, latent_step="")
            parts = [x for s in steps for x in pick(quantity="rows", agent=agent, kind=kind, latent_step=s)]
            assert len(parts) == 2 * len(steps) and math.hypot(*parts) == pytest.approx(segment, rel=1e-5) and segment > 0
            assert reported[step][f"gradient/rows/{agent}/{kind}"] == segment
            (first,) = pick(quantity="hidden", agent=agent, kind=kind, latent_step=steps[0])
            assert first > 0 and (kind != "latent" or reported[step][f"gradient/hidden/{agent}/latent/step_1"] == first)
    assert (tmp_path / "with" / "gradients.png").read_bytes().startswith(b"\x89PNG")
    drawn, plot_of = {}, Axes.plot
    with monkeypatch.context() as patched:
        patched.setattr(
            Axes, "plot", lambda self, x, y, **how: drawn.update({how["label"]: (x, y)}) or plot_of(self, x, y, **how)
        )
        assert plot_gradients(tmp_path / "with" / "gradients.csv", tmp_path / "again.png").is_file()
    assert drawn["planner"][0] == [1, 2] and drawn["planner"][1][0] == reported[4]["gradient/hidden/planner/latent/step_1"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = {}
    for file in (tmp_path / "with").glob("**/events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        scalars |= {tag: [s.step for s in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in ("parameters/layer_1", "rows/critic/latent", "hidden/planner/prompt", "hidden/planner/latent/step_2"):
        assert scalars[f"train/gradient/{tag}"] == [2, 4]


def test_a_report_is_of_the_whole_steps_loss(tmp_path):
    """The norms of rows and hidden states of two micro-batches are those of one batch of all rows."""
    found = []
    for batch, accumulate in ((8, 1), (2, 4)):
        args = arguments(
            tmp_path / str(batch), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
            save_strategy="no",
        )  # fmt: skip
        Trainer(tiny.system(), args, train_dataset=tiny.rows(8), gradient_report_steps=1).train()
        found.append([(list(x.values())[:-1], float(x["norm"])) for x in lines_of(tmp_path / str(batch))])
    assert [x for x, _ in found[0]] == [x for x, _ in found[1]] and len(found[0]) > 30
    assert [n for _, n in found[1]] == pytest.approx([n for _, n in found[0]], rel=1e-4, abs=1e-7)


def test_reports_go_on_after_a_resume(tmp_path):
    for stop, steps in ((2, 4), (None, 4)):
        args = arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=1)
        callbacks = [Stop(stop)] if stop else []
        trainer = Trainer(tiny.system(), args, train_dataset=tiny.rows(8), callbacks=callbacks, gradient_report_steps=1)
        if not stop:
            shutil.rmtree(tmp_path / "checkpoint-2")  # the run goes on from step 1, and reports step 2 again
        trainer.train(resume_from_checkpoint=stop is None)
    steps = [line["step"] for line in lines_of(tmp_path) if line["quantity"] == "parameters" and not line["layers"]]
    assert steps == ["1", "2", "3", "4"]


class Scale(TrainerCallback):
    """Makes the last hidden states many times as large behind the trainer's back, and the logits."""

    def __init__(self, step: int, factor: float):
        self.step, self.factor = step, factor

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == self.step:
            (weight,) = (p for name, p in model.named_parameters() if name.endswith(".norm.weight"))
            weight.data *= self.factor


def exploding(path, caplog, callback=None, system=None, **options):
    """Warnings of a run, and the weights that it ends with."""
    args = arguments(path, max_steps=9, save_strategy="no")
    torch.manual_seed(0)
    system = system or dropping()
    callbacks = [callback or Scale(6, 1e5)]
    caplog.clear()
    Trainer(system, args, train_dataset=tiny.rows(8), callbacks=callbacks, **options).train()
    return [r.getMessage() for r in caplog.records if "running median" in r.getMessage()], tiny.trainable(system)


def test_an_explosion_is_explained_once(tmp_path, caplog):
    (said,), weights = exploding(tmp_path / "a", caplog)
    report = json.loads((tmp_path / "a" / "gradient_explosion.json").read_text())
    size = lambda p: math.hypot(*p["parameters"])  # noqa: E731
    worst = max(report["passes"], key=size)
    place = worst["agent"] + ", " + (f"latent step {worst['step']}" if worst["kind"] == "latent" else worst["kind"])
    assert said.startswith("step 7: the norm of the gradient is ") and f"Most of it comes from {place}, layer " in said
    largest = max(report["segments"], key=lambda s: s["rows"])
    assert f"the {largest['kind']} rows of {largest['agent']} get the largest gradient ({largest['rows']:.3g})" in said
    assert "learning_rate" in said and "sinks" not in said and "explosion_factor=None" in said
    assert (tmp_path / "a" / "gradient_explosion.png").is_file()
    quiet, same = exploding(tmp_path / "b", caplog, explosion_factor=None)
    assert quiet == [] and not list((tmp_path / "b").glob("gradient*"))
    assert all(torch.equal(weights[n], p) for n, p in same.items()), "the report has changed the training"
    assert exploding(tmp_path / "c", caplog, Scale(6, 1.0))[0] == [], "a run that does not explode"


def test_what_to_try_depends_on_the_system(tmp_path, caplog):
    system = tiny.system(trace_content="latent_only", realign="none", sinks=0)
    (said,), _ = exploding(tmp_path, caplog, system=system)
    assert "sinks=4" in said and "realign='ridge'" in said


def test_a_report_that_fails_does_not_end_training(tmp_path, caplog, monkeypatch):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(MultiAgentSystem, "gradient_report", fails)
    (said,), _ = exploding(tmp_path, caplog)
    assert "Its report failed: no room." in said and "learning_rate" in said


def test_what_counts_as_an_explosion():
    norms = lambda explosion, *xs: [explosion.times(x) for x in xs]  # noqa: E731
    assert norms(Explosion(100), 1, 1, 1, 1, 1e9) == [None] * 5, "too few norms for a median"
    assert norms(Explosion(100), 2, 2, 2, 2, 2, 199, 201, 1e9) == [None] * 6 + [100.5, None]
    assert norms(Explosion(100), 1, 1, 1, 1, 1, math.nan, math.inf, 200) == [None] * 7 + [200]
    assert norms(Explosion(100), *[0.0] * 6, 5) == [None] * 7, "many times nothing is nothing to speak of"
    slow = Explosion(100)
    assert not any(slow.times(1.05**i) for i in range(300)), "a norm that grows slowly"
    assert Explosion(3).times(1) is None and norms(Explosion(None), 1, 1, 1, 1, 1, 1e9)[-1] is None


def test_bad_settings_of_reports(tmp_path):
    for options, message in (
        ({"gradient_report_steps": -1}, "gradient_report_steps: expected an integer >= 0, got -1"),
        ({"gradient_report_steps": 1.5}, "gradient_report_steps: expected an integer >= 0, got 1.5"),
        ({"explosion_factor": 1}, "explosion_factor: expected a number > 1 or None, got 1"),
        ({"explosion_factor": "big"}, "explosion_factor: expected a number > 1 or None, got 'big'"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(tiny.system(), arguments(tmp_path), train_dataset=tiny.rows(2), **options)

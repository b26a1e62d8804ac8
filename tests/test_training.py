"""The trainer against what it must equal: one big batch, an uninterrupted run, a single process."""

import csv
import gc
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny_systems as tiny
import torch
from ddp_worker import CASES, build
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, Qwen3Config, TrainerCallback
from transformers.models.qwen3 import Qwen3ForCausalLM

from diffmas import MultiAgentSystem
from diffmas.agents.file import check_same, read_agents
from diffmas.evaluation import Stitched, Writers
from diffmas.training import (
    NonFiniteLoss,
    Trainer,
    add_lora,
    check_checkpoint,
    default_arguments,
    last_checkpoint,
    lora_config,
    plot_gradients,
    processes,
)
from diffmas.training.explosion import Explosion

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
QUIET = dict(report_to=[], disable_tqdm=True, use_cpu=True, save_total_limit=None)


def arguments(path, **options):
    given = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, warmup_steps=0, **QUIET)
    return default_arguments(path, **{**given, **options})


@pytest.fixture(autouse=True)
def no_leftover_precision(monkeypatch):
    """transformers 4.x leaves bf16=True in the environment, for every later run and child process."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


class Stop(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four steps, two per epoch, with a checkpoint after each; not to be changed by a test."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("run")
    args = arguments(path, max_steps=4, eval_strategy="steps", eval_steps=1, report_to=["tensorboard"])
    trainer = Trainer(tiny.system(), args, train_dataset=tiny.rows(8), eval_dataset=tiny.rows(6))
    trainer.train()
    return trainer


# ---- what a run does and leaves --------------------------------------------------------------------------------------


def test_learns_evaluates_and_keeps_the_best(run):
    losses = [log["eval_loss"] for log in run.state.log_history if "eval_loss" in log]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert run.state.best_metric == min(losses)
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    questions, answers = zip(*((r["question"], r["answer"]) for r in tiny.rows(6)))
    with torch.no_grad():
        assert run.model(list(questions), list(answers)).loss.item() == pytest.approx(min(losses), rel=1e-5)


def test_no_collection_runs_within_a_step(tmp_path):
    """Python's cycle collector would look at all of memory for the sake of a graph, which is freed without it."""
    trainer = Trainer(tiny.system(), arguments(tmp_path, max_steps=1), train_dataset=tiny.rows(4))
    enabled, layer = [], trainer.model.model.get_base_model().get_input_embeddings()
    layer.register_forward_hook(lambda *_: enabled.append(gc.isenabled()))
    trainer.train()
    assert enabled and not any(enabled) and gc.isenabled()
    layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert gc.isenabled()


def test_logs_to_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = list(Path(run.args.output_dir).glob("**/events.out.tfevents.*"))
    steps = {}
    for events in (EventAccumulator(str(file)).Reload() for file in files):
        for tag in events.Tags()["scalars"]:
            steps.setdefault(tag, []).extend(scalar.step for scalar in events.Scalars(tag))
    for tag in ("train/loss", "train/learning_rate", "train/grad_norm", "eval/loss"):
        assert set(steps[tag]) == {1, 2, 3, 4}, steps


def test_a_checkpoint_holds_no_base_weights(run):
    path = Path(run.args.output_dir) / "checkpoint-4"
    names = {p.name for p in path.iterdir()} - {"README.md", "special_tokens_map.json"}  # transformers 4 has the latter
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "agents.json", *TOKENIZER,
        "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json",
    }  # fmt: skip
    assert check_checkpoint(path) == path == last_checkpoint(run.args.output_dir)


def test_its_adapter_is_a_plain_peft_adapter(run, tmp_path):
    from peft import PeftModel

    run.save_model(tmp_path / "out")
    plain = PeftModel.from_pretrained(tiny.model(), tmp_path / "out").eval()
    ids = torch.arange(3, 12)[None]
    trained = run.model.model.eval()
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, trained(ids).logits)
        assert not torch.equal(plain(ids).logits, tiny.model().eval()(ids).logits)
    loaded = MultiAgentSystem.from_pretrained(tmp_path / "out", tiny.model(), tiny.tokenizer())
    question = [tiny.rows(1)[0]["question"]]
    assert loaded.generate(question, 5, temperature=0) == run.model.generate(question, 5, temperature=0)


def test_recipes(tmp_path):
    args = default_arguments(tmp_path)
    assert (args.learning_rate, args.lr_scheduler_type, args.max_grad_norm) == (5e-4, "cosine", 1.0)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 16
    assert args.get_warmup_steps(200) == 10
    assert default_arguments(tmp_path, warmup_steps=3).get_warmup_steps(200) == 3
    assert default_arguments(tmp_path, warmup_steps=0).get_warmup_steps(200) == 0
    with pytest.raises(ValueError, match=r"recipe: expected one of \('default', 'paper'\), got 'mine'"):
        default_arguments(tmp_path, "mine")


def test_the_papers_settings(tmp_path):
    args = default_arguments(tmp_path, "paper")
    assert (args.learning_rate, args.lr_scheduler_type, args.gradient_accumulation_steps) == (5e-5, "cosine", 64)
    assert args.optim == "adamw_torch" and args.per_device_train_batch_size == 1 and args.get_warmup_steps(200) == 0
    assert args.num_train_epochs == 1 and default_arguments(tmp_path).num_train_epochs == 3
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=2))  # of Qwen3-8B's width
    model = add_lora(model)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (8, 16)
    assert {name.split(".")[-1] for name in config.target_modules} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    trainable, total = model.get_nb_trainable_parameters()
    assert 0 < trainable < 0.05 * total


def test_without_latent_steps_a_team_that_skips_is_the_single_agent():
    """The paper's T = 0, which is not the default here."""
    questions, answers = map(list, zip(*((r["question"], r["answer"]) for r in tiny.rows(4))))
    alone = MultiAgentSystem(tiny.model(), tiny.tokenizer(), tiny.agents()[-1:])
    skipping, prompting = (tiny.system(0, lora=False, no_latents=mode) for mode in ("skip", "prompt"))
    losses = [system(questions, answers).loss.item() for system in (alone, skipping, prompting)]
    assert losses[0] == losses[1] and abs(losses[2] - losses[0]) > 1e-3


def test_a_plain_model_gets_lora(tmp_path):
    system = tiny.system(lora=False)
    trainer = Trainer(system, arguments(tmp_path, max_steps=1, save_strategy="no"), train_dataset=tiny.rows(4))
    before = tiny.trainable(system)
    assert before and all("lora_" in name for name in before)
    trainer.train()
    assert any(not torch.equal(before[n], p) for n, p in tiny.trainable(system).items())


# ---- equal to something else -----------------------------------------------------------------------------------------


def one_step(path, batch: int, accumulate: int, system_options=None, **options):
    """Weights after one step of plain gradient descent over the same eight rows."""
    args = arguments(
        path, max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, optim="sgd",
        lr_scheduler_type="constant", save_strategy="no", learning_rate=0.1, max_grad_norm=0.0, **options,
    )  # fmt: skip
    system = tiny.system(**(system_options or {}))
    Trainer(system, args, train_dataset=tiny.rows(8)).train()
    return tiny.trainable(system)


def test_accumulation_gives_the_step_of_one_batch(tmp_path):
    whole, parts = one_step(tmp_path, 8, 1), one_step(tmp_path, 2, 4)
    start = tiny.trainable(tiny.system())
    moved = max(float((whole[n] - start[n]).abs().max()) for n in start)
    assert max(float((whole[n] - parts[n]).abs().max()) for n in start) < 1e-5 * moved


def test_activation_checkpointing_gives_the_same_step(tmp_path):
    plain, recomputed = one_step(tmp_path, 4, 2), one_step(tmp_path, 4, 2, gradient_checkpointing=True)
    assert all(torch.equal(plain[n], recomputed[n]) for n in plain)


def test_bf16_trains_close_to_float32(tmp_path):
    start = tiny.trainable(tiny.system())
    # Not "ridge": between these tiny random embeddings it is ill-conditioned and enlarges what bf16 rounds off.
    exact, half = (one_step(tmp_path, 4, 2, {"realign": "norm"}, bf16=bf16) for bf16 in (False, True))
    step, error = (torch.cat([(a[n] - b[n]).flatten() for n in start]).norm() for a, b in ((exact, start), (half, exact)))
    assert all(p.dtype == torch.float32 for p in half.values())
    assert 0 < error < 0.1 * step


@pytest.mark.parametrize(
    "options",
    [{}, {"adapter_scope": "per_role"}, {"realign": "learned"}, {"select": {"rows": 2, "by": "learned"}}],
    ids=["shared", "per_role", "learned", "choice"],
)
def test_resume_is_bit_for_bit(tmp_path, options):
    """Stopped in the middle of the second epoch."""
    weights, histories = [], []
    for name, stop in (("whole", None), ("parts", 3)):
        args = lambda name=name: arguments(tmp_path / name, max_steps=5, save_strategy="steps", save_steps=3)  # noqa: E731
        system = tiny.system(**options)
        trainer = Trainer(system, args(), train_dataset=tiny.rows(8), callbacks=[Stop(stop)] if stop else [])
        trainer.train()
        if stop:
            torch.manual_seed(99)  # resuming restores the random state
            stopped, system = tiny.trainable(system), tiny.system(**options)
            trainer = Trainer(system, args(), train_dataset=tiny.rows(8))
            trainer.train(resume_from_checkpoint=True)
            assert any(not torch.equal(stopped[n], p) for n, p in tiny.trainable(system).items())
        weights.append(tiny.trainable(system))
        histories.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert histories[0] == histories[1] and len(histories[0]) == 5
    choices = [p for n, p in weights[0].items() if n.startswith("choices.")]
    assert len(choices) == ("select" in options) and all(p.abs().max() > 0 for p in choices)


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"num_train_epochs": 1.5}])
@pytest.mark.parametrize("best", [False, True])
def test_a_run_that_is_finished_is_not_trained_on(tmp_path, length, best):
    evaluated = dict(eval_strategy="steps", eval_steps=1, greater_is_better=True) if best else {}  # the first step is
    given = dict(lr_scheduler_type="constant", save_strategy="steps", save_steps=1, **length) | evaluated
    args, sets = arguments(tmp_path, **given), dict(train_dataset=tiny.rows(8), eval_dataset=tiny.rows(6))
    first = Trainer(tiny.system(), args, **sets)
    outcome, last = first.train(), tiny.system()
    again = Trainer(tiny.system(), args, **sets)
    resumed = again.train(resume_from_checkpoint=True)
    assert resumed.global_step == again.state.global_step == outcome.global_step == 3
    assert resumed.training_loss == pytest.approx(outcome.training_loss, rel=1e-3)
    assert all(torch.equal(p, tiny.trainable(again.model)[n]) for n, p in tiny.trainable(first.model).items())
    last.load_weights(tmp_path / "checkpoint-3")
    of_last = all(torch.equal(p, tiny.trainable(again.model)[n]) for n, p in tiny.trainable(last).items())
    assert of_last == (not best) and [p.name for p in tmp_path.glob("checkpoint-4")] == []
    args.max_steps = 4
    assert Trainer(tiny.system(), args, **sets).train(resume_from_checkpoint=True).global_step == 4


def test_two_processes_give_the_gradients_of_one(tmp_path):
    tests = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        tests / "ddp_worker.py",
        tmp_path,
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(tests.parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (steps, options, _) in CASES.items():
        ranks = [torch.load(tmp_path / f"{name}-{r}.pt", weights_only=False) for r in (0, 1)]
        assert len(ranks[0]["seen"]) == len(ranks[1]["seen"]) == 4
        assert sorted(map(str, ranks[0]["seen"] + ranks[1]["seen"])) == sorted(
            str(({"question": r["question"]}, r["answer"])) for r in tiny.rows(8)
        ), "each row once"
        assert ranks[0]["find_unused"] == ("adapter_scope" in options)
        # One process, all rows: each with the latent steps of the rank that had it.
        if steps[0] == steps[1]:  # the mean over the tokens of five rows, of which the second process has two and a copy
            trained = MultiAgentSystem.from_pretrained(tmp_path / name, tiny.model(), tiny.tokenizer())
            questions, answers = zip(*((r["question"], r["answer"]) for r in tiny.rows(5)))
            with torch.no_grad():
                loss = trained(list(questions), list(answers)).loss.item()
            assert [rank["eval_loss"] for rank in ranks] == pytest.approx([loss, loss], rel=1e-5)
        total, counted, expected = 0, 0, {}
        for T, rank in zip(steps, ranks):
            system = build(T, options)
            questions, answers = map(list, zip(*rank["seen"]))
            counted += sum(len(system.answer_ids(a)) for a in answers)
            system(questions, answers, num_items_in_batch=1).loss.backward()
            for n, p in system.named_parameters():
                if p.grad is not None:
                    expected[n] = expected.get(n, 0) + p.grad
        for n, grad in ranks[0]["grads"].items():
            assert torch.equal(grad, ranks[1]["grads"][n]), (name, n)
            total += float(grad.norm())
            want = expected.get(n, torch.zeros_like(grad)) / counted
            assert float((grad - want).abs().max()) <= 1e-4 * max(float(want.abs().max()), 1e-2), (name, n)
        assert total > 0 and (tmp_path / name / "agents.json").is_file()
        manifest = json.loads((check_checkpoint(tmp_path / name / "checkpoint-1") / "manifest.json").read_text())
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= manifest.keys()


WITH_DDP = """
import runpy, sys, torch
end_processes = runpy.run_path(sys.argv[3])["end_processes"]  # no import of diffmas: whatever ends with it lends the GIL, too
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
sys.setswitchinterval(1000)  # nobody gets the GIL who is not lent it
for _ in range(40):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    model(torch.ones(2, 4)).sum().backward()
end_processes()
"""


def test_processes_end_without_aborting(tmp_path):
    """Without the moment that Gloo's threads get, one process or the other aborts in about a third of the turns."""
    for turn in range(5):
        command = [sys.executable, "-c", WITH_DDP, tmp_path / f"store{turn}"]
        both = [
            subprocess.Popen([*command, str(rank), processes.__file__], stderr=subprocess.PIPE, text=True) for rank in range(2)
        ]
        ends = [process.communicate(timeout=120)[1] for process in both]
        assert [process.returncode for process in both] == [0, 0], (turn, ends)


# ---- stopping --------------------------------------------------------------------------------------------------------


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


# ---- gradients while it trains ---------------------------------------------------------------------------------------


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


# ---- bad inputs ------------------------------------------------------------------------------------------------------


def copy_of(run, path, *steps):
    for step in steps:
        source = Path(run.args.output_dir) / f"checkpoint-{step}"
        target = path / source.name
        target.mkdir(parents=True)
        for file in source.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    return path


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "agents.json"]
)
def test_a_cut_checkpoint_is_named_and_skipped(run, tmp_path, name):
    copy_of(run, tmp_path, 1, 2)
    file = tmp_path / "checkpoint-2" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    system = tiny.system()
    trainer = Trainer(system, arguments(tmp_path, max_steps=3, save_strategy="no"), train_dataset=tiny.rows(8))
    before = tiny.trainable(system)
    with pytest.raises(ValueError, match=rf"checkpoint-2/{name}: expected .*whole"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(before[n], p) for n, p in tiny.trainable(system).items())
    file.unlink()
    with pytest.raises(ValueError, match=rf"checkpoint-2.*{name[:9]}"):
        check_checkpoint(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path).name == "checkpoint-1"


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_config.json"]
)
def test_an_overwritten_byte_is_found(run, tmp_path, name):
    copy_of(run, tmp_path, 1, 2)
    file = tmp_path / "checkpoint-2" / name
    data = bytearray(file.read_bytes())
    data[-len(data) // 3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"checkpoint-2/{name}: expected a whole file"):
        check_checkpoint(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path).name == "checkpoint-1"


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_a_checkpoint_without_its_manifest_is_not_whole(run, tmp_path, text):
    copy_of(run, tmp_path, 1, 2)
    manifest = tmp_path / "checkpoint-2" / "manifest.json"
    manifest.unlink() if text is None else manifest.write_text(text)
    with pytest.raises(ValueError, match="checkpoint-2.*manifest.json"):
        check_checkpoint(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path).name == "checkpoint-1"


def test_an_older_checkpoint_goes_only_when_the_newest_is_whole(tmp_path, monkeypatch):
    from diffmas.training import files

    write = files.write_manifest

    def killed(path):
        if path.name == "checkpoint-3":
            raise KeyboardInterrupt
        write(path)

    monkeypatch.setattr(files, "write_manifest", killed)
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=1)
    with pytest.raises(KeyboardInterrupt):
        Trainer(tiny.system(), args, train_dataset=tiny.rows(8)).train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert last_checkpoint(tmp_path).name == "checkpoint-2" and args.save_total_limit == 1


def test_the_best_checkpoint_is_kept(tmp_path):
    args = arguments(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, save_total_limit=1)
    system = tiny.system()
    for p in system.parameters():
        if p.requires_grad:
            p.register_hook(torch.neg)  # uphill: the first is the best
    Trainer(system, args, train_dataset=tiny.rows(8), eval_dataset=tiny.rows(6)).train()
    assert check_checkpoint(tmp_path / "checkpoint-1") and not (tmp_path / "checkpoint-2").exists()


# ---- what a saved system says of itself --------------------------------------------------------------------------------


class Shouting(MultiAgentSystem):
    """Another system, whose class must not get lost."""

    def prompt_ids(self, agent, fields):
        return super().prompt_ids(agent, fields)[::-1]


TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}answer :"


@pytest.mark.parametrize("where", ["saved", "checkpoint-1"])
def test_a_directory_holds_the_tokenizer_and_the_chat_template(tmp_path, where):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.chat_template = TEMPLATE
    base = tiny.model()
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    base.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    system = MultiAgentSystem(add_lora(base), tokenizer, tiny.agents())
    trainer = Trainer(system, arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1), train_dataset=tiny.rows(4))
    trainer.train()
    system.save_pretrained(tmp_path / "saved")
    again = MultiAgentSystem.from_pretrained(tmp_path / where)
    fields = {"question": "where is the new key"}
    assert again.tokenizer.chat_template == TEMPLATE
    assert again.prompt_ids(again.agents[0], fields) == system.prompt_ids(system.agents[0], fields)
    assert again.answer_ids("new")[:-1] == [len(tiny.VOCAB)]
    plain = MultiAgentSystem.from_pretrained(tmp_path / where, tokenizer=tokenizer)
    assert plain.tokenizer is tokenizer
    file = tmp_path / where / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{where}: expected the whole files of a tokenizer, got damaged ones"):
        MultiAgentSystem.from_pretrained(tmp_path / where)


def test_a_subclass_is_loaded_as_what_it_is(tmp_path):
    system = tiny.system()
    other = Shouting(system.model, system.tokenizer, system.agents)
    other.save_pretrained(tmp_path)
    name = rf"{Shouting.__module__}\.Shouting"
    with pytest.raises(
        ValueError, match=rf"expected a system of the class diffmas\.agents.*, got one of {name}; load it by that"
    ):
        MultiAgentSystem.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer())
    with pytest.raises(ValueError, match=rf"got one of {name}"):
        tiny.system().load_weights(tmp_path)
    assert type(Shouting.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer())) is Shouting
    tiny.system().save_pretrained(tmp_path / "base")
    with pytest.raises(
        ValueError, match=rf"expected a system of the class {name}, got one of diffmas\.agents.*MultiAgentSystem"
    ):
        Shouting.from_pretrained(tmp_path / "base", tiny.model(), tiny.tokenizer())


def test_stitched_agents_and_writers_are_loaded_as_they_were(tmp_path):
    system = tiny.system()
    Stitched(system.model, system.tokenizer, system.agents, join="keep").save_pretrained(tmp_path / "stitched")
    with pytest.raises(ValueError, match="got one of diffmas.evaluation.baselines.Stitched"):
        MultiAgentSystem.from_pretrained(tmp_path / "stitched", tiny.model(), tiny.tokenizer())
    assert Stitched.from_pretrained(tmp_path / "stitched", tiny.model(), tiny.tokenizer()).join == "keep"
    with pytest.raises(ValueError, match="expected own_options {'join': 'shift'}, got {'join': 'keep'}"):
        Stitched(system.model, system.tokenizer, system.agents).load_weights(tmp_path / "stitched")
    Writers(system.model, system.tokenizer, system.agents).save_pretrained(tmp_path / "writers")
    writers = Writers.from_pretrained(tmp_path / "writers", tiny.model(), tiny.tokenizer())
    assert list(writers.roles) == ["planner", "critic", "solver"]
    with pytest.raises(ValueError, match="agent: expected one of"):
        writers([{"agent": "nobody", "prompt": "plan"}], ["garden"])
    file = tmp_path / "writers" / "agents.json"
    older = json.loads(file.read_text())
    for agent in older["own_options"]["roles"] + older["agents"]:
        del agent["role"]
    del older["latent_grad_clip"]
    file.write_text(json.dumps(older))
    Writers(system.model, system.tokenizer, system.agents).load_weights(tmp_path / "writers")


def test_roles_are_compared_where_they_mean_something(tmp_path):
    tiny.system().save_pretrained(tmp_path / "shared")
    tiny.system(adapter_scope="per_role").save_pretrained(tmp_path / "roles")
    agents = [asdict(agent) | {"role": "team"} for agent in tiny.agents()]
    check_same(tmp_path, read_agents(tmp_path / "shared"), {"agents": agents})
    with pytest.raises(ValueError, match="expected role 'team' of agent 'planner', got None"):
        check_same(tmp_path, read_agents(tmp_path / "roles"), {"agents": agents})
    agents[0]["prompt"] = "another"
    with pytest.raises(ValueError, match="expected prompt 'another' of agent 'planner'"):
        check_same(tmp_path, read_agents(tmp_path / "shared"), {"agents": agents})


def test_a_directory_that_does_not_say_its_class_is_loaded(tmp_path):
    """As older versions wrote them."""
    tiny.system().save_pretrained(tmp_path)
    file = tmp_path / "agents.json"
    described = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("class", "own_options")}
    file.write_text(json.dumps(described))
    for kind in (MultiAgentSystem, Stitched):
        assert type(kind.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer())) is kind
    tiny.system().load_weights(tmp_path)


@pytest.mark.parametrize("scope", ["shared", "per_role"])
def test_a_loaded_adapter_is_trained_on_if_asked(tmp_path, scope):
    tiny.system(adapter_scope=scope).save_pretrained(tmp_path)
    frozen = MultiAgentSystem.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer())
    assert scope == "per_role" or not tiny.trainable(frozen)
    loaded = MultiAgentSystem.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer(), trainable=True)
    before = tiny.trainable(loaded)
    Trainer(loaded, arguments(tmp_path / "out", max_steps=1, save_strategy="no"), train_dataset=tiny.rows(4)).train()
    assert before and all(not torch.equal(before[name], p) for name, p in tiny.trainable(loaded).items())


@pytest.mark.parametrize("scope, gone", [("shared", "adapter_config.json"), ("per_role", "critic/adapter_model.safetensors")])
def test_a_missing_adapter_is_not_the_untrained_model(tmp_path, scope, gone):
    tiny.system(adapter_scope=scope).save_pretrained(tmp_path)
    assert MultiAgentSystem.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer()).adapter_scope == scope
    (tmp_path / gone).unlink()
    with pytest.raises(ValueError, match=f"{gone}: expected .*found none"):
        MultiAgentSystem.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer())
    if scope == "per_role":
        shutil.rmtree(tmp_path / "critic")
        with pytest.raises(ValueError, match="critic/adapter_config.json: expected this file, found none"):
            MultiAgentSystem.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer())


def test_an_adapter_of_another_scale_is_refused(tmp_path):
    tiny.system(alpha=4).save_pretrained(tmp_path)
    other = tiny.system(alpha=400)
    before = tiny.trainable(other)
    with pytest.raises(ValueError, match="agents.json: expected adapters .*'lora_alpha': 400.*, got .*'lora_alpha': 4,"):
        other.load_weights(tmp_path)
    assert all(torch.equal(before[n], p) for n, p in tiny.trainable(other).items())
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 400}))
    with pytest.raises(ValueError, match="adapter_config.json: expected the adapter of agents.json.*got .*'lora_alpha': 400"):
        MultiAgentSystem.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer())
    with pytest.raises(ValueError, match=r"model: expected a base model without adapters, got one with \['default'\]"):
        MultiAgentSystem.from_pretrained(tmp_path, tiny.system().model, tiny.tokenizer())


def without(data, key):
    return {k: v for k, v in data.items() if k != key}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: without(d, "realign"), r"expected the keys .*got none of \['realign'\]"),
        (lambda d: without(d, "adapters"), r"got none of \['adapters'\]"),
        (lambda d: {**d, "colour": 1}, r"an unknown \['colour'\]"),
        (lambda d: {**d, "last_k": "two"}, r"expected last_k of kind int \| None, got 'two'"),
        (lambda d: {**d, "agents": ["a"]}, r"agents\[0\]: expected an object, got str"),
        (lambda d: {**d, "agents": [without(d["agents"][0], "latent_steps")]}, r"agents\[0\]: .*none of \['latent_steps'\]"),
        (lambda d: {**d, "realign": "magic"}, "realign: expected one of .*'magic'"),
        (lambda d: {**d, "agents": []}, "agents: expected at least one agent"),
        (lambda d: [d], "expected format diffmas-agents-2, got list"),
    ],
)
def test_what_agents_json_may_not_hold(tmp_path, change, message):
    tiny.system().save_pretrained(tmp_path)
    file = tmp_path / "agents.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=f"agents.json: {message}|agents.json: .*{message}"):
        MultiAgentSystem.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer())


def test_a_checkpoint_of_something_else_is_refused(run, tmp_path):
    copy_of(run, tmp_path, 2)
    path = str(tmp_path / "checkpoint-2")
    for system, message in (
        (tiny.system(seed=5), "expected agents of this base model"),
        (tiny.system(latent_steps=3), r"agents.json: expected agents \["),
        (tiny.system(trace_content="latent_only"), "agents.json: expected trace_content 'latent_only', got 'all'"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(system, arguments(tmp_path), train_dataset=tiny.rows(8)).train(resume_from_checkpoint=path)
    with pytest.raises(ValueError, match="expected agents of this base model"):
        MultiAgentSystem.from_pretrained(path, tiny.model(seed=5), tiny.tokenizer())
    weights = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: expected a whole safetensors file"):
        MultiAgentSystem.from_pretrained(path, tiny.model(), tiny.tokenizer())
    with pytest.raises(ValueError, match="expected a whole checkpoint to resume from, found none"):
        Trainer(tiny.system(), arguments(tmp_path / "new"), train_dataset=tiny.rows(8)).train(resume_from_checkpoint=True)


def _another_word(tokenizer):
    tokenizer.add_tokens(["new"])


def _another_template(tokenizer):
    tokenizer.chat_template = TEMPLATE


def _another_end(tokenizer):
    tokenizer.eos_token = "key"


def _other_cuts(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


@pytest.mark.parametrize("change", [_another_word, _another_template, _another_end, _other_cuts])
def test_training_does_not_go_on_with_another_tokenizer(run, tmp_path, change):
    copy_of(run, tmp_path, 2)
    path = tmp_path / "checkpoint-2"
    system = tiny.system()
    system.tokenizer = AutoTokenizer.from_pretrained(path)
    system.load_weights(path)  # the one that was saved is the same
    change(system.tokenizer)
    before = tiny.trainable(system)
    with pytest.raises(ValueError, match="expected agents of this system's tokenizer and chat template .*, got those of oth"):
        Trainer(system, arguments(tmp_path), train_dataset=tiny.rows(8)).train(resume_from_checkpoint=str(path))
    assert all(torch.equal(before[n], p) for n, p in tiny.trainable(system).items())
    file = path / "agents.json"
    file.write_text(json.dumps(without(json.loads(file.read_text()), "tokenizer")))  # as older versions wrote it
    system.load_weights(path)


def test_what_cannot_be_trained_is_refused(tmp_path):
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="train_dataset: expected at least one row, got an empty data set"):
        Trainer(tiny.system(), args, train_dataset=[])
    with pytest.raises(ValueError, match="eval_dataset: expected at least one row"):
        Trainer(tiny.system(), args, train_dataset=tiny.rows(2), eval_dataset=[])
    with pytest.raises(ValueError, match=r"train_dataset\[0\]: expected a string 'answer', got only \['question'\]"):
        Trainer(tiny.system(), args, train_dataset=[{"question": "x"}])
    with pytest.raises(ValueError, match=r"train_dataset\[4\]: agent 'planner': its prompt needs the field {question}"):
        Trainer(tiny.system(), args, train_dataset=[*tiny.rows(4), {"facts": "x", "answer": "y"}])
    with pytest.raises(ValueError, match=r"eval_dataset\['b'\]\[2\]: expected a string 'answer'"):
        sets = {"a": tiny.rows(2), "b": [*tiny.rows(2), {"question": "x", "answer": None}]}
        Trainer(tiny.system(), args, train_dataset=tiny.rows(2), eval_dataset=sets)
    with pytest.raises(ValueError, match="label_smoothing_factor: expected it to be off"):
        Trainer(tiny.system(), arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=tiny.rows(2))
    with pytest.raises(ValueError, match="system: expected a MultiAgentSystem, got Qwen3ForCausalLM"):
        Trainer(tiny.model(), args, train_dataset=tiny.rows(2))
    frozen = tiny.system()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="expected trainable parameters"):
        Trainer(frozen, args, train_dataset=tiny.rows(2))

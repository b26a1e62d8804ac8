"""The trainer against what it must equal: one big batch, an uninterrupted run, a single process."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_systems as tiny
import torch
from ddp_worker import CASES, build
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, Qwen3Config, TrainerCallback
from transformers.models.qwen3 import Qwen3ForCausalLM

from diffmas import MultiAgentSystem
from diffmas.training import Trainer, add_lora, check_checkpoint, default_arguments, last_checkpoint, processes

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
    for turn in range(3):
        command = [sys.executable, "-c", WITH_DDP, tmp_path / f"store{turn}"]
        both = [
            subprocess.Popen([*command, str(rank), processes.__file__], stderr=subprocess.PIPE, text=True) for rank in range(2)
        ]
        ends = [process.communicate(timeout=120)[1] for process in both]
        assert [process.returncode for process in both] == [0, 0], (turn, ends)


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


# ---- what a saved system says of itself --------------------------------------------------------------------------------


TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}answer :"


def without(data, key):
    return {k: v for k, v in data.items() if k != key}


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

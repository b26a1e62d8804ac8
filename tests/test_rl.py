"""GRPO with a team as the policy: log-probabilities and gradients of a plain unroll, TRL's loss by its formula, rewards that
rise."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import systems
import tiny_systems as tiny
import torch
from transformers import LogitsProcessor, TrainerCallback
from trl import GRPOConfig

from diffmas.agents.adapters import switched_off
from diffmas.demo import experiment
from diffmas.rl import GRPOTrainer, answer_log_probs
from diffmas.rl.policy import rollout
from diffmas.training import last_checkpoint

ROOT = Path(__file__).parent.parent
TOKENS = [[20, 21, 22], [23], [24, 63]]  # of three answers, one of them cut off before its end


@pytest.fixture(autouse=True)
def no_leftover_precision(monkeypatch):
    """transformers 4.x leaves bf16=True in the environment, for every later run and child process."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


def config(path, **options):
    given = dict(
        max_steps=1, num_generations=4, per_device_train_batch_size=8, max_completion_length=4, bf16=False, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", gradient_checkpointing=False, lr_scheduler_type="constant",
        optim="sgd", learning_rate=0.1, max_grad_norm=1e9, logging_steps=1,
    )  # fmt: skip
    return GRPOConfig(str(path), **{**given, **options})


def gradients(system) -> dict:
    return {n: p.grad.clone() for n, p in system.named_parameters() if p.grad is not None}


# ---- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"trace_content": "latent_only", "realign": "soft_token", "temperature": 0.7}, {"grad_scope": "detach_trace"},
], ids=str)  # fmt: skip
def test_log_probs_and_gradients_of_a_plain_unroll(options, temperature=0.6):
    """In float64, ragged, with T = 3 and 2: every question alone, the whole prefix anew for every latent step."""
    system = systems.system(**options)
    weights = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)).double()
    found, entropy = answer_log_probs(system, systems.QUESTIONS, TOKENS, temperature)
    (found * weights).sum().backward()
    got = gradients(system)
    system.zero_grad()
    for b, (question, tokens) in enumerate(zip(systems.QUESTIONS, TOKENS)):
        log_p = (systems.unroll(system, question, tokens) / temperature).log_softmax(-1)
        want = log_p[torch.arange(len(tokens)), torch.tensor(tokens)]
        torch.testing.assert_close(found[b, : len(tokens)], want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(entropy[b, : len(tokens)], -(log_p.exp() * log_p).sum(-1), rtol=1e-9, atol=1e-9)
        assert not found[b, len(tokens) :].any() and not entropy[b, len(tokens) :].any()
        if options.get("grad_scope") is None:
            (want * weights[b, : len(tokens)]).sum().backward()
    if options.get("grad_scope") is None:
        for name, want in gradients(system).items():
            torch.testing.assert_close(got[name], want, rtol=1e-7, atol=1e-9)
    assert got


@pytest.mark.parametrize("options", [{}, {"trace_content": "latent_only", "positions": "reindex"}], ids=str)
def test_answers_to_a_question_share_what_the_others_wrote(options):
    """Ragged, in float64: what every answer gets alone, and the sum of their gradients; the others' rows are there once."""
    order, found = [0, 1, 0, 2, 1, 0], []
    questions, tokens = [systems.QUESTIONS[i] for i in order], [[20 + n, *TOKENS[i]] for n, i in enumerate(order)]
    for group in ([range(6)], [[n] for n in range(6)]):
        system = systems.system(**options)
        parts = [answer_log_probs(system, [questions[n] for n in some], [tokens[n] for n in some])[0] for some in group]
        rows = [row[: len(tokens[n])] for n, row in enumerate(row for part in parts for row in part)]
        sum((n + 1) * row.sum() for n, row in enumerate(rows)).backward()
        found.append((rows, gradients(system)))
    for got, want in zip(found[0][0], found[1][0]):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert found[0][1].keys() == found[1][1].keys() and found[0][1]
    for name, want in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], want, rtol=1e-8, atol=1e-10)
    shared, apart = (system(questions, tokens, share=share).trace for share in (True, False))
    assert shared.lengths == apart.lengths
    written = [len({(s.start, s.length) for s in trace.segments if s.agent == "planner"}) for trace in (shared, apart)]
    assert written[1] == 2 * written[0] > 0, "six answers to three questions"


class Seen(LogitsProcessor):
    """Keeps what tokens are chosen from."""

    def __init__(self):
        self.scores = []

    def __call__(self, input_ids, scores):
        self.scores.append(scores.clone())
        return scores


def test_log_probs_of_a_rollout_recomputed():
    system, seen = tiny.system().eval(), Seen()
    (tokens,) = system.generate_tokens(
        ["where is the key"], 6, 1.0, 1.0, seed=1, do_sample=True, top_k=0, logits_processor=[seen]
    )[0]  # fmt: skip
    chosen = [scores[0].log_softmax(-1)[token] for scores, token in zip(seen.scores, tokens)]
    found, _ = answer_log_probs(system, ["where is the key"], [tokens])
    torch.testing.assert_close(found[0], torch.stack(chosen), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("counts", [(2, 2, 2), (3, 1, 2)], ids=["whole groups", "groups that processes share"])
def test_a_rollout_has_an_answer_for_each_row(keep, counts):
    system = tiny.system()
    questions = [{"question": row["question"]} for row, n in zip(tiny.rows(3), counts) for _ in range(n)]
    samples = rollout(system, questions, keep, seed=0, max_new_tokens=5, temperature=0)
    for question, sample in zip(questions, samples):
        assert sample.question == question
        assert sample.answer == system.generate_tokens([question], 5, 0)[0][0]
        assert (sample.trace is not None) == keep
    if keep:
        bare = [answer_log_probs(system, [s.question], [s.answer])[0] for s in samples]
        kept = [answer_log_probs(system, [s.question], [s.answer], trace=s.trace.select([s.sequence]))[0] for s in samples]
        for a, b in zip(bare, kept):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert system.training == tiny.system().training  # as it was


# ---- the loss --------------------------------------------------------------------------------------------------------


class Graded:
    """A reward by the tokens that keeps what it has seen."""

    __name__ = "graded"

    def __init__(self):
        self.prompts, self.tokens, self.rewards = [], [], []

    def __call__(self, prompts, completions, completion_ids, answer, **columns):
        self.prompts, self.tokens, self.answers = prompts, completion_ids, answer
        self.rewards = [sum(ids) % 7 / 7 for ids in completion_ids]
        return self.rewards


def step_of(system, path, latents="recompute", **options):
    """A step of plain gradient descent: its rewards, and by how much each weight has moved, in gradients."""
    graded, before = Graded(), tiny.trainable(system)
    trainer = GRPOTrainer(system, graded, config(path, **options), train_dataset=tiny.rows(4), latents=latents)
    trainer.train()
    moved = {n: (before[n] - p) / 0.1 for n, p in tiny.trainable(system).items()}
    return graded, moved, trainer.state.log_history[0]


def by_formula(system, prompts, answers, rewards, group: int, beta: float = 0.0, temperature: float = 1.0):
    """GRPO's loss with TRL's defaults (dapo: all tokens of the batch weigh the same; the KL term with its ratio), from
    log-probabilities of a plain unroll; and the divergence. Leaves the gradients in the system."""
    rewards = torch.tensor(rewards).view(-1, group)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    count, loss, kl = sum(map(len, answers)), 0.0, 0.0
    for prompt, tokens, advantage in zip(prompts, answers, advantages):
        question, at = prompt.removeprefix("question : ").removesuffix(" answer :"), (range(len(tokens)), tokens)
        log_p = (systems.unroll(system, question, tokens) / temperature).log_softmax(-1)[at]
        since = (log_p - log_p.detach()).exp()  # 1, and its gradient
        loss = loss - since.sum() * advantage / count
        if beta:
            with torch.no_grad(), switched_off(system.model):
                bare = (systems.unroll(system, question, tokens) / temperature).log_softmax(-1)[at]
            kl = kl + (since * ((bare - log_p).exp() - (bare - log_p) - 1)).sum() / count
    (loss + beta * kl).backward()
    return loss, kl


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_a_step_is_the_formulas(tmp_path, beta):
    graded, moved, log = step_of(tiny.system(alpha=8), tmp_path, beta=beta, temperature=0.8)
    assert len(set(graded.rewards)) > 2 and log["reward"] == pytest.approx(sum(graded.rewards) / 8)
    again = tiny.system(alpha=8)
    _, kl = by_formula(again, graded.prompts, graded.tokens, graded.rewards, 4, beta, 0.8)
    for name, want in gradients(again).items():
        torch.testing.assert_close(moved[name], want, rtol=2e-3, atol=2e-5)
    if beta:
        assert log["kl"] == pytest.approx(kl.item(), rel=1e-3) and kl > 0.01


def test_two_processes_share_a_group(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command += [str(Path(__file__).with_name("grpo_worker.py")), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    prompts, tokens, rewards = (ranks[0][key] + ranks[1][key] for key in ("prompts", "tokens", "rewards"))
    assert len(set(prompts)) == 1 and ranks[0]["tokens"] != ranks[1]["tokens"]
    again = tiny.system(alpha=8)
    by_formula(again, prompts, tokens, rewards, 8)
    for name, want in gradients(again).items():
        assert torch.equal(ranks[0]["moved"][name], ranks[1]["moved"][name])
        torch.testing.assert_close(ranks[0]["moved"][name], want, rtol=2e-3, atol=2e-5)


def test_latents_that_are_kept_teach_the_last_agent_alone(tmp_path):
    _, kept, _ = step_of(tiny.system(adapter_scope="per_role", alpha=8), tmp_path, "keep")
    _, through, _ = step_of(tiny.system(adapter_scope="per_role", alpha=8), tmp_path, "recompute")
    for name, moved in kept.items():
        readers = ".solver." not in name
        assert bool(moved.any()) != readers, name
        if readers and "lora_A" in name:
            assert through[name].any(), name
        if not readers:
            torch.testing.assert_close(moved, through[name], rtol=1e-3, atol=1e-5)


def test_a_batch_is_used_twice_with_the_ratio_to_what_it_was_sampled_with(tmp_path):
    """Two passes over the same answers: the first one's ratios are 1, the second one's are not."""
    for latents in ("recompute", "keep"):
        graded = Graded()
        trainer = GRPOTrainer(
            tiny.system(alpha=8), graded, config(tmp_path, max_steps=2, num_iterations=2, epsilon=1e-4),
            train_dataset=tiny.rows(4), latents=latents,
        )  # fmt: skip
        trainer.train()
        first, second = trainer.state.log_history[:2]
        assert first["clip_ratio/region_mean"] == 0 < second["clip_ratio/region_mean"]


def test_micro_batches_change_nothing(tmp_path):
    _, whole, _ = step_of(tiny.system(alpha=8), tmp_path)
    _, parts, _ = step_of(tiny.system(alpha=8), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name, want in whole.items():
        torch.testing.assert_close(parts[name], want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("latents", ["recompute", "keep"])
def test_answers_are_sampled_in_the_precision_of_the_loss(tmp_path, latents):
    """bfloat16 by autocast, as GRPOConfig has it by default."""

    class Precise(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            found, plain = [], self.model.communicate

            def communicate(*args, **options):
                found.append(torch.is_autocast_enabled("cpu"))
                return plain(*args, **options)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self.model, "communicate", communicate)
                output = super()._generate_and_score_completions(inputs)
            assert found and all(found)
            return output

    system = tiny.system(alpha=8)
    before, args = tiny.trainable(system), config(tmp_path, bf16=True)
    Precise(system, Graded(), args, train_dataset=tiny.rows(4), latents=latents).train()
    assert any((before[name] != p).any() for name, p in tiny.trainable(system).items())


# ---- runs ------------------------------------------------------------------------------------------------------------


class Until(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


def run_of(path, *callbacks, resume=False, **options):
    args = config(path, max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-2, **options)
    trainer = GRPOTrainer(tiny.system(), Graded(), args, train_dataset=tiny.rows(6), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return tiny.trainable(trainer.model)


def test_a_run_resumes_bit_for_bit(tmp_path):
    whole = run_of(tmp_path / "whole")
    run_of(tmp_path / "cut", Until(2))
    assert last_checkpoint(tmp_path / "cut").name == "checkpoint-2"
    again = run_of(tmp_path / "cut", resume=True)
    for name, want in whole.items():
        assert torch.equal(again[name], want), name


def test_rewards_rise(tmp_path):
    """Of a word that an untrained team says 3 times in 100."""
    garden = lambda completions, **_: [text.split().count("garden") / 4 for text in completions]  # noqa: E731
    args = config(
        tmp_path, max_steps=10, num_generations=8, per_device_train_batch_size=48, optim="adamw_torch", learning_rate=3e-2,
        max_grad_norm=1.0,
    )  # fmt: skip
    trainer = GRPOTrainer(tiny.system(latent_steps=1, alpha=8), garden, args, train_dataset=tiny.rows(6))
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert rewards[0] < 0.1 and sum(rewards[-3:]) / 3 > 0.3, rewards


def test_evaluation_between_steps_leaves_the_batch_that_is_used_twice(tmp_path):
    def log(**options):
        args = config(tmp_path, max_steps=2, num_iterations=2, per_device_eval_batch_size=4, **options)
        trainer = GRPOTrainer(
            tiny.system(alpha=8), Graded(), args, train_dataset=tiny.rows(4), eval_dataset=tiny.rows(6)[4:]
        )  # fmt: skip
        trainer.train()
        return trainer.state.log_history

    with_evaluation = log(eval_strategy="steps", eval_steps=1)
    losses = [x["loss"] for x in with_evaluation if "loss" in x]
    assert losses == [x["loss"] for x in log() if "loss" in x]
    assert any("eval_reward" in x for x in with_evaluation)


def test_gradient_reports_leave_the_log_of_rewards_as_it_is(tmp_path):
    args = config(tmp_path, max_steps=2, logging_steps=2)
    trainer = GRPOTrainer(tiny.system(), Graded(), args, train_dataset=tiny.rows(4), gradient_report_steps=1)
    trainer.train()
    reports, losses = ([log for log in trainer.state.log_history if ("loss" in log) == whole] for whole in (False, True))
    assert len(losses) == 1 and losses[0]["reward"] > 0 and losses[0]["entropy"] > 0
    assert len(reports) == 3 and not any("reward" in log for log in reports)  # of two steps, and of the run's end


def test_rows_that_are_kept_go_before_the_next_ones_come(tmp_path):
    traces, alive = weakref.WeakSet(), []

    class Watched(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            traces.update(sample.trace for sample in output["samples"])
            return output

    class Counting(Graded):
        def __call__(self, **columns):
            alive.append(len(traces))
            return super().__call__(**columns)

    args = config(tmp_path, max_steps=2)
    Watched(tiny.system(), Counting(), args, train_dataset=tiny.rows(4), latents="keep").train()
    assert alive == [0, 0]  # beside the new one


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    """examples/grpo_facts.py, small: it teaches, rewards, and writes what it says."""
    spec = importlib.util.spec_from_file_location("grpo_facts", ROOT / "examples" / "grpo_facts.py")
    spec.loader.exec_module(example := importlib.util.module_from_spec(spec))
    for module, name, value in ((example, "QUESTIONS", 2), (example, "GROUP", 2), (experiment, "HELD_OUT", 3)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setitem(experiment.TRAINING, "per_device_train_batch_size", 2)
    example.main([3], taught=1, steps=2, output=tmp_path)
    rows = list(csv.DictReader((tmp_path / "rewards.csv").open()))
    assert [(row["seed"], row["step"]) for row in rows] == [("3", "1"), ("3", "2")]
    assert all(0 <= float(row["reward"]) <= 1 for row in rows)
    assert json.loads((tmp_path / "made_with.json").read_text())["taught"] == 1
    assert (tmp_path / "seed3" / "adapter" / "adapter_model.safetensors").exists() and (tmp_path / "rewards.png").exists()
    assert "held-out questions answered" in capsys.readouterr().out

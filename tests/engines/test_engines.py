"""Engines that share a model between two processes, over gloo: loss and every gradient are those of one process; what is saved,
resumed and loaded; who stops when one stops. `make test-engines`.
"""

import importlib.util
from pathlib import Path

import pytest
import tiny_systems as tiny
import torch
from cases import DEEPSPEED, FSDP, MEASURED, MEMORY, REPORTED, STEPS, TENSOR_PARALLEL, TP, ZERO
from worker import model_of, system_of, with_other_weights

from diffmas import MultiAgentSystem
from diffmas.benchmarks.engine_memory import planned
from diffmas.ops import extension
from diffmas.training import Trainer, check_checkpoint, default_arguments, last_checkpoint
from diffmas.training.checkpoint import check_engine_of

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def found_of(results, name: str, cases=FSDP) -> tuple[Path, list[dict]]:
    output, said = results(*cases)
    files = [output / f"{name}-{rank}.pt" for rank in (0, 1)]
    assert all(file.is_file() for file in files), said[-3000:]
    return output / name, [torch.load(file, weights_only=False) for file in files]


def alone(steps, options: dict, ranks: list[dict]) -> tuple[float, dict]:
    """The loss and the gradients of all rows in one process: each row with the latent steps of the process that had it."""
    total, counted, expected = 0.0, 0, {}
    for T, rank in zip(steps, ranks):
        system = system_of(T, options)
        questions, answers = map(list, zip(*rank["seen"]))
        counted += sum(len(system.answer_ids(a)) for a in answers)
        loss = system(questions, answers, num_items_in_batch=1).loss
        loss.backward()
        total += loss.item()
        for n, p in system.named_parameters():
            if p.grad is not None:
                expected[n] = expected.get(n, 0) + p.grad
    return total / counted, {n: grad / counted for n, grad in expected.items()}


def close(got: dict, want: dict, tolerance: float) -> None:
    largest = max(float(x.abs().max()) for x in want.values())
    assert largest > 0.1
    for n, grad in got.items():
        assert float((grad.float() - want.get(n, torch.zeros_like(grad))).abs().max()) <= tolerance * largest, n


def check_step(found: tuple[Path, list[dict]], name: str, rows_by: list[dict]) -> None:
    """rows_by: the processes that had rows of their own."""
    directory, ranks = found
    steps, options, arguments = STEPS[name]
    assert sorted(str(row) for rank in rows_by for row in rank["seen"]) == sorted(
        str(({"question": r["question"]}, r["answer"])) for r in tiny.rows(8)
    ), "each row once"
    loss, grads = alone(steps, options, rows_by)
    exact = not arguments.get("bf16")
    if extension.loaded:  # PEFT's own where parts of a weight, or hooks of each module, need its forward
        assert all(bool(rank["fused"]) is (exact and name.startswith(("fsdp", "zero2"))) for rank in ranks)
    assert ranks[0]["loss"] == pytest.approx(loss, rel=1e-5 if exact else 1e-2)
    for rank in ranks:
        close(rank["grads"], grads, 1e-5 if exact else 0.1)
    if "fsdp" in name or "zero3" in name:
        assert not any(rank["solved"] for rank in ranks), "W was kept from before weights came in parts"
    assert (ranks[0]["norm"] is not None) == (name in REPORTED)
    if name in REPORTED:
        norm = sum(float(grad.square().sum()) for grad in grads.values()) ** 0.5
        assert [rank["norm"] for rank in ranks] == pytest.approx([norm, norm], rel=1e-4)
    if "latent_grad_clip" in options:
        unclipped = alone(steps, {**options, "latent_grad_clip": None}, rows_by)[1]
        with pytest.raises(AssertionError):
            close(unclipped, grads, 0.01)
    if steps[0] != steps[1]:
        return
    saved = MultiAgentSystem.from_pretrained(directory, model_of(), tiny.tokenizer(), trainable=True)
    assert len(ranks[0]["weights"]) == len(grads)
    for n, p in saved.named_parameters():
        if p.requires_grad:
            assert all(torch.equal(rank[of][n].float(), p) for rank in ranks for of in ("weights", "loaded")), n
    if not options:  # what one process has saved
        other = {n: p for n, p in with_other_weights(system_of(steps[0], {})).named_parameters() if p.requires_grad}
        for rank in ranks:
            assert all(torch.equal(rank["of one process"][n], p.to(rank["of one process"][n].dtype)) for n, p in other.items())
    questions, answers = zip(*((r["question"], r["answer"]) for r in tiny.rows(5)))
    with torch.no_grad():
        loss = saved(list(questions), list(answers)).loss.item()
    assert [rank["eval_loss"] for rank in ranks] == pytest.approx([loss, loss], rel=1e-5 if exact else 1e-2)


@pytest.mark.parametrize("name", [name for name in STEPS if name.startswith("fsdp")])
def test_fsdp_equals_one_process(results, name):
    found = found_of(results, name)
    assert found[1][0]["sharded"] == ["FSDPMultiAgentSystem", "FSDPQwen3DecoderLayer", "FSDPQwen3DecoderLayer"]
    check_step(found, name, found[1])


def test_layers_are_gathered_once_for_an_episode_or_at_every_forward(results):
    """Two micro-batches of 2 * (1 + 4) + 1 forwards through two layers, and what is not in a layer; gradients go once."""
    count = lambda name, what="gathered": found_of(results, name)[1][0][what]
    assert count("fsdp keep") == 2 * (2 + 1) and count("fsdp") >= 2 * 2 * 11
    assert count("fsdp", "reduced") == count("fsdp keep", "reduced") == 2 * 2


@pytest.mark.parametrize("name", TP)
def test_tensor_parallel_equals_one_process(results, name):
    found = found_of(results, name, TENSOR_PARALLEL)
    assert found[1][0]["seen"] == found[1][1]["seen"]
    check_step(found, name, found[1][:1])


@pytest.mark.parametrize("realign", ["ridge", "soft_token"])
def test_a_patched_model_in_parts(results, realign):
    for rank in found_of(results, "tp patched", TENSOR_PARALLEL)[1]:
        alone, parts = rank["alone", realign], rank["tp", realign]
        assert (alone["heads"], parts["heads"]) == (2, 1) and parts["text"] == alone["text"]
        assert parts["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        close(parts["grads"], alone["grads"], 1e-5)
        norms = [n for n in alone["grads"] if "q_norm" in n or "k_norm" in n]
        assert len(norms) == 4
        for n in norms:  # every process has some of the heads
            want = alone["grads"][n]
            assert float((parts["grads"][n] - want).abs().max()) <= 1e-4 * float(want.abs().max()), n


def test_a_norm_of_all_heads_has_the_sum_of_all_processes_gradients(results):
    for rank in found_of(results, "tp patched", TENSOR_PARALLEL)[1]:
        assert rank["norm"].tolist() == [3.0] * 3


def test_processes_refuse_a_model_together(results):
    _, (first, second) = found_of(results, "tp patched", TENSOR_PARALLEL)
    assert "it is refused here" in second["error"] and first["error"] == f"process 1: Unsupported: {second['error']}"
    assert first["plain"] and second["plain"]


@needs_deepspeed
@pytest.mark.parametrize("name", ZERO)
def test_zero_equals_one_process(results, name):
    found = found_of(results, name, DEEPSPEED)
    check_step(found, name, found[1])


@pytest.mark.parametrize(
    "name, cases",
    [
        *((name, FSDP) for name in ("fsdp resumed", "fsdp resumed sharded")),
        ("tp resumed", TENSOR_PARALLEL),
        *(pytest.param(f"zero{i} resumed", DEEPSPEED, marks=needs_deepspeed) for i in (2, 3)),
    ],
)
def test_resumed(results, name, cases, tmp_path):
    directory, ranks = found_of(results, name, cases)
    first = MultiAgentSystem.from_pretrained(directory / "checkpoint-1", model_of(), tiny.tokenizer())
    last = dict(MultiAgentSystem.from_pretrained(directory / "checkpoint-3", model_of(), tiny.tokenizer()).named_parameters())
    assert [x["step"] for x in ranks[0]["log"] if "loss" in x] == [1, 2, 3]
    for rank in ranks:
        for n, weight in rank["weights"].items():
            assert torch.equal(weight, rank["resumed"][n]) and torch.equal(weight, last[n]), n
    assert not all(torch.equal(p, last[n]) for n, p in first.named_parameters())
    check_checkpoint(directory / "checkpoint-1")
    engine = {"zero": "DeepSpeed", "fsdp": "FSDP"}.get(name[:4], "tensor parallelism")
    check_engine_of(directory / "checkpoint-1", engine)
    alone = Trainer(system_of(2, {}), default_arguments(tmp_path, use_cpu=True, report_to=[]), train_dataset=tiny.rows(8))
    with pytest.raises(ValueError, match=f"expected a checkpoint of a run with one process or DDP, got one with {engine}"):
        alone.train(resume_from_checkpoint=directory / "checkpoint-1")


@pytest.mark.parametrize(
    "name, cases",
    [("fsdp stop", FSDP), *(pytest.param(f"zero{i} stop", DEEPSPEED, marks=needs_deepspeed) for i in (2, 3))],
)
def test_a_loss_that_is_not_finite_in_one_process_stops_all_before_their_step(results, name, cases):
    for rank in found_of(results, name, cases)[1]:
        assert rank["errors"]["nan"].startswith("NonFiniteLoss: step 1: expected a finite loss") and rank["same"]


@pytest.mark.parametrize("name, cases", [("fsdp stop", FSDP), pytest.param("zero3 stop", DEEPSPEED, marks=needs_deepspeed)])
def test_an_error_stops_all_processes_with_its_message(results, name, cases):
    _, (first, second) = found_of(results, name, cases)
    assert first["errors"]["row"].startswith("RuntimeError: process 1 stopped: TooLong: ")
    assert first["errors"]["row"].endswith(second["errors"]["row"])
    assert "to fit in the context of 128 positions" in second["errors"]["row"]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("generate", "generate: expected a model that this process has alone"),
        ("report", "gradient_report: expected a model that this process has alone"),
        ("cpu", "fsdp: expected processes on several accelerators"),
        ("version", "fsdp: expected FSDP2"),
        ("grad passes", "agent 'planner': grad_passes: expected None where processes share the model's weights"),
        ("own checkpointing", "fsdp_activation_checkpointing: expected it to be off"),
    ],
)
def test_what_a_sharded_system_refuses(results, name, expected):
    _, ranks = found_of(results, "fsdp stop")
    for rank in ranks:
        assert rank["errors"][name].startswith(f"ValueError: {expected}")


@pytest.mark.parametrize(
    "name, cases",
    [
        ("fsdp memory", FSDP),
        ("tp memory", TENSOR_PARALLEL),
        pytest.param("zero memory", DEEPSPEED, marks=needs_deepspeed),
    ],
)
def test_the_memory_of_a_process_is_what_plan_says(results, name, cases):
    """Of a team so small, of which more is temporary than of a large one."""
    _, ranks = found_of(results, name, cases)
    for rank in ranks:
        assert rank.keys() == set(MEMORY[name])
        for engine, found in rank.items():
            for part, said in planned(engine, MEASURED).items():
                assert 0.85 * found[part] <= said <= 1.3 * found[part], (engine, part, found[part], said)


@pytest.mark.parametrize(
    "name, cases",
    [
        ("fsdp killed", FSDP),
        ("tp killed", TENSOR_PARALLEL),
        pytest.param("zero3 killed", DEEPSPEED, marks=needs_deepspeed),
    ],
)
def test_a_killed_process_leaves_no_half_written_checkpoint(results, name, cases):
    output, said = results(*cases)
    directory = output / name
    assert "exitcode: -9" in said.replace(" ", "").replace("exitcode:", "exitcode: "), said[-2000:]
    assert (directory / "checkpoint-2" / "agents.json").is_file(), "it was being written"
    with pytest.raises(ValueError, match=r"manifest\.json: expected this file"):
        check_checkpoint(directory / "checkpoint-2")
    assert last_checkpoint(directory) == directory / "checkpoint-1"

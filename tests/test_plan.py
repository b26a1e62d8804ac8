"""The memory of a team's training by formula, against what autograd keeps and what FSDP2 leaves on a process."""

import json

import pytest
import tiny_systems as tiny
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from diffmas import MultiAgentSystem, patch_model
from diffmas.cli import app
from diffmas.training import add_lora, lora_config
from diffmas.training.plan import ENGINES, Episode, plan, sizes_of

SMALL = dict(vocab_size=64, hidden_size=64)
QWEN3_32B = dict(
    vocab_size=151936, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
    num_key_value_heads=8, head_dim=128,
)  # fmt: skip
WIDE = dict(hidden_size=256, intermediate_size=768, num_attention_heads=8, num_key_value_heads=4, head_dim=32)


def kept_by_autograd(run, weights) -> int:
    """Bytes of the tensors that a forward saves for backward, each storage once, without the weights."""
    known, found, alive = {p.untyped_storage().data_ptr() for p in weights}, {}, []

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        alive.append(run())
    return sum(found.values())


@pytest.mark.parametrize("r", [8, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations(dtype, r):
    base = tiny.model(num_hidden_layers=3, dtype=dtype, **WIDE)
    sizes = sizes_of(base.config, r, dtype)
    assert sizes.weights == sum(p.numel() for p in base.parameters())
    model = add_lora(base, config=lora_config(r=r)) if r else base
    assert sizes.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model = patch_model(model.train(), fuse=False)  # as on a GPU
    system = MultiAgentSystem(model, tiny.tokenizer(), tiny.agents(4))
    questions, answers = zip(*((row["question"], row["answer"]) for row in tiny.rows(6)))
    outputs = []
    kept = kept_by_autograd(lambda: outputs.append(system(list(questions), list(answers))) or outputs, system.parameters())
    trace = outputs[0].trace
    assert kept == pytest.approx(sum(trace.lengths) * 3 * sizes.saved, rel=0.1)
    k, _ = trace.keys_values(0, 0)
    assert 2 * k[0].numel() == sizes.kv


def test_engines_share_what_they_say():
    config = tiny.model(num_hidden_layers=6, **WIDE).config
    sizes, episode = sizes_of(config), Episode(agents=3, prompt=10, latent_steps=4, answer=5, batch=2)
    assert (episode.rows, episode.forwards) == (2 * (3 * 10 + 2 * 4 + 5), 3 + 2 * 4)
    one, four = (dict(zip(ENGINES, plan(sizes, gpus, episode))) for gpus in (1, 4))
    ddp, zero2, kept, gathered, zero3, heads = four.values()
    P, P_t = 2 * sizes.weights, sizes.trained
    root, layer = 2 * sizes.root, 2 * sizes.largest_layer + 4 * P_t // 6
    assert [need.optimizer for need in (ddp, zero2, kept, gathered, zero3)] == [20 * P_t, 12 * P_t, 8 * P_t, 8 * P_t, 9 * P_t]
    assert ddp.weights == zero2.weights == P and kept.weights == P + P // 4 + 4 * P_t + 2 * layer
    assert gathered.weights == P // 4 + max(2 * root + 2 * layer, root + 3 * layer)
    assert zero3.weights == P // 4 + 2 * (P + 4 * P_t), "all of it is on its way at once"
    assert zero3.activations == ddp.activations + episode.rows * 6 * 2 * (256 + 768)
    assert heads.pools == ddp.pools // 4 and ddp.pools == episode.rows * 6 * sizes.kv * (2 + 4)
    assert ddp.activations > heads.activations > ddp.activations // 4 and ddp.optimizer > heads.optimizer > ddp.optimizer // 4
    layers = P - root
    assert kept.gathered == layers * 3 // 4 and gathered.gathered == zero3.gathered == 2 * 11 * layers * 3 // 4
    assert one["DDP"].total == ddp.total - 4 * P_t and one["FSDP2, kept"].gathered == 0
    every = dict(zip(ENGINES, plan(sizes_of(config, None), 4, episode)))
    assert every["DDP"].optimizer == 4 * P and every["FSDP2"].optimizer == P + 3 * P // 4, "weights are there already"
    assert every["ZeRO-2"].optimizer == P + 16 * sizes.weights // 4
    checkpointed = plan(sizes, 4, episode, checkpointing=True)[0]
    assert checkpointed.activations < ddp.activations and checkpointed.pools == ddp.pools
    offloaded = plan(sizes, 4, episode, offload=True)[0]
    assert offloaded.pools == ddp.pools * 2 // 6 and offloaded.total == ddp.total - ddp.pools + offloaded.pools
    assert len(plan(sizes, 3, episode)) == 5, "three processes cannot share four heads"


@pytest.mark.parametrize(
    "config, options, said",
    [
        (
            {"vocab_size": 64, "hidden_size": 64},
            ("--gpus", "2", "--agents", "3", "--memory", "1"),
            "DDP is the first that fits",
        ),
        (QWEN3_32B, ("--gpus", "8", "--agents", "4"), "tensor parallel is the first that fits"),
        (QWEN3_32B, ("--gpus", "4", "--agents", "4", "--r", "0", "--batch", "2"), "nothing fits; more GPUs"),
    ],
)
def test_the_command(tmp_path, config, options, said):
    AutoConfig.for_model("qwen3", **{**WIDE, **config}).save_pretrained(tmp_path)  # no weights
    ran = CliRunner().invoke(app, ["plan", "--model", str(tmp_path), *options])
    assert ran.exit_code == 0, ran.output
    assert all(engine in ran.output for engine in ENGINES) and said in ran.output
    table, below = ran.output.split("└")
    assert max(map(len, table.splitlines())) <= 80 and len(below.splitlines()) == 3
    told = json.loads(CliRunner().invoke(app, ["plan", "--model", str(tmp_path), *options, "--json"]).stdout)
    assert [need["engine"] for need in told["engines"]] == list(ENGINES)
    assert next((f"{need['engine']} is the first" for need in told["engines"] if need["fits"]), "nothing fits") in said
    assert told["engines"][0]["total"] > 2 * told["sizes"]["weights"] and told["episode"]["forwards"] > 10


def test_the_command_refuses_what_is_no_model_or_dtype(tmp_path):
    ran = CliRunner().invoke(app, ["plan", "--model", str(tmp_path / "none"), "--gpus", "2"])
    assert ran.exit_code == 1 and "expected a directory, a .gguf file or a hub name, found no such" in ran.output
    AutoConfig.for_model("qwen3", **WIDE).save_pretrained(tmp_path)
    ran = CliRunner().invoke(app, ["plan", "--model", str(tmp_path), "--gpus", "2", "--dtype", "int8"])
    assert ran.exit_code == 1 and "dtype: expected" in ran.output

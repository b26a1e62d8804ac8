"""Rows that some K/V heads of a reader see, against a plain loop with a mask for each head."""

import json

import pytest
import torch
from loops import check_greedy_tokens
from models import assert_close, body, gradients, tiny, with_lora
from systems import ANSWERS, QUESTIONS, exact_norms, system, tokenizer
from test_graph import TIGHT, agent, exact
from test_selection import FIRST, LATENT, RAGGED, REINDEX, Choosing, check_loss, check_single_runs, of, ragged, solver

from diffmas import Agent, MultiAgentSystem, Segment, Trace
from diffmas.agents.card import contents
from diffmas.agents.scores import attention_by_head, attention_by_layer
from diffmas.evaluation.look.watch import Watch
from diffmas.models.forward import forward
from diffmas.models.patch import patch_of
from diffmas.trace import views
from diffmas.trace.attention_mass import AttentionMass
from diffmas.trace.layer_work import LayerWork
from diffmas.trace.views import rows_of, seen_in

SHAPES = {
    "one": [*FIRST, solver(of("a", heads=[0]), of("b", every=2, heads=[1]))],
    "other layers": [*FIRST, solver(of("a", layers=[0, 2], heads=[1]), "b")],
    "layer by layer": [*FIRST, solver(of("a", layers=[2, 0], heads=[[0], [0, 1]]), of("b", rows=2, layers=[1], heads=[1]))],
    "in turns": [
        FIRST[0], agent("b", 3, [of("a", heads=[1])]),
        agent("c", 2, [of("a", layers=[0, 2], heads=[[0], [1]]), of("b", rows=2)]),
        solver(of("c", "keep", heads=[0]), of("b", "reindex", layers=[0, 1]), of("a", kind="latent", heads=[1]), max_rows=14),
    ],
    "measured": [*FIRST, solver(of("a", rows=2, by="attention", heads=[0]), of("b", rows=2, by="similarity", layers=[1]))],
    "passes": [agent("a", 4, [], passes=2), agent("b", 4, [of("a", heads=[1])], passes=2), solver("a", of("b", heads=[0]))],
}  # fmt: skip


@pytest.mark.parametrize("shape, options", [(x, LATENT) for x in SHAPES] + [("one", {}), ("in turns", REINDEX)], ids=str)
def test_loss_and_gradients_equal_the_loop(shape, options):
    s = exact(system(agents=SHAPES[shape], **options))
    out = check_loss(s)
    told = str(out.trace.segments)
    assert "heads=(" in told or shape == "passes"


@pytest.mark.parametrize("heads", [[0, 2], [3], [1, 2], [0, 1, 2, 3]], ids=str)
def test_heads_that_are_no_neighbours(heads):
    """Each run of heads that see the same is a call."""
    model = with_lora(exact_norms(tiny("qwen3", torch.float64, patch=False, num_attention_heads=8, num_key_value_heads=4)))
    s = MultiAgentSystem(model, tokenizer(), [*FIRST, solver(of("a", heads=heads), of("b", heads=[0]))])
    s.realign.double()
    check_loss(exact(s))


@pytest.mark.parametrize("shape", ["one", "in turns"])
def test_generated_tokens(shape):
    check_greedy_tokens(system(agents=SHAPES[shape], **LATENT), Choosing)


def test_ragged_batches_equal_single_runs():
    check_single_runs(system(agents=ragged(SHAPES["in turns"]), **LATENT, no_latents="skip", sinks=1), RAGGED)


# ---- ways through the layers -----------------------------------------------------------------------------------------


def test_the_cpus_kernels_take_slices_of_pools():
    """In float32; latent steps and decoding do not go the way of few rows, whose op takes one view for all heads."""
    want = step(system(agents=SHAPES["in turns"]))
    got = step(system(agents=SHAPES["in turns"], dtype=torch.float32))
    assert_close({name: x.double() for name, x in got.items()}, want, 1e-3)


def step(s, questions=QUESTIONS, answers=ANSWERS, **options):
    out = s(questions, answers, **options)
    out.loss.backward()
    return {"loss": out.loss.detach(), **gradients(s)}


def test_compiled_layers():
    s = system(agents=SHAPES["in turns"])
    want = step(s)
    torch._dynamo.reset()
    for layer in body(s.model).layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    assert_close(step(s), want, TIGHT)
    torch._dynamo.reset()


def test_checkpointed_layers():
    s = system(agents=SHAPES["other layers"]).train()
    want = step(s)
    s.model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_close(step(s), want, TIGHT)


def test_rows_that_several_sequences_share(monkeypatch):
    """Are read at once by the heads that see them."""
    s, parts = system(agents=SHAPES["one"]), []
    want = step(s, QUESTIONS[:1] * 3, ANSWERS, share=True)
    seen = LayerWork._parts
    monkeypatch.setattr(LayerWork, "_parts", lambda *args: parts.append(seen(*args)) or parts[-1])
    monkeypatch.setattr(views, "SAVED_ROWS", 1)
    assert_close(step(s, QUESTIONS[:1] * 3, ANSWERS, share=True), want, TIGHT)
    assert any(len(found) == 2 and all(part.views["shared"] for part in found) for found in parts)


def read(s, trace):
    out = s(QUESTIONS, ANSWERS, trace=trace)
    out.loss.backward()
    return {"logits": out.logits.detach(), **gradients(s)}


def test_quantised_rows():
    """Heads see those that they would see of full ones."""
    s = system(agents=SHAPES["layer by layer"])
    with torch.no_grad():
        small = s.communicate(s.fields_of(QUESTIONS)).quantize()
    segments, done = [[] for _ in QUESTIONS], 0
    for x in small.segments:
        segments[x.sequence].append(x._replace(start=done))
        done += x.length
    kv = [tuple(map(torch.cat, zip(*(small.keys_values(i, b) for b in range(3))))) for i in range(len(small))]
    want = read(s, Trace.of_rows(s.model, segments, small.next_positions, kv))
    assert_close(read(s, small), want, TIGHT)
    everywhere = Trace.of_rows(s.model, [[x._replace(heads=None) for x in row] for row in segments], small.next_positions, kv)
    assert (read(s, everywhere)["logits"] - want["logits"]).abs().max() > 1e-3


def test_copies_of_a_trace(tmp_path):
    s = system(agents=SHAPES["layer by layer"])
    with torch.no_grad():
        trace = s.communicate(s.fields_of(QUESTIONS))
    assert {(x.layers, x.heads) for x in trace.segments} == {(None, None), ((0, 2), ((0, 1), (0,))), ((1,), (1,))}
    trace.save(tmp_path / "trace")
    loaded, want = Trace.load(tmp_path / "trace", s.model), s(QUESTIONS, ANSWERS).logits
    assert [(x.layers, x.heads) for x in loaded.segments] == [(x.layers, x.heads) for x in trace.segments]
    for other in (loaded, trace.repack(), trace.fork(1)[0]):
        assert_close(s(QUESTIONS, ANSWERS, trace=other).logits, want, 1e-9)


def test_rows_on_the_host():
    found = []
    for offload in (None, "cpu"):
        s = system(agents=SHAPES["in turns"], dtype=torch.float32)
        asked = s.fields_of(QUESTIONS)
        found.append(step(s, trace=s.communicate(asked, Trace(s.model, 3, offload=offload))))
    assert all(torch.equal(found[1][name], x) for name, x in found[0].items())


# ---- what is told of them --------------------------------------------------------------------------------------------


def test_sizes():
    """Of the heads that see them: of 3 layers with 2 heads."""
    s = system(agents=SHAPES["layer by layer"])
    with torch.no_grad():
        trace = s.communicate(s.fields_of(QUESTIONS))
    sizes, head = trace.sizes, 2 * 8 * 8  # K and V of 8 float64
    fixed, rest = len(QUESTIONS) * s.sinks, sizes["a"].rows - len(QUESTIONS) * s.sinks
    assert sizes["a"].bytes == head * (3 * 2 * fixed + 3 * rest)
    assert sizes["b"].rows == fixed + 6 and sizes["b"].bytes == head * (3 * 2 * fixed + 6)


def test_attention_by_head():
    s = exact(system(agents=SHAPES["one"]))
    want = torch.zeros(3, 2, dtype=torch.float64)
    for question in QUESTIONS:
        loop = Choosing(s, question)
        layout, weights = loop.attentions(2, heads=True)
        shares = torch.stack([x[:, s.sinks : len(layout)].sum(1) for x in weights])
        want += shares.unflatten(1, (2, -1)).mean(2) / len(QUESTIONS)
    got = torch.tensor(attention_by_head(s, QUESTIONS), dtype=torch.float64)
    assert_close(got, want, 1e-6)  # eager softmax is in float32
    assert_close(torch.tensor(attention_by_layer(s, QUESTIONS)).double(), want.mean(1), 1e-6)
    assert (got[:, 0] - got[:, 1]).abs().min() > 1e-3


def test_what_a_page_shows():
    """Rows that some heads do not see get nothing from these."""
    s = system(agents=SHAPES["layer by layer"]).eval()
    with Watch(s) as watch, torch.no_grad():
        trace = s.communicate(s.fields_of(QUESTIONS[:1]))
        s(QUESTIONS[:1], trace=trace.fork(1)[0])
    last, rows = watch.passes[-1], rows_of(trace.segments).tolist()
    n, read = len(last.ids), rows_of(last.segments)
    with torch.no_grad():
        forward_pass = trace.plan([n], "prompt")
        mass = AttentionMass(forward_pass)
        forward(patch_of(s.model), trace, forward_pass, input_ids=last.ids[None])
    for layer, (row,) in mass.by_layer.items():
        seen = read[last.sees[layer]].tolist()
        found = dict(zip(seen, last.weights[layer].mean(0).tolist()))
        assert seen[0] == rows[0] and seen[-n:] == read[-n:].tolist()
        assert [found.get(slot, 0.0) for slot in rows] == pytest.approx(row[: len(rows)].tolist(), abs=1e-9)
        assert last.weights[layer].sum(1).tolist() == pytest.approx([1.0] * n)


# ---- descriptions ----------------------------------------------------------------------------------------------------


def test_heads_of_a_view():
    view = [Segment(0, "a", "latent", 0, 1, 0), *(Segment(0, "a", "latent", i, 1, i, 0, *x) for i, x in enumerate(
        [((1, 2), None), (None, (1,)), ((1,), (0,)), ((0, 2), ((0,), (0, 1)))], 1))]  # fmt: skip
    seen = {(layer, head): [x.start for x in seen_in([view], layer, head)[0]] for layer in range(3) for head in range(2)}
    assert seen == {
        (0, 0): [0, 4],
        (0, 1): [0, 2],
        (1, 0): [0, 1, 3],
        (1, 1): [0, 1, 2],
        (2, 0): [0, 1, 4],
        (2, 1): [0, 1, 2, 4],
    }
    assert view[1].extended_by(view[2]._replace(layers=(1, 2))) is None  # but for the heads, it goes on


def test_a_selection_is_saved_and_loaded(tmp_path):
    s = system(agents=SHAPES["layer by layer"], dtype=torch.float32)
    s.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "agents.json").read_text())
    assert described["agents"][2]["reads"][0]["select"] == {"layers": [0, 2], "heads": [[0, 1], [0]]}
    assert "a (layers [0, 2], heads [[0, 1], [0]])" in contents(described, "team")[1]
    assert MultiAgentSystem.from_pretrained(tmp_path, tiny("qwen3", patch=False), tokenizer()).agents == s.agents


@pytest.mark.parametrize(
    "select, message",
    [
        ({"heads": []}, r"heads: expected numbers of K/V heads, from 0, at least one and each once, got \[\]"),
        ({"heads": 0}, "heads: expected numbers of K/V heads, .* got 0"),
        ({"heads": [0, 0]}, r"heads: expected numbers of K/V heads, .* got \[0, 0\]"),
        ({"heads": [-1]}, r"heads: expected numbers of K/V heads, .* got \[-1\]"),
        ({"heads": [True]}, r"heads: expected numbers of K/V heads, .* got \[True\]"),
        ({"heads": [0, [1]]}, r"heads: expected numbers of K/V heads, .* got \[0, \[1\]\]"),
        ({"heads": [[0]]}, r"heads: expected a list of numbers, or one for each of 0 layers, got \[\[0\]\]"),
        ({"layers": [0, 1], "heads": [[0]]}, "heads: expected a list of numbers, or one for each of 2 layers"),
        ({"layers": [0, 1], "heads": [[0], 1]}, "heads: expected numbers of K/V heads, .* got 1"),
        ({"layers": [0, 1], "heads": [[0], []]}, r"heads: expected numbers of K/V heads, .* got \[\]"),
    ],
)
def test_heads_that_are_none(select, message):
    with pytest.raises(ValueError, match=f"agent 'b': reads: a: select: {message}"):
        Agent("b", "x", reads=[{"agent": "a", "select": select}])


@pytest.mark.parametrize("select", [dict(heads=[0, 2]), dict(layers=[0, 1], heads=[[2], [0]])], ids=str)
def test_heads_that_the_model_has_not(select):
    message = "agent 'solver': reads: a: select: heads: expected some of the model's, 0 to 1, got 2"
    with pytest.raises(ValueError, match=message):
        system(agents=[FIRST[0], solver(of("a", **select))])

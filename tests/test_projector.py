"""Rows that cross from one model's trace to another's, against a plain loop with transformers' cache, in float64."""

import pytest
import torch
from models import assert_close, body, build, make_config, pad, tiny, tokens
from two_models import forward, pair, projected, think, turn

import diffmas
from diffmas import Trace
from diffmas.agents.projector import Fuser, Projector, layer_map, row_shapes
from diffmas.trace import Segment

TIGHT = 1e-9
PROMPTS, STEPS, ENDS = tokens(5, 3, seed=2), 2, tokens(4, 6, seed=4)


@pytest.fixture(scope="module")
def models():
    sharer, receiver = pair()
    for model in (sharer, receiver):
        diffmas.patch_model(model)
    return sharer, receiver


def random(module, seed=11):
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return module


def crossed(projector, source, receiver, target=None):
    """A trace of the receiver with the rows of another model's, sequence by sequence."""
    target = Trace(receiver, source.batch_size) if target is None else target
    positions = torch.cat([source.positions(b) for b in range(source.batch_size)])
    segments, at = [], 0
    for b, n in enumerate(source.lengths):
        segments.append([Segment(b, "sharer", "latent", at, n, 0)])
        at += n
    return target.extended(segments, projector(source.packed_rows(), positions, positions))


def thought(sharer, prompts=PROMPTS, trace=None):
    """A trace of prompts and latent steps."""
    trace = Trace(sharer, len(prompts)) if trace is None else trace
    ids, mask = pad(list(prompts))
    h = body(sharer)(input_ids=ids, attention_mask=mask, past_key_values=trace).last_hidden_state[:, -1:]
    for _ in range(STEPS):
        h = body(sharer)(inputs_embeds=h, past_key_values=trace).last_hidden_state[:, -1:]
    return trace


def loss_of(logits):
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    return (logits.log_softmax(-1) * weights).sum()


def read_loss(receiver, trace):
    ids, mask = pad(ENDS)
    logits = receiver(input_ids=ids, attention_mask=mask, past_key_values=trace).logits
    return sum(loss_of(x[m.bool()]) for x, m in zip(logits, mask))


def plain_loss(projector, sharer, receiver):
    total = 0.0
    for prompt, end in zip(PROMPTS, ENDS):
        kv = projected(projector, sharer, receiver, think(sharer, prompt.tolist(), STEPS))
        x = receiver.get_input_embeddings()(end)
        total = total + loss_of(forward(receiver, receiver, kv, x, len(prompt) + STEPS)[0].logits[0])
    return total


def all_gradients(*modules):
    found = {}
    for i, module in enumerate(modules):
        found |= {f"{i}.{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
        module.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("options", [{}, {"hidden": 7}, {"layers": "depth"}, {"layers": [1, 0, 1]}], ids=str)
def test_loss_and_every_gradient_equal_the_loop(models, options):
    sharer, receiver = models
    projector = random(Projector(sharer, receiver, **options))
    got = read_loss(receiver, crossed(projector, thought(sharer), receiver))
    got.backward()
    grads = all_gradients(projector, sharer, receiver)
    want = plain_loss(projector, sharer, receiver)
    want.backward()
    assert_close(got, want, TIGHT)
    assert_close(grads, all_gradients(projector, sharer, receiver), TIGHT)
    assert sum(name.startswith("1.") for name in grads) and sum(name.startswith("2.") for name in grads)


def test_a_ragged_batch_equals_single_runs(models):
    sharer, receiver = models
    projector = random(Projector(sharer, receiver))
    both = crossed(projector, thought(sharer), receiver)
    for b in range(2):
        one = crossed(projector, thought(sharer, PROMPTS[b : b + 1]), receiver)
        assert both.lengths[b] == one.lengths[0] and both.next_positions[b] == one.next_positions[0]
        for layer in range(len(both)):
            for x, y in zip(both.keys_values(layer, b), one.keys_values(layer, 0)):
                assert_close(x, y, TIGHT)


def test_rows_have_gradients_from_all_their_readers(models):
    """The sharer's own next tokens, and two readers of the receiver's, of which one has rows of its own before."""
    sharer, receiver = models
    projector, prompt, end = random(Projector(sharer, receiver)), PROMPTS[0], ENDS[0]
    n, own = len(prompt) + STEPS, torch.tensor([7, 8])
    source, before = thought(sharer, [prompt]), Trace(receiver)
    receiver(input_ids=own[None], past_key_values=before)
    first, second = crossed(projector, source, receiver), crossed(projector, source, receiver, before)
    readers = (sharer, source), (receiver, first), (receiver, second)
    got = sum(loss_of(model(input_ids=end[None], past_key_values=trace).logits[0]) for model, trace in readers)
    got.backward()
    grads = all_gradients(projector, sharer, receiver)

    kv = think(sharer, prompt.tolist(), STEPS)
    made = projected(projector, sharer, receiver, kv)
    behind = [tuple(torch.cat(x, 2) for x in zip(*layer)) for layer in zip(think(receiver, own.tolist()), made)]
    readers = (sharer, kv), (receiver, made), (receiver, behind)
    x = lambda model: model.get_input_embeddings()(end)  # noqa: E731
    want = sum(loss_of(forward(model, model, kv, x(model), n)[0].logits[0]) for model, kv in readers)
    want.backward()
    assert_close(got, want, TIGHT)
    assert_close(grads, all_gradients(projector, sharer, receiver), TIGHT)


@pytest.mark.parametrize("frozen", ["sharer", "receiver", "both"])
def test_frozen_models(frozen):
    """A layer below which nothing is trained leaves rows from elsewhere their gradient all the same."""
    sharer, receiver = (diffmas.patch_model(model) for model in pair(lora=False))
    for name, model in (("sharer", sharer), ("receiver", receiver)):
        model.requires_grad_(frozen not in (name, "both"))
    projector = random(Projector(sharer, receiver))
    read_loss(receiver, crossed(projector, thought(sharer), receiver)).backward()
    grads = all_gradients(projector, sharer, receiver)
    plain_loss(projector, sharer, receiver).backward()
    assert_close(grads, all_gradients(projector, sharer, receiver), TIGHT)
    assert {name[0] for name in grads} == {"sharer": {"0", "2"}, "receiver": {"0", "1"}, "both": {"0"}}[frozen]


def test_rows_on_the_host(models):
    sharer, receiver = models
    projector, grads = random(Projector(sharer, receiver)), []
    for offload in (None, "cpu"):
        source = thought(sharer, trace=Trace(sharer, len(PROMPTS), offload=offload))
        target = crossed(projector, source, receiver, Trace(receiver, len(PROMPTS), offload=offload))
        read_loss(receiver, target).backward()
        grads.append(all_gradients(projector, sharer, receiver))
    assert_close(grads[1], grads[0], TIGHT)


def test_rows_stay_until_backward(models):
    """Nobody else gets the rows that a graph needs, though no trace sees them any more."""
    sharer, receiver = models
    projector, losses, grads = random(Projector(sharer, receiver)), [], []
    for busy in (False, True):
        source, empty = thought(sharer), Trace(receiver, len(PROMPTS))
        target = crossed(projector, source, receiver, empty)
        loss = read_loss(receiver, target)
        if busy:
            source.reset()
            del target
            thought(sharer, [torch.cat([x] * 4) for x in PROMPTS], source)
            with torch.no_grad():
                receiver(input_ids=pad(ENDS)[0].repeat(1, 4), past_key_values=empty)
        loss.backward()
        losses.append(loss)
        grads.append(all_gradients(projector, sharer, receiver))
    assert_close(losses[1], losses[0], TIGHT)
    assert_close(grads[1], grads[0], TIGHT)


def test_a_constant_source_has_no_gradient(models):
    sharer, receiver = models
    projector = random(Projector(sharer, receiver))
    read_loss(receiver, crossed(projector, thought(sharer).detach(), receiver)).backward()
    assert {name[0] for name in all_gradients(projector, sharer, receiver)} == {"0", "2"}


def test_compiled_kernels_in_float32():
    """With the backend that "auto" picks, against the loop in float64."""
    grads = []
    for dtype in (torch.float64, torch.float32):
        sharer, receiver = (diffmas.patch_model(model) for model in pair(dtype=dtype))
        projector = random(Projector(sharer, receiver)).to(dtype)
        read_loss(receiver, crossed(projector, thought(sharer), receiver)).backward()
        grads.append(all_gradients(projector, sharer, receiver))
    assert_close({name: x.double() for name, x in grads[1].items()}, grads[0], 1e-3)


# ---- layer maps, shapes, refusals ------------------------------------------------------------------------------------


def test_layer_maps():
    assert layer_map("terminal", 2, 4, gaps=True) == [None, None, 0, 1]
    assert layer_map("terminal", 2, 4, gaps=False) == [0, 0, 0, 1]
    assert layer_map("terminal", 4, 2, gaps=False) == [2, 3]
    assert layer_map("depth", 3, 5, gaps=False) == [0, 0, 1, 2, 2]
    assert layer_map("depth", 5, 1, gaps=False) == [0]
    assert layer_map([1, None], 2, 2, gaps=True) == [1, None]


@pytest.mark.parametrize(
    "layers, gaps", [([0], True), ([0, 2], True), ([0, -1], True), ([0, True], True), ([0, None], False), ([None, None], True),
                     ("first", True), (None, False), ([0, "1"], True)],
)  # fmt: skip
def test_layer_maps_that_do_not_fit(layers, gaps):
    with pytest.raises(ValueError, match="layers: expected 'terminal', 'depth' or a layer"):
        layer_map(layers, 2, 2, gaps)


def test_row_shapes_are_those_of_the_rows(models):
    assert [row_shapes(model) for model in models] == [[(1, 8)] * 2, [(2, 10)] * 3]
    state = torch.get_rng_state()
    row_shapes(models[0])
    assert torch.equal(state, torch.get_rng_state())


def test_layers_that_do_not_turn_keys():
    """smollm3's second layer has no RoPE: the map gets its keys as they are, and they stay as the map has made them."""
    models = [tiny("smollm3", seed=seed) for seed in (0, 1)]
    projector, source = random(Projector(*models, layers=[0, 1, 1])), thought(models[0])
    rows, positions = source.packed_rows(), torch.cat([source.positions(b) for b in range(2)])
    made = projector(rows, positions, positions)
    of = lambda i, k: projector.keys[i](k.flatten(1)).view(-1, 2, 8)  # noqa: E731
    assert_close(made[1][0], of(1, rows[1][0]), TIGHT)
    turned = turn(of(2, rows[1][0]).transpose(0, 1)[None], positions, models[1])[0].transpose(0, 1)
    assert_close(made[2][0], turned, 1e-6)


def test_what_does_not_fit_is_refused(models):
    sharer, receiver = models
    with pytest.raises(ValueError, match="expected a patched model, got a plain"):
        Projector(build(make_config("qwen2")), receiver)
    with pytest.raises(ValueError, match=r"layer 0: cannot move keys: how it rotates them \(unknown\)"):
        Projector(tiny("gpt2"), receiver)
    with pytest.raises(ValueError, match="hidden: expected an integer >= 1 or None, got 0"):
        Projector(sharer, receiver, hidden=0)
    with pytest.raises(ValueError, match="depth: expected an integer >= 1, got 0"):
        Fuser(sharer, receiver, depth=0)
    projector = Projector(sharer, receiver)
    with pytest.raises(ValueError, match="projector: expected one that was made for this receiver"):
        projector.check(sharer, sharer)
    with pytest.raises(ValueError, match="packed_rows: expected a trace that holds tokens"):
        Trace(sharer).packed_rows()
    trace, rows = Trace(receiver), thought(sharer, PROMPTS[:1]).packed_rows()
    with pytest.raises(ValueError, match="kv: expected K and V of 3 layers, got 2"):
        trace.extended([[]], rows)
    with pytest.raises(ValueError, match="segments: expected a list for each of 1 sequences, of 7 rows"):
        trace.extended([[Segment(0, None, "latent", 5, 3, 0)]], rows)
    receiver(input_ids=PROMPTS[0][None], past_key_values=trace)
    before = trace.rows
    with pytest.raises(ValueError, match=r"kv: expected K and V \[7, Hkv, D\] of layer 0 as it has them, got \[7, 1, 8\]"):
        trace.extended([[]], [*rows, rows[0]])
    assert trace.rows == before

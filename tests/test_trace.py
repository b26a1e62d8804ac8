"""A trace against whole contexts that are recomputed without any cache, and calls that fail."""

import inspect

import pytest
import torch
import transformers
from models import (
    SOME,
    assert_close,
    body,
    embed,
    episode,
    gradients,
    last_hidden,
    latent_steps,
    loss_of,
    monolithic,
    pad,
    prefill,
    read,
    tiny,
    tokens,
    whole,
)  # fmt: skip

import diffmas

T = 3


# ---- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME)
def test_handoff_equals_one_context(family):
    model = tiny(family)
    ids = tokens(13)[0]
    trace = diffmas.Trace(model, capacity=4)  # and grows
    cuts = [0, 5, 6, 12, 13]
    outs = [model(input_ids=ids[None, a:b], past_key_values=trace).logits[0] for a, b in zip(cuts, cuts[1:])]
    assert_close(torch.cat(outs), whole(model, ids).logits[0])
    assert trace.lengths == [13]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", SOME)
def test_ragged_batch_equals_single_runs(family, side):
    model = tiny(family)
    first, second = tokens(7, 1, 4), tokens(2, 5, 1, seed=2)
    out, mask, trace = episode(model, first, second, side)
    assert trace.lengths == [7 + T + 2, 1 + T + 5, 4 + T + 1]
    want = monolithic(model, first, second)
    for b in range(3):
        assert_close(out.logits[b][mask[b].bool()], want[b])
    sum(loss_of(out.logits[b][mask[b].bool()]) for b in range(3)).backward()
    got = gradients(model)
    sum(loss_of(w) for w in want).backward()
    assert_close(got, gradients(model))


def test_the_argument_of_newer_transformers():
    """`cache=` in the place of `past_key_values=`, in forward and generate."""
    model = tiny("qwen3")
    if "cache" not in inspect.signature(type(model).forward).parameters:
        pytest.skip("this transformers calls it past_key_values")
    ids, traces = tokens(6)[0][None], [diffmas.Trace(model) for _ in range(2)]
    assert torch.equal(model(ids, cache=traces[0]).logits, model(ids, past_key_values=traces[1]).logits)
    options = dict(do_sample=False, max_new_tokens=3)
    got, want = (model.generate(ids, **{name: t}, **options) for name, t in zip(("cache", "past_key_values"), traces))
    assert torch.equal(got, want) and traces[0].lengths == traces[1].lengths
    with pytest.raises(ValueError, match="^cache: expected a trace of this model"):
        tiny("qwen3", seed=1)(ids, cache=traces[0])


def test_hidden_states_of_a_ragged_batch():
    model = tiny("qwen3")
    first, second = tokens(3, 6), tokens(4, 2, seed=2)
    trace = diffmas.Trace(model, batch_size=2)
    model(*pad(first), past_key_values=trace)
    ids, mask = pad(second, "right")
    out = model(ids, mask, past_key_values=trace, output_hidden_states=True)
    assert out.past_key_values is trace and len(out.hidden_states) == 4
    for b in range(2):
        want = whole(model, torch.cat((first[b], second[b])))
        for got, expected in zip(out.hidden_states, want.hidden_states):
            assert_close(got[b][mask[b].bool()], expected[0, len(first[b]) :])
            assert not got[b][~mask[b].bool()].any()


def test_rows_without_new_tokens():
    model = tiny("llama")
    first, second, third = tokens(3, 0, 2), tokens(0, 4, 0, seed=2), tokens(1, 1, 1, seed=3)
    trace = diffmas.Trace(model, batch_size=3)
    for rows in (first, second):
        model(*pad(rows), past_key_values=trace)
    assert trace.lengths == [3, 4, 2]
    logits = model(*pad(third), past_key_values=trace).logits
    for b in range(3):
        assert_close(logits[b], whole(model, torch.cat((first[b], second[b], third[b]))).logits[0, -1:])


@pytest.mark.parametrize(
    "options", [dict(use_cache=False), dict(use_cache=True), dict(logits_to_keep=1), dict(return_dict=False)], ids=str
)
def test_forward_options(options):
    model = tiny("qwen3")
    ids = tokens(9)[0]
    trace = diffmas.Trace(model)
    model(ids[None, :5], past_key_values=trace, **options)
    out = model(ids[None, 5:], past_key_values=trace, **options)
    logits = out.logits if options.get("return_dict", True) else out[0]
    want = whole(model, ids).logits[:, 5:]
    assert_close(logits, want[:, -1:] if "logits_to_keep" in options else want)


def test_labels_give_the_loss_of_the_new_tokens():
    model = tiny("llama")
    first, second = tokens(3, 6), tokens(5, 2, seed=2)
    trace = diffmas.Trace(model, batch_size=2)
    model(*pad(first), past_key_values=trace)
    ids, mask = pad(second, "right")
    loss = model(ids, mask, labels=ids.masked_fill(mask == 0, -100), past_key_values=trace).loss
    logits = [whole(model, torch.cat(rows)).logits[0, -len(rows[1]) :] for rows in zip(first, second)]
    want = sum(torch.nn.functional.cross_entropy(x[:-1], y[1:], reduction="sum") for x, y in zip(logits, second))
    assert_close(loss, want / sum(len(y) - 1 for y in second))


def test_explicit_positions():
    model = tiny("qwen3")
    ids, positions = tokens(8)[0], [0, 1, 2, 9, 10, 30, 31, 40]
    trace = diffmas.Trace(model)
    model(ids[None, :5], position_ids=torch.tensor(positions[:5])[None], past_key_values=trace)
    assert trace.next_positions == [11] and trace.positions(0).tolist() == positions[:5]
    logits = model(ids[None, 5:], position_ids=torch.tensor(positions[5:])[None], past_key_values=trace).logits
    assert_close(logits, whole(model, ids, positions).logits[:, 5:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_explicit_positions_of_a_padded_batch(side):
    model = tiny("qwen3")
    rows, where = tokens(4, 2), [[3, 4, 8, 9], [20, 21]]
    ids, mask = pad(rows, side)
    positions, _ = pad([torch.tensor(p) for p in where], side, value=99)
    trace = diffmas.Trace(model, 2)
    logits = model(ids, mask, position_ids=positions, past_key_values=trace).logits
    assert trace.next_positions == [10, 22]
    for b in range(2):
        assert_close(logits[b][mask[b].bool()], whole(model, rows[b], where[b]).logits[0])


@pytest.mark.parametrize("mask_dtype", [torch.long, torch.bool, torch.float32])
def test_a_hole_in_the_mask_at_explicit_positions(mask_dtype):
    """What transformers hides from all others is left out; what is left stays where it was."""
    model, plain = tiny("qwen3"), tiny("qwen3", patch=False)
    first, second = tokens(5)[0], tokens(4, seed=2)[0]
    mask, at = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 1, 1]]).to(mask_dtype), torch.arange(5, 9)[None]
    trace, cache = diffmas.Trace(model), transformers.DynamicCache()
    model(first[None], past_key_values=trace)
    got = model(second[None], mask, position_ids=at, past_key_values=trace).logits[0]
    plain(first[None], past_key_values=cache)
    want = plain(second[None], mask.bool(), position_ids=at, past_key_values=cache).logits[0]
    assert_close(got[[0, 2, 3]], want[[0, 2, 3]])
    assert trace.positions(0).tolist() == [0, 1, 2, 3, 4, 5, 7, 8]


def test_a_mask_may_show_the_past_as_it_is():
    """Masks that grow along, padding of earlier turns included, or that say nothing of latent steps."""
    model = tiny("qwen3")
    first, second, third = tokens(3, 5), tokens(4, 2, seed=2), tokens(1, 3, seed=3)
    trace, mask = diffmas.Trace(model, 2), torch.zeros(2, 0, dtype=torch.long)
    for rows, side in ((first, "right"), (second, "left"), (third, "left")):
        ids, new = pad(rows, side)
        mask = torch.cat((mask, new), dim=1)
        logits = model(ids, mask, past_key_values=trace).logits
    assert trace.lengths == [8, 10]
    for b in range(2):
        n = len(third[b])
        want = whole(model, torch.cat((first[b], second[b], third[b]))).logits[0, -n:]
        assert_close(logits[b, -n:], want)
    latent_steps(model, trace, embed(model, torch.tensor([[3], [4]])), 1)
    model(third[0].expand(2, 1), torch.ones(2, 11, dtype=torch.long), past_key_values=trace)
    assert trace.lengths == [10, 12]


def test_a_row_of_padding_appends_nothing():
    model = tiny("qwen3")
    trace = prefill(model, *tokens(4, 2))
    ids, mask = pad(tokens(0, 3, seed=2))
    out = body(model)(ids, mask, past_key_values=trace)
    assert trace.lengths == [4, 5] and trace.next_positions == [4, 5]
    assert not out.last_hidden_state[0].any() and out.last_hidden_state[1].any()


def test_the_body_takes_positional_arguments():
    model = tiny("llama")
    rows = tokens(2, 5)
    ids, mask = pad(rows)
    trace = diffmas.Trace(model, batch_size=2)
    hidden = body(model)(ids, mask, None, trace).last_hidden_state
    assert trace.lengths == [2, 5]
    assert_close(hidden[0, -1], last_hidden(model, embed(model, rows[0]))[-1])


def test_segments_record_agent_kind_and_positions():
    model = tiny("qwen3")
    trace = diffmas.Trace(model, batch_size=2)
    trace.agent = "planner"
    h = body(model)(*pad(tokens(3, 1)), past_key_values=trace).last_hidden_state[:, -1:]
    latent_steps(model, trace, h, 2)
    rows = [(s.sequence, s.agent, s.kind, s.length, s.position) for s in trace.segments]
    assert rows == [
        (0, "planner", "prompt", 3, 0), (0, "planner", "latent", 2, 3),
        (1, "planner", "prompt", 1, 0), (1, "planner", "latent", 2, 1),
    ]  # fmt: skip


# ---- what a trace tells, and traces of another origin ----------------------------------------------------------------


def test_layers_can_be_looked_at():
    """As those of a plain cache, one sequence at a time; what is written to them is refused."""
    model, plain = tiny("qwen3"), tiny("qwen3", patch=False)
    rows = tokens(5, 3)
    trace = diffmas.Trace(model, 2)
    assert [(x.keys, x.is_initialized) for x in trace.layers] == [(None, False)] * 3
    prefill(model, *rows, trace=trace)
    caches = [transformers.DynamicCache() for _ in rows]
    for cache, row in zip(caches, rows):
        plain(row[None], past_key_values=cache)
    assert len(trace.layers) == 3
    for i, layer in enumerate(trace.layers):
        assert layer.keys.shape == (2, 2, 5, 8) and layer.get_seq_length() == 5 and not layer.keys[1, :, :2].any()
        for b, (cache, row) in enumerate(zip(caches, rows)):
            assert_close(layer.keys[b, :, 5 - len(row) :], cache.layers[i].keys[0])
            assert_close(layer.values[b, :, 5 - len(row) :], cache.layers[i].values[0])
        with pytest.raises(AttributeError):
            layer.keys = layer.values
    left, right = diffmas.Trace(model, 2).fork(2)
    joined = diffmas.Trace.join([prefill(model, *rows, trace=t) for t in (left, right)])
    with pytest.raises(ValueError, match="repack it first"):
        _ = joined.layers[0].keys
    moved = torch.cat([joined.repack().keys_values(0, b)[0] for b in range(2)])
    assert_close(joined.repack().layers[0].keys[0].transpose(0, 1), moved[:10])


def test_token_ids_go_with_the_rows(tmp_path):
    model = tiny("llama")
    (a,), (b,) = tokens(4), tokens(3, seed=2)
    left, right = diffmas.Trace(model).fork(2)
    with torch.no_grad():
        prefill(model, a, trace=left)
        prefill(model, b, trace=right)
        latent_steps(model, left, embed(model, a[:1])[None], 2)
        joined = diffmas.Trace.join([left, right])
        want = [*a.tolist(), -1, -1, *b.tolist()]
        joined.save(tmp_path / "trace")
        views = {
            "join": joined, "fork": joined.fork(1)[0], "select": joined.select([0, 0]), "repack": joined.repack(),
            "file": diffmas.Trace.load(tmp_path / "trace", model), "another origin": diffmas.Trace.join([joined.repack()]),
        }  # fmt: skip
        assert {name: t.token_ids(0).tolist() for name, t in views.items()} == dict.fromkeys(views, want)
        assert joined.keep("latent", sinks=1).token_ids(0).tolist() == [int(a[0]), -1, -1]
        alone = diffmas.Trace(model)
        adopted = diffmas.Trace.join([prefill(model, b, trace=alone), joined.detach()])
        assert adopted.token_ids(0).tolist() == [*b.tolist(), *want]
        for _ in range(100):  # and when rows are used again
            trace = left.fork(1)[0]
            model(inputs_embeds=embed(model, a)[None], past_key_values=trace)
            assert trace.token_ids(0).tolist() == [*want[:6], -1, -1, -1, -1]
            trace.drop_newest([4])
            model(b[None], past_key_values=trace)
            assert trace.token_ids(0).tolist() == want


@pytest.mark.parametrize("order", ["live first", "loaded first"])
def test_a_loaded_trace_joins_a_live_one(order, tmp_path):
    """Read as if both were forks of one trace, of which the loaded one is a constant."""
    model = tiny("qwen3")
    memory, own, new = tokens(5, 3), tokens(2, 4, seed=2), tokens(1, 3, seed=3)
    prefill(model, *memory).save(tmp_path / "memory")

    def joined(loaded, live):
        return diffmas.Trace.join([live, loaded] if order == "live first" else [loaded, live])

    def loss_on(trace):
        loss = sum(map(loss_of, read(model, trace, *new)))
        loss.backward()
        return loss.detach(), gradients(model)

    origin = diffmas.Trace(model, 2)
    first, second = origin.fork(2)
    want = loss_on(joined(prefill(model, *memory, trace=first).detach(), prefill(model, *own, trace=second)))
    live = prefill(model, *own)
    got = loss_on(joined(diffmas.Trace.load(tmp_path / "memory", model), live))
    assert_close(got[0], want[0])
    assert_close(got[1], want[1])
    assert live.lengths == [2, 4]

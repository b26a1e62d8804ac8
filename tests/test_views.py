"""Forks, joins, selections and other views of a trace, against contexts recomputed with explicit positions and masks."""

import copy
import itertools

import pytest
import torch
from models import assert_close, body, gradients, latent_steps, loss_of, masked, pad, prefill, read, tiny, tokens, whole

import diffmas
from diffmas.ops.reference import offset_tables, rotate


@pytest.fixture(params=["qwen3", "cohere"])
def model(request):
    return tiny(request.param)


# ---- forks -----------------------------------------------------------------------------------------------------------


def test_forks_share_and_go_on_separately(model):
    a, b, c, d = tokens(5, 3, 4, 2)
    trace = prefill(model, a)
    used = trace.rows
    left, right, third = trace.fork(3)
    assert trace.rows == used
    prefill(model, b, trace=left)
    prefill(model, c, trace=right)
    for fork, text in ((left, [a, b]), (right, [a, c]), (third, [a]), (trace, [a])):
        assert_close(read(model, fork, d)[0], whole(model, torch.cat((*text, d))).logits[0, -2:])


def test_forks_within_an_open_segment(model):
    """The parent, too, goes on in the rows that were reserved for it: only one branch can have them."""
    a, b, c = tokens(4, 6, 6, seed=3)
    trace = prefill(model, a[:1])
    for i in range(1, 4):
        prefill(model, a[i : i + 1], trace=trace)
    left, right = trace.fork(2)
    for i in range(6):
        prefill(model, b[i : i + 1], trace=left)
        prefill(model, c[i : i + 1], trace=right)
    for fork, text in ((left, b), (right, c)):
        assert_close(read(model, fork, a)[0], whole(model, torch.cat((a, text, a))).logits[0, -4:])


def test_a_deep_copy_is_a_fork(model):
    a, b = tokens(5, 3)
    trace = prefill(model, a)
    copied = copy.deepcopy(trace)
    prefill(model, b, trace=copied)
    assert (trace.lengths, copied.lengths) == ([5], [8]) and copied.spec is trace.spec


def test_select_reorders_and_repeats(model):
    rows, new = tokens(5, 2, 3), tokens(1, 1, 1, 1, seed=2)
    picked = prefill(model, *rows).select([2, 0, 0, 1])
    assert picked.lengths == [3, 5, 5, 2]
    got = read(model, picked, *new)
    for b, source in enumerate([2, 0, 0, 1]):
        assert_close(got[b], whole(model, torch.cat((rows[source], new[b]))).logits[0, -1:])


def test_reorder_repeat_and_crop_in_place(model):
    rows, new = tokens(5, 2), tokens(3, 3, 3, seed=2)
    trace = prefill(model, *rows)
    trace.reorder_cache(torch.tensor([1, 0]))
    assert trace.lengths == [2, 5]
    trace.batch_repeat_interleave(2)
    assert trace.lengths == [2, 2, 5, 5]
    trace.batch_select_indices(torch.tensor([0, 2, 3]))
    prefill(model, *new, trace=trace)
    trace.crop(-2)
    assert trace.lengths == [3, 6, 6]
    got = read(model, trace, *new)
    for b, source in enumerate([1, 0, 0]):
        assert_close(got[b], whole(model, torch.cat((rows[source], new[b][:1], new[b]))).logits[0, -3:])
    trace.crop(4)  # what transformers before 5.17 means by it: the longest keeps 4
    assert trace.lengths == [1, 4, 4] and trace.next_positions == [1, 4, 4]
    trace.crop(-2)
    assert trace.lengths == [0, 2, 2] and trace.next_positions == [0, 2, 2]
    trace.reset()
    assert trace.lengths == [0, 0, 0]
    assert_close(read(model, trace, *new)[1], whole(model, new[1]).logits[0])


# ---- joins -----------------------------------------------------------------------------------------------------------


def join_case(model, positions):
    """Two branches b, c after a common a, joined, then d -> (joined, parts, positions of a forward, hidden pairs)."""
    a, b, c, d = tokens(4, 3, 5, 2, seed=4)
    trace = prefill(model, a)
    left, right = trace.fork(2)
    prefill(model, b, trace=left)
    prefill(model, c, trace=right)
    return diffmas.Trace.join([left, right], positions), (a, b, c, d)


# Where a, b, c and d are read from.
READ = {
    "keep": ([0, 1, 2, 3], [4, 5, 6], [4, 5, 6, 7, 8], [9, 10]),
    "same_branch": ([0, 1, 2, 3], [4, 5, 6], [4, 5, 6, 7, 8], [9, 10]),
    "shift": ([0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11], [12, 13]),
    "reindex": ([0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11], [12, 13]),
}


@pytest.mark.parametrize("positions", list(READ))
def test_join(model, positions):
    """K and V do not change when positions move, for RoPE is relative: b and c saw a at the same distances, or not b."""
    joined, (*_, d) = join_case(model, positions)
    assert joined.lengths == [12] and joined.positions(0).tolist() == sum(READ[positions][:3], [])
    got = read(model, joined, d)[0]
    cache = {}
    for layer in range(3):
        k, v = joined.keys_values(layer, 0)
        offset = joined.positions(0) - torch.tensor(READ["keep"][0] + READ["keep"][1] + READ["keep"][2])
        interleaved = type(body(model).layers[0].self_attn).__name__.startswith("Cohere")
        tables = offset_tables(offset, body(model).rotary_emb.inv_freq, interleaved, k.dtype)
        cache[layer] = (rotate(k, *tables, interleaved), v)
    assert_close(got, from_cache(model, cache, d, READ[positions][3]))


def from_cache(model, cache, ids, positions):
    """Logits of new tokens over given K and V, through transformers' own cache."""
    from transformers import DynamicCache

    past = DynamicCache()
    for layer, (k, v) in cache.items():
        past.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], layer)
    n = past.get_seq_length()
    mask = torch.ones(1, n + len(ids), dtype=torch.long)
    return model(
        ids[None], attention_mask=mask, position_ids=torch.tensor(positions)[None], past_key_values=past, use_cache=True
    ).logits[0]  # fmt: skip


@pytest.mark.parametrize("positions", ["keep", "same_branch"])
def test_join_that_moves_nothing_equals_a_masked_context(model, positions):
    joined, parts = join_case(model, positions)
    want = masked(model, parts, sum(READ["keep"], []), [(slice(7, 12), slice(4, 7))])
    loss_of(read(model, joined, parts[3])[0]).backward()
    got = gradients(model)
    loss_of(want[12:]).backward()
    assert_close(read(model, joined, parts[3])[0], want[12:])
    assert_close(got, gradients(model))


@pytest.mark.parametrize("family", ["llama", "qwen3", "cohere", "smollm3"])
@pytest.mark.parametrize("positions", ["shift", "reindex"])
def test_shift_in_one_layer_equals_recomputing(family, positions):
    """With one layer, and queries of c that do not exist in the loss, K and V are functions of token and position alone."""
    changes = dict(no_rope_layers=[1]) if family == "smollm3" else {}
    model = tiny(family, num_hidden_layers=1, **changes)
    joined, parts = join_case(model, positions)
    where = sum(READ[positions], [])
    want = masked(model, parts, where, [])[12:]
    got = read(model, joined, parts[3])[0]
    assert_close(got, want)
    loss_of(got).backward()
    got = gradients(model)
    loss_of(want).backward()
    assert_close(got, gradients(model))


def test_joining_after_going_on_in_a_common_segment(model):
    """A branch that lengthens the last common segment still shares its beginning."""
    a, b, c, d = tokens(3, 2, 4, 2, seed=5)
    trace = prefill(model, a[:1])
    for i in (1, 2):
        prefill(model, a[i : i + 1], trace=trace)  # an extent with room to spare
    left, right = trace.fork(2)
    prefill(model, b, trace=left)
    prefill(model, c, trace=right)
    for order, parts in (([left, right], (b, c)), ([right, left], (c, b)), ([trace, left, right], (b, c))):
        joined = diffmas.Trace.join(order, "keep")
        assert joined.lengths == [9]
        n = len(parts[0])
        where = [0, 1, 2, *range(3, 3 + n), *range(3, 9 - n), 7, 8]
        want = masked(model, (a, *parts, d), where, [(slice(3 + n, 9), slice(3, 3 + n))])
        assert_close(read(model, joined, d)[0], want[9:])


def test_join_of_ragged_batches_of_independent_agents(model):
    """Agents that write independently fork an empty trace; a join of one sequence is not a join of another's rows."""
    first, second, new = tokens(3, 1), tokens(2, 4, seed=2), tokens(2, 1, seed=3)
    left, right = diffmas.Trace(model, 2).fork(2)
    prefill(model, *first, trace=left)
    prefill(model, *second, trace=right)
    got = read(model, diffmas.Trace.join([left, right], "keep"), *new)
    for b in range(2):
        n, m = len(first[b]), len(second[b])
        where = [*range(n), *range(m), *range(max(n, m), max(n, m) + len(new[b]))]
        want = masked(model, (first[b], second[b], new[b]), where, [(slice(n, n + m), slice(0, n))])
        assert_close(got[b], want[n + m :])


def test_join_made_without_gradients_detaches_nothing(model):
    joined, parts = join_case(model, "keep")
    loss_of(read(model, joined, parts[3])[0]).backward(retain_graph=True)
    want = gradients(model)
    with torch.no_grad():
        left, right = joined.fork(2)
        again = diffmas.Trace.join([left, right], "keep")
    loss_of(read(model, again, parts[3])[0]).backward()
    assert_close(gradients(model), want)


def test_a_row_is_not_joined_to_itself(model):
    """A sequence that reads a row twice would give it its gradient from two places at once."""
    trace = prefill(model, *tokens(4, 3))
    body(model)(inputs_embeds=torch.randn(2, 1, 32, dtype=torch.float64), past_key_values=trace)
    with pytest.raises(ValueError, match="share only what all of them begin with"):
        diffmas.Trace.join([trace, trace.keep("latent", sinks=0)])
    assert diffmas.Trace.join([trace, trace.fork(1)[0]], "keep").lengths == [5, 4]


def test_a_policy_for_each_trace(model):
    """Those that are given for all are what the list of them is; and each moves its own rows alone."""
    common, a, b, c = tokens(3, 4, 2, 5)
    trace = prefill(model, common)
    one, two, three = (prefill(model, x, trace=fork) for x, fork in zip((a, b, c), trace.fork(3)))
    for positions in ("keep", "shift", "same_branch"):
        want = diffmas.Trace.join([one, two, three], positions)
        got = diffmas.Trace.join([one, two, three], [positions] * 3)
        assert got.segments == want.segments and got.next_positions == want.next_positions
    gaps = one.keep("prompt", agent=None)
    mixed = diffmas.Trace.join([gaps, two, three], ["shift", "keep", "same_branch"])
    assert mixed.positions(0).tolist() == [0, 1, 2, *range(3, 7), *range(3, 5), *range(3, 8)] and mixed.next_positions == [8]
    last = diffmas.Trace.join([one, two, three], ["keep", "keep", "reindex"])
    assert last.positions(0).tolist() == [*range(7), 3, 4, *range(7, 12)] and last.next_positions == [12]


def test_traces_side_by_side(model):
    """Each sequence goes on as in a trace of its own, with the gradients of both."""
    parts = tokens(3, 5, 4, 2, 3, 2)
    losses, grads = [], []
    for together in (False, True):
        model.zero_grad()
        left, right = diffmas.Trace(model, 1).fork(2)
        prefill(model, parts[0], trace=left)
        prefill(model, parts[1], trace=right)
        if together:
            both = diffmas.Trace.stack([left, right])
            assert both.lengths == [3, 5] and both.batch_size == 2 and both.next_positions == [3, 5]
            out = read(model, both, parts[2], parts[3])
        else:
            out = [*read(model, left, parts[2]), *read(model, right, parts[3])]
        losses.append(loss_of(out[0]) + 2 * loss_of(out[1]))
        losses[-1].backward()
        grads.append(gradients(model))
    assert_close(losses[1], losses[0])
    assert_close(grads[1], grads[0])
    for traces in ([left, left.detach()], [left, diffmas.Trace(model, 1)], []):
        with pytest.raises(ValueError, match="traces: expected "):
            diffmas.Trace.stack(traces)


def test_bad_joins_are_refused(model):
    (a,) = tokens(3)
    trace, other = prefill(model, a), prefill(model, a)
    for traces, positions, message in (
        ([], "keep", "traces"), ([trace], "nowhere", "positions"),
        ([trace, other], "keep", r"different origin.*Trace\(model, batch_size\).fork"),
        ([trace, trace.select([0, 0])], "keep", "batch size"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            diffmas.Trace.join(traces, positions)


def test_keys_that_cannot_be_moved_are_refused():
    model = tiny("gpt2")
    joined, parts = join_case(model, "shift")
    with pytest.raises(ValueError, match="layer 0.*cannot move keys"):
        read(model, joined, parts[3])
    with pytest.raises(ValueError, match="cannot move keys"):
        joined.repack()


# ---- keep ------------------------------------------------------------------------------------------------------------


def agents(model):
    """Two agents, each a prompt and two latent steps, on two sequences."""
    trace = diffmas.Trace(model, 2)
    for agent, rows in (("planner", tokens(3, 1)), ("critic", tokens(2, 4, seed=2))):
        trace.agent = agent
        h = body(model)(*pad(rows), past_key_values=trace).last_hidden_state[:, -1:]
        latent_steps(model, trace, h, 2)
    return trace


@pytest.mark.parametrize("kind, agent", [("latent", None), (None, "critic"), ("prompt", "planner"), (None, None)])
@pytest.mark.parametrize("positions, sinks", [("keep", 0), ("keep", 2), ("reindex", 0), ("reindex", 4)])
def test_keep(model, kind, agent, positions, sinks):
    trace, new = agents(model), tokens(2, 2, seed=3)
    kept = trace.keep(kind=kind, agent=agent, positions=positions, sinks=sinks)
    assert sinks or all(kind in (None, s.kind) and agent in (None, s.agent) for s in kept.segments)
    got = read(model, kept, *new)
    for b in range(2):
        table = [s for s in trace.segments if s.sequence == b]
        rows = torch.cat([torch.full((s.length,), kind in (None, s.kind) and agent in (None, s.agent)) for s in table])
        rows[:sinks] = True
        stored = torch.arange(len(rows))[rows]
        at = torch.arange(len(stored)) if positions == "reindex" else stored
        assert kept.positions(b).tolist() == at.tolist()
        first = len(stored) if positions == "reindex" else len(rows)
        interleaved = type(body(model).layers[0].self_attn).__name__.startswith("Cohere")
        tables = offset_tables(at - stored, body(model).rotary_emb.inv_freq, interleaved, torch.float64)
        cache = {}
        for layer in range(3):
            k, v = trace.keys_values(layer, b)
            cache[layer] = (rotate(k[rows], *tables, interleaved), v[rows])
        assert_close(got[b], from_cache(model, cache, new[b], [first, first + 1]))


def test_first_tokens_stay(model):
    """By default, under their writer's name; they are counted once, and still the first after another selection."""
    trace = agents(model)  # prompts of 3 and 1, then 2 and 4 tokens, each with two latent steps

    def named(t):
        """Who wrote how many tokens of which kind, wherever their rows are."""
        written = [(s.sequence, s.agent, s.kind) for s in t.segments for _ in range(s.length)]
        return [(*who, len(list(tokens))) for who, tokens in itertools.groupby(written)]

    kept = trace.keep(kind="latent")
    assert named(kept) == [
        (0, "planner", "prompt", 3), (0, "planner", "latent", 2), (0, "critic", "latent", 2),
        (1, "planner", "prompt", 1), (1, "planner", "latent", 2), (1, "critic", "prompt", 1), (1, "critic", "latent", 2),
    ]  # fmt: skip
    assert named(kept.keep(kind="latent")) == named(kept)
    assert named(trace.keep(agent="critic", sinks=1)) == [
        (0, "planner", "prompt", 1), (0, "critic", "prompt", 2), (0, "critic", "latent", 2),
        (1, "planner", "prompt", 1), (1, "critic", "prompt", 4), (1, "critic", "latent", 2),
    ]  # fmt: skip
    assert named(trace.keep(sinks=0)) == named(trace.keep()) == named(trace)
    for sinks in (-1, 1.5):
        with pytest.raises(ValueError, match=f"sinks: expected an integer >= 0, got {sinks}"):
            trace.keep(sinks=sinks)


def test_keep_nothing(model):
    (new,) = tokens(3, seed=3)
    kept = prefill(model, *tokens(4)).keep(kind="latent", sinks=0)
    assert kept.lengths == [0] and kept.next_positions == [4]
    assert_close(read(model, kept, new)[0], whole(model, new, [4, 5, 6]).logits[0])
    with pytest.raises(ValueError, match="kind"):
        kept.keep(kind="thought")
    with pytest.raises(ValueError, match=r"expected one of \['critic', 'planner'\].*'plnner'"):
        agents(model).keep(agent="plnner")


# ---- any rows ---------------------------------------------------------------------------------------------------------


def test_reading_rows_of_other_sequences(model):
    """Sequence 0 reads what sequence 1 wrote, some of it moved; sequence 1 reads nothing."""
    trace, new = prefill(model, *tokens(5, 4)), tokens(2, 2, seed=3)
    ((own,), (other,)) = ([s for s in trace.segments if s.sequence == b] for b in range(2))
    view = trace.reading([[own._replace(length=2), other.skip(1)._replace(offset=1)], []])
    assert view.lengths == [5, 0] and view.next_positions == [5, 4] and [s.sequence for s in view.segments] == [0, 0]
    assert view.positions(0).tolist() == [0, 1, 2, 3, 4]
    got = read(model, view, *new)
    interleaved = type(body(model).layers[0].self_attn).__name__.startswith("Cohere")
    tables = offset_tables(torch.ones(3), body(model).rotary_emb.inv_freq, interleaved, torch.float64)
    cache = {}
    for layer in range(3):
        (k, v), (k1, v1) = (trace.keys_values(layer, b) for b in range(2))
        cache[layer] = (torch.cat((k[:2], rotate(k1[1:], *tables, interleaved))), torch.cat((v[:2], v1[1:])))
    assert_close(got[0], from_cache(model, cache, new[0], [5, 6]))
    assert_close(got[1], whole(model, new[1], [4, 5]).logits[0])
    prefill(model, *new, trace=view)
    assert trace.lengths == [5, 4] and trace.reading([[own], [other]]).lengths == [5, 4]
    for segments, message in (
        ([[own]], "a list for each of 2 sequences, got 1"),
        ([[own, own], []], r"segments\[0\]: expected every row once"),
        ([[], [own._replace(start=own.start + 100)]], r"segments\[1\]: expected rows that this trace sees"),
        ([[], [view.segments[-1]]], r"segments\[1\]: expected rows that this trace sees"),
    ):
        with pytest.raises(ValueError, match=message):
            trace.reading(segments)
    assert trace.reading([[], [view.segments[-1]]], view).lengths == [0, view.segments[-1].length]
    with pytest.raises(ValueError, match="beside: expected a trace with the same storage"):
        trace.reading([[], []], prefill(model, *new))


# ---- repack -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", list(READ))
def test_repack_changes_no_logit_and_no_gradient(model, positions):
    results = []
    for pack in (False, True):
        joined, parts = join_case(model, positions)
        if pack:
            where = joined.positions(0)
            joined = joined.repack()
            assert joined.positions(0).tolist() == where.tolist() and all(s.offset == 0 for s in joined.segments)
        logits = read(model, joined, parts[3])[0]
        loss_of(logits).backward()
        results.append((logits, gradients(model)))
    assert_close(results[1][0], results[0][0])
    assert_close(results[1][1], results[0][1])


def test_repack_of_partly_empty_and_empty_traces(model):
    rows, new = tokens(3, 0), tokens(2, 2, seed=2)
    trace = prefill(model, *rows).repack()
    got = read(model, trace, *new)
    for b in range(2):
        assert_close(got[b], whole(model, torch.cat((rows[b], new[b]))).logits[0, -2:])
    assert diffmas.Trace(model).repack().lengths == [0]

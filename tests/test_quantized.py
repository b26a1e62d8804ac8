"""Traces with quantised rows: attention is that over the numbers which the rows stand for, in forward and backward; what is
written on them learns as ever."""

import gc
import weakref

import numpy as np
import pytest
import torch
from models import (
    assert_close,
    body,
    error,
    gradients,
    latent_steps,
    loss_of,
    prefill,
    read,
    tiny,
    tokens,
    with_lora,
)
from safetensors import safe_open

import diffmas
from diffmas import Trace
from diffmas.ops import dequantize, quantize
from diffmas.trace.forward_pass import ForwardPass
from diffmas.trace.frozen import Frozen
from diffmas.trace.spec import LayerSpec, ModelSpec
from diffmas.trace.store import Hold, Store
from diffmas.trace.tables import Tables
from diffmas.trace.views import FROZEN, KVRange

BITS = ["int8", "fp8", "int4"]


@torch.no_grad()
def context(model, *lengths, **options):
    return prefill(model, *tokens(*(lengths or (9, 40, 5)), **options))


def dense(model, trace):
    """A trace of full rows with the numbers that the rows of `trace` stand for."""
    rows, done = [[] for _ in trace.lengths], 0
    for s in trace.segments:
        rows[s.sequence].append(s._replace(start=done))
        done += s.length
    kv = [[torch.cat(x) for x in zip(*(trace.keys_values(i, b) for b in range(trace.batch_size)))] for i in range(len(trace))]
    ids = torch.cat([trace.token_ids(b) for b in range(trace.batch_size)])
    return Trace.of_rows(model, rows, trace.next_positions, kv, ids)


def learned(model, trace, *rows):
    """Logits, and what a turn with latent steps on a trace teaches the weights."""
    trace = trace.fork(1)[0]
    ids = torch.cat(rows).view(len(rows), -1)
    h = body(model)(input_ids=ids, past_key_values=trace).last_hidden_state[:, -1:]
    latent_steps(model, trace, h, 3)
    logits = model(input_ids=ids, past_key_values=trace).logits
    loss_of(logits).backward()
    return logits.detach(), gradients(model)


# ---- attention of one layer, by hand -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_a_plain_loop(bits):
    """Two passes of ragged batches over quantised rows and each other's: dq, dk and dv of each, against torch's autograd over
    rows put together in float64."""
    g = torch.Generator().manual_seed(3)
    rand = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)
    (Hq, Hkv, D), R, inv_freq = (4, 2, 8), 30, torch.tensor([0.9, 0.2, 0.05, 0.01])
    k, v = rand(R, Hkv, D), rand(R, Hkv, D)
    layer = LayerSpec(0, "half")
    store = Store(1)
    store.allocate(40)
    store.freeze(Frozen.of(bits, [(k, v)], np.full(R, -1)), Hold(store))
    spec = ModelSpec([layer], "reference", inv_freq=lambda device: inv_freq)
    frozen = [[KVRange(2, 9, 0), KVRange(20, 5, 7)], [], [KVRange(0, 30, 0)]]
    lengths = [[3, 2, 0], [1, 1, 2]]
    slots = [[0, 1, 2, 10, 11], [3, 12, 20, 21]]
    seen = [[[(0, 3)], [(10, 2)], []], [[(0, 4)], [(10, 3)], [(20, 2)]]]
    inputs = [[rand(n, h, D).requires_grad_() for h in (Hq, Hkv, Hkv)] for n in (5, 4)]
    past, outputs = torch.zeros(0), []
    for p, (q, key, value) in enumerate(inputs):
        views = [[KVRange(*x, 0) for x in view] for view in seen[p]]
        forward_pass = ForwardPass(
            spec, store, lengths[p], np.arange(len(slots[p])), np.array(slots[p]), views, past, frozen=frozen
        )
        outputs.append(forward_pass.attend(layer, q, key, value, 0.4))
        forward_pass.end(outputs[-1])
        past = forward_pass.after
    weight = rand(9, Hq, D)
    leaves = [x for three in inputs for x in three]
    got = torch.autograd.grad((torch.cat(outputs) * weight).sum(), leaves)

    kq, vq = (dequantize(*quantize(x, bits), torch.float64) for x in (k, v))
    written = {s: (p, i) for p in (0, 1) for i, s in enumerate(slots[p])}
    plain, first = [], [0, 0]
    for p, (q, _, _) in enumerate(inputs):
        for b, n in enumerate(lengths[p]):
            for i in range(n):
                ks = [turned(kq[r.start + j], r.offset, inv_freq) for r in frozen[b] for j in range(r.length)]
                vs = [vq[r.start + j] for r in frozen[b] for j in range(r.length)]
                own = [s for start, length in seen[p][b] for s in range(start, start + length)]
                for s in own[: len(own) - n + i + 1]:
                    there, row = written[s]
                    ks.append(inputs[there][1][row])
                    vs.append(inputs[there][2][row])
                ks, vs = torch.stack(ks), torch.stack(vs)
                for h in range(Hq):
                    p_h = (ks[:, h // 2] @ q[first[p] + i, h] * 0.4).softmax(0)
                    plain.append(p_h @ vs[:, h // 2])
            first[p] += n
    plain = torch.stack(plain).view(9, Hq, D)
    want = torch.autograd.grad((plain * weight).sum(), leaves)
    torch.testing.assert_close(torch.cat(outputs), plain)
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y)


def turned(k, offset, inv_freq):
    cos, sin = (offset * inv_freq.double()).cos(), (offset * inv_freq.double()).sin()
    a, b = k.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def test_neighbours_that_see_the_same_rows_read_them_once():
    frozen = [[KVRange(0, 9, 0)], [KVRange(0, 9, 0)], [KVRange(0, 8, 0)], [KVRange(0, 9, 0)]]
    views = [[KVRange(i, 1, 0)] for i in range(4)]
    tables = Tables(torch.device("cpu"), [1, 2, 0, 1], np.arange(4), np.arange(4), [0] * 4, views, None, frozen)
    q_indptr, seg_indptr, _, length, *_ = tables.as_written["frozen"]
    assert q_indptr.tolist() == [0, 3, 3, 4] and seg_indptr.tolist() == [0, 1, 2, 3] and length.tolist() == [9, 8, 9]


# ---- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["qwen3", "cohere", "gpt_neox"])
def test_reads_what_the_rows_stand_for(family, bits):
    """Logits and gradients with latent steps (their run, whose older rows are constants), text, and ragged contexts."""
    model = tiny(family)
    small = context(model).quantize(bits)
    logits, grads = learned(model, small, *tokens(4, 4, 4, seed=5))
    want, want_grads = learned(model, dense(model, small), *tokens(4, 4, 4, seed=5))
    assert_close(logits, want)
    assert_close(grads, want_grads)
    full, _ = learned(model, context(model), *tokens(4, 4, 4, seed=5))
    assert error(logits, full) > 1e-4  # and it is not the trace that was there before


def test_a_batch_is_its_sequences_and_checkpointing_changes_nothing():
    model = with_lora(tiny("qwen3"))
    small, rows = context(model).quantize("int8"), tokens(4, 4, 4, seed=5)
    alone = [torch.cat(read(model, small.select([b]), rows[b])) for b in range(3)]
    assert_close(torch.cat(read(model, small, *rows)), torch.cat(alone))
    want, want_grads = learned(model, small, *rows)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    got, grads = learned(model, small, *rows)
    assert torch.equal(got, want) and grads.keys() == want_grads.keys() and grads
    for name in grads:
        assert torch.equal(grads[name], want_grads[name]), name


def test_forks_joins_and_views():
    """Branches on quantised rows, at position offsets; a sequence named twice; latents and sinks alone."""
    model = tiny("qwen3")
    small = context(model).quantize("int8")
    for make in (
        lambda t: Trace.join([prefill(model, *tokens(3, 2, 4, seed=s), trace=f) for s, f in zip((1, 2), t.fork(2))]),
        lambda t: _with_one_detached(model, *t.fork(2)),
        lambda t: t.select([1, 0, 1, 1]),
        lambda t: t.keep(positions="reindex", kind="latent", sinks=3),
        lambda t: Trace.stack(t.fork(2)),
    ):
        got, want = make(small), make(dense(model, small))
        assert got.lengths == want.lengths and got.next_positions == want.next_positions
        rows = tokens(*([3] * got.batch_size), seed=8)
        found = []
        for trace in (got, want):
            logits = torch.cat(read(model, trace, *rows))
            loss_of(logits).backward()
            found.append((logits, gradients(model)))
        assert_close(found[0][0], found[1][0])
        assert_close(found[0][1], found[1][1])


def _with_one_detached(model, left, right):
    """What the one learns from its reader, the other does not."""
    for seed, trace in enumerate((left, right)):
        prefill(model, *tokens(3, 2, 4, seed=seed), trace=trace)
    return Trace.join([left, right.detach()])


def test_generates_what_the_rows_stand_for():
    model = tiny("qwen3")
    small = context(model).quantize("int8")
    ids = torch.stack(tokens(3, 3, 3, seed=9))
    options = dict(max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
    got, want = (model.generate(ids, past_key_values=t, **options) for t in (small.fork(1)[0], dense(model, small)))
    assert torch.equal(got, want)


def test_a_trace_that_went_on_is_quantised_again():
    """Rows that are in 8 bits already are copied, not rounded twice, and shared rows are there once."""
    model = tiny("qwen3")
    small = context(model).quantize("fp8")
    with torch.no_grad():
        went_on = prefill(model, *tokens(3, 2, 6, seed=2), trace=small.fork(1)[0])
    again = Trace.stack(went_on.fork(2)).quantize("fp8")
    assert again._store.frozen.rows == 9 + 40 + 5 + 11 and again.rows == 0
    for b in range(6):
        n = small.lengths[b % 3]
        for old, new, mixed in zip(small.keys_values(1, b % 3), again.keys_values(1, b), went_on.keys_values(1, b % 3)):
            assert torch.equal(new[:n], old) and torch.equal(mixed[:n], old)
            assert torch.equal(new[n:], dequantize(*quantize(mixed[n:], "fp8"), new.dtype))
        assert torch.equal(again.token_ids(b), went_on.token_ids(b % 3)) and (again.token_ids(b) >= 0).all()


def test_bytes():
    model = tiny("qwen3", torch.bfloat16)
    trace = context(model)
    small, layers, rows = trace.quantize("int8"), 3, 54
    assert small.memory() == layers * rows * 2 * 2 * (8 + 4)  # K and V, two heads of 8 elements and a scale
    store = small._store
    with torch.no_grad():
        prefill(model, *tokens(1, 1, 1), trace=small)
    assert store.pools[0].rows < 54  # room for what is written, none for what was


def test_sizes():
    """Bytes of what is seen, by who wrote it: quantised rows as they are kept, others in 16 bits."""
    model = tiny("qwen3", torch.bfloat16)
    trace = context(model)
    row, small_row = 2 * 2 * 8 * 2, 2 * 2 * (8 + 4)  # K and V, two heads of 8 elements; and a scale
    small = trace.quantize("int8")
    assert trace.sizes == {None: (54, 3 * 54 * row)} and small.sizes == {None: (54, 3 * 54 * small_row)}
    assert small.sizes[None].bytes == small.memory()
    small.agent = "b"
    with torch.no_grad():
        prefill(model, *tokens(1, 1, 2), trace=small)
    assert small.sizes == {None: (54, 3 * 54 * small_row), "b": (4, 3 * 4 * row)}
    narrowed = small.reading([[s._replace(layers=(1, 2)) for s in row] for row in small._segments])
    assert narrowed.sizes == {None: (54, 2 * 54 * small_row), "b": (4, 2 * 4 * row)}
    small._store.pools[0] = None  # as where rows go to some layers alone
    assert narrowed.sizes["b"].bytes == 2 * 4 * row


def test_compiled_layers():
    model = tiny("qwen3", torch.float32)
    small = context(model).quantize("int8")
    rows = tokens(4, 4, 4, seed=5)
    want = torch.cat(read(model, small, *rows))
    want_grads = loss_of(want).backward() or gradients(model)
    for layer in body(model).layers:
        layer.compile(backend="aot_eager")
    got = torch.cat(read(model, small, *rows))
    loss_of(got).backward()
    assert_close(got, want)
    assert_close(gradients(model), want_grads, 1e-4)


# ---- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_files(tmp_path, bits):
    """Of quantised rows and rows that were written on them, in any order."""
    model = tiny("qwen3")
    with torch.no_grad():
        trace = prefill(model, *tokens(3, 2, 6, seed=2), trace=context(model).quantize(bits))
    a, b = trace.fork(2)
    with torch.no_grad():
        prefill(model, *tokens(1, 1, 1, seed=7), trace=b)
    for view in (trace, trace.select([2, 0]), Trace.join([a, b], "keep"), context(model).quantize(bits)):
        view.save(tmp_path / "t")
        loaded = Trace.load(tmp_path / "t", model)
        assert loaded.lengths == view.lengths and loaded.next_positions == view.next_positions
        assert loaded._store.frozen.bits == bits
        for i in range(len(view)):
            for n in range(view.batch_size):
                for x, y in zip(loaded.keys_values(i, n), view.keys_values(i, n)):
                    assert torch.equal(x, y)
                assert torch.equal(loaded.token_ids(n), view.token_ids(n))
        ids = tokens(*([2] * view.batch_size), seed=3)
        assert torch.equal(torch.cat(read(model, loaded, *ids)), torch.cat(read(model, view, *ids)))
    with safe_open(tmp_path / "t", "pt") as file:
        packed = file.get_tensor("1.quantized.k")
    assert packed.shape == (54, 2, 4 if bits == "int4" else 8) and packed.element_size() == 1


def test_a_context_in_another_dtype_than_its_readers(tmp_path):
    """Rows of a float32 forward, gone on under autocast: what is kept, saved and quantised again stays as it was written."""
    model = tiny("qwen3", torch.float32)
    small, ids = context(model).quantize("int8"), tokens(2, 2, 2, seed=3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trace = prefill(model, *tokens(2, 2, 2), trace=small.fork(1)[0])
        trace.save(tmp_path / "t")
        loaded = Trace.load(tmp_path / "t", model)
        for x, y in zip(trace.keys_values(0, 1), loaded.keys_values(0, 1)):
            assert x.dtype == torch.bfloat16 and torch.equal(x, y)
        want = torch.cat(read(model, trace.fork(1)[0], *ids))
        assert torch.equal(torch.cat(read(model, loaded, *ids)), want)
        again = trace.quantize("int8")
        assert error(torch.cat(read(model, again, *ids)).float(), want.float()) < 0.02
    for b in range(3):
        for new, old in zip(again.keys_values(2, b), small.keys_values(2, b)):
            assert torch.equal(new[: len(old)], old.to(torch.bfloat16))
    joined = Trace.join([context(model).quantize(), again])  # a trace of another dtype
    assert joined.lengths == [20, 82, 12] and joined.keys_values(0, 0)[0].dtype == torch.float32


def test_a_damaged_file_is_refused(tmp_path):
    model = tiny("qwen3")
    context(model).quantize("int8").save(tmp_path / "t")
    raw = bytearray((tmp_path / "t").read_bytes())
    raw[-3] ^= 1
    (tmp_path / "t").write_bytes(raw)
    with pytest.raises(ValueError, match="checksum"):
        Trace.load(tmp_path / "t", model)


def test_traces_of_another_origin_are_joined(tmp_path):
    model = tiny("qwen3")
    home, other = context(model).quantize("int8"), context(model, 3, 4, 5, seed=6).quantize("int8")
    other.save(tmp_path / "t")
    joined = Trace.join([home, Trace.load(tmp_path / "t", model)])
    assert joined._store is home._store and joined._store.frozen.rows == 54 + 12
    want = torch.cat(read(model, dense(model, joined), *tokens(2, 2, 2)))
    assert_close(torch.cat(read(model, joined, *tokens(2, 2, 2))), want)
    for x, y in zip(joined.keys_values(2, 1), other.keys_values(2, 1)):
        assert torch.equal(x[40:], y)
    plain = Trace.join([context(model), other])
    assert plain._store.frozen.rows == 12 and plain.lengths == [12, 44, 10]
    with pytest.raises(ValueError, match="bits: expected rows in int8, as this trace has, got rows in fp8"):
        Trace.join([home, context(model).quantize("fp8")])


def test_joins_that_are_let_go_leave_nothing_behind():
    """A trace of another origin is joined time and again: its rows take the place of those before, which somebody who has read
    them still needs."""
    model = tiny("qwen3")
    home, rows = context(model), tokens(3, 3, 3, seed=8)
    contexts = [context(model, 3, 4, 5, seed=seed).quantize() for seed in (6, 7)]
    want = []
    for other in contexts:
        loss_of(torch.cat(read(model, Trace.join([home, other]), *rows))).backward()
        want.append(gradients(model))
        assert home._store.frozen.rows == 12
    losses = [loss_of(torch.cat(read(model, Trace.join([home, other]), *rows))) for other in contexts]
    for loss, grads in zip(losses, want):
        loss.backward()
        assert_close(gradients(model), grads)
    joined = Trace.join([home, contexts[0]])
    (last,) = (s for s in joined.segments if s.sequence == 2 and s.start >= FROZEN)
    first = joined.reading([[], [last], []])  # sees rows behind those that may go
    before = first.keys_values(1, 1)
    del joined
    both = Trace.join([first, contexts[1]])
    assert both._store.frozen.rows == 24
    for x, y in zip(first.keys_values(1, 1), before):
        assert torch.equal(x, y)
    del first, both
    fp8 = Trace.join([home, context(model, 1, 1, 1).quantize("fp8")])  # the rows of the other format are gone
    assert fp8._store.frozen.rows == 3


def test_a_captured_pass_keeps_the_rows_that_it_reads():
    """A graph reads them where they lie (`ForwardPass.storage`), also when the trace's store has taken over others."""
    model = tiny("qwen3")
    with torch.no_grad():
        small = prefill(model, *tokens(2, 2, 2), trace=context(model).quantize())
    storage = small.plan([1, 1, 1], "text").storage()
    payload = weakref.ref(small._store.frozen.layers[0][0])
    joined = Trace.join([small, context(model, 2, 2, 2).quantize()])
    gc.collect()
    assert payload() is not None and any(x is payload() for layer in storage for x in layer)
    after = joined.plan([1, 1, 1], "text").storage()
    assert [mine is now for mine, now in zip(storage, after)] == [True] * 3 + [False] * 3


def test_weights_that_are_offloaded():
    """accelerate leaves them on the meta device between forwards: rows stay where the forward wrote them."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny("llama")
    want = torch.cat(read(model, context(model).quantize(), *tokens(2, 2, 2)))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    small = context(model).quantize()
    assert_close(torch.cat(read(model, small, *tokens(2, 2, 2))), want)
    joined = Trace.join([small, context(model, 3, 4, 5, seed=6).quantize()])
    assert joined.lengths == [12, 44, 10]
    torch.cat(read(model, joined, *tokens(2, 2, 2)))
    for other in (small, context(model)):
        with pytest.raises(ValueError, match="trace: expected a layer 0 in memory, .* whose weights are offloaded"):
            Trace(model, 3).adopted(other)


# ---- refusals ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_quantised_is_refused(tmp_path):
    model = tiny("qwen3")
    trace = context(model)
    with pytest.raises(ValueError, match="bits: expected one of .* got 'int2'"):
        trace.quantize("int2")
    with pytest.raises(ValueError, match="trace: expected one that holds tokens"):
        Trace(model).quantize()
    learning = prefill(model, *tokens(3, 3))
    with pytest.raises(ValueError, match="expected one that no gradient has to reach"):
        learning.quantize()
    assert learning.detach().quantize().lengths == [3, 3]
    with torch.no_grad():
        away = prefill(model, *tokens(3, 3), trace=Trace(model, 2, offload="cpu"))
    with pytest.raises(ValueError, match="offload: expected rows on the device"):
        away.quantize()
    small = trace.quantize()
    small.save(tmp_path / "t")
    with pytest.raises(ValueError, match="offload: expected rows as they were written"):
        Trace.load(tmp_path / "t", model, offload="cpu")
    with pytest.raises(ValueError, match="repack: expected rows as they were written, got quantised ones"):
        small.repack()
    with torch.no_grad():
        went_on = prefill(model, *tokens(1, 1, 1), trace=small.fork(1)[0])
    with pytest.raises(ValueError, match="bits: expected rows in fp8, as this trace has, got rows in int8"):
        went_on.quantize("fp8")


def test_keys_that_nobody_can_move():
    """Of quantised rows at position offsets a transformers layer has none; `repack` before `quantize` is what can be done."""
    model = tiny("qwen3")
    for early in (True, False):
        a, b = (prefill(model, *tokens(3, 3, seed=s), trace=t) for s, t in enumerate(Trace(model, 2).fork(2)))
        joined = Trace.join([a.detach(), b.detach()])
        small = (joined.repack() if early else joined).quantize()
        if early:
            assert small.layers[0].keys.shape == (2, 2, 6, 8)
        else:
            with pytest.raises(ValueError, match="keys: .* quantised rows at position offsets.* `repack` the trace before"):
                small.layers[0].keys  # noqa: B018
        assert small.keys_values(0, 1)[0].shape == (6, 2, 8)


def test_a_pass_is_not_captured_before_there_are_pools():
    model = tiny("qwen3")
    small = context(model).quantize()
    assert not small.plan([1, 1, 1], "text").repeatable(1)
    with torch.no_grad():
        prefill(model, *tokens(1, 1, 1), trace=small)
    assert small.plan([1, 1, 1], "text").repeatable(1)


def test_a_backend_that_cannot_read_them_is_refused(tmp_path, monkeypatch):
    model = tiny("qwen3", torch.float32)
    trace = context(model)
    trace.quantize().save(tmp_path / "t")
    with monkeypatch.context() as patched:
        patched.setattr(diffmas.ops.BACKENDS["reference"], "has", lambda op, *_: "quantized" not in op)
        model.diffmas_spec.backend = "reference"
        for make in (trace.quantize, lambda: Trace.load(tmp_path / "t", model)):
            with pytest.raises(ValueError, match="backend: expected one that reads quantised rows.* got 'reference'"):
                make()


def test_rows_of_an_aborted_pass_and_of_forks_are_free_again():
    """The store's own rows only: quantised ones are in nobody's way."""
    model = tiny("qwen3")
    small = context(model).quantize()
    assert small.rows == 0
    forks = small.fork(4)
    with torch.no_grad():
        for n, fork in enumerate(forks):
            prefill(model, *tokens(2, 2, 2, seed=n), trace=fork)
    assert small.rows == 24
    del forks, fork
    assert small.rows == 0

"""Rows of a trace that nobody needs any more are free, are used again, and are never read again."""

import contextlib
import copy
import random
import threading

import pytest
import torch
from models import EOS, assert_close, body, gradients, latent_steps, loss_of, pad, prefill, read, tiny, tokens, whole
from transformers import LogitsProcessor, LogitsProcessorList

import diffmas
from diffmas.trace.pool import Pool
from diffmas.trace.store import MOST_SPARE, Store


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Whatever is free when rows are handed out is not a number from then on, in every pool."""
    original = Store.allocate

    def allocate(store, *args, **kwargs):
        free = torch.from_numpy(~store._held())
        for pool in store.pools:
            for x in pool.kv if pool else ():
                x[: len(free)][free[: len(x)]] = torch.nan
                x[len(free) :] = torch.nan
        return original(store, *args, **kwargs)

    monkeypatch.setattr(Store, "allocate", allocate)


@pytest.fixture
def model():
    return tiny("qwen3")


@pytest.fixture
def constant():
    with torch.no_grad():
        yield


def one_by_one(model, trace, ids):
    """ids [B, n]"""
    for i in range(ids.shape[1]):
        model(input_ids=ids[:, i : i + 1], past_key_values=trace)


def hand_made(batch_size: int) -> diffmas.Trace:
    """A trace that no model writes to."""
    return diffmas.Trace(tiny("qwen3", torch.float32), batch_size)


def append(trace, tokens=1, **options):
    with torch.no_grad():
        trace.commit_repeated(trace.plan([tokens] * trace.batch_size, "text", **options))


# ---- what is held ----------------------------------------------------------------------------------------------------


class Noise(LogitsProcessor):
    """Scores that have nothing to do with the model's: beams diverge and die at every step."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, ids, scores):
        scores = 4 * torch.randn(scores.shape, generator=self.generator, dtype=scores.dtype)
        scores[:, [0, EOS]] = -torch.inf
        return scores.log_softmax(-1)


@pytest.mark.parametrize("past, new, beams, n", [(23, 1, 4, 100), (5, 9, 3, 40)])
def test_beam_search(model, constant, past, new, beams, n):
    trace = prefill(model, *tokens(past))
    seen = []
    handle = body(model).register_forward_hook(lambda *_: seen.append((trace.rows, trace._store.top)))
    out = model.generate(
        tokens(new, seed=2)[0][None], past_key_values=trace, num_beams=beams, do_sample=False, max_new_tokens=n,
        logits_processor=LogitsProcessorList([Noise()]),
    )  # fmt: skip
    handle.remove()
    assert out.shape[1] == new + n and len(seen) == n
    for step, (rows, top) in enumerate(seen):
        assert rows <= 1.25 * (past + beams * (new + step)) + MOST_SPARE * beams, step
        assert top <= 1.25 * (past + beams * (new + step)) + 2 * MOST_SPARE * beams, step
    assert trace.rows == past


@pytest.mark.parametrize("past", [6, 200])
def test_forks(model, constant, past):
    trace = prefill(model, *tokens(past))
    for forks, n in ((8, 3), (3, 8)):
        branches = trace.fork(forks)
        for i, fork in enumerate(branches):
            one_by_one(model, fork, tokens(n, seed=i)[0][None])
        assert trace.rows <= past + 1.25 * forks * n + 8 * forks
        del fork, branches
        assert trace.rows == past
    branches = trace.fork(8)
    for i, fork in enumerate(branches):
        prefill(model, *tokens(3, seed=i), trace=fork)
    assert trace.rows == past + 8 * 3  # exact, where they come at once


@pytest.mark.parametrize("how", ["at once", "one by one", "assisted", "reserved"])
def test_append_and_crop(model, constant, how):
    ids = tokens(35, 20)
    trace = prefill(model, ids[0])
    for i in range(100):
        new = tokens(20, seed=i)[0][None]
        if how == "at once":
            model(input_ids=new, past_key_values=trace)
            trace.crop(-20)
        elif how == "one by one":
            for _ in range(20):
                append(trace)
            trace.crop(-20)
        elif how == "reserved":
            append(trace, 5, reserve=15)
            trace.crop(35)
        else:
            model(input_ids=new[:, :5], past_key_values=trace)
            trace.crop(-3)
            if trace.lengths[0] > 53:
                trace.crop(35)
        assert trace.rows <= 55 and trace._store.top <= 55 + MOST_SPARE
    trace.crop(35)
    assert trace.rows == 35
    for i in range(3):  # and the rows, used again, are right
        prefill(model, *tokens(20, seed=i), trace=trace)
        trace.crop(-20)
    assert_close(read(model, trace, ids[1])[0], whole(model, torch.cat(ids)).logits[0, -20:])
    assert len(trace.segments) == 1 or how == "assisted"


def test_resets(model, constant):
    trace = diffmas.Trace(model, 2)
    for i in range(20):
        one_by_one(model, trace, torch.stack(tokens(5, 5, seed=i)))
        assert trace._store.top <= 40
        trace.reset()
        assert trace.rows == 0


def test_fork_and_forget(model, constant):
    a, b = tokens(9, 4)
    trace = prefill(model, a)
    for i in range(20):
        fork = trace.fork(1)[0]
        prefill(model, *tokens(7, seed=i), trace=fork)
        append(fork, reserve=100)
        assert trace.rows == 9 + 7 + 1 + 100
        del fork
        assert trace.rows == 9
        assert trace._store.top <= 9 + 7 + 1 + 100
    prefill(model, b, trace=trace)
    assert len(trace.segments) == 1 and trace.rows == 13  # it goes on where it was
    for view in (lambda: trace.keep(), lambda: trace.select([0, 0]), lambda: diffmas.Trace.join([trace, trace]), trace.repack):
        made = view()
        assert trace.rows == 13 + 13 * (view == trace.repack)
        del made
        assert trace.rows == 13


def test_a_view_outlives_the_trace_that_it_was_made_from(model, constant):
    a, b, c = tokens(6, 3, 4)
    for make in (copy.copy, copy.deepcopy, lambda t: t.keep(), lambda t: t.select([0])):
        trace = prefill(model, a)
        view = make(trace)
        other = trace.fork(1)[0]
        del trace
        other.crop(-5)
        for i in range(4):
            prefill(model, *tokens(9, seed=i), trace=other)
        assert_close(read(model, view, c)[0], whole(model, torch.cat((a, c))).logits[0, -4:])


def test_a_failed_forward_gives_its_rows_back(model, constant):
    trace = prefill(model, *tokens(6))
    top = trace._store.top
    handle = body(model).layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    for _ in range(5):
        try:
            prefill(model, *tokens(9), trace=trace)
        except KeyError:
            pass
        assert trace.rows == 6 and trace._store.top <= top + 9
    handle.remove()
    prefill(model, *tokens(9), trace=trace)
    assert len(trace.segments) == 1


def test_rows_of_a_planned_forward_pass_are_not_given_away(model, constant):
    trace = prefill(model, *tokens(6))
    planned = trace.fork(1)[0].plan([3], "text", reserve=5)
    claimed = set(range(int(planned.work.slots[0]), int(planned.work.slots[0]) + 3 + 5))
    for _ in range(5):
        fork = trace.fork(1)[0]
        mine = fork.plan([4], "text").work.slots
        assert not claimed & set(mine.tolist())
    assert trace.rows == 6 + 8
    del planned
    assert trace.rows == 6


# ---- graphs ----------------------------------------------------------------------------------------------------------


def branch_of(model, trace, seed=0):
    """A loss of what a fork wrote and read; the fork is forgotten."""
    fork = trace.fork(1)[0]
    prefill(model, *tokens(7, seed=seed), trace=fork)
    return loss_of(read(model, fork, *tokens(4, seed=seed + 1))[0])


@pytest.mark.parametrize("how", ["backward", "retain", "drop", "input only"])
def test_a_graph_holds_its_rows_until_it_has_run(model, how):
    with torch.no_grad():
        trace = prefill(model, *tokens(5))
    loss = branch_of(model, trace)
    assert trace.rows == 5 + 7 + 4
    other = prefill(model, *tokens(9, seed=5), trace=trace.fork(1)[0])  # into rows that are free, or not
    del other
    if how == "backward":
        loss.backward()
        got = gradients(model)
        assert trace.rows == 5 and loss is not None
        branch_of(model, trace).backward()
        assert_close(got, gradients(model), 1e-12)
        assert trace.rows == 5
    elif how == "retain":
        loss.backward(retain_graph=True)
        want = gradients(model)
        assert trace.rows == 5 + 7 + 4
        prefill(model, *tokens(9, seed=6), trace=trace.fork(1)[0])
        loss.backward(retain_graph=True)
        assert_close(gradients(model), want, 1e-12)
        loss.backward()
        assert trace.rows == 5
        with pytest.raises(RuntimeError):
            loss.backward()
    elif how == "input only":
        torch.autograd.grad(loss, body(model).layers[0].self_attn.q_proj.weight)
        del loss
        assert trace.rows == 5
    else:
        del loss
        assert trace.rows == 5


@pytest.mark.parametrize("how", ["save_on_cpu", "copies", "checkpoint"])
def test_saved_tensor_hooks_keep_the_hold(model, how):
    with torch.no_grad():
        trace = prefill(model, *tokens(5))
    branch_of(model, trace).backward()
    want = gradients(model)
    if how == "checkpoint":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        loss = branch_of(model, trace)
    else:
        copies = torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x)
        with torch.autograd.graph.save_on_cpu() if how == "save_on_cpu" else copies:
            loss = branch_of(model, trace)
    assert trace.rows == 5 + 7 + 4
    for i in range(3):
        with torch.no_grad():
            prefill(model, *tokens(9, seed=i), trace=trace.fork(1)[0])
    loss.backward()
    assert_close(gradients(model), want, 1e-12)
    del loss
    assert trace.rows == 5


def test_a_checkpointed_graph_that_is_dropped(model):
    """What a checkpoint keeps of a forward pass leads to no graph, or none of it would ever be freed."""
    with torch.no_grad():
        trace = prefill(model, *tokens(5))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    loss = branch_of(model, trace)
    assert trace.rows == 5 + 7 + 4
    del loss
    assert trace.rows == 5


def test_a_trace_that_was_cropped_can_still_run_backward(model):
    a, b, c = tokens(5, 6, 3)
    trace = prefill(model, a)
    loss = loss_of(model(input_ids=b[None], past_key_values=trace).logits)
    trace.crop(-6)
    with torch.no_grad():
        prefill(model, *tokens(9, seed=5), trace=trace.fork(1)[0])
    (loss + loss_of(model(input_ids=c[None], past_key_values=trace).logits)).backward()
    got = gradients(model)
    (loss_of(whole(model, torch.cat((a, b))).logits[:, 5:]) + loss_of(whole(model, torch.cat((a, c))).logits[:, 5:])).backward()
    assert_close(got, gradients(model))
    trace.crop(5)
    assert trace.rows == 5


# ---- rows that are used again are right -------------------------------------------------------------------------------

OPS = ["prompt", "prompt", "text", "text", "text", "latent", "fork", "select", "crop", "drop", "keep", "join", "join", "repack"]
OPS += ["detach", "backward", "reset", "forget", "forget", "planned", "no_grad"]


def program(model, seed: int, ops: int):
    """A random program on forks of one trace of two sequences -> all logits and gradients, and its largest store."""
    rng, results, losses = random.Random(seed), [], []
    traces, planned, top = [diffmas.Trace(model, 2)], [], 0

    def ids(low, high):
        return [torch.tensor([rng.randrange(2, 63) for _ in range(rng.randint(low, high))], dtype=torch.long) for _ in range(2)]

    for _ in range(ops):
        i = rng.randrange(len(traces))
        t, op = traces[i], rng.choice(OPS)
        if max(t.lengths) > 60:
            op = "reset"
        if op in ("prompt", "text", "no_grad"):
            rows = ids(1, 1) if op == "text" else ids(0, 6)
            if not any(map(len, rows)):
                continue
            x, mask = pad(rows, rng.choice(["left", "right"]))
            with torch.set_grad_enabled(op != "no_grad"):
                logits = model(input_ids=x, attention_mask=mask, past_key_values=t).logits[mask.bool()]
            results.append(logits.detach())
            if logits.requires_grad:
                losses.append(loss_of(logits))
        elif op == "latent":
            h = body(model)(*pad(ids(1, 3)), past_key_values=t).last_hidden_state[:, -1:]
            results.append(latent_steps(model, t, h, rng.randint(1, 4)).detach())
        elif op == "fork":
            traces += t.fork(rng.randint(1, 2))
        elif op == "select":
            traces[i] = t.select(rng.choice([[0, 0], [1, 1], [1, 0]]))
        elif op == "crop":
            t.crop(-rng.randint(0, 6))
        elif op == "drop":
            t.drop_newest([rng.randint(0, 4), rng.randint(0, 4)])
        elif op == "keep":
            kind, positions = rng.choice([None, "prompt", "latent"]), rng.choice(["keep", "reindex"])
            traces[i] = t.keep(kind, positions=positions, sinks=(0, 1, 4)[i % 3])
        elif op == "join":
            others = [t, *rng.sample(traces, min(len(traces), 2))]
            if sum(max(o.lengths) for o in others) < 60:
                with contextlib.suppress(ValueError):  # some branches share tokens beyond their beginning
                    traces.append(diffmas.Trace.join(others, rng.choice(["keep", "shift", "reindex", "same_branch"])))
        elif op == "repack":
            traces[i] = t.repack()
        elif op == "detach":
            traces[i] = t.detach()
        elif op == "backward" and losses:
            sum(rng.sample(losses, max(1, len(losses) // 2))).backward()
            results.append(gradients(model))
            losses.clear()
            traces = [x.detach() for x in traces]
        elif op == "reset":
            t.reset()
        elif op == "forget" and len(traces) > 1:
            del traces[i]
        elif op == "planned":
            planned = [t.fork(1)[0].plan([rng.randint(0, 3), 1], "text", reserve=rng.randint(0, 9))]
        del t
        while len(traces) > 6:
            del traces[rng.randrange(len(traces))]
        top = max(top, traces[0]._store.top)
    if losses:
        sum(losses).backward()
        results.append(gradients(model))
    del losses, planned
    traces = [x.detach() for x in traces]
    needed = {r for t in traces for s in t.segments for r in range(s.start, s.end)}
    assert len(needed) <= traces[0].rows <= len(needed) + len(traces) * 2 * (MOST_SPARE + 9)
    return results, top


@pytest.mark.parametrize("backend, dtype, limit", [("reference", torch.float64, 1e-9), ("cpu", torch.float32, 2e-3)])
@pytest.mark.parametrize("seed", range(4))
def test_random_programs_equal_those_that_never_use_a_row_again(monkeypatch, backend, dtype, limit, seed):
    model = diffmas.patch_model(tiny("qwen3", dtype, patch=False, num_hidden_layers=2), backend=backend)
    got, top = program(model, seed, 200)
    monkeypatch.setattr(Store, "_sweep", lambda store: setattr(store, "_swept", True))
    want, without = program(model, seed, 200)
    assert len(got) == len(want) > 40 and top < without / 2
    assert sum(isinstance(x, dict) for x in got) > 2
    for x, y in zip(got, want):
        assert_close(x, y, limit)


def test_two_threads_on_forks_of_one_trace(model):
    a, new = tokens(6), tokens(3)[0]
    trace = prefill(model, *a)
    failures = []

    def work(fork, seed):
        rng = random.Random(seed)
        try:
            with torch.no_grad():
                for i in range(40):
                    ids = tokens(rng.randint(1, 5), seed=seed + i)[0]
                    prefill(model, ids, trace=fork)
                    text = torch.cat((a[0], ids, new))
                    assert_close(read(model, fork, new)[0], whole(model, text).logits[0, -3:])
                    fork.crop(6)
        except BaseException as error:  # noqa: B036  the main thread's to raise
            failures.append(error)

    threads = [threading.Thread(target=work, args=(fork, 1000 * i)) for i, fork in enumerate(trace.fork(2))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    del threads, t
    assert not failures, failures[0]
    assert trace.rows == 6


# ---- where rows lie --------------------------------------------------------------------------------------------------


def test_reserved_tokens_stay_in_one_range():
    trace = hand_made(3)
    append(trace, 5)
    others = trace.fork(2)
    for left in range(9, -1, -1):
        for t in (trace, *others):
            append(t, reserve=left)
    for t in (trace, *others):
        assert all(len({(s.start, s.end) for s in t.segments if s.sequence == b and s.length}) <= 2 for b in range(3))
    assert trace.rows == 3 * 5 + 3 * 3 * 10
    first = hand_made(1)
    append(first, 5, reserve=20)
    top = first._store.top
    for _ in range(20):
        append(first)
    assert len(first.segments) == 1 and first._store.top == top == 25


def test_a_sequence_goes_on_where_it_ends():
    """Not in the first gap, where the rows behind it are free."""
    trace = hand_made(1)
    append(trace, 5)
    left, right = trace.fork(2)
    append(left, 10)
    append(right, 10)
    del left
    append(right, 4)
    assert [(s.start, s.length) for s in right.segments] == [(0, 5), (15, 14)]
    right.crop(-4)
    append(right)
    assert [(s.start, s.length) for s in right.segments] == [(0, 5), (15, 11)]


@pytest.mark.parametrize("beams, n", [(6, 300), (16, 100)])
def test_long_beam_searches_do_not_fragment(beams, n):
    rng, trace = random.Random(1), hand_made(1)
    append(trace, 30)
    trace = trace.select([0] * beams)
    for step in range(n):
        trace = trace.select([rng.randrange(beams) for _ in range(beams)])
        append(trace)
        needed = len({r for s in trace.segments for r in range(s.start, s.end)})
        most = 30 + beams * (step + 1)
        assert needed <= trace.rows <= needed + beams * MOST_SPARE
        assert trace._store.top <= 1.25 * most + 2 * MOST_SPARE * beams


def test_room_is_made_once(model, constant, monkeypatch):
    grown = []
    reserve = Pool.reserve

    def watched(pool, *args):
        before = pool.rows
        reserve(pool, *args)
        grown.append(pool.rows > before)

    monkeypatch.setattr(Pool, "reserve", watched)
    ids, mask = pad(tokens(3, 7))
    for options in (dict(), dict(num_beams=3), dict(do_sample=True, num_return_sequences=4), dict(max_length=60)):
        trace = prefill(model, *tokens(5, 2))
        grown.clear()
        options = dict(max_new_tokens=50) | options if "max_length" not in options else options
        model.generation_config.eos_token_id = None
        model.generate(ids, attention_mask=mask, past_key_values=trace, **options)
        assert sum(grown) == 3, options  # each pool once
        del trace

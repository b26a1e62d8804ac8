"""Views with some of an agent's rows."""

import numpy as np
import torch
from models import assert_close, gradients
from systems import ANSWERS, QUESTIONS, system
from test_selection import FIRST, LATENT, SHAPES, of, solver

from diffmas import Agent, Segment, Trace
from diffmas.agents.meter import measuring
from diffmas.agents.selection import selected
from diffmas.trace.views import places, rows_of


def test_places_of_a_view():
    view = [Segment(0, "a", "prompt", 10, 3, 0), Segment(0, "b", "latent", 5, 4, 7, 2), Segment(0, None, "text", 20, 1, 0)]
    for chosen in ([], [0], [2, 3], [0, 1, 2, 4, 6, 7], list(range(8))):
        got = places(view, np.array(chosen, dtype=np.int64))
        assert rows_of(got).tolist() == rows_of(view)[chosen].tolist()
        where = np.concatenate([np.arange(s.position, s.position + s.length) + s.offset for s in view])
        assert [p for s in got for p in range(s.position + s.offset, s.next_position)] == where[chosen].tolist()
    assert places(view, np.arange(8)) == view
    seen, new = view[1]._replace(layers=(0,)), Segment(0, "b", "latent", 9, 1, 11, 2)
    assert seen.extended_by(new) is None and view[1].extended_by(new).length == 5


def test_rows_that_stay_do_not_count():
    """Neither among the best rows nor among every k-th, though they may be of another kind."""
    select = Agent("x", "y", reads=[of("a", kind="latent", every=2, rows=2)]).reads[0].select
    row = [Segment(0, "a", "prompt", 0, 6, 0), Segment(0, "a", "latent", 6, 7, 6)]
    assert rows_of(selected(row, 2, select, {})).tolist() == [0, 1, 10, 12]
    assert rows_of(selected(row, 0, select, {})).tolist() == [10, 12]
    assert rows_of(selected(row[:1], 2, select, {})).tolist() == [0, 1]


def test_nothing_is_copied():
    """The rows are those of a team that selects nothing, and the others are free."""
    held = {}
    for name, edges in (("all", ["a", "b"]), ("some", [of("a", rows=1), of("b", every=2)])):
        s = system(agents=[*FIRST, solver(*edges)], **LATENT, sinks=0)
        with torch.no_grad():
            trace = s.communicate(s.fields_of(QUESTIONS))
        held[name] = [rows_of([x for x in trace.segments if x.sequence == b]).tolist() for b in range(3)]
        assert trace.rows == sum(trace.lengths)
    for every, some in zip(held["all"], held["some"]):
        assert some == [every[3], every[4], every[6]]


def test_sizes_of_what_agents_read():
    """Rows, each of them once, and their bytes in all layers: of float64, with K and V."""
    s = system(agents=SHAPES["budgets"])
    with torch.no_grad(), measuring(s.device) as meter:
        out = s(QUESTIONS, ANSWERS)
        s(QUESTIONS, ANSWERS)
    layers, heads, D = len(out.trace), *out.trace.keys_values(0, 0)[0].shape[1:]
    sizes = out.trace.sizes
    assert sum(size.rows for size in sizes.values()) == sum(out.trace.lengths)
    for name, size in sizes.items():
        assert size.rows == sum(x.length for x in out.trace.segments if x.agent == name) > 0
        assert size.bytes == size.rows * layers * heads * D * 2 * 8
    assert out.trace.select([0, 0]).sizes == out.trace.select([0]).sizes
    assert {name: size.rows for name, size in meter.cost.read.items()} == {"c": 2 * 3 * 7, "solver": 2 * 3 * 6}
    chain = system()
    with torch.no_grad(), measuring(chain.device) as meter:
        chain.generate_tokens(QUESTIONS, max_new_tokens=2)
        written = chain.communicate(chain.fields_of(QUESTIONS)).sizes
    both = 2 * written["planner"].rows, 2 * sum(size.rows for size in written.values())
    assert {name: size.rows for name, size in meter.cost.read.items()} == dict(zip(("critic", "solver"), both))


def test_rows_that_some_layers_see(tmp_path):
    """Count in these; are saved and loaded so, and go on the same."""
    s = system(agents=SHAPES["some layers"])
    with torch.no_grad():
        trace = s.communicate(s.fields_of(QUESTIONS))
    fixed, size = len(QUESTIONS) * s.sinks, trace.sizes["a"]
    row = size.bytes // (3 * fixed + (size.rows - fixed))
    assert size.bytes == row * (3 * fixed + (size.rows - fixed))  # sinks in all layers, the rest in one
    assert trace.sizes["b"].bytes % row == 0 < trace.sizes["b"].rows
    assert {x.layers for x in trace.segments} == {None, (2,), (0, 2)}
    trace.save(tmp_path / "trace")
    loaded = Trace.load(tmp_path / "trace", s.model)
    assert [x.layers for x in loaded.segments] == [x.layers for x in trace.segments]
    for other in (loaded, trace.repack(), trace.fork(1)[0]):
        assert_close(s(QUESTIONS, ANSWERS, trace=other).logits, s(QUESTIONS, ANSWERS).logits, 1e-9)
    everywhere = system(agents=[*FIRST, solver("a", of("b", every=2))])
    assert (everywhere(QUESTIONS, ANSWERS).logits - s(QUESTIONS, ANSWERS).logits).abs().max() > 1e-3


def test_rows_that_some_layers_see_on_the_host():
    losses = []
    for offload in (None, "cpu"):
        s = system(agents=SHAPES["some layers in turns"], dtype=torch.float32)
        s.zero_grad()
        asked = s.fields_of(QUESTIONS)
        trace = s.communicate(asked, Trace(s.model, 3, offload=offload))
        s(QUESTIONS, ANSWERS, trace=trace).loss.backward()
        losses.append(gradients(s))
    assert losses[0].keys() == losses[1].keys() and all(torch.equal(losses[1][n], g) for n, g in losses[0].items())

"""A saved trace to look at, and the figure."""

import json

import pytest
import tiny_systems as tiny
import torch
from test_look import saved
from test_quantized_agents import rounded

from diffmas import Trace
from diffmas.evaluation.look import look_at, look_at_file, plot

# ---- a saved trace ---------------------------------------------------------------------------------------------------


def test_a_saved_trace(tmp_path):
    trace, path = saved(tmp_path)
    look = look_at_file(path, tiny.tokenizer(), 1)
    assert [(look.lanes[b.agent].name, b.kind, b.rows, b.position) for b in look.blocks] == [
        (s.agent, s.kind, s.length, s.position) for s in trace.segments if s.sequence == 1
    ]
    assert "".join(look.blocks[0].texts) == "plan : where is the lamp"
    start = 0
    for block in look.blocks:
        rows = slice(start, start + block.rows)
        for layer in range(look.layers):
            k, v = (x[rows] for x in trace.keys_values(layer, 1))
            assert block.keys[layer] == pytest.approx(float(k.norm()), rel=1e-5)
            assert block.values[layer] == pytest.approx(float(v.norm()), rel=1e-5)
        for i, step in enumerate(block.steps):
            values = [trace.keys_values(layer, 1)[1][start + i] for layer in range(look.layers)]
            assert step.values == pytest.approx(float(torch.stack(values).norm()), rel=1e-5)
        assert bool(block.steps) == (block.kind == "latent")
        start += block.rows
    assert look.attention is None and json.dumps(look.to_dict())
    assert look_at_file(path).blocks[0].texts[0].startswith("#")
    with pytest.raises(ValueError, match=r"sequence: expected one in \[0, 2\)"):
        look_at_file(path, None, 2)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="a damaged one"):
        look_at_file(path)


@pytest.mark.parametrize("bits", ["int8", "fp8", "int4"])
def test_a_saved_trace_of_quantised_rows(bits, tmp_path):
    trace, path = saved(tmp_path)
    plain = look_at_file(path, tiny.tokenizer(), 1)
    prompts, latents = (trace.keep(kind=kind, sinks=0) for kind in ("prompt", "latent"))
    Trace.join([prompts, latents.quantize(bits)], "keep").save(path)
    look = look_at_file(path, tiny.tokenizer(), 1)
    found = {(b.agent, b.kind): b for b in look.blocks}
    assert found.keys() == {(b.agent, b.kind) for b in plain.blocks} and bits in dict(look.facts)["quantised rows"]
    start, of_small = 0, []  # the norms of the numbers that bytes stand for
    for block in plain.blocks:
        again = found[block.agent, block.kind]
        assert again.texts == block.texts and again.position == block.position
        rows = [trace.keys_values(layer, 1)[1][start : start + block.rows] for layer in range(plain.layers)]
        of_small.append(pytest.approx([float(rounded(v.double(), bits).norm()) for v in rows], rel=1e-6))
        assert again.values == (block.values if block.kind == "prompt" else of_small[-1]) and block.values != of_small[-1]
        start += block.rows
    trace.quantize(bits).save(path)
    assert [b.values for b in look_at_file(path, None, 1).blocks] == of_small


# ---- the figure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, begins", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_figure(suffix, begins, tmp_path, recwarn):
    look = look_at(tiny.system(), "where is the key", "in the garden", text_agents=True, max_new_tokens=4)
    look.title, look.blocks[1].steps[0].text, look.lanes[0].name = "$x^$", "$\\frac{汉$", "$plan_$"
    file = plot(look, tmp_path / "new" / f"look.{suffix}", layer=1)
    assert file.read_bytes().startswith(begins) and not [w for w in recwarn if "Glyph" in str(w.message)]
    with pytest.raises(ValueError, match=r"layer: expected one in \[0, 2\) or None, got 2"):
        plot(look, tmp_path / "look.png", layer=2)


def test_the_figure_of_a_trace(tmp_path):
    assert plot(look_at_file(saved(tmp_path)[1]), tmp_path / "look.png").stat().st_size > 1000

"""Agents whose rows are read in 8 bits, against a plain loop whose readers see them rounded; straight-through gradients."""

import json
from dataclasses import replace

import pytest
import test_messages
import torch
from loops import check_checkpointing, check_compiled, check_greedy_tokens, check_loss, check_ragged
from models import assert_close, body, gradients, tiny
from systems import ANSWERS, QUESTIONS, system, tokenizer
from test_graph import agent, at, exact

from diffmas import Agent, MultiAgentSystem, Trace, patch_model
from diffmas.agents.card import contents
from diffmas.agents.meter import measuring
from diffmas.evaluation.plain_hf import plain_loss
from diffmas.ops import backends
from diffmas.serving.vllm.teams import check_team
from diffmas.trace.views import FROZEN

MOST = {"int8": 127, "fp8": 448, "int4": 7}


def small(name, steps, reads, bits="int8", **options):
    return agent(name, steps, reads, quantized=bits, **options)


SHAPES = {
    "chain": [small("a", 3, None), agent("b", 2, None), small("c", 2, None), agent("solver", 0, None)],
    "floats": [small("a", 3, [], "fp8"), small("b", 2, ["a"], "fp8"), agent("solver", 0, ["b", at("a", "keep")])],
    "parallel": [small("a", 3, [], "int4"), small("b", 2, [], "int4"), agent("solver", 0, ["b", "a"])],
    "diamond": [agent("a", 2, []), small("b", 2, ["a"]), small("c", 3, ["a"]), agent("solver", 0, ["c", "a", at("b", "keep")])],
    "chosen": [
        small("a", 3, [], max_message_tokens=3), small("b", 2, ["a"]),
        agent("solver", 0, [{"agent": "a", "select": {"kind": "text"}}, {"agent": "b", "select": {"rows": 3}}]),
    ],
}  # fmt: skip
LATENT = dict(trace_content="latent_only")
CONTENTS = [dict(sinks=0), LATENT, dict(**LATENT, sinks=2, positions="reindex")]


def rounded(x, bits):
    """The numbers of 8 bits, by the largest element of each row and head, with the gradient of x."""
    scale = (x.detach().abs().amax(-1, keepdim=True) / MOST[bits]).float().double()
    y = x.detach() / scale
    # e4m3: three binary digits behind the leading one, down to 2^-6; below that, steps as there.
    step = 2 ** (y.abs().log2().floor().clamp_min(-6) - 3) if bits == "fp8" else 1
    y = ((y / step).round() * step).clamp(-MOST[bits], MOST[bits]) * scale
    return y + (x - x.detach())


def moved(s, k, by):
    """Keys [1, H, n, D] that were rotated, rotated `by` positions further."""
    angle = by * body(s.model).rotary_emb.inv_freq.double()
    cos, sin = torch.cat((angle, angle)).cos(), torch.cat((angle, angle)).sin()
    left, right = k.chunk(2, -1)
    return k * cos + torch.cat((-right, left), -1) * sin


class Loop(test_messages.Loop):
    """Rows are rounded where they were written; only then are they moved to where a reader has them."""

    def chosen(self, i, j):
        select = next((r.select for r in self.s.agents[i].reads or () if r.agent == self.s.agents[j].name), None)
        rows = self.handed(j)
        fixed, rest = rows[: self.s.sinks], rows[self.s.sinks :]
        if select is not None and select.kind == "text":
            rest = [x for x in rest if x[0] == j and x[1] >= self.wrote(j)[0][-1][1] + 1 - len(self.message(j))]
        return fixed + (rest if select is None or select.rows is None else rest[-select.rows :])

    def rows(self, i, move):
        layout, _ = self.layout(i)
        turns, parts = {}, []
        for w, n, position in layout:
            bits, by = self.s.agents[w].quantized, position - self.wrote(w)[0][n][2] + move
            whole = bits is None or any(x[:2] == (w, n) for x in self.handed(w)[: self.s.sinks])
            key = (w, by if whole else 0)
            if key not in turns:
                turns[key] = self.turn(*key)
            row = [(k[:, :, n : n + 1], v[:, :, n : n + 1]) for k, v in turns[key]]
            parts.append(row if whole else [(moved(self.s, rounded(k, bits), by), rounded(v, bits)) for k, v in row])
        return [tuple(torch.cat(x, 2) for x in zip(*layer)) for layer in zip(*parts)]


@pytest.mark.parametrize("options", CONTENTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_equal_the_loop(shape, options):
    """Straight-through: and they are not those of rows that nobody rounds."""
    s = exact(system(agents=SHAPES[shape], **options))
    out, _ = check_loss(s, Loop)
    with torch.no_grad():  # what is stored in 8 bits is what training has rounded
        assert_close(s(QUESTIONS, ANSWERS).loss, out.loss, 1e-6)
    plain = system(agents=[replace(a, quantized=None) for a in SHAPES[shape]], **options)(QUESTIONS, ANSWERS)
    assert abs(plain.loss - out.loss) > 1e-5


@pytest.mark.parametrize("shape", ["chain", "diamond", "floats"])
def test_generated_tokens(shape):
    check_greedy_tokens(exact(system(agents=SHAPES[shape], **LATENT)), Loop)


@pytest.mark.parametrize("bits", ["int8", "fp8", "int4"])
def test_what_is_stored_and_what_is_learned_from_are_the_same_numbers(bits):
    agents = [small("a", 3, [], bits), small("b", 2, ["a"], bits), agent("solver", 0, ["a", "b"])]
    s, found = system(agents=agents, **LATENT), []
    for learning in (False, True):
        with torch.set_grad_enabled(learning):
            trace = s.communicate(s.fields_of(QUESTIONS))
        frozen = [x.start >= FROZEN for x in trace.segments]
        assert any(frozen) != learning
        found.append([trace.keys_values(1, b) for b in range(3)])
    for (k, v), (k2, v2) in zip(*found):
        assert_close(k, k2, 1e-6)
        assert_close(v, v2, 1e-6)


def test_readers_have_fewer_bytes():
    """Rows as they were written are free, but the sinks."""
    sizes, rows = [], []
    for bits in (None, "int8"):
        agents = [small("a", 9, [], bits), small("b", 8, [], bits), agent("solver", 0, ["a", "b"])]
        s = system(agents=agents, dtype=torch.float32, trace_content="latent_only")
        with measuring(s.device) as meter, torch.no_grad():
            trace = s.communicate(s.fields_of(QUESTIONS))
        sizes.append(meter.cost.read["solver"])
        rows.append(trace.rows)
    assert sizes[0].rows == sizes[1].rows == 3 * (9 + 8) + 2 * (4 + 4 + 3) and sizes[1].bytes < 0.6 * sizes[0].bytes
    assert rows[1] == 3 * 2 * 4


def test_ragged_batches_equal_single_runs():
    """Also agents without a turn; and who leaves between two turns."""
    agents = [small("a", "a", []), small("b", "b", ["a"]), agent("solver", 0, ["b", "a"])]
    rows = [{"question": q, "a": a, "b": b} for q, a, b in zip(QUESTIONS, (2, 0, 1), (0, 3, 1))]
    for options in (dict(no_latents="skip"), LATENT):
        s = system(agents=agents, **options)
        check_ragged(s, rows)


def test_checkpointing_gives_the_same_gradients():
    check_checkpointing(system(agents=SHAPES["diamond"], **LATENT).train())


def test_compiled_layers_give_the_same_gradients():
    check_compiled(system(agents=SHAPES["diamond"], **LATENT))


@pytest.mark.parametrize("scope", [dict(grad_scope="detach_trace"), dict(grad_scope="last_k", last_k=2)], ids=str)
def test_agents_that_do_not_learn(scope):
    """The loss is the same; what they hand on is a constant."""
    s = system(agents=SHAPES["chain"], **scope)
    out = s(QUESTIONS, ANSWERS)
    out.loss.backward()
    whole = system(agents=SHAPES["chain"])
    assert_close(out.loss, whole(QUESTIONS, ANSWERS).loss, 1e-6)
    mine = gradients(s)
    whole(QUESTIONS, ANSWERS).loss.backward()
    assert any((mine[n] - g).abs().max() > 1e-6 for n, g in gradients(whole).items())


def test_a_memory_stays_as_it_is():
    """Everybody reads it, whole and as it was written."""
    s = system(agents=SHAPES["parallel"], **LATENT)
    with torch.no_grad():
        memory = s.think(Agent("memory", "w30 w31 w32 w33 w34 w35", 2), s.fields_of(QUESTIONS), Trace(s.model, 3))
        trace = s.communicate(s.fields_of(QUESTIONS), memory.fork(1)[0])
    kinds = [(x.agent, x.start >= FROZEN) for x in trace.segments if x.sequence == 0]
    assert [k for k in kinds if k[0] == "memory"] and not any(frozen for who, frozen in kinds if who == "memory")
    assert all(frozen for who, frozen in kinds if who in "ab")


# ---- descriptions ----------------------------------------------------------------------------------------------------


def test_plain_code_says_why_it_does_not_run_them():
    with pytest.raises(ValueError, match="system: expected agents that .*, got quantized of agent 'a', 'int8'"):
        plain_loss(system(agents=SHAPES["chain"]), QUESTIONS, ANSWERS)


def test_they_are_saved_and_loaded(tmp_path):
    s = system(agents=SHAPES["chain"], dtype=torch.float32)
    s.save_pretrained(tmp_path)
    assert MultiAgentSystem.from_pretrained(tmp_path, tiny("qwen3", patch=False), tokenizer()).agents == SHAPES["chain"]
    described = json.loads((tmp_path / "agents.json").read_text())
    assert "### a: T = 3, read in int8" in contents(described, "team")[1]
    with pytest.raises(ValueError, match="quantized of agent 'a': expected None in vLLM, got 'int8'"):
        check_team("team", described)


@pytest.mark.parametrize(
    "agents, message",
    [
        ([small("a", 1, None), small("b", 1, None, "fp8"), agent("solver", 0, None)],
         r"agents: expected one format of quantized rows, got \['int8', 'fp8'\]"),
        ([small("a", 1, []), agent("solver", 0, [{"agent": "a", "select": {"rows": 2, "by": "attention"}}])],
         "agent 'solver': expected another choice of rows than by attention.* with those of 'a'"),
        ([small("a", 1, None), agent("solver", 0, None, max_rows=9, max_rows_by="attention")],
         "agent 'solver': expected another choice of rows than by attention.* with those of 'a'"),
    ],
)  # fmt: skip
def test_shapes_that_are_refused(agents, message):
    with pytest.raises(ValueError, match=message):
        system(agents=agents)


def test_the_rows_of_who_answers_are_nobodys():
    """Such an agent may have been made for another place: an agent that refines its own text answers in its last round."""
    chain = [agent("a", 2, None), small("solver", 0, None, "fp8", max_message_tokens=3)]
    assert system(agents=chain).graph.chain
    assert not system(agents=[small("a", 2, None), chain[1]]).graph.chain
    model = patch_model(tiny("qwen3", patch=False), offload="cpu")
    assert MultiAgentSystem(model, tokenizer(), chain).graph.chain


def test_models_that_cannot_read_them_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"agent 'a': quantized: expected one of \['int8', 'fp8', 'int4'\] or None, got 'int2"):
        Agent("a", "x", quantized="int2")
    model = patch_model(tiny("qwen3", patch=False), offload="cpu")
    with pytest.raises(ValueError, match="offload: expected rows on the device with quantized agents, got rows on the host"):
        MultiAgentSystem(model, tokenizer(), SHAPES["chain"])
    model = patch_model(tiny("qwen3", torch.float32, patch=False), backend="cpu")
    monkeypatch.setattr(backends.Backend, "has", lambda self, op, *args: not op.endswith("quantized"))
    with pytest.raises(ValueError, match="backend: expected one that reads quantised rows, of those here .*, got 'cpu'"):
        MultiAgentSystem(model, tokenizer(), SHAPES["chain"])

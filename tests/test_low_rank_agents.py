"""Agents whose rows are read with low-rank codes, against a plain loop that makes each reader's rows by the reader's own
projections of the bare model's hidden states."""

import contextlib
import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import test_messages
import torch
from loops import check_checkpointing, check_greedy_tokens, check_loss, check_ragged
from models import assert_close, body, gradients, tiny, with_lora
from peft import IA3Config, LoraConfig, get_peft_model
from systems import ANSWERS, QUESTIONS, exact_norms, tokenizer
from test_graph import TIGHT, agent, at, exact

from diffmas import MultiAgentSystem, Trace, ops, patch_model
from diffmas.agents import adapters
from diffmas.agents.adapters import add_lora
from diffmas.agents.board import Board
from diffmas.agents.card import contents
from diffmas.agents.meter import measuring
from diffmas.evaluation import TextAgents
from diffmas.evaluation.plain_hf import plain_loss
from diffmas.ops import low_rank as ops_low_rank
from diffmas.serving.vllm.teams import check_team
from diffmas.trace import low_rank
from diffmas.trace.views import CODED, Size
from diffmas.training.sharded import check_engine

LATENT = dict(trace_content="latent_only")


def doc(steps, reads, **options):
    return agent("doc", steps, reads, low_rank=True, **options)


SHAPES = {
    "experts": [doc(0, []), agent("a", 2, ["doc"]), agent("b", 1, ["doc"]), agent("solver", 0, ["b", "a"])],
    "all read": [doc(0, []), agent("a", 2, ["doc"]), agent("b", 1, ["doc"]), agent("solver", 0, ["b", "a", "doc"])],
    "chain": [doc(2, None), agent("a", 2, None), agent("b", 1, None, max_message_tokens=3), agent("solver", 0, None)],
    "behind another": [agent("a", 2, []), doc(1, ["a"]), agent("b", 2, ["doc"]), agent("solver", 0, ["b", "doc"])],
    "two": [
        doc(0, []), replace(doc(2, [at("doc", "shift")]), name="more"), agent("a", 1, ["more", "doc"]),
        agent("solver", 0, ["a", at("more", "keep")]),
    ],
}  # fmt: skip
CONTENTS = [{}, dict(**LATENT, sinks=2)]


def team(agents, family="llama", scope="per_role", targets=("q_proj", "k_proj", "v_proj"), dtype=torch.float64, **options):
    """Each role has other weights."""
    chosen = {n: options.pop(n) for n in ("layers_to_transform", "use_dora", "lora_bias") if n in options}
    targets = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **chosen)
    model = add_lora(exact_norms(tiny(family, dtype, patch=False)), agents, scope, config)
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = (0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(dtype)
    made = MultiAgentSystem(model.eval(), tokenizer(), agents, adapter_scope=scope, **options)
    made.realign.to(dtype)
    return exact(made) if dtype == torch.float64 else made


@contextlib.contextmanager
def using(model, name):
    """PEFT's layers run an adapter, or none."""
    wrappers = [m for m in model.modules() if hasattr(m, "lora_A")]
    before = [(m._active_adapter, m._disable_adapters) for m in wrappers]
    for m in wrappers:
        m._active_adapter, m._disable_adapters = [name] if name else m._active_adapter, name is None
    yield
    for m, (active, off) in zip(wrappers, before):
        m._active_adapter, m._disable_adapters = active, off


class Loop(test_messages.Loop):
    """With each agent's own adapter; what a low-rank agent writes is made anew for whoever reads it."""

    def using(self, i):
        who, scope = self.s.agents[i], self.s.adapter_scope
        bare = who.low_rank or (scope == "final_only" and i < len(self.s.agents) - 1)
        name = who.adapter if scope == "per_role" else "default"
        return using(self.s.model, None if bare else name)

    def rows(self, i, move):
        layout, _ = self.layout(i)
        made, parts = {}, []
        for w, n, position in layout:
            by = position - self.wrote(w)[0][n][2] + move
            if (w, by) not in made:
                made[w, by] = self.read_by(i, w, by) if self.s.agents[w].low_rank else self.turn(w, by)
            parts.append([(k[:, :, n : n + 1], v[:, :, n : n + 1]) for k, v in made[w, by]])
        return [tuple(torch.cat(x, 2) for x in zip(*layer)) for layer in zip(*parts)]

    def read_by(self, i, w, move):
        """K and V of the turn of agent w, by the projections of agent i."""
        seen, layers = {}, body(self.s.model).layers
        hooks = [
            x.input_layernorm.register_forward_hook(lambda m, _, y, n=n: seen.update({n: y})) for n, x in enumerate(layers)
        ]
        self.turn(w, move)
        for hook in hooks:
            hook.remove()
        positions = torch.arange(seen[0].shape[1])[None] + self.layout(w)[1] + move
        cos, sin = body(self.s.model).rotary_emb(seen[0], positions)
        found = []
        with self.using(i):
            for n, layer in enumerate(layers):
                attention = layer.self_attn
                heads = lambda y: y.unflatten(-1, (-1, attention.head_dim))  # noqa: B023, E731
                k, v = heads(attention.k_proj(seen[n])), heads(attention.v_proj(seen[n])).transpose(1, 2)
                k = (attention.k_norm(k) if hasattr(attention, "k_norm") else k).transpose(1, 2)
                left, right = k.chunk(2, -1)
                found.append((k * cos[:, None] + torch.cat((-right, left), -1) * sin[:, None], v))
        return found

    def turn(self, i, move):
        self.message(i)
        with self.using(i):
            return super().turn(i, move)

    def message(self, j):
        with self.using(j):
            return super().message(j)

    def logits(self, ids):
        with self.using(len(self.s.agents) - 1):
            return super().logits(ids)


@pytest.mark.parametrize("options", CONTENTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_equal_the_loop(shape, options):
    """And are not those of agents that run with adapters of their own."""
    s = team(SHAPES[shape], **options)
    check_loss(s, Loop)


@pytest.mark.parametrize("targets", [("v_proj",), ("k_proj",), ("q_proj", "v_proj"), "all-linear"], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2"])
def test_of_families_and_layers(family, targets):
    """Keys behind a norm too."""
    check_loss(team(SHAPES["all read"], family, targets=targets), Loop)


@pytest.mark.parametrize("scope", ["shared", "final_only"])
def test_of_other_scopes(scope):
    check_loss(team(SHAPES["all read"], scope=scope), Loop)


@pytest.mark.parametrize("shape", ["all read", "chain"])
def test_generated_tokens(shape):
    check_greedy_tokens(team(SHAPES[shape]), Loop)


# ---- full rows -------------------------------------------------------------------------------------------------------

READ_ONCE = [doc(0, []), agent("a", 2, ["doc"]), agent("solver", 0, ["doc", "a"])]
READ_EACH = [
    replace(READ_ONCE[0], name="doc_a", role="reader", low_rank=False),
    replace(READ_ONCE[0], name="doc_s", role="answers", low_rank=False),
    replace(READ_ONCE[1], reads=["doc_a"], role="reader"), replace(READ_ONCE[2], reads=["doc_s", "a"], role="answers"),
]  # fmt: skip
BY_ROLE = [replace(x, role=role) for x, role in zip(READ_ONCE, (None, "reader", "answers"))]
WHOLE = dict(sinks=0, targets=("k_proj", "v_proj"))


def gap(family="llama", scale=1.0, **options) -> float:
    """Of the logits of an answer's first token: between agents that read one agent's rows and those that run over the text."""
    once, each = (team(agents, family, **WHOLE, **options) for agents in (BY_ROLE, READ_EACH))
    for s in (once, each):
        for name, p in s.model.named_parameters():
            p.data *= scale if "lora_B" in name else 1
    with torch.no_grad():
        return float((once(QUESTIONS).logits - each(QUESTIONS).logits).abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_when_they_are_what_each_agent_would_have_made(family):
    """Where adapters change no hidden state that rows come from; else they differ by how much they change."""
    assert gap(family, layers_to_transform=[2]) < 1e-10
    assert gap(family, scale=0.0) < 1e-10
    small, large = gap(family, scale=1e-3), gap(family)
    assert 1e-9 < small < 1e-2 * large


def test_readers_have_fewer_bytes():
    """The rows once, and r numbers for K and V of each, layer and reader, in place of their own."""
    rows, read = [], []
    for agents in (BY_ROLE, READ_EACH):
        s = team(agents, dtype=torch.float32, **WHOLE)
        with measuring(s.device) as meter, torch.no_grad():
            trace = s.communicate(s.fields_of(QUESTIONS))
        rows.append(trace.rows)
        read.append(meter.cost.read["a"])
    prompts = sum(len(s.prompt_ids(READ_ONCE[0], f)) for f in s.fields_of(QUESTIONS))
    layers, row, r = 3, 2 * 2 * 8 * 4, 3
    assert read[1] == Size(prompts, prompts * layers * row) and read[0] == Size(prompts, prompts * layers * (row + 2 * r * 4))
    assert rows[0] == rows[1]  # those that the last agent reads
    held = team(BY_ROLE, dtype=torch.float32, **WHOLE)
    with torch.no_grad():
        board = Board(held, Trace(held.model, 3))
        board.write(board.groups[0], held.fields_of(QUESTIONS))
        views = [board.read(i, held.fields_of(QUESTIONS)) for i in (1, 1)]
    assert views[0].rows == prompts  # however many readers there are


def test_rows_stay_as_long_as_somebody_reads_them():
    s = team(READ_ONCE)
    with torch.no_grad():
        empty = Trace(s.model, 3)
        trace = s.communicate(s.fields_of(QUESTIONS), empty)
        before = trace.keys_values(1, 0)
        more = empty.fork(1)[0]
        s.model(input_ids=torch.arange(2, 5).expand(3, -1), past_key_values=more)  # into the first rows that are free
        for x, y in zip(trace.keys_values(1, 0), before):
            assert_close(x, y, 1e-12)
        held = empty.rows
        del trace, more
        assert held > 0 and empty.rows == 0


@pytest.mark.parametrize("shape", ["all read", "two"])
def test_few_queries_have_kernels_of_their_own(shape, monkeypatch):
    """Latent steps and answers' tokens; others read tiles. The same loss and gradients as with tiles alone."""
    if ops.available()["cpu"] is not None:
        pytest.skip("the C++ extension is not built")
    found, kinds = [], []
    for few in (True, False):
        if not few:
            monkeypatch.setattr(low_rank, "few_kernels", lambda *_: False)
        seen = []
        spy = lambda *args, seen=seen: seen.append(type(args[5])) or ops_low_rank.low_rank_attention(*args)  # noqa: E731
        monkeypatch.setattr(low_rank, "low_rank_attention", spy)
        s = team(SHAPES[shape], dtype=torch.float32)
        out = s(QUESTIONS, ANSWERS)
        out.loss.backward()
        found.append((out.loss.detach(), gradients(s)))
        kinds.append(set(seen))
    assert ops_low_rank.Whole in kinds[0] and kinds[1] == {list}
    assert_close(*(loss for loss, _ in found), 1e-5)
    assert_close(*(grads for _, grads in found), 1e-4)


# ---- batches, branches, graphs ---------------------------------------------------------------------------------------


def test_ragged_batches_equal_single_runs():
    """Also agents without a turn; and who leaves between two turns."""
    agents = [doc("a", []), agent("b", "b", ["doc"]), agent("solver", 0, ["b", "doc"])]
    rows = [{"question": q, "a": a, "b": b} for q, a, b in zip(QUESTIONS, (2, 0, 1), (0, 3, 1))]
    for options in (dict(no_latents="skip"), LATENT):
        s = team(agents, **options)
        check_ragged(s, rows)


@pytest.mark.parametrize("shape", ["all read", "behind another"])
def test_checkpointing_gives_the_same_gradients(shape):
    check_checkpointing(team(SHAPES[shape]).train())


def test_compiled_layers_give_the_same_gradients():
    s = team(SHAPES["all read"], "qwen3")
    s(QUESTIONS, ANSWERS).loss.backward()
    want = gradients(s)
    torch._dynamo.reset()
    for layer in body(s.model).layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    s(QUESTIONS, ANSWERS).loss.backward()
    assert_close(gradients(s), want, TIGHT)
    torch._dynamo.reset()


def test_branches_of_which_one_is_detached():
    """Codes get the gradient of who reads them and learns: here as if the other branch had been written without gradients."""
    found = []
    for detached in (True, False):
        s = team(READ_ONCE)
        trace = s.communicate(s.fields_of(QUESTIONS[:1]))
        left, right = trace.fork(2)
        left.agent, right.agent = "left", "right"
        s.model.set_adapter("solver")
        run = lambda on, *ids, m=s.model: m(input_ids=torch.tensor([ids]), past_key_values=on).logits  # noqa: E731
        run(left, 5, 6)
        with torch.set_grad_enabled(detached):
            run(right, 7, 8, 9)
        joined = Trace.join([left, right.detach() if detached else right])
        run(joined, 3, 4).square().sum().backward()
        found.append(gradients(s))
    assert_close(*found, TIGHT)
    assert any("v_proj.lora_B.solver" in name and g.abs().max() > 1e-3 for name, g in found[0].items())


@pytest.mark.parametrize("scope", [dict(grad_scope="detach_trace"), dict(grad_scope="last_k", last_k=2)], ids=str)
def test_agents_that_do_not_learn(scope):
    """The loss is the same; codes of an agent that learns get their gradient, whoever wrote the rows."""
    s, whole = team(READ_ONCE, **scope), team(READ_ONCE)
    out = s(QUESTIONS, ANSWERS)
    out.loss.backward()
    mine, want = gradients(s), whole(QUESTIONS, ANSWERS)
    want.loss.backward()
    assert_close(out.loss, want.loss, TIGHT)
    full = gradients(whole)
    same = lambda role: all(torch.allclose(mine[n], g, atol=1e-9) for n, g in full.items() if f".{role}." in n and n in mine)  # noqa: E731
    assert same("solver") and any(".solver." in n for n in mine)
    assert any(".a." in n and g.abs().max() > 0 for n, g in mine.items()) == ("last_k" in scope)


def test_a_gradient_report():
    s = team(SHAPES["experts"])
    report = s.gradient_report(QUESTIONS, ANSWERS)
    s(QUESTIONS, ANSWERS).loss.backward()
    assert report.norm == pytest.approx(sum(float(g.square().sum()) for g in gradients(s).values()) ** 0.5)


def test_beside_rows_in_8_bits():
    """In one attention: rows as they were written, quantised ones, and low-rank ones; what is read is what training reads."""
    s = team([doc(0, []), agent("a", 3, ["doc"], quantized="int8"), agent("solver", 0, ["a", "doc"])])
    out = s(QUESTIONS, ANSWERS)
    with torch.no_grad():
        assert_close(s(QUESTIONS, ANSWERS).loss, out.loss, 1e-6)


def test_beside_rows_that_some_heads_see(tmp_path):
    """In one attention, whose gradient is that of differences of the loss."""
    some = {"agent": "a", "select": {"heads": [1]}}
    s = team([doc(0, []), agent("a", 2, ["doc"]), agent("solver", 0, [some, "doc"])])
    with torch.no_grad():
        trace = s.communicate(s.fields_of(QUESTIONS))
        assert any(x.heads == (1,) for x in trace.segments) and any(x.start >= CODED for x in trace.segments)
        trace.save(tmp_path / "trace")
        want = s(QUESTIONS, ANSWERS, trace=Trace.load(tmp_path / "trace", s.model)).logits
        assert_close(s(QUESTIONS, ANSWERS).logits, want, 1e-12)
    s(QUESTIONS, ANSWERS).loss.backward()
    given = gradients(s)
    for part in (
        "layers.0.self_attn.k_proj.lora_A.solver",
        "layers.1.self_attn.v_proj.lora_B.a",
        "layers.1.self_attn.q_proj.lora_B.a",
    ):
        name, p = next((n, p) for n, p in s.named_parameters() if part in n)
        p.requires_grad_(False)  # its version may change
        losses = []
        for step in (1e-5, -2e-5):
            p[0, 1] += step
            losses.append(s(QUESTIONS, ANSWERS).loss.item())
        p[0, 1] += 1e-5
        p.requires_grad_()
        assert given[name][0, 1].item() == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5, abs=1e-9)


def test_threads_take_turns():
    """A turn on the bare model, and adapters that are looked at, are nobody else's."""
    s, found = team(SHAPES["experts"]), []
    want = alone(s)

    def several():
        found.extend(alone(s) for _ in range(3))

    threads = [threading.Thread(target=several) for _ in range(2)]
    with adapters.switched_off(s.model):
        for thread in threads:
            thread.start()
        threads[0].join(0.3)  # both have come to where they wait
    for thread in threads:
        thread.join()
    assert len(found) == 6 and all(loss == pytest.approx(want, abs=1e-9) for loss in found)


@torch.no_grad()
def alone(s) -> float:
    return float(s(QUESTIONS, ANSWERS).loss)


@torch.no_grad()
def test_rows_are_constant():
    """Also when the weights change that they were made with."""
    s = team(SHAPES["all read"])
    trace = s.communicate(s.fields_of(QUESTIONS))
    before = trace.keys_values(1, 0)
    for name, p in s.model.named_parameters():
        if "lora_B" in name:
            p.add_(0.05)
    assert all(map(torch.equal, trace.keys_values(1, 0), before))


# ---- which rows, and files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", [{"rows": 3}, {"every": 2}, {"layers": [1]}], ids=str)
def test_some_of_the_rows_and_in_a_file(select, tmp_path):
    """A file, and whatever copies rows, has them as they are read."""
    s = team([doc(0, []), agent("solver", 0, [{"agent": "doc", "select": select}])], "qwen3", scope="shared", sinks=1)
    with torch.no_grad():
        trace = s.communicate(s.fields_of(QUESTIONS))
        trace.save(tmp_path / "trace")
        loaded = Trace.load(tmp_path / "trace", s.model)
        assert any(x.start >= CODED for x in trace.segments) and not any(x.start >= CODED for x in loaded.segments)
        assert loaded.token_ids(1).tolist() == trace.token_ids(1).tolist()
        want = s(QUESTIONS, ANSWERS, trace=loaded).logits
        assert_close(s(QUESTIONS, ANSWERS).logits, want, 1e-12)
    for name in ("repack", "packed_rows", "quantize"):
        with pytest.raises(ValueError, match="expected rows as they were written, got .*codes"):
            getattr(trace, name)()


def test_without_adapters_they_are_plain_rows():
    """Which may come later: then what does not fit is told in the agent's turn."""
    agents = [doc(0, []), agent("solver", 0, ["doc"])]
    s, plain = (
        MultiAgentSystem(tiny("phi3"), tokenizer(), a) for a in (agents, [replace(agents[0], low_rank=False), agents[1]])
    )
    assert_close(s(QUESTIONS).logits, plain(QUESTIONS).logits, 1e-12)
    s.model = with_lora(s.model)
    with pytest.raises(ValueError, match="expected attention with k_proj and v_proj, on the fused tier, got Phi3Attention"):
        s(QUESTIONS)


def test_they_are_saved_and_loaded(tmp_path):
    s = team(SHAPES["experts"], dtype=torch.float32)
    s.save_pretrained(tmp_path)
    loaded = MultiAgentSystem.from_pretrained(tmp_path, exact_norms(tiny("llama", torch.float32, patch=False)), tokenizer())
    assert loaded.agents == SHAPES["experts"] and "doc" not in loaded.model.peft_config
    tokens = s.generate_tokens(QUESTIONS, max_new_tokens=4, temperature=0)
    assert loaded.generate_tokens(QUESTIONS, max_new_tokens=4, temperature=0) == tokens
    described = json.loads((tmp_path / "agents.json").read_text())
    assert "### doc: T = 0, reads nobody, on the bare model" in contents(described, "team")[1]
    with pytest.raises(ValueError, match="low_rank of agent 'doc': expected False in vLLM, got True"):
        check_team("team", {**described, "agents": [{**a, "reads": None} for a in described["agents"]]})
    with pytest.raises(ValueError, match="system: expected agents that .*, got low_rank of agent 'doc'"):
        plain_loss(s, QUESTIONS, ANSWERS)
    with pytest.raises(ValueError, match="agent 'doc': low_rank: expected False where processes share the model's weights"):
        engine = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=2))
        check_engine(s, SimpleNamespace(fsdp="", world_size=1), engine)


def test_as_text_agents_they_are_like_others():
    text, trained = (
        TextAgents(s, 2) for s in (team(SHAPES["experts"]), team([replace(a, low_rank=False) for a in SHAPES["experts"]]))
    )
    answers = [method.answer(QUESTIONS, max_new_tokens=3, temperature=0.0) for method in (text, trained)]
    assert answers[0].texts == answers[1].texts


# ---- descriptions that are refused -----------------------------------------------------------------------------------


def test_agents_that_are_refused():
    for coded, quantized, message in ((1, None, "low_rank: expected True or False, got 1"),
                                         (True, "int8", "quantized: expected None with low_rank, got 'int8'")):  # fmt: skip
        with pytest.raises(ValueError, match=f"agent 'doc': {message}"):
            agent("doc", 0, [], low_rank=coded, quantized=quantized)
    for by in ("attention", "similarity"):
        chosen = [
            agent("solver", 0, [{"agent": "doc", "select": {"rows": 2, "by": by}}]),
            agent("solver", 0, ["doc"], max_rows=9, max_rows_by=by),
        ]
        for last in chosen:
            with pytest.raises(ValueError, match=f"agent 'solver': expected another choice of rows than by {by}.* of 'doc'"):
                team([doc(0, []), last])
    for select in ({"heads": [0]}, {"rows": 2, "by": "learned"}):
        with pytest.raises(ValueError, match="agent 'solver': reads: doc: select: expected no heads, and no learned choice"):
            team([doc(0, []), agent("solver", 0, [{"agent": "doc", "select": select}])])
    with pytest.raises(ValueError, match="agent 'doc': low_rank: expected False for who answers"):
        team([agent("a", 1, []), doc(0, ["a"])])


def test_models_that_are_refused():
    agents = [doc(0, []), agent("solver", 0, ["doc"])]
    for options in (dict(use_dora=True), dict(lora_bias=True)):
        with pytest.raises(ValueError, match="agent 'doc': low_rank: expected plain LoRA on k_proj.* got .* in layer 0"):
            team(agents, **options)
    with pytest.raises(ValueError, match="agent 'doc': low_rank: expected plain LoRA on k_proj.* got Linear in layer 0"):
        ia3 = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
        MultiAgentSystem(get_peft_model(tiny("llama", patch=False), ia3), tokenizer(), agents)
    for family, name in (("phi3", "Phi3Attention"), ("olmo2", "Olmo2Attention")):
        with pytest.raises(ValueError, match=f"expected attention with k_proj and v_proj, on the fused tier, got {name}"):
            MultiAgentSystem(with_lora(tiny(family, patch=False)), tokenizer(), agents)
    on_host = patch_model(with_lora(tiny("llama", patch=False)), offload="cpu")
    with pytest.raises(ValueError, match="agent 'doc': low_rank: expected rows on the device.* got offload='cpu'"):
        MultiAgentSystem(on_host, tokenizer(), agents)
    both = with_lora(tiny("llama", patch=False))
    both.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    both.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"model: expected one active adapter, got \['default', 'second'\]"):
        MultiAgentSystem(both, tokenizer(), agents)

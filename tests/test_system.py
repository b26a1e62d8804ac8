"""A system of agents against a cache-free unroll, single questions, finite differences and the unpatched model."""

import contextlib
import inspect
from dataclasses import asdict, replace

import pytest
import torch
from models import EOS, assert_close, body, gradients, tiny, with_lora
from systems import AGENTS, ANSWERS, QUESTIONS, roles_model, system, tokenizer, unroll, unrolled_loss

import diffmas
from diffmas import Agent, MultiAgentSystem
from diffmas.agents import prompts
from diffmas.agents.adapters import add_lora
from diffmas.agents.options import Options
from diffmas.agents.realign import REALIGN
from diffmas.models.patch import patch_of
from diffmas.trace import pool

TIGHT = 1e-9  # everything is float64

SETTINGS = [
    {},
    dict(trace_content="latent_only"),
    dict(realign="none"),
    dict(realign="soft_token", trace_content="latent_only"),
    dict(realign="learned"),
    dict(no_latents="skip", agents=[Agent("a", "w5 {question}"), *AGENTS[1:]]),
    dict(agents=[Agent("a", "w5 {question}"), *AGENTS[1:]]),
]


@pytest.mark.parametrize("family", ["qwen3", "phi3", "cohere"])
def test_handoff_equals_one_long_context(family):
    s = system(family)
    with torch.no_grad():
        out = s(QUESTIONS, ANSWERS)
        for b, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS)):
            want = unroll(s, question, answer)
            assert_close(out.logits[b, : len(want)], want, TIGHT)
        first = s(QUESTIONS).logits
        for b, question in enumerate(QUESTIONS):
            assert_close(first[b], unroll(s, question), TIGHT)


@pytest.mark.parametrize("options", SETTINGS, ids=lambda o: "-".join(map(str, o)) or "default")
def test_loss_and_gradients_equal_the_unroll(options):
    s = system(**options)
    s(QUESTIONS, ANSWERS).loss.backward()
    got = gradients(s)
    want_loss = unrolled_loss(s, QUESTIONS, ANSWERS)
    want_loss.backward()
    want = gradients(s)
    assert len([n for n in want if "lora_" in n]) == 12
    if options.get("realign") == "learned":
        assert want["realign.weight"].abs().max() > 0
    assert_close(got, want, TIGHT)


@pytest.mark.parametrize("family", ["qwen3", "phi3", "cohere"])
def test_gradients_by_family(family):
    s = system(family)
    s(QUESTIONS, ANSWERS).loss.backward()
    got = gradients(s)
    unrolled_loss(s, QUESTIONS, ANSWERS).backward()
    assert_close(got, gradients(s), 1e-6 if family == "cohere" else TIGHT)  # Cohere rotates in float32


def test_directional_finite_difference():
    s = system()
    parameters = [p for p in s.parameters() if p.requires_grad]
    s(QUESTIONS, ANSWERS).loss.backward()
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions))

    def at(step):
        with torch.no_grad():
            for p, d in zip(parameters, directions):
                p += step * d
            loss = float(s(QUESTIONS, ANSWERS).loss)
            for p, d in zip(parameters, directions):
                p -= step * d
        return loss

    assert abs((at(1e-7) - at(-1e-7)) / 2e-7 - slope) < 1e-6 * abs(slope)


@pytest.mark.parametrize("trace_content", ["all", "latent_only"])
def test_ragged_batch_equals_single_runs(trace_content):
    s = system(trace_content=trace_content)
    out = s(QUESTIONS, ANSWERS)
    out.loss.backward()
    got, total, labels = gradients(s), 0.0, 0
    for b, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS)):
        single = s([question], [answer])
        n = single.labels.numel()
        assert_close(out.logits[b, :n], single.logits[0], TIGHT)
        assert (out.labels[b, n:] == -100).all()
        total, labels = total + single.loss * n, labels + n
    assert_close(out.loss, total / labels)
    (total / labels).backward()
    assert_close(got, gradients(s), TIGHT)


def test_no_padding_is_stored():
    s = system()
    trace = s(QUESTIONS, ANSWERS).trace
    kinds = [(seg.agent, seg.kind, seg.length) for seg in trace.segments if seg.sequence == 1]
    assert kinds == [
        ("planner", "prompt", 6), ("planner", "latent", 3), ("critic", "prompt", 6), ("critic", "latent", 2),
        ("solver", "prompt", 7),
    ]  # fmt: skip
    assert trace.lengths == [4 + 3 + 4 + 2 + 3 + 4, 6 + 3 + 6 + 2 + 5 + 2, 3 + 3 + 3 + 2 + 2 + 3]


@pytest.mark.parametrize("options", [{}, dict(no_latents="skip", agents=[Agent("a", "w5 {question}"), *AGENTS[1:]])])
def test_a_training_step_allocates_the_rows_that_it_writes(options):
    store = system(**options)(QUESTIONS, ANSWERS).trace._store
    rounded = 15  # of this head size, to a multiple of 16
    assert all(0 <= p.rows - store.top < len(QUESTIONS) + rounded for p in store.pools)


@pytest.mark.parametrize("samples", [1, 3])
def test_generation_allocates_once(samples, monkeypatch):
    s, sizes = system(), []
    make = pool.rows_of_heads
    monkeypatch.setattr(pool, "rows_of_heads", lambda rows, *a: sizes.append(rows) or make(rows, *a))
    s.generate(QUESTIONS, max_new_tokens=4, samples=samples, seed=0)
    assert len(sizes) == 2 * len(patch_of(s.model).layers)  # K and V of each layer


def test_one_agent_without_latent_steps_is_the_model():
    s = system(agents=[Agent("solver", "w9 {question}")], lora=False)
    plain = tiny("qwen3", patch=False)
    for question, answer in zip(QUESTIONS, ANSWERS):
        ids = torch.tensor([s.prompt_ids(s.agents[0], {"question": question}) + s.answer_ids(answer)])
        count = len(s.answer_ids(answer))
        want = plain(ids).logits[0, -count - 1 : -1]
        out = s([question], [answer])
        assert_close(out.logits[0], want)
        assert_close(out.loss, torch.nn.functional.cross_entropy(want, ids[0, -count:]))


# ---- which agents get gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, needs_grad",
    [
        (dict(grad_scope="full"), {"planner", "critic", "solver"}),
        (dict(grad_scope="detach_trace"), {"solver"}),
        (dict(grad_scope="last_k", last_k=2), {"critic", "solver"}),
    ],
)
def test_grad_scope(options, needs_grad):
    s = MultiAgentSystem(roles_model(), tokenizer(), AGENTS, adapter_scope="per_role", **options)
    out = s(QUESTIONS, ANSWERS)
    out.loss.backward()
    grads = gradients(s)
    roles = {r for r in ("planner", "critic", "solver") if any(f".{r}." in n and g.abs().max() > 0 for n, g in grads.items())}
    assert roles == needs_grad
    shared = system()
    full = shared(QUESTIONS, ANSWERS)
    assert_close(out.loss, full.loss)  # the scope changes gradients, never the loss
    if needs_grad == {"planner", "critic", "solver"}:  # the shared adapter's gradient is the sum of the roles'
        full.loss.backward()
        for name, g in gradients(shared).items():
            assert_close(sum(grads[name.replace("default", role)] for role in needs_grad), g)


def test_agents_of_a_role_share_its_adapter(tmp_path):
    agents = [replace(agent, role="reader") if agent is not AGENTS[-1] else agent for agent in AGENTS]
    made = add_lora(tiny("qwen3", patch=False), agents, "per_role")
    assert sorted(made.peft_config) == ["reader", "solver"]
    s = MultiAgentSystem(roles_model(("reader", "solver")), tokenizer(), agents, adapter_scope="per_role")
    s(QUESTIONS, ANSWERS).loss.backward()
    grads = gradients(s)
    each = MultiAgentSystem(roles_model(), tokenizer(), AGENTS, adapter_scope="per_role")
    each(QUESTIONS, ANSWERS).loss.backward()
    own = gradients(each)
    assert sum(".reader." in name for name in grads) == 12
    for name, g in grads.items():
        others = ("planner", "critic") if ".reader." in name else ("solver",)
        role = "reader" if ".reader." in name else "solver"
        assert_close(g, sum(own[name.replace(f".{role}.", f".{other}.")] for other in others))
    s.save_pretrained(tmp_path)
    loaded = MultiAgentSystem.from_pretrained(tmp_path, tiny("qwen3", patch=False), tokenizer())
    assert loaded.agents == agents and sorted(loaded.model.peft_config) == ["reader", "solver"]


def test_a_role_that_means_another_agent_is_refused():
    agents = [replace(AGENTS[0], role="critic"), *AGENTS[1:]]
    with pytest.raises(ValueError, match="'planner': role: expected a name that no agent of another role has, got 'critic'"):
        system(agents=agents)
    system(agents=[replace(agent, role="critic") for agent in AGENTS])  # one that they share


def test_final_only_leaves_the_others_without_adapter():
    s = MultiAgentSystem(with_lora(tiny("qwen3", patch=False)), tokenizer(), AGENTS, adapter_scope="final_only")
    trace = s(QUESTIONS, ANSWERS).trace
    plain = MultiAgentSystem(tiny("qwen3", patch=False), tokenizer(), AGENTS)
    others, n = plain.communicate(plain.fields_of(QUESTIONS)), 4 + 3 + 4 + 2
    assert_close(trace.keys_values(2, 0)[1][:n], others.keys_values(2, 0)[1])
    assert (trace.keys_values(2, 0)[1][n:] != plain(QUESTIONS, ANSWERS).trace.keys_values(2, 0)[1][n:]).any()


@pytest.mark.parametrize("scope", ["shared", "per_role", "final_only"])
def test_checkpointing_gives_the_same_gradients(scope):
    """A layer is recomputed with the adapter of its forward, whichever is active by then."""
    s = MultiAgentSystem(roles_model() if scope == "per_role" else with_lora(tiny("qwen3", patch=False)), tokenizer(), AGENTS,
                         adapter_scope=scope).train()  # fmt: skip
    with torch.no_grad():
        for i, (name, p) in enumerate(s.model.named_parameters()):
            if "lora_B" in name:
                p.add_(0.05 * (i % 5))  # roles that differ
    s(QUESTIONS, ANSWERS).loss.backward()
    want = gradients(s)
    s.model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = s(QUESTIONS, ANSWERS).loss
    loss.backward(retain_graph=True)
    assert_close(gradients(s), want, 1e-9)
    loss.backward()  # which recomputes again
    assert_close(gradients(s), want, 1e-9)


# ---- realign ---------------------------------------------------------------------------------------------------------


def test_realign_modes():
    model = tiny("qwen3", patch=False)
    e_in, e_out = model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()
    h = torch.randn(5, 32, dtype=torch.float64)
    norm = e_in.norm(dim=-1).mean()
    mapped = {mode: diffmas.agents.realign.Realign(model, mode)(h) for mode in REALIGN}
    assert torch.equal(mapped["none"], h)
    assert_close(mapped["norm"], h / h.norm(dim=-1, keepdim=True) * norm)
    gram = e_out.T @ e_out
    W = torch.linalg.inv(gram + 1e-3 * gram.diagonal().mean() * torch.eye(32)) @ e_out.T @ e_in
    want = h @ W
    assert_close(mapped["ridge"], want / want.norm(dim=-1, keepdim=True) * norm)
    assert_close(mapped["learned"], mapped["ridge"])
    assert_close(mapped["soft_token"], (h @ e_out.T).softmax(-1) @ e_in)
    with pytest.raises(ValueError, match="realign: expected one of"):
        diffmas.agents.realign.Realign(model, "magic")


@pytest.mark.parametrize("mode", REALIGN)
def test_realign_ends_where_the_input_embedding_is(mode, monkeypatch):
    """Other layers may be on other devices; "meta" is one that everything has."""
    model = tiny("qwen3", patch=False)
    realign = diffmas.agents.realign.Realign(model, mode).to("meta")
    model.to("meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no "meta"
    assert realign(torch.randn(5, 32)).device.type == "meta"


def test_ridge_is_the_identity_for_tied_embeddings():
    model = tiny("qwen3", patch=False, tie_word_embeddings=True)
    h = torch.randn(5, 32, dtype=torch.float64)
    ridge, norm = (diffmas.agents.realign.Realign(model, mode)(h) for mode in ("ridge", "norm"))
    assert_close(ridge, norm, 5e-3)


# ---- generate --------------------------------------------------------------------------------------------------------


def greedy_by_hand(s, question, count):
    """The cache-free unroll, one token at a time."""
    ids = []
    while len(ids) < count and EOS not in ids:
        with torch.no_grad():
            ids.append(int(unroll(s, question, generated=ids).argmax()))
    return ids


@pytest.mark.parametrize("family", ["qwen3", "phi3", "cohere"])
def test_greedy_equals_a_loop_by_hand(family):
    s = system(family)
    tokens = s.generate_tokens(QUESTIONS, max_new_tokens=6, temperature=0)
    for b, question in enumerate(QUESTIONS):
        assert tokens[b][0] == greedy_by_hand(s, question, 6)


def test_sampling_depends_on_seed_not_on_batching():
    s = system()
    sample = lambda **kw: s.generate(QUESTIONS, max_new_tokens=8, temperature=1.0, samples=3, **kw)  # noqa: E731
    together = sample(seed=3)
    assert together == sample(seed=3, batch_size=1) == sample(seed=3, batch_size=2)
    assert together != sample(seed=4)
    assert len({t for row in together for t in row}) > 3
    assert s.generate(QUESTIONS, max_new_tokens=8, temperature=1.0, seed=3) == [row[:1] for row in together]


def test_sampling_follows_the_distribution():
    """First tokens over many samples against the model's own probabilities, with and without top-p."""
    s = system(agents=[Agent("solver", "w9 {question}")])
    p = (s(["w10"]).logits[0, 0].float() / 2.0).softmax(-1).detach()
    for top_p in (1.0, 0.7):
        tokens = s.generate_tokens(["w10"], max_new_tokens=1, temperature=2.0, top_p=top_p, seed=0, samples=4000)
        counts = torch.bincount(torch.tensor(tokens[0]).flatten(), minlength=64) / 4000
        want = p
        if top_p < 1:
            order = p.argsort(descending=True)
            kept = order[: int((p[order].cumsum(0) < top_p).sum()) + 1]
            want = torch.zeros_like(p).index_copy(0, kept, p[kept] / p[kept].sum())
            assert (counts[want == 0] == 0).all()
        assert (counts - want).abs().sum() < 0.12


def test_generate_stops():
    s = system()
    tokens = s.generate_tokens(QUESTIONS, max_new_tokens=30, temperature=1.5, seed=5, samples=8)
    ended = [t for row in tokens for t in row if len(t) < 30]
    assert ended and all(t[-1] == EOS and EOS not in t[:-1] for t in ended)
    texts = s.generate(QUESTIONS, max_new_tokens=12, temperature=0)
    word = texts[0][0].split()[2]
    cut = s.generate(QUESTIONS, max_new_tokens=12, temperature=0, stop=[word])
    assert cut[0][0] == texts[0][0].split(word)[0]


def test_modes_are_left_alone():
    """A system takes its model's mode; generate and a method's loss give every submodule its own back."""
    from diffmas.evaluation.baselines import Latent

    s = system()
    assert not s.training and not s.realign.training
    s.train()
    body(s.model).layers[1].eval()
    modes = [m.training for m in s.modules()]
    s.generate(QUESTIONS[:1], max_new_tokens=2, seed=0)
    Latent(s).loss(QUESTIONS[:1], ANSWERS[:1])
    assert [m.training for m in s.modules()] == modes
    assert MultiAgentSystem(s.model, s.tokenizer, AGENTS).training and [m.training for m in s.modules()] == modes


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"text": "w10"}, r"questions\[2\], agent 'planner': its prompt needs the field \{question\}"),
        ("w10 " * 260, r"questions\[2\], agent 'critic': expected its prompt and 2 latent .* got 265 before it and 264 of"),
        ("w10 " * 164, r"questions\[2\], agent 'solver': expected its prompt and answer .* got 337 before it and 177 of"),
    ],
)
def test_all_questions_are_checked_before_any_agent_runs(bad, message, monkeypatch):
    s = system()
    monkeypatch.setattr(s, "think", None)
    with pytest.raises(ValueError, match=message):
        s.generate(["w10", "w11", bad], max_new_tokens=12, batch_size=1)


@pytest.mark.parametrize("positions", ["keep", "reindex"])
@pytest.mark.parametrize("trace_content", ["all", "latent_only"])
def test_what_is_checked_is_where_agents_end_up(trace_content, positions, monkeypatch):
    s = system(trace_content=trace_content, positions=positions)
    starts, prompt = [], prompts.prompt_that_fits
    monkeypatch.setattr(prompts, "prompt_that_fits", lambda *args: starts.append(args[4]) or prompt(*args))
    s.tokenize(s.fields_of(QUESTIONS), [0] * 3)
    assert starts[2::3] == s.communicate(s.fields_of(QUESTIONS)).next_positions


# ---- against the plain Hugging Face way ------------------------------------------------------------------------------


@pytest.mark.parametrize("trace_content", ["all", "latent_only"])
def test_plain_hugging_face_agrees(trace_content):
    from diffmas.evaluation.plain_hf import plain_loss

    s = system(trace_content=trace_content)
    out = s(QUESTIONS, ANSWERS)
    out.loss.backward()
    got = gradients(s)
    loss = plain_loss(s, QUESTIONS, ANSWERS)
    loss.backward()
    assert_close(out.loss, loss, TIGHT)
    assert_close(got, gradients(s), TIGHT)


def test_options_have_one_list_of_names_and_defaults():
    parameters = inspect.signature(MultiAgentSystem).parameters
    assert {n: parameters[n].default for n in list(parameters)[3:]} == {**asdict(Options()), "others": None}
    described = system().describe()
    of_class = {"class": "diffmas.agents.system.MultiAgentSystem", "own_options": {}, "others": {}}
    assert {**of_class, "agents": described["agents"], **asdict(Options(chat_template=False))} == described

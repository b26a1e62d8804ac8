"""The gradient report against three oracles: plain Hugging Face code whose K/V keep their gradients, an adapter for each agent,
and the products of which the gradient of a linear layer is the sum."""

import contextlib
import copy
import json
import math

import pytest
import systems
import tiny_systems as tiny
import torch
from models import body
from transformers import DynamicCache

from diffmas import patch_model
from diffmas.agents.gradient_report import layer_groups, norm_of
from diffmas.agents.gradients import GradientWatch
from diffmas.evaluation import plain_hf
from diffmas.training import add_lora, lora_config

QUESTIONS, ANSWERS = systems.QUESTIONS, systems.ANSWERS
PASSES = [
    ("planner", "prompt", 0), ("planner", "latent", 1), ("planner", "latent", 2), ("planner", "latent", 3),
    ("critic", "prompt", 0), ("critic", "latent", 1), ("critic", "latent", 2), ("solver", "answer", 0),
]  # fmt: skip
OPTIONS = [{}, {"trace_content": "latent_only", "realign": "norm"}, {"realign": "soft_token"}]


def places(passes):
    return [(p.agent, p.kind, p.step) for p in passes]


def close(got, want):
    assert got == pytest.approx(want, rel=1e-9, abs=1e-12)


def by_layer(gradients: dict[str, torch.Tensor], layers: int = 3) -> list[float]:
    """Norms of named gradients: of each layer's, and of the rest."""
    parts = [[] for _ in range(layers + 1)]
    for name, grad in gradients.items():
        parts[int(name.split("layers.")[1].split(".")[0]) if "layers." in name else layers].append(float(grad.norm()))
    return [math.hypot(*part) for part in parts]


def gradients(system):
    found = {n: p.grad for n, p in system.named_parameters() if p.grad is not None}
    for p in system.parameters():
        p.grad = None
    return found


# ---- rows and hidden states ------------------------------------------------------------------------------------------


def plain_rows(system, monkeypatch):
    """dL/d(K, V) by pass and layer, and dL/dh by pass, of `plain_loss`."""
    rows, hidden = [[] for _ in range(3)], []

    class Keeping(DynamicCache):
        def update(self, k, v, layer, *args, **kwargs):
            for x in (k, v):  # below the first trained weight, rows are leaves
                x.retain_grad() if x.requires_grad else x.requires_grad_()
            rows[layer].append((k, v))
            return super().update(k, v, layer, *args, **kwargs)

    def keep(module, args, output):
        output.last_hidden_state.retain_grad()
        hidden.append(output.last_hidden_state)

    monkeypatch.setattr(plain_hf, "DynamicCache", Keeping)
    hook = body(system.model).register_forward_hook(keep)
    loss = plain_hf.plain_loss(system, QUESTIONS, ANSWERS)
    hook.remove()
    loss.backward()
    norm = lambda *xs: math.hypot(*(0.0 if x.grad is None else float(x.grad.norm()) for x in xs))
    return loss.item(), [[norm(*kv) for kv in by_pass] for by_pass in zip(*rows)], [norm(h) for h in hidden]


@pytest.mark.parametrize("family", ["qwen3", "llama"])  # with a norm between the projection and the row, and without
@pytest.mark.parametrize("options", OPTIONS)
def test_rows_and_hidden_states_against_plain_code(family, options, monkeypatch):
    system = systems.system(family, **options)
    loss, rows, hidden = plain_rows(system, monkeypatch)
    gradients(system)
    report = system.gradient_report(QUESTIONS, ANSWERS)
    assert places(report.passes) == PASSES
    close(report.loss, loss)
    for p, want_rows, want_hidden in zip(report.passes, rows, hidden):
        close(p.rows, want_rows)
        close(p.hidden, want_hidden)
    assert all(norm_of(p.rows) > 0 for p in report.passes)
    latent = norm_of(norm_of(x) for x in rows[1:4])
    close(report.segments()["planner", "latent"], latent)
    assert list(report.segments()) == [(a, k) for a, k, s in PASSES if s < 2]


# ---- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
def test_an_agents_part_is_the_gradient_of_an_adapter_of_its_own(options):
    """Three adapters of the same weights compute what one does, and keep the agents' gradients apart."""
    apart = systems.MultiAgentSystem(
        systems.roles_model(), systems.tokenizer(), systems.AGENTS, adapter_scope="per_role", **options
    )  # fmt: skip
    shared = copy.deepcopy(apart.model)
    planner = {n: p for n, p in shared.named_parameters() if ".planner." in n}
    for name in ("critic", "solver"):
        shared.delete_adapter(name)
    shared.set_adapter("planner")
    shared = systems.MultiAgentSystem(shared, systems.tokenizer(), systems.AGENTS, **options)
    for system in (apart, shared):
        system.realign.to(torch.float64)
    apart(QUESTIONS, ANSWERS).loss.backward()
    found = gradients(apart)
    shared(QUESTIONS, ANSWERS).loss.backward()
    whole = gradients(shared)
    report = shared.gradient_report(QUESTIONS, ANSWERS)
    assert len(planner) == len(whole) == len(found) / 3
    for agent in systems.AGENTS:
        own = {n: g for n, g in found.items() if f".{agent.name}." in n}
        close(report.agents[agent.name], by_layer(own))
    close(report.parameters, by_layer(whole))
    for name, grad in whole.items():
        parts = [found[name.replace(".planner.", f".{agent.name}.")] for agent in systems.AGENTS]
        torch.testing.assert_close(sum(parts), grad)
    of_roles = apart.gradient_report(QUESTIONS, ANSWERS)
    for name, norms in report.agents.items():
        close(of_roles.agents[name], norms)


def products(system):
    """The gradient that each call of a LoRA layer adds to its weight, of its input and its output's gradient: by pass, name."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    calls: dict[str, int] = {}
    hooks = []

    def hook(name):
        def after(module, args, output):
            number = calls[name] = calls.get(name, -1) + 1
            x = args[0].detach().flatten(0, -2)

            def keep(grad):
                found.setdefault(number, {})[name] = grad.flatten(0, -2).T @ x

            output.register_hook(keep)

        return after

    for name, module in system.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora_" in name:
            hooks.append(module.register_forward_hook(hook(name)))
    system(QUESTIONS, ANSWERS).loss.backward()
    for h in hooks:
        h.remove()
    return found


@pytest.mark.parametrize("options", OPTIONS)
def test_a_passs_part_is_the_sum_of_its_own_products(options):
    system = systems.system("qwen3", **options)
    want = products(system)
    gradients(system)
    report = system.gradient_report(QUESTIONS, ANSWERS)
    assert places(report.passes) == PASSES
    for number, p in enumerate(report.passes):
        close(p.parameters, by_layer(want[number]))
    assert report.worst is max(report.passes, key=lambda p: norm_of(p.parameters))


def test_what_is_in_no_layer():
    """A learned realignment, used by latent steps alone: the norm of its gradient is told apart from that of layers."""
    system = systems.system("qwen3", realign="learned")
    system(QUESTIONS, ANSWERS).loss.backward()
    want = gradients(system)
    report = system.gradient_report(QUESTIONS, ANSWERS)
    close(report.parameters, by_layer(want))
    assert report.parameters[-1] > 0
    for p in report.passes:
        assert (p.parameters[-1] > 0) == (p.kind == "latent"), p
    assert report.agents["solver"][-1] == 0


# ---- who has no gradient ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, without", [({"grad_scope": "detach_trace"}, 2), ({"grad_scope": "last_k", "last_k": 2}, 1)])
def test_agents_without_a_gradient_have_zeros(options, without):
    system = systems.system("qwen3", **options)
    system(QUESTIONS, ANSWERS).loss.backward()
    want = by_layer(gradients(system))
    report = system.gradient_report(QUESTIONS, ANSWERS)
    assert places(report.passes) == PASSES
    close(report.parameters, want)
    for i, agent in enumerate(systems.AGENTS):
        norms = [x for p in report.passes if p.agent == agent.name for x in (p.hidden, *p.rows, *p.parameters)]
        assert any(norms) == any(report.agents[agent.name]) == (i >= without), agent.name
    if without == 2:  # the only one who is trained
        close(report.agents["solver"], want)


def test_a_system_without_trained_weights():
    system = systems.system("qwen3", lora=False)
    system.requires_grad_(False)
    with pytest.raises(ValueError, match="system: expected trainable parameters, got none"):
        system.gradient_report(QUESTIONS, ANSWERS)
    with pytest.raises(ValueError, match="answers: expected a list, got None"):
        system.gradient_report(QUESTIONS, None)


# ---- nothing changes -------------------------------------------------------------------------------------------------


def noisy(adapter_scope="shared", **options):
    """With dropout in the adapters: the random state counts."""
    base = tiny.model()
    base = add_lora(base, tiny.agents(), adapter_scope, lora_config(r=2, alpha=4, dropout=0.3))
    generator = torch.Generator().manual_seed(1)
    for name, p in base.named_parameters():
        if "lora_B" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return systems.MultiAgentSystem(base, tiny.tokenizer(), tiny.agents(), adapter_scope=adapter_scope, **options).train()


ROWS = tiny.rows(4)
BATCH = [r["question"] for r in ROWS], [r["answer"] for r in ROWS]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"trace_content": "latent_only"}, {"realign": "learned"}, {"adapter_scope": "per_role"}]
)
def test_a_report_leaves_everything_as_it_was(options, checkpointing):
    system = noisy(**options)
    if checkpointing:
        system.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(5)
    system(*BATCH).loss.backward()
    before = {n: (p, p.detach().clone(), None if p.grad is None else p.grad.clone()) for n, p in system.named_parameters()}
    torch.manual_seed(5)
    report = system.gradient_report(*BATCH)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = system.gradient_report(*BATCH)
    assert torch.equal(state, torch.get_rng_state()) and system.training
    assert report == again and report.norm > 0
    now = dict(system.named_parameters())
    assert now.keys() == before.keys()
    for name, (p, value, grad) in before.items():
        assert now[name] is p and torch.equal(p, value), name
        assert (p.grad is None) if grad is None else torch.equal(p.grad, grad), name
    assert report.norm == pytest.approx(norm_of(float(g.norm()) for _, _, g in before.values() if g is not None), rel=1e-5)


def test_checkpointing_gives_the_same_report():
    plain, recomputed = noisy(), noisy()
    recomputed.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    reports = []
    for system in (plain, recomputed):
        torch.manual_seed(5)
        reports.append(system.gradient_report(*BATCH))
    assert reports[0] == reports[1]


def test_a_report_of_compiled_layers_compiles_nothing():
    torch._dynamo.reset()
    system, compiled = tiny.system().train(), tiny.system().train()
    for layer in body(compiled.model).layers:
        layer.compile(backend="eager")
    compiled(*BATCH).loss.backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        got = compiled.gradient_report(*BATCH)
        compiled(*BATCH).loss.backward()
    want = system.gradient_report(*BATCH)
    assert got.norm == pytest.approx(want.norm, rel=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{}, {"trace_content": "latent_only"}, {"grad_scope": "last_k", "last_k": 2}])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_watching_changes_no_bit_of_a_gradient(options, backend):
    found = []
    for watched in (False, True):
        system = tiny.system(**options).train()
        patch_model(system.model, backend)
        watch = GradientWatch(system)
        with watch if watched else contextlib.nullcontext():
            system(*BATCH).loss.backward()
        found.append({n: p.grad for n, p in system.named_parameters() if p.grad is not None})
        passes = watch.take()
        assert bool(passes) == watched
    assert found[0] and all(torch.equal(found[0][n], g) for n, g in found[1].items())
    assert sum(p.hidden > 0 for p in passes) > 1 and sum(norm_of(p.rows) > 0 for p in passes) > 1
    assert all(p.parameters is None for p in passes)


def test_a_watch_that_is_over_sees_nothing():
    system = tiny.system().train()
    with GradientWatch(system) as watch:
        system(*BATCH).loss.backward()
        assert len(watch.take(2.0)) == 7 and watch.take() == []
    hooks = len(body(system.model)._forward_hooks)
    system(*BATCH).loss.backward()
    assert watch.take() == [] and hooks == 1  # the patch's own


def test_micro_batches_count_together():
    """Rows of different micro-batches are different rows: their norms add up as those of one vector."""
    system = systems.system("qwen3")
    whole = system.gradient_report(QUESTIONS, ANSWERS, num_items_in_batch=7)
    with GradientWatch(system) as watch:
        for i in range(3):
            system(QUESTIONS[i : i + 1], ANSWERS[i : i + 1], num_items_in_batch=7).loss.backward()
        passes = watch.take(0.5)
    assert places(passes) == PASSES
    for p, want in zip(passes, whole.passes):
        close([x / 2 for x in p.rows], want.rows)
        close(p.hidden / 2, want.hidden)


# ---- how it is shown -------------------------------------------------------------------------------------------------


def test_table_plot_and_data(tmp_path):
    from rich.console import Console

    report = tiny.system().gradient_report(*BATCH)
    console = Console(record=True, width=150, file=open("/dev/null", "w"))
    console.print(report.table())
    text = console.export_text()
    for p in report.passes:
        line = next(x for x in text.splitlines() if p.agent in x and f" {p.name} " in x)
        assert f"{norm_of(p.rows):.2e}" in line and f"{norm_of(p.parameters):.2e}" in line
    for agent, norms in report.agents.items():
        assert any(agent in x and " all " in x and f"{norm_of(norms):.2e}" in x for x in text.splitlines())
    assert report.plot(tmp_path / "new" / "g.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads(json.dumps(report.to_dict()))
    assert data["norm"] == report.norm and len(data["passes"]) == 7
    assert data["segments"][1] == {"agent": "planner", "kind": "latent", "rows": report.segments()["planner", "latent"]}


def test_a_report_with_nan_can_be_shown(tmp_path):
    system = tiny.system()
    broken = next(p for n, p in system.named_parameters() if "layers.1" in n and "lora_B" in n)
    broken.data.fill_(float("nan"))
    report = system.gradient_report(*BATCH)
    assert math.isnan(report.norm) and math.isnan(norm_of(report.worst.parameters))
    report.table()
    report.plot(tmp_path / "nan.png")


def test_layers_in_groups():
    assert layer_groups(30) == {
        "layers 0-7": slice(0, 8), "layers 8-14": slice(8, 15), "layers 15-21": slice(15, 22), "layers 22-29": slice(22, 30),
    }  # fmt: skip
    assert layer_groups(1) == {"layer 0": slice(0, 1)} and list(layer_groups(3)) == ["layer 0", "layer 1", "layer 2"]

"""Latent steps with gradients whose forward and backward are replayed: to the same bits as steps that run one by one.

Without a GPU a graph is a record of torch ops (fake_graph), which a replay runs again on the same memory.
"""

import contextlib
import functools
import itertools
from dataclasses import replace

import pytest
import torch
import transformers
from models import body, loss_of, read, tiny, tokens, with_lora
from systems import ANSWERS, QUESTIONS, roles_model, system, tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from diffmas import Agent, MultiAgentSystem, Trace, patch_model
from diffmas.agents import latent, learning
from diffmas.agents.realign import Realign
from diffmas.models.patch import patch_of
from diffmas.trace.layer_work import LayerWork

AGENTS = [Agent("planner", "w5 {question} w6", 8), Agent("critic", "w7 w8 {question}", 7), Agent("solver", "w9 {question}")]
TWO = [AGENTS[0], AGENTS[2]]
RAGGED = [Agent("planner", "w5 {question} w6", "T"), AGENTS[2]]


@functools.cache
def made():
    return system(agents=TWO)


def two():
    """One agent who thinks and one who answers, the same for all tests, which leave its weights as they were."""
    made().zero_grad(set_to_none=True)
    patch_of(made().model).tries.clear()
    return made()


def gradients(module) -> dict[str, torch.Tensor]:
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return grads


def assert_equal(got, want):
    assert got.keys() == want.keys() and want
    assert not [n for n in want if not torch.equal(got[n], want[n])]


@contextlib.contextmanager
def rows_of_gradient():
    """dK and dV of the rows of prompts, as their passes take them out, the latest pass first."""
    rows, original = [], LayerWork.attend_backward

    def watched(work, layer, *args, **options):
        out = original(work, layer, *args, **options)
        if work.deferred is None:
            rows.append((layer.index, *out[1:3]))
        return out

    LayerWork.attend_backward = watched
    try:
        yield rows
    finally:
        LayerWork.attend_backward = original


def episode(s, questions=QUESTIONS, answers=ANSWERS, graphs=True):
    """-> what one loss and its backward leave, to be compared bit by bit."""
    patch_of(s.model).graphs = graphs
    out = s(questions, answers)
    with rows_of_gradient() as rows:
        out.loss.backward()
    found = {"loss": out.loss.detach(), "logits": out.logits.detach(), **gradients(s)}
    for n, (layer, dk, dv) in enumerate(rows):
        found |= {f"dK of {n} in {layer}": dk, f"dV of {n} in {layer}": dv}
    for layer, sequence in itertools.product(range(len(out.trace)), range(len(questions))):
        for name, x in zip("KV", out.trace.keys_values(layer, sequence)):
            found[f"{name} of {sequence} in {layer}"] = x.detach()
    return found, out.trace


def assert_as_eager(s, **what):
    (got, trace), (want, plain) = (episode(s, graphs=graphs, **what) for graphs in (True, False))
    assert_equal(got, want)
    assert trace.segments == plain.segments and trace.next_positions == plain.next_positions


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_an_episode(dtype, backend, repeating):
    s = system(agents=AGENTS, dtype=dtype)
    patch_model(s.model, backend, fuse=False)  # fused, steps one by one sum LoRA's gradients as a run; graphs are a GPU's
    assert_as_eager(s)
    # The forwards of each run, 7 and 6 steps, twice; and their backward, which for the last step is of its rows alone, and with
    # the step before it warms up.
    assert [g.replays for g in repeating] == [2 * 7, 2 * 6, 6 - 2, 7 - 2]


@pytest.mark.parametrize("heads", [None, [1]], ids=str)
def test_layers_and_heads_that_see_less(heads, repeating):
    """Each of them moves on in tables of its own."""
    of = lambda name, layers: {"agent": name, "select": {"layers": layers, "heads": heads}}
    critic, solver = replace(AGENTS[1], reads=[of("planner", [1])]), replace(AGENTS[2], reads=["planner", of("critic", [0, 2])])
    s = system(agents=[AGENTS[0], critic, solver])
    patch_model(s.model, fuse=False)
    assert_as_eager(s)
    assert [g.replays for g in repeating] == [2 * 7, 2 * 6, 6 - 2, 7 - 2]


def test_captured_steps_with_fused_linears(repeating):
    s = system(agents=TWO, dtype=torch.float32)
    (got, _), (want, _) = (episode(s, graphs=graphs) for graphs in (True, False))
    assert len(repeating) == 2 and patch_of(s.model).spec.fused and got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-4 * float(want[name].abs().max()))


OPTIONS = {
    "latent_only": dict(trace_content="latent_only"),
    "reindexed": dict(trace_content="latent_only", positions="reindex", realign="norm"),
    "a realignment that is trained": dict(realign="learned"),
    "soft tokens": dict(realign="soft_token"),
    "clipped": dict(latent_grad_clip=0.3),
    "detached": dict(grad_scope="detach_trace"),
    "the last two": dict(grad_scope="last_k", last_k=2),
    "final_only": dict(adapter_scope="final_only"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, repeating):
    s = system(agents=AGENTS, **options)
    assert_as_eager(s)
    learns = {"detach_trace": 0, "last_k": 1}.get(s.grad_scope, 0 if s.adapter_scope == "final_only" else 2)
    assert len(repeating) == 2 + learns  # steps that record nothing are replayed too, and have no backward


@pytest.mark.parametrize("family", ["phi3", "cohere"])
def test_families(family, repeating):
    assert_as_eager(system(family, agents=TWO))
    assert len(repeating) == 2


def test_all_weights_are_trained(repeating, monkeypatch):
    """Norms of queries and keys too, which no torch function is asked about, and embeddings by their position."""
    inputs, take = [], learning.LearningSteps.take
    monkeypatch.setattr(learning.LearningSteps, "take", lambda run, *args: inputs.extend(run.inputs[1:]) or take(run, *args))
    families = ["qwen3", "gpt2"] if transformers.__version__ >= "5" else ["qwen3"]  # 4's head of gpt2 takes no trace
    for family in families:
        s = system(family, agents=TWO, lora=False, realign="norm")
        assert_as_eager(s)
    assert len(repeating) == 2 * len(families)
    # A parameter's own node may belong to another stream, which cannot be captured along.
    assert inputs and not any(x.is_leaf for x in inputs)


def test_steps_of_which_the_first_records_less(repeating):
    """Hidden states without a gradient, and nothing to learn in the first layers."""
    model, found = with_lora(tiny("qwen3"), layers_to_transform=[2]), []
    for graphs in (True, False):
        patch_of(model).graphs = graphs
        trace = Trace(model, batch_size=1)
        with torch.no_grad():
            h = body(model)(input_ids=tokens(4)[0][None], past_key_values=trace).last_hidden_state
        steps(model, trace, h, 8)
        loss_of(read(model, trace, *tokens(3))[0]).backward()
        found.append(gradients(model))
    assert_equal(*found)
    assert len(repeating) == 2


def test_an_adapter_for_each_agent(repeating):
    """Nobody has to switch to it in backward."""
    names = [a.name for a in TWO]
    assert_as_eager(MultiAgentSystem(roles_model(names), tokenizer(), TWO, adapter_scope="per_role"))
    assert len(repeating) == 2


def test_agents_with_an_adapter_each_in_one_forward(repeating):
    side_by_side = [*(replace(a, reads=[], latent_steps=8) for a in AGENTS[:2]), AGENTS[2]]
    s = MultiAgentSystem(roles_model([a.name for a in side_by_side]), tokenizer(), side_by_side, adapter_scope="per_role")
    assert_as_eager(s)
    assert len(repeating) == 2


def test_ragged_steps(repeating):
    """Each set of sequences that take steps together is a run."""
    s = system(agents=RAGGED)
    questions = [{"question": q, "T": T} for q, T in zip(QUESTIONS, (15, 0, 7))]
    assert_as_eager(s, questions=questions)
    # One sequence goes on from the last step of the first run.
    assert [g.replays for g in repeating] == [2 * 6, 2 * 7, 7 - 2, 6 - 1]


def test_runs_longer_than_a_flush(repeating):
    """The 65th step begins another run, and is taken as it is."""
    agents = [Agent("a", "w5 {question}", 71), Agent("c", "w9 {question}")]
    assert_as_eager(system(agents=agents), questions=QUESTIONS[:2], answers=ANSWERS[:2])
    assert [g.replays for g in repeating] == [2 * 63, 2 * 6, 4, 62]


def test_accumulated_gradients(repeating):
    found, s = [], two()
    for graphs in (True, False):
        patch_of(s.model).graphs = graphs
        for i in range(2):
            s(QUESTIONS[i : i + 2], ANSWERS[i : i + 2]).loss.backward()
        found.append(gradients(s))
    assert_equal(*found)
    assert len(repeating) == 4


def test_autocast(repeating):
    """Weights that were cast for the steps are not those that later passes find in autocast's memory."""
    s, found = system(agents=TWO, dtype=torch.float32), []
    for graphs in (True, False):
        patch_of(s.model).graphs = graphs
        with torch.autocast("cpu", torch.bfloat16):
            loss = s(QUESTIONS, ANSWERS).loss
        loss.backward()
        found.append(gradients(s))
    # One by one, the gradient of a weight is summed in bfloat16 before it is cast back.
    got, want = found
    assert got.keys() == want.keys() and len(repeating) == 2
    assert all((got[n] - want[n]).abs().max() < 0.02 * want[n].abs().max() for n in want)


# ---- views that several branches read --------------------------------------------------------------------------------


def steps(model, trace, h, T):
    """Latent steps as agents take them; h [B, 1, hidden]."""
    return latent.latent_steps(patch_of(model), Realign(model, "norm").double(), trace, h[:, -1], [T] * len(h))[:, None]


def branches(model, positions):
    """Two branches think on forks of one trace, a third one on what both wrote, moved."""
    a, b, c, d = tokens(5, 3, 4, 2)
    trace = Trace(model, batch_size=2)
    h = body(model)(input_ids=torch.stack((a, a + 1)), past_key_values=trace).last_hidden_state
    left, right = trace.fork(2)
    steps(model, left, h, 8)
    h = body(model)(input_ids=torch.stack((b, b)), past_key_values=right).last_hidden_state
    steps(model, right, h, 7)
    joined = Trace.join([left, right.detach() if positions == "keep" else right], positions=positions)
    h = body(model)(input_ids=torch.stack((c, c)), past_key_values=joined).last_hidden_state
    steps(model, joined, h, 7)
    return sum(loss_of(x) for x in read(model, joined, d, d))


@pytest.mark.parametrize("positions", ["shift", "keep", "reindex"])
def test_joined_views(positions, repeating):
    model, found = with_lora(tiny("qwen3")), []
    for graphs in (True, False):
        patch_of(model).graphs = graphs
        branches(model, positions).backward()
        found.append(gradients(model))
    assert_equal(*found)
    assert len(repeating) == (5 if positions == "keep" else 6)  # nothing comes back to steps that were detached


# ---- what the host does ----------------------------------------------------------------------------------------------


class Launches(TorchDispatchMode):
    """What is asked of torch."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_host_does_next_to_nothing(repeating, monkeypatch):
    """No layer runs in Python. Backward goes to the step, sets its hidden state and what comes back to it, and copies what lies
    in the graph's memory."""
    s, forwards, backwards, layers, given = two(), [], [], [], []
    patch_of(s.model).graphs = True
    forward_of, backward_of = learning.LearningSteps.forward, learning.LearningSteps.backward
    attend, attend_backward = LayerWork.attend, LayerWork.attend_backward

    def counted(method, calls):
        def run(*args):
            layers.clear()
            with Launches() as launches:
                out = method(*args)
            calls.append((launches.names, len(layers)))
            given.extend(x for x in (out if isinstance(out, list) else [out]) if x is not None)
            return out

        return run

    monkeypatch.setattr(learning.LearningSteps, "forward", counted(forward_of, forwards))
    monkeypatch.setattr(learning.LearningSteps, "backward", counted(backward_of, backwards))
    monkeypatch.setattr(LayerWork, "attend", lambda *args: layers.append(1) or attend(*args))
    monkeypatch.setattr(LayerWork, "attend_backward", lambda *args: layers.append(1) or attend_backward(*args))
    s(QUESTIONS, ANSWERS).loss.backward()
    assert forwards == [(["clone"], 0)] * 7
    replayed = [names for names, count in backwards if not count]
    assert len(replayed) == 7 - 3  # after the last step, the one that warms up, and the one that is captured
    for names in replayed:
        launched = [n for n in names if n not in ("detach", "alias", "empty_like")]
        assert launched == ["add_", "copy_", "copy_", "_foreach_copy_", "_foreach_copy_"]
    assert all(len(graph.ops) > 200 for graph in repeating)
    # Autograd adds gradients on streams of its own choice: none lies where the next replay writes.
    assert len({x.data_ptr() for x in given}) == len(given)

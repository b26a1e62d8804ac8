"""Latent steps with gradients whose forward and backward are replayed: to the same bits as steps that run one by one.

Without a GPU a graph is a record of torch ops (fake_graph), which a replay runs again on the same memory.
"""

import contextlib
import functools
import gc
import itertools
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
import transformers
from models import body, loss_of, read, tiny, tokens, with_lora
from systems import ANSWERS, QUESTIONS, roles_model, system, tokenizer
from threads import together
from torch.utils._python_dispatch import TorchDispatchMode

from diffmas import Agent, MultiAgentSystem, Trace, patch_model
from diffmas.agents import capture, latent, learning
from diffmas.agents.gradients import GradientWatch
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


# ---- backward passes -------------------------------------------------------------------------------------------------


def test_several_backward_passes(repeating):
    """Each has its own gradient pools, and a graph of its own; what was let go of is not differentiated again."""
    s = two()
    want, _ = episode(s, graphs=False)
    want = {n: x for n, x in want.items() if n in dict(s.named_parameters())}
    patch_of(s.model).graphs = True
    loss = s(QUESTIONS, ANSWERS).loss
    for again in (True, True, False):
        loss.backward(retain_graph=again)
        assert_equal(gradients(s), want)
    assert len(repeating) == 1 + 3
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_part_of_the_graph(repeating):
    s, found = two(), []
    parameter = next(p for n, p in s.named_parameters() if "layers.1" in n and "lora_A" in n)
    for graphs in (True, False):
        patch_of(s.model).graphs = graphs
        loss = s(QUESTIONS, ANSWERS).loss
        found.append({"part": torch.autograd.grad(loss, parameter, retain_graph=True)[0]})
        loss.backward()
        found.append(gradients(s))
    assert_equal(found[0], found[2])
    assert_equal(found[1], found[3])


def test_hidden_states_that_are_read(repeating):
    """A loss on the last hidden states: the last step has a gradient of its own."""
    found = []
    for graphs in (True, False):
        model = with_lora(tiny("qwen3"))
        patch_of(model).graphs = graphs
        trace = Trace(model, batch_size=2)
        start = body(model)(input_ids=torch.stack(tokens(4, 4)), past_key_values=trace).last_hidden_state
        h = steps(model, trace, start, 7)
        (of_start,) = torch.autograd.grad(loss_of(h), [start], retain_graph=True)
        loss_of(h).backward()
        found.append({"h": h.detach(), "start": of_start, **gradients(model)})
    assert_equal(*found)
    assert [g.replays for g in repeating] == [3 * 6, 5, 5]


def test_two_threads_go_backward_over_one_episode(repeating):
    s = two()
    patch_of(s.model).graphs = False
    want = gradients_of(s(QUESTIONS, ANSWERS).loss, s)
    patch_of(s.model).graphs = True
    loss = s(QUESTIONS, ANSWERS).loss
    for got in together(*[lambda: gradients_of(loss, s)] * 2):
        assert all(map(torch.equal, got, want))
    assert len(repeating) == 3


def gradients_of(loss, s):
    return torch.autograd.grad(loss, [p for p in s.parameters() if p.requires_grad], retain_graph=True)


def test_two_threads_train_one_model(repeating):
    s = two()
    patch_of(s.model).graphs = False
    want = [gradients_of(s(q, a).loss, s) for q, a in zip((QUESTIONS, QUESTIONS[:1]), (ANSWERS, ANSWERS[:1]))]
    patch_of(s.model).graphs = True
    jobs = [lambda n=n: gradients_of(s(QUESTIONS[:n], ANSWERS[:n]).loss, s) for n in (3, 1)]
    for got, wanted in zip(together(*jobs), want):
        assert all(map(torch.equal, got, wanted))
    assert len(repeating) == 4


def test_twice_is_refused(repeating):
    s = two()
    patch_of(s.model).graphs = True
    grads = torch.autograd.grad(s(QUESTIONS, ANSWERS).loss, [p for p in s.parameters() if p.requires_grad], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.sum() for g in grads).backward()
    assert repeating


def test_weights_that_have_changed(repeating):
    """Also those that are not trained: their steps would not be what they were."""
    s = system(agents=TWO)
    for name in ("lora_A", "mlp.up_proj"):
        loss = s(QUESTIONS, ANSWERS).loss
        with torch.no_grad():
            next(p for n, p in s.named_parameters() if name in n and "layers.1" in n).mul_(1.01)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert len(repeating) == 2


def test_weights_that_no_backward_needs_have_changed(repeating):
    """Steps one by one do not notice a bias, which autograd does not save; a replay computes with it."""
    s = system("qwen2", agents=TWO, realign="norm")
    loss = s(QUESTIONS, ANSWERS).loss
    with torch.no_grad():
        next(p for n, p in s.named_parameters() if n.endswith("v_proj.base_layer.bias") or n.endswith("v_proj.bias")).add_(0.3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_training_is_captured_where_it_was_asked_for(repeating):
    s = system(agents=TWO)
    patch_model(s.model, training_graphs=False)
    s(QUESTIONS, ANSWERS).loss.backward()
    assert not repeating
    with torch.no_grad():
        s(QUESTIONS, ANSWERS)
    assert repeating


@pytest.mark.parametrize("current", ["captures", "mine"])
def test_a_backward_on_the_stream_of_captures_waits_for_the_current_one(current, monkeypatch):
    waited = []

    class Stream(str):
        def wait_stream(self, other):
            waited.append((self, other))

    monkeypatch.setattr(capture, "_capture_stream", lambda device: Stream("captures"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(current))
    with capture.on_capture_stream(torch.device("cuda", 0)):
        assert waited == ([] if current == "captures" else [("captures", "mine")])


def test_pools_that_grow_before_backward(repeating):
    """The graph writes where the rows were."""
    s, found = two(), []
    for graphs in (True, False):
        patch_of(s.model).graphs = graphs
        trace = s.communicate(s.fields_of(QUESTIONS))
        before = trace.memory()
        out = s(QUESTIONS, [" ".join(["w20"] * 90)] * 3, trace=trace)
        assert trace.memory() > before
        out.loss.backward()
        found.append({"logits": out.logits.detach(), **gradients(s)})
    assert_equal(*found)


def test_what_a_run_leaves(monkeypatch, repeating):
    """Nothing, once its backward has run or its graph is dropped, and without the garbage collector's help."""
    runs, take = [], learning.LearningSteps.take
    monkeypatch.setattr(learning.LearningSteps, "take", lambda run, *args: runs.append(weakref.ref(run)) or take(run, *args))
    s = two()
    patch_of(s.model).graphs = True
    gc.collect()
    gc.disable()
    try:
        out = s(QUESTIONS, ANSWERS)
        out.loss.backward()
        rows = out.trace.rows
        assert len(runs) == 1 and runs[0]() is None
        out = s(QUESTIONS, ANSWERS)
        assert runs[1]() and out.trace.rows == rows
        del out
        assert not any(run() for run in runs)
    finally:
        gc.enable()


def test_a_run_keeps_its_hidden_states_alone(repeating):
    model = with_lora(tiny("qwen3"))
    trace = Trace(model, batch_size=2)
    h = body(model)(input_ids=torch.stack(tokens(4, 4)), past_key_values=trace).last_hidden_state
    node, saved = steps(model, trace, h, 8).grad_fn.next_functions[0][0], []  # that of the selection is not of the run
    while "Step" in node.name():
        saved.append([tuple(x.shape) for x in node.saved_tensors])
        node = node.next_functions[0][0]
    assert saved == [[(2, 32), (0,)]] * 7


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


# ---- steps that are not captured -------------------------------------------------------------------------------------


@contextlib.contextmanager
def hooked(s):
    handle = body(s.model).layers[1].mlp.register_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextlib.contextmanager
def hooked_parameter(s):
    handle = next(p for p in s.parameters() if p.requires_grad).register_hook(lambda g: 2 * g)
    yield
    handle.remove()


@contextlib.contextmanager
def hooked_everywhere(s):
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextlib.contextmanager
def checkpointed(s):
    s.model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if hasattr(s.model.get_base_model(), "_require_grads_hook"):  # a hook that transformers 5 sets with it
        s.model.get_base_model().disable_input_require_grads()
    s.train()
    yield


@contextlib.contextmanager
def dropping(s):
    body(s.model).layers[1].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.5))
    torch.manual_seed(3)
    s.train()
    yield


@contextlib.contextmanager
def compiled(s):
    layer = body(s.model).layers[1].mlp
    layer.compile(backend="eager")
    yield
    layer._compiled_call_impl = None


OBSERVED = {
    "a hook": hooked,
    "a parameter's hook": hooked_parameter,
    "a hook on all modules": hooked_everywhere,
    "a gradient watch": GradientWatch,
    "saved tensors elsewhere": lambda s: torch.autograd.graph.save_on_cpu(),
    "checkpoints": checkpointed,
    "dropout": dropping,
    "a compiled layer": compiled,
}


@pytest.mark.parametrize("context", OBSERVED.values(), ids=OBSERVED)
def test_what_a_replay_would_not_do(context, repeating):
    """Then steps run one by one, and those that follow are captured again."""
    s, found = system(agents=TWO) if context in (checkpointed, dropping) else two(), []
    for graphs in (True, False):
        patch_of(s.model).graphs = graphs
        with context(s):
            s(QUESTIONS, ANSWERS).loss.backward()
        found.append(gradients(s))
        assert not repeating
    assert_equal(*found)
    if context not in (checkpointed, dropping):
        patch_of(s.model).graphs = True
        s(QUESTIONS, ANSWERS).loss.backward()
        gradients(s)
        assert len(repeating) == 2


def test_a_report_sees_every_step(repeating):
    report = two().gradient_report(QUESTIONS, ANSWERS)
    assert not repeating and sum(p.kind == "latent" for p in report.passes) == 8


def failing(monkeypatch, where, error, times=99):
    """Captures of work `where` fail in the middle of the second layer."""
    attempt, left = capture.attempt, [times]

    def attempted(patch, what, work, spare):
        if what != where or not left[0]:
            return attempt(patch, what, work, spare)
        left[0] -= 1
        name = "attend" if where == learning.WHAT else "attend_backward"
        seen, original = [], getattr(LayerWork, name)

        def stop(*args):
            seen.append(1)
            if len(seen) == 2:
                raise type(error)(*error.args)  # one whose traceback holds no work of a forward pass
            return original(*args)

        setattr(LayerWork, name, stop)
        try:
            return attempt(patch, what, work, spare)
        finally:
            setattr(LayerWork, name, original)

    monkeypatch.setattr(capture, "attempt", attempted)
    monkeypatch.setattr(learning, "attempt", attempted)


@pytest.mark.parametrize("where, graphs", [(learning.WHAT, 0), (learning.BACKWARD, 1)])
def test_a_capture_that_fails(where, graphs, repeating, monkeypatch):
    """One warning; a forward whose backward cannot be captured has the right gradient."""
    s = system(agents=TWO)
    want, _ = episode(s, graphs=False)
    failing(monkeypatch, where, RuntimeError("it waits"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            got, _ = episode(s)
            assert_equal(got, want)
    caught = [str(w.message) for w in caught if "CUDA graph" in str(w.message)]
    assert len(caught) == 1 and caught[0].startswith(f"{where} run without") and "it waits" in caught[0]
    assert len(repeating) == 2 * graphs and patch_of(s.model).tries[where] == 0


@pytest.mark.parametrize("where", [learning.WHAT, learning.BACKWARD])
def test_memory_that_is_short_once(where, repeating, monkeypatch):
    s = two()
    want, _ = episode(s, graphs=False)
    failing(monkeypatch, where, torch.OutOfMemoryError("full"), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert_equal(episode(s)[0], want)
    assert len(repeating) == {learning.WHAT: 2, learning.BACKWARD: 4}[where] and patch_of(s.model).tries[where] == 3


@pytest.mark.parametrize("where", [learning.WHAT, learning.BACKWARD])
def test_an_interrupted_capture_leaves_nothing_behind(where, repeating, monkeypatch):
    s = two()
    want, _ = episode(s, graphs=False)
    patch_of(s.model).graphs = True
    failing(monkeypatch, where, KeyboardInterrupt(), 1)
    with pytest.raises(KeyboardInterrupt):
        s(QUESTIONS, ANSWERS).loss.backward()
    gradients(s)
    assert_equal(episode(s)[0], want)

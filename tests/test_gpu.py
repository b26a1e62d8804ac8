"""What only a GPU can show: no waiting for the device, no compilation for new lengths, CUDA graphs. Needs one."""

import itertools

import pytest
import torch
from models import assert_close, gradients, latent_steps, tiny, tokens, with_lora
from op_cases import View, attention_inputs, inject_inputs
from op_runs import raw
from systems import ANSWERS, QUESTIONS, system

import diffmas
from diffmas import Agent, ops
from diffmas.agents import latent, learning
from diffmas.agents.adapters import switched_to
from diffmas.agents.decoding import Rules
from diffmas.agents.realign import Realign
from diffmas.agents.sampling import Sampling
from diffmas.benchmarks.machine import own_stream
from diffmas.benchmarks.measure import OURS, Case, Contest, Problem, Trial
from diffmas.models import capture
from diffmas.models.forward import forward
from diffmas.models.parts import body_of
from diffmas.models.patch import patch_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
BACKENDS = [pytest.param(b, marks=pytest.mark.skipif(bool(why), reason=str(why))) for b, why in ops.available().items()][:2]


def compiled() -> int:
    """Binaries that Triton has made of the kernels so far."""
    from diffmas.kernels import cross_attention, inject, merge_states, reposition

    modules = (cross_attention, inject, merge_states, reposition)
    kernels = [x for m in modules for name, x in vars(m).items() if "_kernel" in name]
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


def gpu_model(dtype=torch.float32):
    return tiny("qwen3", dtype).cuda()


def test_auto_takes_triton():
    q = torch.zeros(1, 2, 64, device="cuda")
    assert ops.implementation("cross_attention", q, "auto").__module__.startswith("diffmas.kernels")


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_do_not_wait_for_the_device(backend):
    """A latent step, a decoded token and a step with gradients; everything is on the device or goes there unasked."""
    model = gpu_model()
    patch_of(model).spec.backend = backend
    trace = diffmas.Trace(model, batch_size=2, capacity=256)
    ids = [x.cuda() for x in tokens(5, 3)]
    forward(patch_of(model), trace, trace.plan([5, 3], "prompt"), input_ids=torch.cat(ids)[None])
    h = torch.randn(1, 2, model.config.hidden_size, device="cuda")
    one = torch.full((1, 2), 7, device="cuda")

    def steps():
        with torch.no_grad():
            forward(patch_of(model), trace, trace.plan([1, 1], "latent"), inputs_embeds=h)
            forward(patch_of(model), trace, trace.plan([1, 1], "text"), head=True, input_ids=one)
        forward(patch_of(model), trace, trace.plan([1, 1], "latent"), inputs_embeds=h)

    steps()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")


ROWS = 2100


def ops_of_a_step(backend: str, seed: int):
    """A call of inject and attention, forward and backward, over views of several parts, which gives all that they give and
    write; and what they read: queries and offsets of attention, queries of inject."""
    view = View([3, 1], [[(0, 1500, 0), (2000, 3, 0)], [(0, 900, 7 + seed), (2010, 1, 0)]])
    x = attention_inputs(view, D=128, seed=seed, rows=ROWS).to(torch.bfloat16, "cuda")
    y = inject_inputs(n=4, D=128, seed=seed, rows=ROWS).to(torch.bfloat16, "cuda")
    args, do = x.args(), torch.randn_like(x.q)
    pools, grads, more = (torch.zeros(2, ROWS, 2, 128, dtype=t, device="cuda") for t in (x.q.dtype, *2 * [torch.float32]))

    def call() -> list[torch.Tensor]:
        for t in (pools, grads):
            t.zero_()
        more.fill_(1)
        rotated = raw.inject(y.q, y.k, y.v, *y.rope(), *pools, backend)
        o, lse = raw.cross_attention(*args, backend)
        dq = raw.cross_attention_backward(do, None, args[0], o, lse, *args[1:], *grads, None, True, backend)
        given = raw.inject_backward(rotated, y.q, y.k, *y.rope(), *more, backend)
        return [rotated, o, lse, dq, *given, pools, grads, more]

    return call, (args[0], args[7], y.q)


def copies(tensors) -> list[torch.Tensor]:
    return [t.clone() for t in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_streams(backend):
    """At once, the same bits as alone."""
    calls = [ops_of_a_step(backend, seed)[0] for seed in range(2)]
    want = [copies(call()) for call in calls]
    torch.cuda.synchronize()
    streams, got = [torch.cuda.Stream() for _ in calls], [[], []]
    for _ in range(30):
        for stream, call, results in zip(streams, calls, got):
            with torch.cuda.stream(stream):
                results.append(copies(call()))
    torch.cuda.synchronize()
    for wanted, results in zip(want, got):
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, wanted))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ops_in_a_graph(backend):
    """Also segments at a offset, whose tables are then part of the graph: a replay sees the offsets and queries of its time."""
    call, (q, offset, new) = ops_of_a_step(backend, 0)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    seen = []
    for turn in range(4):
        if turn in (1, 3):
            for t in (q, new):
                t.copy_(torch.randn_like(t))
        if turn in (2, 3):
            offset.add_(5 * turn)
        want = copies(call())
        seen.append(want[1])
        for t in captured:
            t.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, want))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


def loss_of_agents(s):
    return s(QUESTIONS, ANSWERS).loss


def loss_of_a_join(s):
    """Of a join with a branch without gradients, moved, and latent steps after it: all the nodes that give only tokens."""
    model, device = s.model, s.model.device
    a, b, c, d = (x[None].to(device) for x in tokens(4, 3, 5, 2))
    trace = diffmas.Trace(model)
    model(a, past_key_values=trace)
    branches = trace.fork(2)
    for branch, ids in zip(branches, (b, c)):
        model(ids, past_key_values=branch)
    joined = diffmas.Trace.join([branches[0].detach(), branches[1]], "offset").repack()
    h = body_of(patch_of(model).causal_lm)(input_ids=d, past_key_values=joined).last_hidden_state[:, -1:]
    latent_steps(model, joined, h, 4)
    return model(d, past_key_values=joined).logits.square().mean()


@pytest.mark.parametrize("loss_of", [loss_of_agents, loss_of_a_join])
def test_a_backward_that_another_stream_calls(loss_of):
    """Of nodes that give only tokens, which lie on the CPU: they belong on their forward's stream, too."""
    s = system(agents=[Agent("a", "w5 {question}", 5), Agent("b", "w9 {question}")], dtype=torch.float32).cuda()
    stream, results = torch.cuda.Stream(), []
    for own in (None, *10 * [stream]):
        s.zero_grad()
        torch.cuda.synchronize()
        with torch.cuda.stream(own):
            loss = loss_of(s)
        loss.backward()
        torch.cuda.synchronize()
        results.append(gradients(s))
    for got in results[1:]:
        assert_close(got, results[0], 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_launches_of_one_token(backend):
    """inject is one kernel; attention one, and one more: parts of a view are merged, or their counters are set to zero."""
    x = attention_inputs(View([1], [[(0, 2000, 0)]]), D=128, rows=ROWS).to(torch.bfloat16, "cuda")
    y = inject_inputs(n=1, D=128, rows=ROWS).to(torch.bfloat16, "cuda")
    pools = torch.zeros(2, ROWS, 2, 128, dtype=torch.bfloat16, device="cuda")
    args, rope = x.args(), y.rope()
    calls = lambda: raw.inject(y.q, y.k, y.v, *rope, *pools, backend), lambda: raw.cross_attention(*args, backend)
    for call, most in zip(calls, (1, 2)):
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        events = [e for e in profile.profiler.kineto_results.events() if e.device_type() == torch.autograd.DeviceType.CUDA]
        if not events:
            pytest.skip("torch's profiler sees no kernels here")
        assert len(events) <= most, [e.name() for e in events]


def test_new_lengths_compile_nothing():
    """A fixed set of binaries: by tile (16 rows, more), split or not. Short and long prompts and views see all of them."""
    s = system(dtype=torch.float32).cuda()

    def use(n):
        questions = [" ".join(["w10"] * n), " ".join(["w11"] * (n + 3))]
        s(questions, ["w20", "w21 w22 w23"]).loss.backward()
        s.generate_tokens(questions, max_new_tokens=3, temperature=0)

    for n in (1, 40, 400):
        use(n)
    before = compiled()
    for n in (2, 5, 9, 43, 77, 301, 415):
        use(n)
    assert compiled() == before


@pytest.mark.parametrize("T", [[12], [12, 12, 12], [7, 0, 19]], ids=str)
def test_latent_steps_as_a_graph(T, monkeypatch):
    """One for each set of sequences that take steps together."""
    s = system(agents=[Agent("a", "w5 {question}", "T"), Agent("b", "w9 {question}")], dtype=torch.float32).cuda()
    questions = [{"question": q, "T": n} for q, n in zip(QUESTIONS, T)]
    captured = []
    attempt = capture.attempt
    monkeypatch.setattr(capture, "attempt", lambda *args: captured.append(attempt(*args)) or captured[-1])
    with torch.no_grad():
        got = s(questions)
        assert all(captured) and len(captured) == len(set(T) - {0})
        patch_of(s.model).graphs = False
        want = s(questions)
    assert_close(got.logits, want.logits, 1e-5)
    assert got.trace.segments == want.trace.segments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_steps_with_gradients_as_graphs(dtype, monkeypatch):
    """Their forward and their backward, in several backward passes over one episode."""
    s = system(agents=[Agent("a", "w5 {question}", 9), Agent("b", "w9 {question}")], dtype=dtype).cuda()
    captured, attempt, found = [], capture.attempt, []
    monkeypatch.setattr(capture, "attempt", lambda *args: captured.append(attempt(*args)) or captured[-1])
    monkeypatch.setattr(learning, "attempt", capture.attempt)
    for graphs in (False, True):
        patch_of(s.model).training_graphs = graphs
        loss = s(QUESTIONS, ANSWERS).loss
        for again in (True, False):
            loss.backward(retain_graph=again)
            found.append(gradients(s))
    assert len(captured) == 3 and all(captured)
    for got in found[1:]:
        assert_close(got, found[0], 1e-4 if dtype == torch.float32 else 0.1)


def test_decoding_as_a_graph(monkeypatch):
    s = system(dtype=torch.float32).cuda()
    captured, attempt, found = [], capture.attempt, []
    monkeypatch.setattr(capture, "attempt", lambda *args: captured.append(attempt(*args)) or captured[-1])
    for graphs in (False, True):
        patch_of(s.model).graphs = graphs
        found.append(s.generate_tokens(QUESTIONS, max_new_tokens=30, temperature=0, samples=2))
    assert found[0] == found[1] and captured and all(captured)


def test_generate_as_a_graph(monkeypatch):
    """transformers' own, on a trace."""
    s = system(dtype=torch.float32).cuda()
    captured, attempt, found = [], capture.attempt, []
    monkeypatch.setattr(capture, "attempt", lambda *args: captured.append(attempt(*args)) or captured[-1])
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]], device="cuda")
    for graphs in (False, True):
        patch_of(s.model).graphs = graphs
        trace = diffmas.Trace(s.model, batch_size=2)
        found.append(s.model.generate(ids, past_key_values=trace, max_new_tokens=30, do_sample=False, eos_token_id=None))
    assert torch.equal(*found) and len(captured) == 1 and all(captured)


def test_a_model_that_waits_for_the_device_is_not_captured():
    """Experts that are chosen on the host: the steps run one by one, and the device is as it was."""
    model = tiny("qwen3_moe", torch.float32, experts_implementation="eager").cuda()
    stream = torch.cuda.current_stream()
    trace = diffmas.Trace(model, batch_size=1, capacity=64)
    with torch.no_grad():
        forward(patch_of(model), trace, trace.plan([5], "prompt"), input_ids=tokens(5)[0][None].cuda())
        latent.latent_steps(
            patch_of(model), Realign(model, "none"), trace, torch.randn(1, model.config.hidden_size, device="cuda"), [8]
        )
    assert trace.lengths == [13] and torch.cuda.current_stream() == stream
    torch.rand(3, device="cuda")
    torch.cuda.synchronize()


def test_a_benchmark_that_is_not_captured_spoils_no_other():
    """One waits for the device, one does so only when it is captured, and ours comes last."""
    x = torch.linspace(-1, 1, 1000, device="cuda")
    double = lambda wait: lambda p: Trial(lambda: 2 * x + (0 * x.sum().item() if wait() else 0), lambda y: {"y": y})
    ways = {"waits": lambda: True, "fails": torch.cuda.is_current_stream_capturing, OURS: lambda: False}
    problem = Problem(Case("double", "any", n=1), x, lambda dtype: {"y": 2 * x.to(dtype)})
    with own_stream("cuda"):
        contest = Contest(problem, {name: double(wait) for name, wait in ways.items()}, "cuda")
        assert not contest.notes
        contest.warm_up()
        assert set(contest._uncaptured) == {"waits", "fails"} and set(contest._graphs) == {OURS}, contest._uncaptured
        assert "synchroniz" in contest._uncaptured["waits"]
        assert all(contest.sample(name, 0) < 1e-3 for name in ways)
    torch.rand(3, device="cuda")  # generators do not count on a capture
    torch.cuda.synchronize()


def test_a_backward_that_holds_the_adapters_it_waits_for():
    """Autograd's thread recomputes the layers, and the thread that called backward has their adapters."""
    model = with_lora(tiny("qwen3", torch.float32, patch=False)).cuda().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = tokens(5)[0].cuda()[None]
    with switched_to(model, "default"):
        loss = model(ids).logits.sum()
        with pytest.raises(RuntimeError, match="backward: expected it outside of switched_to and switched_off"):
            loss.backward()
        loss = model(ids).logits.sum()
    loss.backward()
    assert gradients(model)


def test_decoding_waits_for_the_device_once_a_token():
    """For the tokens that were chosen. Where no rule looks at the texts, these stay on the CPU."""
    s = system(dtype=torch.float32).cuda()
    rules = Rules(Sampling.of(s, max_new_tokens=4), s, [0, 1], torch.zeros(1, dtype=torch.long))
    assert rules.text.device.type == "cpu" and rules.append([5, 5], torch.zeros(2, 64, device="cuda")) == [False, False]
    beams = dict(seed=0, num_beams=2, temperature=1.5)
    for options in (dict(temperature=0), dict(seed=0), beams, dict(temperature=0, repetition_penalty=2.0)):
        assert s.generate(QUESTIONS, max_new_tokens=6, **options) == s.generate(QUESTIONS, 6, batch_size=1, **options)


def test_a_second_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    s = system(agents=[Agent("a", "w5 {question}", 12), Agent("b", "w9 {question}")], dtype=torch.float32).to("cuda:1")
    with torch.no_grad():
        got = s(QUESTIONS[:1]).logits  # latent steps as a graph
        patch_of(s.model).graphs = False
        assert_close(got, s(QUESTIONS[:1]).logits, 1e-5)
    model = gpu_model().to("cuda:1")
    trace = diffmas.Trace(model)
    ids = tokens(5)[0][None].to("cuda:1")
    with torch.no_grad():
        got = forward(patch_of(model), trace, trace.plan([5], "prompt"), head=True, input_ids=ids).logits
        want = tiny("qwen3", torch.float32, patch=False).to("cuda:1")(ids).logits
    assert_close(got, want, 1e-4)

"""torch.compile(fullgraph=True) with a trace: each layer in training, the whole body for prefill, latent steps and decoding."""

import copy
import functools
import gc
import os
import pickle
import shutil

import pytest
import systems
import torch
from models import assert_close, body, embed, gradients, latent_steps, loss_of, pad, prefill, read, tiny, tokens, with_lora
from torch._dynamo.utils import counters

import diffmas
from diffmas.models.forward import forward
from diffmas.models.patch import patch_of
from diffmas.trace import layer_work

LAYERS = 12  # more than torch compiles of one function, where layers do not share what is compiled


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


no_recompilation = lambda: torch.compiler.set_stance("fail_on_recompile")  # noqa: E731


def compile_layers(model, backend="aot_eager"):
    for layer in body(model).layers:
        layer.compile(fullgraph=True, backend=backend)
    return model


needs_cpp_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler")


# ---- layers, in training ---------------------------------------------------------------------------------------------


def packed(model, lengths=((5, 3), (1, 1), (1, 1), (1, 1), (7, 4), (2, 2), (6, 6)), seed=1):
    """A loss over prompts and latent steps on one trace, packed and planned by the caller. lengths: of each forward."""
    patch, trace = patch_of(model), diffmas.Trace(model, len(lengths[0]))
    head, generator, h, total = model.get_output_embeddings(), torch.Generator().manual_seed(seed), None, 0
    for i, new in enumerate(lengths):
        trace.agent = str(i)
        latent = h is not None and max(new) == 1
        forward_pass = trace.plan(list(new), "latent" if latent else "prompt")
        inputs = {"inputs_embeds": h} if latent else {"input_ids": torch.randint(2, 60, (1, sum(new)), generator=generator)}
        out = forward(patch, trace, forward_pass, **inputs).last_hidden_state
        h = out[:, forward_pass.last_rows()]
        if i % 2 == 0:
            total = total + loss_of(head(out))
    return total


def padded(model, first=(4, 2), second=(3, 1)):
    """A loss over an episode of padded batches through the model's own forward."""
    trace = prefill(model, *tokens(*first))
    latent_steps(model, trace, embed(model, torch.tensor([[5], [6]])[: len(first)]), 3)
    ids, mask = pad(tokens(*second, seed=2), "right")
    logits = model(input_ids=ids, attention_mask=mask, past_key_values=trace).logits
    return sum(loss_of(x[m.bool()]) for x, m in zip(logits, mask))


def losses(model, run, **options) -> tuple[torch.Tensor, dict]:
    loss = run(model, **options)
    loss.backward()
    return loss.detach(), gradients(model)


def assert_equal(got, want):
    (loss, grads), (wanted_loss, wanted) = got, want
    assert torch.equal(loss, wanted_loss) and grads.keys() == wanted.keys() and wanted
    different = [n for n in wanted if not torch.equal(grads[n], wanted[n])]
    assert not different, different


def assert_same(got, want):
    """As above, but for the order in which the gradients of a parameter are added up."""
    assert torch.equal(got[0], want[0])
    assert_close(got[1], want[1], limit=1e-13)


def check_layers(model, *runs, most=2, want=None):
    """Compiled layers give what they gave in eager mode, lengths that change cost few recompilations, a second episode none."""
    want = want or [losses(model, run) for run in runs]
    alive = set(layer_work._alive)
    compile_layers(model)
    losses(model, packed, lengths=((4, 2),))
    first = graphs()
    for run, wanted in zip(runs, want):
        assert_equal(losses(model, run), wanted)
    assert 0 < first and graphs() - first <= most, (first, graphs())
    with no_recompilation():
        for run, wanted in zip(runs, want):
            assert_equal(losses(model, run), wanted)
    gc.collect()
    assert set(layer_work._alive) <= alive  # what is compiled keeps no forward pass


@pytest.mark.parametrize("family", ["qwen3", "llama", "cohere"])
def test_layers_in_training(family):
    check_layers(tiny(family, num_hidden_layers=LAYERS if family == "qwen3" else 2), packed, padded, most=1)
    assert graphs() == 2  # all layers share what is compiled: the first length, then any


@pytest.mark.parametrize("lora", [False, True])
def test_layers_on_a_batch_of_one(lora):
    """Latent steps are forwards of a single token, which torch compiles on its own."""
    model = tiny("llama", num_hidden_layers=2)
    run = functools.partial(packed, lengths=((5,), (1,), (1,), (9,), (3,), (1,)))
    # On a frozen base the first layer's input needs no gradient in a prompt: it is one kind of layer, the others another.
    check_layers(with_lora(model) if lora else model, run, most=3 if lora else 2)


def test_layers_with_lora_on_a_frozen_base():
    check_layers(with_lora(tiny("qwen3", num_hidden_layers=LAYERS)), packed, padded)


def test_frozen_lower_layers():
    """Nothing is recorded in the first layer before there is a latent step, and then something is: two kinds of layers more."""
    model = tiny("qwen3")
    for part in (model.get_input_embeddings(), body(model).layers[0], model.lm_head):
        part.requires_grad_(False)
    check_layers(model, functools.partial(packed, lengths=((5, 3), (1, 1), (1, 1), (7, 4))), most=3 + 2)


def test_layers_under_activation_checkpointing():
    model = tiny("qwen3", num_hidden_layers=LAYERS)
    want = [losses(model, packed), losses(model, padded)]
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check_layers(model, packed, padded, want=want)


def test_some_layers():
    model = tiny("qwen3", num_hidden_layers=4)
    want = losses(model, packed)
    for layer in body(model).layers[::2]:
        layer.compile(fullgraph=True, backend="aot_eager")
    assert_equal(losses(model, packed), want)


def step(system, batch=(0, 1, 2)):
    """The loss of a training step of a multi-agent system, and all its gradients."""
    questions, answers = ([texts[i] for i in batch] for texts in (systems.QUESTIONS, systems.ANSWERS))
    loss = system(questions, answers).loss
    loss.backward()
    return loss.detach(), gradients(system)


@pytest.mark.parametrize("options", [{}, {"trace_content": "latent_only"}])
def test_a_system_in_training(options):
    system = systems.system(**options)
    want = step(system), step(system, (2, 1))
    compile_layers(system.model)
    for _ in range(2):
        assert_same(step(system), want[0])
        assert_same(step(system, (2, 1)), want[1])
    assert graphs() <= 4  # the first layer, whose input needs no gradient in a prompt, and the others
    with no_recompilation():
        assert_same(step(system), want[0])


@needs_cpp_compiler
def test_layers_with_inductor():
    model = tiny("llama", num_hidden_layers=2)
    want = losses(model, padded)
    compile_layers(model, "inductor")
    for _ in range(2):
        for got, wanted in zip(losses(model, padded), want):
            assert_close(got, wanted)


# ---- the body, without gradients -------------------------------------------------------------------------------------


def use(model, log=None, agents=3):
    """Prompts of changing lengths, latent steps and decoding, on one trace; the hidden states of everything."""
    trace, out, generator = diffmas.Trace(model, 2), [], torch.Generator().manual_seed(3)

    def read(**inputs):
        before = counters["stats"]["unique_graphs"]
        h = body(model)(**inputs, past_key_values=trace).last_hidden_state
        out.append(h.flatten(0, 1))
        if log is not None:
            log.append(counters["stats"]["unique_graphs"] - before)
        return h[:, -1:]

    for agent in range(agents):
        trace.agent = str(agent)
        h = read(input_ids=torch.randint(2, 60, (2, 6 + agent), generator=generator))
        for _ in range(3):
            h = read(inputs_embeds=h)
    for _ in range(3):
        read(input_ids=torch.randint(2, 60, (2, 1), generator=generator))
    return torch.cat(out)


@pytest.mark.parametrize("family, mode", [("qwen3", "inference_mode"), ("cohere", "no_grad")])
def test_the_body_without_gradients(family, mode):
    model = tiny(family, num_hidden_layers=2)
    with getattr(torch, mode)():
        want = use(model)
        body(model).compile(fullgraph=True, backend="aot_eager")
        log = []
        assert torch.equal(use(model, log), want)
        # The first prompt, latent steps, and prompts of any length, decoding too.
        assert [i for i, new in enumerate(log) if new] == [0, 1, 4] and graphs() == 3, log
        with no_recompilation():
            assert torch.equal(use(model), want)


def test_generation_of_a_system():
    system = systems.system()
    options = dict(max_new_tokens=6, temperature=0.8, seed=3)
    want = system.generate_tokens(systems.QUESTIONS, **options)
    body(system.model).compile(fullgraph=True, backend="aot_eager")
    assert system.generate_tokens(systems.QUESTIONS, **options) == want
    with no_recompilation():
        assert system.generate_tokens(systems.QUESTIONS, **options) == want


@needs_cpp_compiler
def test_the_body_with_inductor():
    model = tiny("llama", num_hidden_layers=1)
    with torch.no_grad():
        want = use(model, agents=2)
        body(model).compile(fullgraph=True)
        assert_close(use(model, agents=2), want)


# ---- the body, with gradients, and whole models -----------------------------------------------------------------------


def test_the_body_in_training():
    model = tiny("llama", num_hidden_layers=2)
    want = losses(model, packed)
    body(model).compile(fullgraph=True, backend="aot_eager")
    assert_equal(losses(model, packed), want)


@pytest.mark.parametrize("how", ["method", "function"])
def test_the_whole_model(how):
    """The hooks that plan and commit are not traced: graphs break there, and the result is the same."""
    model = tiny("llama", num_hidden_layers=2)
    want = losses(model, padded)
    if how == "method":
        model.compile(backend="aot_eager")
        assert_equal(losses(model, padded), want)
    else:
        ids, compiled = tokens(5)[0][None], torch.compile(model, backend="aot_eager")
        with torch.no_grad():
            for _ in range(2):
                a, b = (m(input_ids=ids, past_key_values=diffmas.Trace(model)).logits for m in (model, compiled))
                assert torch.equal(a, b)
    assert counters["stats"]["unique_graphs"]


# ---- patching and compiling -------------------------------------------------------------------------------------------


def test_without_a_trace():
    model = tiny("llama", num_hidden_layers=2)
    ids = torch.stack(tokens(5, 5))
    want = model(input_ids=ids, use_cache=False).logits
    compile_layers(model)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, want)
    losses(model, padded)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, want)
    body(model).compile(backend="aot_eager")
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, want)


def test_unpatching_leaves_nothing_compiled():
    model = tiny("llama", num_hidden_layers=1)
    ids = tokens(5)[0][None]
    plain = model(input_ids=ids, use_cache=False).logits
    for _ in range(2):
        body(model).compile(fullgraph=True, backend="aot_eager")
        prefill(model, *tokens(3, 2))
    diffmas.unpatch_model(model)
    assert not {"forward", "compile"} & body(model).__dict__.keys()
    assert all("forward" not in layer.self_attn.__dict__ for layer in body(model).layers)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)
    body(model).compile(backend="aot_eager")  # torch's own again
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_copies_of_a_compiled_model(duplicate):
    """A copy runs on its own weights: what was compiled for the other is compiled for it anew."""
    model = tiny("llama", num_hidden_layers=2)
    compile_layers(model)
    body(model).compile(backend="aot_eager")
    rows = tokens(4, 2)
    want = read(model, prefill(model, *rows), *rows)
    other = duplicate(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert other.diffmas_patch.body is body(other)
    for got, wanted in zip(read(other, prefill(other, *rows), *rows), want):
        assert torch.equal(got, wanted)
    body(other).compile(fullgraph=True, backend="aot_eager")
    for got, wanted in zip(read(other, prefill(other, *rows), *rows), want):
        assert torch.equal(got, wanted)


# ---- the op ------------------------------------------------------------------------------------------------------------


def op_arguments(forward_pass, normed: bool):
    n, generator = sum(forward_pass.lengths), torch.Generator().manual_seed(2)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    q, k, v = (random(n, heads, 8).requires_grad_() for heads in (4, 2, 2))
    weights = [random(8).requires_grad_() if normed else None for _ in range(2)]
    work = forward_pass.work
    tables = random(n, 8), random(n, 8)
    return q, k, v, forward_pass.order, *tables, *weights, 1e-6, 0.3, work.ticket, work.spec.layers[0].number


class Again(list):
    """Which layers ran, of a forward pass whose layers may run again and again."""

    def __setitem__(self, *_):
        pass


@pytest.mark.parametrize("normed", [False, True])
def test_opcheck(normed):
    """Schema, autograd, fakes, and what AOTAutograd makes of it, with numbers of tokens that may change."""
    forward_pass = diffmas.Trace(tiny("qwen3"), 2).plan([3, 2], "prompt")
    forward_pass.work.ran = Again(forward_pass.work.ran)
    torch.library.opcheck(torch.ops.diffmas.attend, op_arguments(forward_pass, normed))


def test_the_op_of_a_pass_that_is_over():
    forward_pass = diffmas.Trace(tiny("qwen3"), 2).plan([3, 2], "prompt")
    args = op_arguments(forward_pass, False)
    args = (*args[:3], None, *args[4:])
    del forward_pass
    gc.collect()
    with torch.no_grad(), pytest.raises(RuntimeError, match="this forward pass of a trace is over"):
        torch.ops.diffmas.attend(*args)

"""The CPU's op of decoder layers of few rows, against an op for each of their parts and against float64."""

import pytest
import torch
import torch.nn.functional as F

from diffmas.ops import extension, reference
from diffmas.ops.linear import Adapter, Parts, linear

pytestmark = pytest.mark.skipif(not extension.loaded, reason=f"the CPU kernels are missing: {extension.error}")

HIDDEN, INNER, KV, HEAD, EPS, SCALE = 96, 160, 32, 16, 1e-5, 0.3
ops = torch.ops.diffmas_native


def make_linear(out, length, dtype, rank):
    weight, bias = torch.randn(out, length) / length**0.5, 0.3 * torch.randn(out)
    if not rank:
        return weight.to(dtype), None, None, None, 0.0
    return weight.to(dtype), bias.to(dtype), torch.randn(rank, length) / length**0.5, torch.randn(out, rank) / rank**0.5, 0.7


def make_layer(dtype, rank=0, hidden=HIDDEN, inner=INNER):
    shapes = [(hidden, hidden), (KV, hidden), (KV, hidden), (hidden, hidden), (inner, hidden), (inner, hidden), (hidden, inner)]
    return [make_linear(*shape, dtype, rank) for shape in shapes], [(1 + 0.3 * torch.randn(hidden)).to(dtype) for _ in range(2)]


class Rows:
    """Pools of a layer, where its few rows are written, and what they see, of two sequences."""

    def __init__(self, n, dtype, heads=HIDDEN // HEAD, shared=False):
        generator = torch.Generator().manual_seed(n)
        past, self.n, self.heads = 70, n, heads
        self.pools = [torch.randn(160, KV // HEAD, HEAD, generator=generator).to(dtype) for _ in range(2)]
        angles = torch.randn(1, n, HEAD // 2, generator=generator).repeat(1, 1, 2)
        self.cos, self.sin, self.slots = angles.cos().to(dtype), angles.sin().to(dtype), torch.arange(past, past + n)
        first = n // 2
        q_indptr, table = [0, first, n], lambda *rows: [torch.tensor(x) for x in rows]
        own = table(q_indptr, [0, 1, 2], [past, past + first], [first, n - first])
        old = table(q_indptr, [0, 1, 3], [0, 10, 40], [30, 20, 25])
        start, length = [0, past, 10, 40, past + first], [30, first, 20, 25, n - first]
        self.views = [old, own] if shared else [table(q_indptr, [0, 2, 5], start, length)]

    def inject(self, q, k, v):
        """Heads of q, with K and V written."""
        heads = (x.view(self.n, -1, HEAD) for x in (q, k, v))
        return ops.inject(*heads, self.cos[0], self.sin[0], self.slots, None, None, 0.0, False, *self.pools)

    def attend(self, q, k, v):
        """o [n, hidden], as the layer's own ops make it."""
        q = self.inject(q, k, v)
        states = [
            ops.cross_attention(q, *self.pools, *view, None, None, SCALE, view is self.views[-1], False) for view in self.views
        ]
        return (ops.merge_states(*states[0], *states[1]) if len(states) > 1 else states[0])[0].flatten(1)


def adapters_of(linear) -> tuple[Adapter, ...]:
    """Of what make_linear gives, or of (weight, bias, adapters)."""
    return () if linear[2] is None else (Adapter(*linear[2:]),) if len(linear) == 5 else linear[2]


def arguments(rows, layers, ends=()) -> dict:
    """layers: (linears, norms) of each."""
    present = lambda some: [t for t in (*some[:2], *(t for adapter in adapters_of(some) for t in adapter[:2])) if t is not None]
    linears = [linear for some, _ in layers for linear in some]
    parts = [(x[1] is not None) + 2 * bool(adapters_of(x)) for x in linears]
    scales = [s for x in linears for s in ([a.scale for a in adapters_of(x)] or [0.0] * (len(ends) or 1))]
    return {
        "norms": [w for _, norms in layers for w in norms], "eps": [EPS] * 2 * len(layers),
        "linears": [t for linear in linears for t in present(linear)], "parts": parts, "scales": scales,
        "ends": list(ends),
        "cos": rows[0].cos, "sin": rows[0].sin, "slots": rows[0].slots, "head_norms": [], "head_eps": 0.0, "interleaved": False,
        "k_pools": [r.pools[0] for r in rows], "v_pools": [r.pools[1] for r in rows], "view": rows[0].views[0],
        "rest": rows[0].views[1] if len(rows[0].views) > 1 else [], "inv_freq": None, "scale": SCALE, "frozen": [],
        "frozen_view": [],
    }  # fmt: skip


def fused(x, rows, layers, **more):
    """-> x [n, hidden] behind the layers."""
    return ops.few_rows_layers(x[None], **arguments(rows, layers) | more, learning=False)[0][0]


def learned(x, rows, layers, dy, change=lambda kept: kept, ends=()):
    """With gradients: y, what backward leaves, dK and dV, and the gradients of the adapters' weights."""
    args = arguments(rows, layers, ends)
    args["parts"] = [part | 4 if part & 2 else part for part in args["parts"]]
    y, *kept = ops.few_rows_layers(x[None], **args, learning=True)
    dk, dv = ([torch.zeros(r.pools[0].shape) for r in rows] for _ in range(2))
    tail = torch.zeros(2, dtype=torch.int64)
    found = ops.few_rows_layers_backward(
        dy[None],
        x[None],
        change(kept),
        **args,
        dk_pools=dk,
        dv_pools=dv,
        own_rows_only=[False] * len(rows),
        tail=tail,
        no_tail=None,
    )
    of_layers = (args[name] for name in ("norms", "eps", "linears", "parts", "scales", "ends"))
    weights = ops.few_rows_lora_grads(*of_layers, *([t] for t in (kept[1], *kept[4:], *found[2:])))
    return [y[0], *found, *dk, *dv, *weights]


def by_its_parts(x, rows, linears, norms, ends=None):
    """By an op for each part of the layer."""
    own = [Parts(*some[:2], adapters_of(some)) for some in linears]
    q, k, v, out, gate, up, down = (lambda x, some=some: linear(x, some, ends)[0] for some in own)
    normed = ops.norm(x, norms[0], EPS)
    h = x + out(rows.attend(q(normed), k(normed), v(normed)))
    inner = ops.norm(h, norms[1], EPS)
    return h + down(ops.gate(gate(inner), up(inner)))


def as_the_model(x, rows, linears, norms, product):
    """As transformers' layers do it, in the dtype of x."""
    q, k, v, out, gate, up, down = (lambda x, some=some: product(x, *some) for some in linears)
    normed = plain_norm(x, norms[0])
    heads = (rows.cos[0], rows.sin[0], rows.slots, None, None, 0.0, False, *rows.pools)
    turned = reference.inject(*(y.view(len(x), -1, HEAD) for y in (q(normed), k(normed), v(normed))), *heads)
    view = [*rows.views[-1], None, None]
    o = reference.cross_attention(turned, *rows.pools, *view, SCALE, True, False)[0]
    h = x + out(o.flatten(1).to(x.dtype))
    inner = plain_norm(h, norms[1])
    return h + down(F.silu(gate(inner)) * up(inner))


def exact_product(x, weight, bias, a, b, scale):
    y = x @ weight.T
    return y if a is None else y + bias + scale * x @ a.T @ b.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("n", [2, 3, 12, 32])
def test_layers(n, rank, dtype):
    """The bits of the parts' ops, through two layers; and close to float64."""
    torch.manual_seed(n)
    x, layers = torch.randn(n, HIDDEN).to(dtype), [make_layer(dtype, rank) for _ in range(2)]
    for shared in (False, True):
        rows, same = ([Rows(n, dtype, shared=shared) for _ in layers] for _ in range(2))
        got, want = fused(x, rows, layers), x
        for own, layer in zip(same, layers):
            want = by_its_parts(want, own, *layer)
        assert torch.equal(got, want)
        assert all(torch.equal(a, b) for r, s in zip(rows, same) for a, b in zip(r.pools, s.pools))
    linears, norms = layers[0]
    rows, wide_rows = Rows(n, dtype), Rows(n, dtype)
    wide = lambda t: t.double() if isinstance(t, torch.Tensor) else t
    for name in ("cos", "sin"):
        setattr(wide_rows, name, wide(getattr(wide_rows, name)))
    wide_rows.pools = list(map(wide, wide_rows.pools))
    linears, norms = [tuple(map(wide, some)) for some in linears], list(map(wide, norms))
    exact = as_the_model(wide(x), wide_rows, linears, norms, exact_product)
    tolerance = 1e-5 if dtype == torch.float32 else 0.04
    torch.testing.assert_close(fused(x, [rows], layers[:1]).double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_adapters_with_rows_of_their_own(dtype):
    """The bits of the parts' ops. One adapter has no row, and one linear has none of them; and their gradients."""
    torch.manual_seed(0)
    x, (linears, norms), ends = torch.randn(12, HIDDEN).to(dtype), make_layer(dtype, 5), [7, 7, 12]

    def with_three(linear, ranks):
        out, length = linear[0].shape
        return *linear[:2], tuple(Adapter(torch.randn(r, length) / 9, torch.randn(out, r) / 2, 0.5 * r) for r in ranks)

    own = [with_three(some, () if i == 2 else (3, 4, 5)) for i, some in enumerate(linears)]
    args = arguments([Rows(12, dtype)], [(own, norms)], ends)
    (got,) = ops.few_rows_layers(x[None], **args, learning=False)
    assert torch.equal(got[0], by_its_parts(x, Rows(12, dtype), own, norms, ends))
    for wrong in ([7, 12], [7, 7, 11], [7, 3, 12], [-1, 7, 12], [7, 13, 12], []):
        with pytest.raises(RuntimeError, match=r"(ends|scales): expected"):
            ops.few_rows_layers(x[None], **args | {"ends": wrong}, learning=False)
        with pytest.raises(RuntimeError, match=r"(ends|scales): expected"):
            ops.few_rows_lora_grads(
                *(args[n] for n in ("norms", "eps", "linears", "parts", "scales")), wrong, [torch.zeros(1, 1, 12, HIDDEN)],
                *[[torch.zeros(0)]] * 4,
            )  # fmt: skip


@pytest.mark.parametrize("n, ends", [(12, (7, 7, 12)), (1, (0, 1, 1))])
def test_equal_adapters_with_rows_of_their_own_learn_as_one(n, ends):
    torch.manual_seed(0)
    (x, dy), (linears, norms) = torch.randn(2, n, HIDDEN), make_layer(torch.float32, 5)
    rows = lambda: [Rows(n, torch.float32, shared=False)]
    if n == 1:
        one_sequence = [[torch.tensor(t) for t in ([0, 1], [0, 2], [3, 70], [60, 1])]]
        rows = lambda made=rows: [setattr(r, "views", one_sequence) or r for r in made()]
    one = learned(x, rows(), [(linears, norms)], dy)
    several = [(*some[:2], adapters_of(some) * 3) for some in linears]
    three = learned(x, rows(), [(several, norms)], dy, ends=ends)
    same = len(one) - 2 * 7
    assert len(three) == same + 3 * 2 * 7
    for got, want in zip(three[:same], one[:same]):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for i in range(7):
        for which in range(2):
            parts = [three[same + 6 * i + 2 * k + which] for k in range(3)]
            torch.testing.assert_close(sum(parts), one[same + 2 * i + which], rtol=1e-4, atol=1e-4)
            assert not any(part.any() for part, begin, end in zip(parts, (0, *ends), ends) if begin == end)


def test_one_row_of_one_sequence():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = make_layer(dtype), torch.randn(1, HIDDEN).to(dtype)
        rows, same = Rows(1, dtype), Rows(1, dtype)
        for r in (rows, same):
            r.views = [[torch.tensor(t) for t in ([0, 1], [0, 2], [3, 70], [60, 1])]]
        assert torch.equal(fused(x, [rows], [layer]), by_its_parts(x, same, *layer))


def test_large_numbers_through_the_gate():
    """SiLU of what exp would overflow on is 0 or the number itself."""
    linears, norms = make_layer(torch.float32)
    linears[4] = (200 * linears[4][0], *linears[4][1:])
    x = torch.randn(4, HIDDEN)
    got = fused(x, [Rows(4, torch.float32)], [(linears, norms)])
    want = as_the_model(x, Rows(4, torch.float32), linears, norms, exact_product)
    assert want.abs().max() > 20
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_bits_do_not_depend_on_the_threads():
    torch.manual_seed(0)
    layers = [make_layer(torch.bfloat16, 5, hidden=512, inner=1024) for _ in range(2)]
    (x, dy), before, found = torch.randn(2, 12, 512).bfloat16(), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        rows = lambda: [Rows(12, torch.bfloat16) for _ in layers]
        found.append([fused(x, rows(), layers), *learned(x, rows(), layers, dy)])
    torch.set_num_threads(before)
    assert torch.equal(*found[0][:2]) and len(found[0]) == 2 + 4 + 2 * 2 + 2 * 2 * 7
    assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[0], found[2]))


def test_what_is_wrong_is_said():
    x, (linears, norms), rows = torch.randn(2, HIDDEN), make_layer(torch.float32), Rows(2, torch.float32)
    other = lambda i, weight: [*linears[:i], (weight, None, None, None, 0.0), *linears[i + 1 :]]
    for wrong, what in (
        ((x[:, :80], [rows], [(linears, norms)]), "x"),
        ((torch.randn(33, HIDDEN), [rows], [(linears, norms)]), "x"),
        ((x, [rows], [(linears, [norms[0][:32], norms[1]])]), "norm"),
        ((x, [rows], [(other(1, torch.randn(KV, 32)), norms)]), "weight"),
        ((x, [rows], [(other(2, torch.randn(KV, HIDDEN).bfloat16()), norms)]), "weight"),
        ((x, [rows], [(other(3, torch.randn(64, HIDDEN)), norms)]), "weight"),
        ((x, [rows], [(other(6, torch.randn(HIDDEN, 32)), norms)]), "weight"),
        ((x, [rows, rows], [(linears, norms)]), "k_pools, v_pools"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"{what}: expected"):
            fused(*wrong)
    for name, value in (("parts", [0] * 6), ("eps", [EPS]), ("linears", linears[0][:1]), ("head_norms", norms[:1])):
        with pytest.raises(RuntimeError, match=f"{name}.*: expected"):
            fused(x, [rows], [(linears, norms)], **{name: value})
    for name in ("view", "rest"):
        with pytest.raises(RuntimeError, match=f"{name}: expected 4 or 5 tensors"):
            fused(x, [rows], [(linears, norms)], **{name: rows.views[0][:3]})
    adapted = make_layer(torch.float32, rank=5)
    for change in (
        lambda kept: kept[1:],
        *(lambda kept, i=i: [*kept[:i], kept[i].flatten()[1:], *kept[i + 1 :]] for i in range(4)),
        *(lambda kept, i=i: [*kept[:i], kept[i].bfloat16(), *kept[i + 1 :]] for i in range(2)),
    ):
        with pytest.raises(RuntimeError, match="kept: expected|lse: expected"):
            learned(x, [rows], [adapted], x, change)
    with pytest.raises(RuntimeError, match="dy: expected"):
        learned(x, [rows], [adapted], x[:1])
    grads, none = torch.ops.diffmas_native.few_rows_lora_grads, [torch.zeros(0)]
    with pytest.raises(RuntimeError, match="norms: expected two a layer, got none"):
        grads([], [], [], [], [], [], [torch.zeros(1, 1, 2, 64)], none, none, none, none)
    narrow = [(torch.randn(KV, 32), *linears[1][1:])]
    with pytest.raises(RuntimeError, match="weight: expected"):
        tensors = [t for linear in (linears[0], *narrow, *linears[2:]) for t in linear[:4] if t is not None]
        parts = [(1 if x[1] is not None else 0) + (2 if x[2] is not None else 0) for x in (linears[0], *narrow, *linears[2:])]
        grads([n for n in norms], [EPS, EPS], tensors, parts, [0.0] * 7, [], [torch.zeros(1, 1, 2, 64)], none, none, none, none)


# ---- norm and gate of any number of rows, and their gradients --------------------------------------------------------


def plain_norm(x, weight):
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def plain_gate(gate, up):
    return F.silu(gate) * up


def with_gradients(op, dy, *inputs):
    """y, and the gradients of all inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = op(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def ours(name, dy, *inputs, **options):
    grads = getattr(ops, f"{name}_backward")(dy, *inputs, *options.values())
    return [getattr(ops, name)(*inputs, *options.values()), *([grads] if name == "norm" else grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "plain"), [("norm", plain_norm), ("gate", plain_gate)])
@pytest.mark.parametrize("n", [0, 1, 7, 300])
def test_norm_and_gate(n, name, plain, dtype):
    """The numbers of torch's own chain of ops, rounded where they are; strides between rows are taken as they come."""
    torch.manual_seed(n)
    x, dy = (3 * torch.randn(n, HIDDEN)).to(dtype), torch.randn(n, 2 * HIDDEN).to(dtype)[:, HIDDEN:]
    other = torch.randn(n, HIDDEN).to(dtype) if name == "gate" else (1 + 0.3 * torch.randn(HIDDEN)).to(dtype)
    options = {"eps": EPS} if name == "norm" else {}
    got = ours(name, dy, x, other, **options)
    wide = with_gradients(plain, dy.double(), x.double(), other.double())[: len(got)]
    for y, same, exact in zip(got, with_gradients(plain, dy, x, other), wide):
        assert y.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
        elif n:
            assert (y == same).double().mean() > 0.97
            assert (y.double() - exact).norm() <= 1.1 * (same.double() - exact).norm()


def test_a_gate_that_is_shut_or_wide_open():
    gate = torch.tensor([[-200.0, -90.0, 90.0, 200.0] * 8])
    y, dgate, dup = ours("gate", torch.ones_like(gate), gate, torch.full_like(gate, 2.0))
    want = torch.tensor([[0.0, 0.0, 1.0, 1.0] * 8])
    torch.testing.assert_close(dgate, 2 * want)
    torch.testing.assert_close(dup, want * gate)
    torch.testing.assert_close(y, 2 * want * gate)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda dy, x, weight: (dy, x[:, :40], weight[:40]), "x: expected rows of a length that fits, a multiple of 32"),
        (lambda dy, x, weight: (dy[1:], x, weight), "dy"),
        (lambda dy, x, weight: (dy, x, weight[1:]), "weight"),
        (lambda dy, x, weight: (dy.bfloat16(), x.bfloat16(), weight), "weight"),
        (lambda dy, x, weight: (dy.bfloat16(), x, weight), "dy: expected the dtype of the others"),
        (lambda dy, x, weight: (dy, x.half(), weight), "x: expected rows in float32 or bfloat16"),
    ],
)
def test_what_does_not_fit(change, message):
    tensors = torch.randn(3, HIDDEN), torch.randn(3, HIDDEN), torch.randn(HIDDEN)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.diffmas_native.norm_backward(*change(*tensors), EPS)

"""One forward and backward of every op on a backend and device, and the error budget that the results are held to."""

import torch
from op_cases import View, as_it_lies, attention_inputs, head_major

from diffmas.ops import reference

raw = torch.ops.diffmas


def within_budget(got, same_precision, exact, terms: float, products: torch.dtype = torch.float32):
    """Twice the error of the same-precision reference, and what rounding costs where that one is exact by luck.

    Inputs are unit normal, sums are kept in float32: a sum over `terms` of them may round by terms * eps. (A single
    visible row is such a case: do.v - do.o is zero, the reference takes both in the same order, a kernel need not.)
    products: the dtype that a kernel rounds p and ds to, as tensor cores want them.
    """
    eps = max(torch.finfo(got.dtype).eps, torch.finfo(products).eps)
    floor = torch.finfo(torch.float32).eps * terms + eps * exact.abs().max()
    got = got.double().cpu()
    error, budget = (got - exact).abs(), (same_precision.double() - exact).abs()
    assert not got.isnan().any()
    assert error.max() <= 2 * budget.max() + floor, f"error {error.max():.3e}, reference's {budget.max():.3e}"


def finite(x):
    return x.masked_fill(x == -torch.inf, -1e30)


def exact_in_half(*shape):
    return torch.randn(*shape).bfloat16().double()


def attention_all(inputs, backend, do, dlse=None, grad_tail=None, want_dq=True):
    """o, lse, dq and the gradient pools after one forward and backward; the pools start from a constant, to be added to."""
    args = inputs.args()
    o, lse = raw.cross_attention(*args, backend)
    wide = reference.accumulator(inputs.q.dtype)
    dk, dv = (head_major(*inputs.k_pool.shape, wide, 0.5, o.device) for _ in "kv")
    dlse, grad_tail = (None if x is None else x.to(o.device) for x in (dlse, grad_tail))
    dq = raw.cross_attention_backward(do.to(o), dlse, args[0], o, lse, *args[1:], dk, dv, grad_tail, want_dq, backend)
    return o, finite(lse), dq, dk, dv


def nan_stays_in_its_sequence(backend, name, dtype):
    """And reaches all that it must there. Both sequences have rows in one tile of the pool; one part of a view has the NaN of
    tensor `name`: q, do, k_pool or v_pool."""
    view = View([20, 2], [[(0, 300, 0), (620, 20, 0)], [(300, 320, 4), (640, 2, 0)]], causal=False)
    inputs, do = attention_inputs(view, rows=650), exact_in_half(22, 4, 64)
    want = attention_all(inputs.to(dtype), backend, do)
    {"do": do, **vars(inputs)}[name][9, 0, 5] = torch.nan  # a token, or a row, of the first sequence
    got, like = (attention_all(inputs.to(dtype), by, do) for by in (backend, "reference"))
    rows = torch.cat((torch.arange(300, 620), torch.arange(640, 650)))
    for i, (x, clean, wanted) in enumerate(zip(got, want, like)):
        other = slice(20, 22) if i < 3 else rows
        assert torch.equal(x[other], clean[other]) and x[wanted.isnan()].isnan().all()
    assert like[2].isnan().any() and like[3].isnan().any()


def row_makes_nan_of_what_it_sees(backend, name, value, dtype, queries, keys=150, D=64):
    """And of nothing else, bit for bit: a query row of q or do (`name`) with a `value` that is not finite, in a causal view."""
    inputs = attention_inputs(View([queries], [[(3, 40, 0), (100, keys - 40, 5)]]), D=D, rows=300)
    do, token, head = exact_in_half(queries, 4, D), queries // 2, 3
    want = attention_all(inputs.to(dtype), backend, do)
    {"do": do, "q": inputs.q}[name][token, head, D - 2] = value
    got = attention_all(inputs.to(dtype), backend, do)
    slots = torch.cat((torch.arange(3, 43), torch.arange(100, 60 + keys)))
    reached = torch.zeros(300, 2, dtype=torch.bool)
    reached[slots[: keys - queries + token + 1], head // 2] = True
    for x, clean in zip(got[3:], want[3:]):
        assert x[reached].isnan().all() and torch.equal(x[~reached], clean[~reached])
    others = torch.ones(queries, 4, dtype=torch.bool)
    others[token, head] = False
    assert got[2][token, head].isnan().all()
    assert all(torch.equal(x[others], clean[others]) for x, clean in zip(got[:3], want[:3]))


def inject_all(inputs, backend, dq_rot, dk, dv):
    wide = reference.accumulator(inputs.q.dtype)
    device = inputs.q.device
    k_pool, v_pool = (head_major(*dk.shape, inputs.q.dtype, 7.0, device) for _ in "kv")
    q_rot = raw.inject(inputs.q, inputs.k, inputs.v, *inputs.rope(), k_pool, v_pool, backend)
    dk_pool, dv_pool = (head_major(*x.shape, wide, 0.0, device).copy_(x) for x in (dk, dv))
    grads = raw.inject_backward(dq_rot.to(q_rot), inputs.q, inputs.k, *inputs.rope(), dk_pool, dv_pool, backend)
    return q_rot, k_pool, v_pool, *grads, dk_pool, dv_pool


def merge_all(states, do, dlse, dtype, backend, device="cpu"):
    """o, lse and the four gradients; lse stays float32 where o is shorter."""
    wide = reference.accumulator(dtype)
    args = [as_it_lies(x, dtype if x.dim() == 3 else wide, device) for x in states]
    o, lse = raw.merge_states(*args, backend)
    grads = raw.merge_states_backward(do.to(o), dlse.to(lse), *args, o, lse, backend)
    return o, finite(lse), *grads


def reposition_all(move, k, v, dk, dv, dtype, backend, device="cpu"):
    """The pools and the gradient pools after a forward and a backward."""
    wide = reference.accumulator(dtype)
    move = [x.to(device) if isinstance(x, torch.Tensor) else x for x in move]
    data = (k, dtype), (v, dtype), (dk, wide), (dv, wide)
    pools = [head_major(*x.shape, t, 0, device).copy_(x) for x, t in data]
    raw.reposition(*move, *pools[:2], backend)
    raw.reposition_backward(*move, *pools[2:], backend)
    return pools

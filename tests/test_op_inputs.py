"""What the ops refuse: bad input raises before any memory is touched, and the message names the argument."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from op_cases import ROWS, VIEWS, attention_inputs, inject_inputs

from diffmas import ops
from diffmas.ops import backends, reference

BACKENDS = [name for name in ("cpu",) if ops.available()[name] is None]
raw = torch.ops.diffmas

ORDER = {
    "inject": "q k v cos sin slots q_weight k_weight eps interleaved k_pool v_pool",
    "inject_backward": "dq_rot q k cos sin slots q_weight k_weight eps interleaved dk_pool dv_pool",
    "cross_attention": "q k_pool v_pool q_indptr seg_indptr seg_start seg_len seg_offset inv_freq scale causal interleaved",
    "cross_attention_backward": "do dlse q o lse k_pool v_pool q_indptr seg_indptr seg_start seg_len seg_offset inv_freq scale "
    "causal interleaved dk_pool dv_pool grad_tail want_dq",
    "merge_states": "o_a lse_a o_b lse_b",
    "reposition": "src dst offset inv_freq interleaved k_pool v_pool",
    "reposition_backward": "src dst offset inv_freq interleaved dk_pool dv_pool",
}


def good_arguments(op):
    """Everything an op might take, good; a case spoils one of them."""
    x = inject_inputs(n=5, D=64).to(torch.float32)
    a = dict(q=x.q, k=x.k, v=x.v, cos=x.cos, sin=x.sin, q_weight=x.q_weight, k_weight=x.k_weight, eps=1e-6, interleaved=False)
    a |= {name: torch.randn(20, 2, 64) for name in ("k_pool", "v_pool", "dk_pool", "dv_pool")}
    a |= dict(
        slots=torch.tensor([3, -1, 0, 4, 19]),
        dq_rot=x.q.clone(),
        do=x.q.clone(),
        o=x.q.clone(),
        lse=torch.zeros(5, 4),
        dlse=None,
    )
    a |= dict(q_indptr=torch.tensor([0, 3, 5]), seg_indptr=torch.tensor([0, 2, 3]), seg_start=torch.tensor([10, 0, 3]))
    a |= dict(seg_len=torch.tensor([5, 4, 9]), seg_offset=None, inv_freq=torch.ones(32), scale=0.1, causal=True)
    a |= dict(grad_tail=torch.tensor([2, 9]), want_dq=True)
    a |= dict(o_a=x.q, o_b=x.q, lse_a=torch.zeros(5, 4), lse_b=torch.zeros(5, 4))
    a |= dict(src=torch.tensor([0, 1, 0]), dst=torch.tensor([9, 7, 8]), offset=torch.tensor([1, 2, 3]))
    return {name: a[name] for name in ORDER[op].split()}


ints = torch.tensor
both_pools = lambda shape: dict(k_pool=torch.zeros(shape), v_pool=torch.zeros(shape))  # noqa: E731
halves = lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2]  # noqa: E731  equal values, last stride 2
shared = torch.zeros(60, 2, 64)


# op, the argument that the message names, what is wrong. Shapes, dtypes and strides, and indices outside of q and the pools.
BAD = [
    ("inject", "q", lambda a: dict(q=torch.zeros(5, 4))),
    ("inject", "q", lambda a: dict(q=torch.zeros(5, 0, 64))),
    ("inject", "q", lambda a: {n: a[n][..., :0] for n in ("q", "k", "v", "k_pool", "v_pool")} | dict(cos=None, sin=None)),
    ("inject", "q", lambda a: dict(q=torch.zeros(5, 4, 513), k=torch.zeros(5, 2, 513))),
    ("inject", "q", lambda a: dict(q=halves(a["q"]))),
    ("inject", "q", lambda a: dict(q=a["q"].int())),
    ("inject", "k", lambda a: dict(k=torch.zeros(4, 2, 64))),
    ("inject", "k", lambda a: dict(k=torch.zeros(5, 0, 64), v=torch.zeros(5, 0, 64), **both_pools((20, 0, 64)))),
    ("inject", "k", lambda a: dict(k=torch.zeros(5, 3, 64), v=torch.zeros(5, 3, 64), **both_pools((20, 3, 64)))),
    ("inject", "k", lambda a: dict(k=a["k"].half())),
    ("inject", "v", lambda a: dict(v=torch.zeros(5, 2, 32))),
    ("inject", "v", lambda a: dict(v=halves(a["v"]))),
    ("inject", "v", lambda a: dict(v=a["v"].half())),
    ("inject", "sin", lambda a: dict(cos=None)),
    ("inject", "sin", lambda a: dict(sin=torch.zeros(5, 32))),
    ("inject", "cos", lambda a: dict(cos=torch.zeros(4, 64), sin=torch.zeros(4, 64))),
    ("inject", "cos", lambda a: dict(cos=torch.zeros(5, 66), sin=torch.zeros(5, 66))),
    ("inject", "cos", lambda a: dict(cos=torch.zeros(5, 31), sin=torch.zeros(5, 31))),
    ("inject", "q_weight", lambda a: dict(q_weight=torch.ones(32))),
    ("inject", "k_weight", lambda a: dict(k_weight=torch.ones(1, 64))),
    ("inject", "slots", lambda a: dict(slots=torch.arange(4))),
    ("inject", "slots", lambda a: dict(slots=torch.arange(5).short())),
    ("inject", "slots", lambda a: dict(slots=ints([0, 1, 2, 3, 20]))),
    ("inject", "slots", lambda a: dict(slots=ints([0, 1, 2, 3, -2]))),
    ("inject", "k_pool", lambda a: dict(k_pool=torch.zeros(20, 2, 32))),
    ("inject", "v_pool", lambda a: dict(v_pool=torch.zeros(21, 2, 64))),
    ("inject", "v_pool", lambda a: dict(v_pool=a["v_pool"].half())),
    ("inject", "k_pool", lambda a: dict(k_pool=halves(a["k_pool"]))),
    ("inject_backward", "dq_rot", lambda a: dict(dq_rot=torch.zeros(5, 2, 64))),
    ("inject_backward", "dk_pool", lambda a: dict(dk_pool=a["dk_pool"].half(), dv_pool=a["dv_pool"].half())),
    ("cross_attention", "q", lambda a: dict(q=torch.zeros(5, 64))),
    ("cross_attention", "q", lambda a: dict(q=halves(a["q"]))),
    ("cross_attention", "q", lambda a: dict(q=torch.zeros(5, 4, 513), **both_pools((20, 2, 513)))),
    ("cross_attention", "k_pool", lambda a: both_pools((20, 0, 64))),
    ("cross_attention", "k_pool", lambda a: both_pools((20, 3, 64))),
    ("cross_attention", "k_pool", lambda a: dict(k_pool=halves(a["k_pool"]))),
    ("cross_attention", "v_pool", lambda a: dict(v_pool=a["v_pool"].bfloat16())),
    ("cross_attention", "v_pool", lambda a: dict(v_pool=torch.zeros(19, 2, 64))),
    ("cross_attention", "q_indptr", lambda a: dict(q_indptr=ints([0, 3, 4]))),
    ("cross_attention", "q_indptr", lambda a: dict(q_indptr=ints([1, 3, 5]))),
    ("cross_attention", "q_indptr", lambda a: dict(q_indptr=ints([0, 6, 5]))),
    ("cross_attention", "q_indptr", lambda a: dict(q_indptr=torch.zeros(0).long(), seg_indptr=torch.zeros(0).long())),
    ("cross_attention", "q_indptr", lambda a: dict(q_indptr=ints([0.0, 3.0, 5.0]))),
    ("cross_attention", "seg_indptr", lambda a: dict(seg_indptr=ints([0, 3]))),
    ("cross_attention", "seg_indptr", lambda a: dict(seg_indptr=ints([0, 4, 3]))),
    ("cross_attention", "seg_indptr", lambda a: dict(seg_indptr=ints([0, 2, 2]))),
    ("cross_attention", "seg_start", lambda a: dict(seg_start=ints([-1, 4, 3]))),
    ("cross_attention", "seg_start", lambda a: dict(seg_start=ints([16, 4, 3]))),
    ("cross_attention", "seg_start", lambda a: dict(seg_start=ints([2**62, 4, 3]), seg_len=ints([2**62, 4, 3]))),
    ("cross_attention", "seg_start", lambda a: dict(seg_start=ints([[10, 0, 3]]))),
    ("cross_attention", "seg_len", lambda a: dict(seg_len=ints([5, -4, 9]))),
    ("cross_attention", "seg_len", lambda a: dict(seg_len=ints([5, 9]))),
    ("cross_attention", "seg_offset", lambda a: dict(seg_offset=ints([5, 9]))),
    ("cross_attention", "inv_freq", lambda a: dict(seg_offset=ints([5, 9, 0]), inv_freq=None)),
    ("cross_attention", "inv_freq", lambda a: dict(inv_freq=torch.ones(33))),
    ("cross_attention", "inv_freq", lambda a: dict(inv_freq=torch.ones(4, 8))),
    ("cross_attention_backward", "do", lambda a: dict(do=torch.zeros(5, 2, 64))),
    ("cross_attention_backward", "dlse", lambda a: dict(dlse=torch.zeros(5, 2))),
    ("cross_attention_backward", "o", lambda a: dict(o=torch.zeros(4, 4, 64))),
    ("cross_attention_backward", "lse", lambda a: dict(lse=torch.zeros(5, 3))),
    ("cross_attention_backward", "lse", lambda a: dict(lse=torch.zeros(5, 4).double())),
    ("cross_attention_backward", "seg_len", lambda a: dict(seg_len=ints([5, -4, 9]))),
    ("cross_attention_backward", "dk_pool", lambda a: dict(dk_pool=torch.zeros(19, 2, 64))),
    ("cross_attention_backward", "dv_pool", lambda a: dict(dv_pool=a["dv_pool"].half())),
    ("merge_states", "o_a", lambda a: dict(o_a=torch.zeros(5, 4))),
    ("merge_states", "o_a", lambda a: dict(o_a=torch.zeros(5, 4, 0), o_b=torch.zeros(5, 4, 0))),
    ("merge_states", "o_a", lambda a: dict(o_a=halves(a["o_a"]))),
    ("cross_attention_backward", "grad_tail", lambda a: dict(grad_tail=ints([2]))),
    ("cross_attention_backward", "grad_tail", lambda a: dict(grad_tail=ints([2.0, 1.0]))),
    ("merge_states", "o_b", lambda a: dict(o_b=torch.zeros(4, 4, 64))),
    ("merge_states", "o_b", lambda a: dict(o_b=torch.zeros(5, 4, 64).int())),
    ("merge_states", "lse_a", lambda a: dict(lse_a=torch.zeros(5, 3))),
    ("merge_states", "lse_b", lambda a: dict(lse_b=torch.zeros(5, 4).long())),
    ("reposition", "src", lambda a: dict(src=ints([0, 1, 20]))),
    ("reposition", "src", lambda a: dict(src=ints([0, 1, -1]))),
    ("reposition", "src", lambda a: dict(src=ints([[0, 1, 2]]))),
    ("reposition", "dst", lambda a: dict(dst=ints([9, 7]))),
    ("reposition", "dst", lambda a: dict(dst=ints([9, 7, 20]))),
    ("reposition", "dst", lambda a: dict(dst=ints([9, -7, 2]))),
    ("reposition", "offset", lambda a: dict(offset=ints([1, 2]))),
    ("reposition", "offset", lambda a: dict(offset=ints([1.0, 2.0, 3.0]))),
    ("reposition", "inv_freq", lambda a: dict(inv_freq=torch.ones(33))),
    ("reposition", "k_pool", lambda a: both_pools((20, 0, 64))),
    ("reposition", "k_pool", lambda a: both_pools((20, 2, 513))),
    ("reposition", "k_pool", lambda a: dict(k_pool=halves(a["k_pool"]))),
    ("reposition", "v_pool", lambda a: dict(v_pool=a["v_pool"][:, :1])),
    ("reposition_backward", "dk_pool", lambda a: dict(dk_pool=a["dk_pool"].half(), dv_pool=a["dv_pool"].half())),
]
# Values that only the public functions look at.
BAD_VALUES = [
    ("inject", "eps", lambda a: dict(eps=float("nan"))),
    ("inject", "eps", lambda a: dict(eps=-1.0)),
    ("inject", "eps", lambda a: dict(eps=1e39)),
    ("cross_attention", "scale", lambda a: dict(scale=1e39)),
    ("inject", "slots", lambda a: dict(slots=ints([0, 5, -1, 5, 2]))),
    ("inject", "k_pool", lambda a: dict(k_pool=torch.zeros(1, 2, 64).expand(20, 2, 64))),
    ("inject", "v_pool", lambda a: dict(v_pool=torch.zeros(20, 1, 64).expand(20, 2, 64))),
    ("inject", "v_pool", lambda a: dict(v_pool=torch.zeros(4000).as_strided((20, 2, 64), (100, 50, 1)))),
    ("inject", "k_pool", lambda a: dict(v_pool=a["k_pool"])),
    ("inject", "k_pool", lambda a: dict(k_pool=shared[:20], v_pool=shared[19:39])),
    ("inject", "k_pool", lambda a: dict(q=shared[10:20].view(5, 4, 64), k_pool=shared[:20])),
    ("inject", "v_pool", lambda a: dict(v=shared[3:8], v_pool=shared[:20])),
    ("cross_attention", "seg_start", lambda a: dict(seg_start=ints([3, 0, 3]))),
    ("cross_attention", "seg_start", lambda a: dict(seg_start=ints([3, 3, 3]))),
    ("cross_attention", "seg_len", lambda a: dict(seg_len=ints([5, 0, 9]))),
    ("cross_attention", "scale", lambda a: dict(scale=float("nan"))),
    ("cross_attention", "scale", lambda a: dict(scale=float("inf"))),
    ("reposition", "dst", lambda a: dict(dst=ints([9, 7, 9]))),
    ("reposition", "dst", lambda a: dict(dst=ints([9, 7, 1]))),
    ("reposition", "k_pool", lambda a: dict(v_pool=a["k_pool"])),
]


def refused(call, error, op, name, spoil):
    args = good_arguments(op)
    args |= spoil(args)
    before = [x.clone() if isinstance(x, torch.Tensor) else None for x in args.values()]
    with pytest.raises(error, match=rf"(^|[ ,]){name}\b.*: expected"):
        call(args)
    for old, new in zip(before, args.values()):
        assert old is None or (old.device.type == "meta" or torch.equal(old, new))


def cases(bad):
    return pytest.mark.parametrize("op, name, spoil", bad, ids=[f"{i}-{op}-{name}" for i, (op, name, _) in enumerate(bad)])


@cases([case for case in BAD + BAD_VALUES if hasattr(ops, case[0])])
def test_public_functions_refuse(op, name, spoil):
    """The message names the argument, and nothing is written."""
    refused(lambda args: getattr(ops, op)(**args), ValueError, op, name, spoil)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built")
@cases(BAD)
def test_the_extension_refuses(op, name, spoil):
    """The same of its own binding."""
    refused(lambda args: getattr(torch.ops.diffmas_native, op)(*args.values()), RuntimeError, op, name, spoil)


@pytest.mark.parametrize("name", ["cos", "sin", "q_weight", "k_weight"])
@pytest.mark.parametrize("pool", ["k_pool", "v_pool"])
def test_refuses_tables_and_weights_inside_the_written_pools(pool, name):
    inside, beside = (slice(4, 9), slice(20, 25)) if name in ("cos", "sin") else (7, 20)
    memory = torch.randn(25, 2, 64)
    args = good_arguments("inject") | {pool: memory[:20]}
    with pytest.raises(ValueError, match=rf"{pool}: expected memory of its own, got a tensor that overlaps {name}\b"):
        ops.inject(**args | {name: memory[inside, 1]})
    ops.inject(**args | {name: memory[beside, 1]})


@pytest.mark.parametrize("name", ["q", "cos"])
def test_refuses_one_expanded_row_as_pool_and_input(name):
    row = torch.ones(64)
    one = {n: row.clone().expand(5, 1, 64) for n in ("q", "k", "v")} | {
        n: row.clone().expand(5, 1, 64)[:1] for n in ("k_pool", "v_pool")
    }
    args = good_arguments("inject") | one | dict(slots=ints([0, -1, -1, -1, -1]), cos=row.clone().expand(5, 64))
    ops.inject(**args)
    with pytest.raises(ValueError, match=rf"k_pool: expected memory of its own, got a tensor that overlaps {name}\b"):
        ops.inject(**args | {name: one["k_pool"][0].expand(5, *args[name].shape[1:])})


@pytest.mark.parametrize("op", ORDER)
def test_good_input(op):
    """The arguments that test_bad_input spoils; K and V interleaved in one allocation, heads or rows outermost, are legal."""
    for backend in BACKENDS:
        args = good_arguments(op)
        getattr(raw, op)(*args.values(), backend)
        for name in ("", "d"):
            if name + "k_pool" in args:
                for k, v in (torch.zeros(20, 2, 2, 64).unbind(1), torch.zeros(2, 20, 2, 64).transpose(0, 1).unbind(2)):
                    args |= {name + "k_pool": k, name + "v_pool": v}
                    getattr(raw, op)(*args.values(), backend)
                    if hasattr(ops, op):
                        getattr(ops, op)(**args, backend=backend)


@pytest.mark.parametrize(
    "op, name", [("inject", "k_pool"), ("inject", "slots"), ("cross_attention", "seg_len"), ("reposition", "dst")]
)
def test_refuses_another_device(op, name):
    refused(lambda args: getattr(ops, op)(**args), ValueError, op, name, lambda a: {name: a[name].to("meta")})


def test_refuses_an_unknown_backend():
    with pytest.raises(ValueError, match="backend: expected"):
        ops.inject(**good_arguments("inject"), backend="fast")


def test_ops_never_drop_a_gradient_silently():
    with pytest.raises(RuntimeError, match="records no gradient"):
        args = good_arguments("inject")
        ops.inject(**{**args, "q": args["q"].requires_grad_()})
    q, *rest = attention_inputs(VIEWS["ragged"]).args()
    with pytest.raises(RuntimeError, match="diffmas.ops.cross_attention .* records no gradient"):
        raw.cross_attention(q.requires_grad_(), *rest)
    with torch.no_grad():
        raw.cross_attention(q, *rest)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_checked_entry_points_convert_what_kernels_do_not_read(backend):
    strided = lambda x: torch.stack((x, x), 1)[:, 0]  # noqa: E731
    x = inject_inputs(n=5).to(torch.float32)
    want, got = torch.zeros(2, ROWS, 2, 64), torch.zeros(2, ROWS, 2, 64)
    args = (x.q, x.k, x.v, x.cos, x.sin, x.slots, *want)
    wide = (x.q, x.k, x.v, x.cos.double(), x.sin.double(), strided(x.slots.int()), *got)
    assert torch.equal(ops.inject(*wide, backend=backend), ops.inject(*args, backend=backend)) and torch.equal(got, want)
    q, k, v, *view, freq, scale, _, _ = attention_inputs(VIEWS["offset"]).to(torch.float32).args()
    freq = freq.bfloat16()
    want = ops.cross_attention(q, k, v, *view, freq.float(), backend=backend)
    for index, other in ((strided, torch.bfloat16), (torch.Tensor.int, torch.float64)):
        got = ops.cross_attention(q, k, v, *map(index, view), freq.to(other), backend=backend)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    for kind in (torch.float32, torch.bfloat16, torch.float64):
        src, dst, offset = (strided(torch.arange(a, a + 3).int()) for a in (0, 10, 5))
        ops.reposition(src, dst, offset, freq.to(kind), torch.zeros(20, 2, 64), torch.zeros(20, 2, 64), backend=backend)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_the_stride_of_a_dimension_of_size_1_says_nothing(backend):
    odd = lambda x: x.as_strided(x.shape, [7 if n == 1 else stride for n, stride in zip(x.shape, x.stride())])  # noqa: E731
    x, got, want = inject_inputs(n=1, heads=(1, 1)).to(torch.float32), torch.zeros(2, 9, 1, 64), torch.zeros(2, 9, 1, 64)
    q, k, v, cos, sin, weight = map(odd, (x.q, x.k, x.v, x.cos, x.sin, x.q_weight))
    norms = lambda w: dict(q_weight=w, k_weight=w, backend=backend)  # noqa: E731
    rotated = ops.inject(x.q, x.k, x.v, x.cos, x.sin, torch.tensor([4]), *want, **norms(x.q_weight))
    mine = ops.inject(q, k, v, cos, sin, torch.tensor([4]), *map(odd, got), **norms(weight))
    assert torch.equal(mine, rotated) and torch.equal(got, want)
    pools = torch.randn(2, 9, 1, 64)
    for rows in (9, 1):
        k, v = pools[:, :rows]
        view = [torch.tensor(x) for x in ([0, 1], [0, 1], [0], [rows])]
        states = [ops.cross_attention(*x, *view, backend=backend) for x in ((q, odd(k), odd(v)), (x.q, k, v))]
        assert all(map(torch.equal, *states))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_inject_returns_memory_of_its_own(backend):
    """Also where there is nothing to compute, without norm and rotation: torch lets no op return what it was given."""
    x = inject_inputs(n=5, Dr=0, norm=False).to(torch.float32)
    pools = torch.zeros(4, ROWS, 2, 64)
    rotated = ops.inject(x.q, x.k, x.v, None, None, x.slots, *pools[:2], backend=backend)
    given = torch.ones_like(x.q)
    dq = raw.inject_backward(given, x.q, x.k, None, None, x.slots, None, None, 1e-6, False, *pools[2:], backend)[0]
    assert torch.equal(rotated, x.q) and rotated.data_ptr() != x.q.data_ptr()
    assert torch.equal(dq, given) and dq.data_ptr() != given.data_ptr()


def test_float64_is_for_the_reference():
    inputs = attention_inputs(VIEWS["ragged"])
    assert torch.equal(raw.cross_attention(*inputs.args())[0], raw.cross_attention(*inputs.args(), "reference")[0])
    for backend in BACKENDS:
        with pytest.raises(ValueError, match="backend"):
            raw.cross_attention(*inputs.args(), backend)


@pytest.fixture
def nobody_warned():
    """`_choose` and the warning are cached; what these tests pretend must not stay."""
    caches = (backends._choose, backends._warn_of_the_reference)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_attention_without_a_kernel_warns_once(monkeypatch, nobody_warned):
    monkeypatch.setitem(ops.BACKENDS, "cpu", backends.Backend("cpu", None, ("cpu",), backends.FLOATS, "not built here"))
    monkeypatch.setattr(backends, "AUTO", "auto")
    args = [*good_arguments("cross_attention").values()][:7]
    with pytest.warns(UserWarning, match=r"float32 with heads of 64 on cpu.*all scores in memory.*not built here"):
        o, _ = ops.cross_attention(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ops.cross_attention(*args)[0], o)
        ops.cross_attention(*args, backend="reference")  # who asks for it
        ops.cross_attention(*(x.double() if x.is_floating_point() else x for x in args))  # its own


@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
def test_heads_that_no_gpu_kernel_takes_warn_of_it(backend, monkeypatch, nobody_warned):
    """Without a GPU: who would be chosen there."""
    for name in ("triton", "cuda"):
        monkeypatch.setitem(vars(ops.BACKENDS[name]), "why_missing", None)
    monkeypatch.setattr(ops.BACKENDS["triton"], "interpreted", False)
    monkeypatch.setattr(ops.BACKENDS["cuda"], "has", lambda op, dtype, head_dim: backend == "cuda" and head_dim <= 256)
    monkeypatch.setattr(ops.BACKENDS["triton"], "devices", ("cuda",))
    monkeypatch.setattr(ops.BACKENDS["triton"], "dtypes", backends.FLOATS)
    monkeypatch.setattr(backends, "AUTO", "auto")
    choose = lambda dtype, head_dim: backends._choose("cross_attention", torch.device("cuda"), dtype, head_dim, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(torch.bfloat16, 256) is not reference and choose(torch.float32, 128) is not reference
        if backend == "cuda":
            assert choose(torch.float32, 192) is not reference
    with pytest.warns(UserWarning, match="heads of 320 on cuda.*up to 256"):
        assert choose(torch.bfloat16, 320) is reference
    if backend != "cuda":
        with pytest.warns(UserWarning, match="float32 with heads of 192 on cuda.*in float32 there are kernels up to 128"):
            assert choose(torch.float32, 192) is reference


@pytest.mark.parametrize("name", ["reference", "none-such"])
def test_environment_variable_picks_the_backend(name):
    """Read when diffmas is imported; a wrong one is refused by the first op that needs it."""
    code = (
        "import torch; from diffmas import ops; from diffmas.ops import reference\n"
        "found = ops.implementation('merge_states', torch.zeros(1, 1, 4), 'auto')\n"
        "assert found is reference.merge_states"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"DIFFMAS_BACKEND": name}, capture_output=True, text=True
    )
    assert run.returncode == (name == "none-such"), run.stderr
    assert name == "reference" or "ValueError: backend: expected 'auto' or one of" in run.stderr

"""The compiled Triton kernels, executed: their PTX for sm_80 and sm_90 in numpy (tests/ptx) against the float64 reference,
within the budget of test_ops.py; what programs without work cost; and faults made on purpose, each of which is found."""

import functools
import re
from dataclasses import dataclass

import pytest
import torch
from layer_cases import FeedForward, Linear, Together, gates, lora_gradients, norms
from op_cases import ROWS, VIEWS, View, attention_inputs, head_major, inject_inputs, random_attention
from op_runs import attention_all, exact_in_half, finite, inject_all, merge_all, raw, reposition_all, within_budget
from quantized_cases import in_bits, quantized_dq, run_quantized

pytest.importorskip("triton")

from ptx.kernels import executed  # noqa: E402
from ptx.text import Fault  # noqa: E402

from diffmas import ops  # noqa: E402
from diffmas.kernels import backend, cross_attention  # noqa: E402

ARCHITECTURES = [80, 90]
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def numbers_everywhere(monkeypatch):
    """The executor takes CPU tensors of all dtypes, and memory that nobody wrote to is NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(ops.BACKENDS["triton"], "dtypes", None)
    yield
    torch.use_deterministic_algorithms(False)


def agree(results, run, dtype, terms, products=FLOAT):
    """results of the kernels, against `run(dtype, "reference")` in that precision and in float64."""
    for got, like, want in zip(results, run(dtype, "reference"), run(torch.float64, "reference"), strict=True):
        assert got.shape == want.shape and got.dtype == like.dtype
        if got.numel():
            within_budget(got, like, want, terms, products)


@dataclass
class Attention:
    """A call of cross_attention and its backward. rows: of the pool. gathers: its segments pass for short ones, whose tiles are
    gathered."""

    view: View
    dtype: torch.dtype
    D: int = 128
    heads: tuple[int, int] = (4, 2)
    Dr: int | None = None
    interleaved: bool = False
    rows: int = 352
    grad_tail: list[int] | None = None
    gathers: bool = True

    def inputs(self):
        return attention_inputs(self.view, self.heads, self.D, self.Dr, self.interleaved, rows=self.rows)


TWO = View([30], [[(0, 130, 0), (300, 30, 0)]])
ATTENTION = {
    "tile_of_64_rows": Attention(TWO, BRAIN, gathers=False),
    "tile_of_128_rows": Attention(View([75, 1], [[(0, 80, 0), (200, 75, 0)], [(5, 77, 0)]]), BRAIN, rows=288),
    "group_of_3": Attention(View([30], TWO.segments, causal=False), BRAIN, 96, (6, 2), gathers=False),
    "latent_step": Attention(
        View([1, 1], [[(0, 190, 0), (300, 3, 0)], [(0, 90, 0), (310, 1, 0)]]), BRAIN, grad_tail=[1, 0]
    ),
    "short_heads": Attention(VIEWS["ragged"], BRAIN, 80, (2, 2), rows=320),
    "offset": Attention(
        View([40, 7], [[(0, 100, 13), (200, 40, 0)], [(0, 100, -40_000), (250, 7, 0)]]), BRAIN, 64, (4, 2), 48, True, 272
    ),
    "float16": Attention(View([12], [[(0, 150, 0), (160, 12, 0)]]), HALF, 128, (8, 2), rows=192, gathers=False),
    "float32": Attention(View([20, 2], [[(0, 40, 0), (100, 20, 0)], [(7, 9, 0)]]), FLOAT, 64, rows=128),
    "float32_offset": Attention(VIEWS["offset"], FLOAT, 40, (3, 1), 20, rows=448, gathers=False),
    "gathered_tile_of_64_rows": Attention(TWO, BRAIN),
    "long_heads": Attention(View([5], [[(0, 50, 0), (60, 5, 0)]]), BRAIN, 256, (2, 1), rows=80),
}  # fmt: skip


def attend(inputs, launches, do, dlse=None, grad_tail=None, want_dq=True):
    """As op_runs.attention_all, with the launchers and tiles of an architecture."""
    args = inputs.args()
    o, lse = backend.cross_attention(*args, tiles=launches.tiles)
    dk, dv = (head_major(*inputs.k_pool.shape, FLOAT, 0.5) for _ in "kv")
    dq = backend.cross_attention_backward(
        do.to(o), dlse, args[0], o, lse, *args[1:], dk, dv, grad_tail, want_dq, tiles=launches.tiles
    )
    return o, finite(lse), dq, dk, dv


@pytest.fixture
def long_segments(monkeypatch):
    """From now on all segments pass for long ones, which have loops of their own."""
    return lambda: monkeypatch.setattr(cross_attention, "SHORT", 0)


def check_attention(inputs, arch, dtype, grad_tail=None):
    do, dlse = exact_in_half(*inputs.q.shape), exact_in_half(*inputs.q.shape[:2])
    with executed(arch) as launches:
        results = attend(inputs.to(dtype), launches, do, dlse.float(), grad_tail)

    def run(dtype, name):
        wide = torch.promote_types(dtype, FLOAT)
        return attention_all(inputs.to(dtype), name, do, dlse.to(wide), grad_tail)

    Hq, Hkv = inputs.q.shape[1], inputs.k_pool.shape[1]
    agree(results, run, dtype, inputs.q.shape[2] * (Hq / Hkv) ** 0.5, products=dtype)
    return launches


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, arch, long_segments):
    case = ATTENTION[name]
    if not case.gathers:
        long_segments()
    tail = None if case.grad_tail is None else torch.tensor(case.grad_tail)
    launches = check_attention(case.inputs(), arch, case.dtype, tail)
    rows = {one.constants["ROWS"] for one in launches.of("fwd_kernel") + launches.of("dq")}
    assert (rows == {"gathered"}) == case.gathers
    products = sum(counts.by_name["products"] for one in launches.seen for counts in one.counts.values())
    assert (products > 0) == (case.dtype != FLOAT)


@pytest.mark.parametrize("arch, seed, dtype", [(80, 2, BRAIN), (90, 3, HALF)])
def test_attention_of_random_views(arch, seed, dtype):
    check_attention(random_attention(seed, 304), arch, dtype)


QUANTIZED = {
    "int8": ("int8", Attention(View([30], TWO.segments, causal=False), BRAIN, gathers=False)),
    "fp8": ("fp8", Attention(View([30], TWO.segments, causal=False), BRAIN, gathers=False)),
    "one_token": ("int8", Attention(View([1, 1], [[(0, 190, 0), (300, 3, 0)], [(0, 90, 0)]], causal=False), BRAIN)),
    "float16": ("int8", Attention(View([12], [[(0, 150, 0), (160, 12, 0)]], causal=False), HALF, 64, rows=192)),
    "fp8_float16": ("fp8", Attention(View([2], [[(0, 150, 0), (160, 12, 0)]], causal=False), HALF, 64, rows=192)),
    "float32": ("fp8", Attention(View([5, 2], [[(0, 40, 0)], [(7, 9, 0)]], causal=False), FLOAT, 64, rows=64)),
    "offset": ("int8", Attention(View([7], [[(0, 60, 13), (80, 20, -4)]], causal=False), BRAIN, 80, (2, 2), 48, rows=112)),
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantised_rows(name, arch, long_segments):
    bits, case = QUANTIZED[name]
    if not case.gathers:
        long_segments()
    inputs = case.inputs()
    do, args = exact_in_half(*inputs.q.shape), in_bits(inputs.to(case.dtype), bits)
    with executed(arch) as launches:
        o, lse = backend.cross_attention_quantized(*args, tiles=launches.tiles)
        backward = functools.partial(backend.cross_attention_quantized_backward, tiles=launches.tiles)
        dq = quantized_dq(args, do, backward)
    run = lambda dtype, name: run_quantized(in_bits(inputs.to(dtype), bits), do, name)
    agree([o, finite(lse), dq], run, case.dtype, inputs.q.shape[2] * 2**0.5, products=case.dtype)
    assert {one.constants["PAYLOAD"] for one in launches.of("fwd_kernel") + launches.of("dq")} == {
        "int8" if bits == "int8" else "e4m3"
    }


def check(run, arch, dtype, terms):
    """run(dtype, backend) of an op and its backward."""
    with executed(arch):
        results = run(dtype, "triton")
    agree(results, run, dtype, terms)


INJECT = {
    "bfloat16": (BRAIN, dict(n=9, heads=(8, 2), D=128, strided=True)),
    "float16": (HALF, dict(n=9, D=80, Dr=48, interleaved=True)),
    "float32": (FLOAT, dict(n=5, heads=(18, 9), D=37, Dr=22, strided=True)),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", INJECT)
def test_inject(name, arch):
    dtype, what = INJECT[name]
    inputs = inject_inputs(**what, rows=48)
    dq_rot, (dk, dv) = exact_in_half(*inputs.q.shape), exact_in_half(2, 48, *inputs.k.shape[1:])
    run = lambda dtype, name: inject_all(inputs.to(dtype), name, dq_rot, dk, dv)
    check(run, arch, dtype, inputs.q.shape[2])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype, n, H, D", [(BRAIN, 12, 8, 128), (HALF, 7, 2, 80), (FLOAT, 5, 3, 37)])
def test_merge_states(dtype, n, H, D, arch):
    parts = exact_in_half(n, 2 * H, D).split(H, dim=1)
    lses = [4 * exact_in_half(n, H) for _ in "ab"]
    lses[0][::5] = lses[1][::3] = -torch.inf
    do, dlse = exact_in_half(n, H, D), exact_in_half(n, H)
    states = parts[0], lses[0], parts[1], lses[1]
    check(lambda *where: merge_all(states, do, dlse, *where), arch, dtype, D)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype, H, D, interleaved", [(BRAIN, 2, 128, False), (HALF, 1, 80, True), (FLOAT, 2, 37, False)])
def test_reposition(dtype, H, D, interleaved, arch):
    move, data = moves(H, D, interleaved)
    check(lambda *where: reposition_all(move, *data, *where), arch, dtype, 8)


def moves(H, D, interleaved=False):
    """Nine rows of a pool, turned by far offsets in half of their dimensions, and the pools."""
    rows, Dr = torch.randperm(ROWS), D // 4 * 2
    inv_freq = 1e4 ** (-torch.arange(0, Dr, 2).float() / Dr)
    move = rows[torch.randint(0, 5, (9,))], rows[9:18], torch.randint(-100_000, 100_000, (9,)), inv_freq, interleaved
    return move, [exact_in_half(ROWS, H, D) for _ in range(4)]


def check_layer(run, plain, arch, dtype, terms):
    """run() on the kernels, against plain(dtype)."""
    with executed(arch) as launches:
        results = run()
    agree(results, lambda dtype, name: plain(dtype), dtype, terms)
    return launches


LINEARS = {
    "bfloat16": (BRAIN, Linear(5, out=96, length=384, r=8)),  # sums that are split
    "more_rows": (HALF, Linear(25, out=64, length=192, r=20, bias=False)),
    "float32": (FLOAT, Linear(3, out=64, length=96, r=4)),
    "odd": (BRAIN, Linear(2, out=37, length=67, r=3, far=True)),
    "without_an_adapter": (BRAIN, Linear(17, out=288, length=160, r=0)),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", LINEARS)
def test_linear(name, arch):
    dtype, case = LINEARS[name]
    launches = check_layer(lambda: case.run(backend.linear, dtype), case.plain, arch, dtype, case.terms)
    assert len(launches.seen) == (4 if case.r else 2)
    products = sum(counts.by_name["products"] for one in launches.seen for counts in one.counts.values())
    assert (products > 0) == (dtype != FLOAT)


TOGETHER = {
    "bfloat16": (BRAIN, Together(5, (96, 32, 40), 320, (8, 0, 3), bias=True)),
    "float16": (HALF, Together(18, (33, 48), 67, (4, 20), far=True)),
    "float32": (FLOAT, Together(2, (64, 32, 32), 40, (4, 4, 4))),
    "split": (BRAIN, Together(1, (20, 16), 1030, (4, 0))),
    "one_split_back": (BRAIN, Together(1, (600, 40), 30, (4, 0))),
    "feed_forward": (BRAIN, FeedForward(3, 96, 64, (8, 0, 4), bias=True)),
    "feed_forward_of_float16": (HALF, FeedForward(17, 40, 33, (3, 3, 0))),
    "feed_forward_of_float32": (FLOAT, FeedForward(2, 64, 40)),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", TOGETHER)
def test_linears_together(name, arch):
    dtype, case = TOGETHER[name]
    launches = check_layer(lambda: case.run(backend, dtype), case.plain, arch, dtype, case.terms)
    assert len(launches.seen) == 4
    assert max(one.grid[1] for one in launches.of("products")) == (2 if "split" in name else 1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "dtype, case", [(BRAIN, Linear(40, out=96, length=64, bias=False)), (FLOAT, Linear(33, out=40, length=40, bias=False))]
)
def test_what_lora_adds_to_many_rows(dtype, case, arch):
    def run(x, weight, bias, a, b, scale, transposed):
        y = x @ weight if transposed else x @ weight.T
        return y, backend.add_lora(y, x, a, b, scale, transposed)

    check_layer(lambda: case.run(run, dtype), case.plain, arch, dtype, case.terms)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype, n, r, length", [(BRAIN, 90, 8, 72), (FLOAT, 7, 20, 64)])
def test_lora_grad(dtype, n, r, length, arch):
    of = lora_gradients(n, r, length)
    check_layer(lambda: of(dtype, ops=backend), of, arch, dtype, n**0.5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype, n, length, far", [(BRAIN, 3, 576, False), (HALF, 2, 100, True), (FLOAT, 2, 64, False)])
def test_norm_and_gate(dtype, n, length, far, arch):
    for of in (norms(n, length, far), gates(n, length, far)):
        check_layer(lambda of=of: of(dtype, ops=backend), of, arch, dtype, length**0.5)


# ---- what a program costs


# Instructions of a program of dK and dV that multiplies nothing: nobody reads its rows, or, with grad_tail, the sequence's tail
# ends before them.
IDLE = {True: 20, False: 60}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tail", [True, False])
def test_programs_without_work_end_early(tail, arch):
    """Two sequences read 300 rows, and the newest of their own; most of the pool is nobody's. 11 and 44 instructions today."""
    view = View([1, 1], [[(0, 300, 0), (600, 1, 0)], [(0, 300, 0), (610, 1, 0)]])
    inputs = Attention(view, BRAIN, rows=1024).inputs()
    launches = check_attention(inputs, arch, BRAIN, torch.tensor([1, 1]) if tail else None)
    counts = [counts for one in launches.seen if "dkv" in one.kernel for counts in one.counts.values()]
    idle = [one.instructions for one in counts if not one.by_name["products"]]
    assert len(idle) < len(counts) and max(idle) <= IDLE[tail]


SHORT_SEGMENTS = View([1], [[(80 * i, 70, 0) for i in range(14)]])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiles_of_short_segments_are_full(arch, long_segments):
    """A token over 14 segments of 70 rows: a loop for each would fill and drain, with a tile of six rows. On sm_90 all programs
    together 9318 instructions for 18205."""
    inputs = attention_inputs(SHORT_SEGMENTS, (4, 1), 128, rows=1120)

    def instructions():
        with executed(arch) as launches:
            backend.cross_attention(*inputs.to(BRAIN).args(), tiles=launches.tiles)
        (one,) = launches.of("fwd_kernel")
        return sum(counts.instructions for counts in one.counts.values())

    gathered = instructions()
    long_segments()
    assert gathered < 0.6 * instructions()


@pytest.mark.parametrize("arch, most", [(80, 410), (90, 380)])
def test_a_program_begins_without_a_search(arch, most, long_segments):
    """What a program does until its first copy of K: on sm_90, over one segment, 369 instructions; 572, with 13 barriers,
    when each looked for its sequence and segment."""

    def until_the_first_copy(kernel, ptx, parameters):
        if not kernel.endswith("fwd_kernel"):
            return ptx
        at = re.search(rf"\n[^\n]*{COPY}", ptx).start()
        return ptx[:at] + "\n\tret;" + ptx[at:]

    long_segments()
    inputs = attention_inputs(SHORT_SEGMENTS, (4, 1), 128, rows=1120)
    with executed(arch, until_the_first_copy) as launches:
        backend.cross_attention(*inputs.to(BRAIN).args(), tiles=launches.tiles)
    (one,) = launches.of("fwd_kernel")
    for counts in one.counts.values():
        assert counts.instructions <= most and counts.global_loads <= 10 and counts.barriers <= 1


# ---- mutants: PTX with one fault


def replaced(pattern: str, new, after: str = "", which: int | None = None):
    """An edit of PTX: the matches of `pattern` (or one of them) that come after the first match of `after`."""

    def edit(ptx: str, parameters: list[str]) -> str:
        begin = re.search(after, ptx).start()
        found = [one for one in re.finditer(pattern, ptx) if one.start() >= begin]
        assert found, f"nothing like {pattern} to edit"
        for one in found[::-1] if which is None else [found[which]]:
            ptx = ptx[: one.start()] + (one.expand(new) if isinstance(new, str) else new(one)) + ptx[one.end() :]
        return ptx

    return edit


def swapped(first: str, second: str):
    """An edit of PTX: one parameter in the place of another."""

    def edit(ptx: str, parameters: list[str]) -> str:
        a, b = (f"_param_{parameters.index(name)}]" for name in (first, second))
        return ptx.replace(a, "_param_x]").replace(b, a).replace("_param_x]", b)

    return edit


def counted(difference: int):
    """The last number of a match, changed."""
    return lambda one: re.sub(r"\d+$", lambda number: str(int(number[0]) + difference), one[0])


COPY = r"cp\.async\.c[ag]"
WAIT = r"cp\.async\.wait_group \s*\d+"
BARRIER = r"\s*bar\.sync \s*0;"
PRODUCT = r"(mma\.sync\S+ \s*\{[^}]*\}, \{ %r\d+, )(%r\d+), (%r\d+)"
MUTANTS = {
    "a wait for fewer copies": ("fwd", [80, 90], replaced(WAIT, counted(1), which=1)),
    "a group of copies that is not closed": ("fwd", [80, 90], replaced(r"cp\.async\.commit_group;", "", which=1)),
    "no barrier after a wait": ("fwd", [80, 90], replaced(f"({WAIT};){BARRIER}", r"\1", which=1)),
    "no barrier before memory is used again": (
        "fwd", [90], replaced(BARRIER + r"((?:[^;\n]*[;\n]){1,9}\s*" + COPY + ")", r"\1", which=0)
    ),
    "no barrier before memory is used again, backward": (
        "dkv", [80], replaced(BARRIER + r"((?:[^;\n]*[;\n]){1,9}\s*" + COPY + ")", r"\1", which=-1)
    ),
    "no barrier between threads that read and write a row": ("reposition_bwd_kernel", [80, 90], replaced(BARRIER, "")),
    "a wrong comparison": ("fwd", [80, 90], replaced(r"setp\.le\.s32", "setp.lt.s32", after=COPY)),
    "a swapped stride": ("fwd", [80, 90], swapped("stride_kr", "stride_kh")),
    "a changed shift": ("fwd", [80, 90], replaced(r"shl\.b32 \s*%r\d+, %r\d+, \d+", counted(-1), after=COPY)),
    "a load without its predicate": ("fwd", [80, 90], replaced(r"@%p\d+ (ld\.global\.v4)", r"\1")),
    "a store without its predicate": ("dkv", [80, 90], replaced(r"@%p\d+ (st\.global)", r"\1")),
    "a shuffle with another lane": (
        "fwd", [80, 90], replaced(r"(shfl\.sync\.bfly\.b32 \s*%r\d+, %r\d+, )1,", r"\g<1>4,", after=COPY)
    ),
    "the row of another position": (
        "gathered", [80, 90], replaced(r"(\s)(ld\.global\.b32 \{ %r\d+ \}, \[ %rd\d+ \+ )0", r"\1\g<2>4", which=13)
    ),
    "a segment's length for its start": ("work_kernel_streams", [80, 90], swapped("seg_start", "seg_len")),
    "a stream that does not end": (
        "work_kernel_streams", [80, 90], replaced(r"setp\.eq\.b64", "setp.ne.b64", which=-1)
    ),
    "the view of another sequence": ("work_kernel", [80, 90], swapped("q_indptr", "seg_indptr")),
    "rows for columns": ("fwd", [80], replaced(r"\.trans", "", which=0)),
    "registers of a product swapped": ("fwd", [80], replaced(PRODUCT, r"\1\3, \2", which=0)),
    "registers of a product swapped, backward": ("dkv", [80], replaced(PRODUCT, r"\1\3, \2", which=0)),
    "a product that is not waited for": (
        "fwd", [90], replaced(r"wgmma\.wait_group\.sync\.aligned \d+", counted(1), after=r"wgmma\.mma_async", which=0)
    ),
    "no fence between threads and products": ("fwd", [90], replaced(r"fence\.proxy\.async[^;]*;", "", which=0)),
    "no fence of a product's registers": ("fwd", [90], replaced(r"wgmma\.fence[^;]*;", "", which=1)),
    "a wait for fewer copies of weights": ("products", [80, 90], replaced(WAIT, counted(1), which=1)),
    "the stride of the weight for that of the rows": ("products", [80, 90], swapped("stride_x0", "stride_w")),
    "LoRA's sums from where others are": ("finish", [80, 90], swapped("rank0", "to0")),
    "another linear's weight": ("together's products", [80, 90], swapped("weight0", "weight1")),
    "another linear's adapter": ("together's products", [80, 90], swapped("down0", "down1")),
    "another linear's columns": ("together's finish", [80, 90], swapped("to0", "to2")),
    "another linear's scale": ("together's finish", [80, 90], swapped("scale1", "scale2")),
    "another linear's parts": ("split's sum", [80, 90], swapped("length0", "length1")),
    "another linear's codes": ("together's sum", [80, 90], swapped("up0", "up2")),
    "gate for up": ("fed gate", [80, 90], swapped("gate", "up")),
    "the gradient of gate for that of up": ("fed gate_backward", [80, 90], swapped("dgate", "dup")),
    "another swizzle": (
        "fwd", [90], replaced(r"46\d{17}(?=;)", lambda one: str(int(one[0]) ^ 3 << 62), after=r"wgmma\.fence", which=0)
    ),
}  # fmt: skip


def forward(launches):
    inputs = ATTENTION["tile_of_64_rows"].inputs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_attention, "SHORT", 0)
        results = backend.cross_attention(*inputs.to(BRAIN).args(), tiles=launches.tiles)
    run = lambda dtype, name: raw.cross_attention(*inputs.to(dtype).args(), name)
    agree(results, run, BRAIN, 128 * 2**0.5, BRAIN)


def gathered(launches):
    """The forward over short segments, at two offsets."""
    inputs = Attention(View([30], [[(0, 50, 0), (80, 80, 9), (300, 40, 9)]]), BRAIN).inputs()
    results = backend.cross_attention(*inputs.to(BRAIN).args(), tiles=launches.tiles)
    run = lambda dtype, name: raw.cross_attention(*inputs.to(dtype).args(), name)
    agree(results, run, BRAIN, 128 * 2**0.5, BRAIN)


def gradients(launches):
    """dK and dV alone."""
    inputs = Attention(View([12], [[(0, 20, 0), (60, 12, 0)]]), BRAIN, rows=72).inputs()
    do = exact_in_half(*inputs.q.shape)

    def run(dtype, name):
        args = inputs.to(dtype).args()
        o, lse = raw.cross_attention(*args, "reference")
        grads = [head_major(*inputs.k_pool.shape, lse.dtype, 0.5) for _ in "kv"]
        rest = do.to(o), None, args[0], o, lse, *args[1:], *grads, None, False
        if name == "reference":
            raw.cross_attention_backward(*rest, name)
        else:
            backend.cross_attention_backward(*rest, tiles=launches.tiles)
        return grads

    agree(run(BRAIN, "triton"), run, BRAIN, 128 * 2**0.5, BRAIN)


def repositioned(launches):
    move, data = moves(2, 37)
    agree_on = lambda *where: reposition_all(move, *data, *where)
    agree(agree_on(FLOAT, "triton"), agree_on, FLOAT, 8)


def multiplied(launches):
    case = Linear(5, out=64, length=1100, r=4)
    agree(case.run(backend.linear, BRAIN), lambda dtype, name: case.plain(dtype), BRAIN, case.terms)


def of_case(case):
    """A run of it."""
    return lambda launches: agree(case.run(backend, BRAIN), lambda dtype, name: case.plain(dtype), BRAIN, case.terms)


together = of_case(Together(2, (64, 32, 544), 96, (4, 4, 8)))
fed_forward = of_case(FeedForward(2, 40, 32, (3, 4, 4)))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("run", [forward, gathered, gradients, multiplied, repositioned])
def test_without_a_fault_nothing_is_found(run, arch):
    with executed(arch) as launches:
        run(launches)


@pytest.mark.parametrize("name, arch", [(name, arch) for name, (_, archs, _) in MUTANTS.items() for arch in archs])
def test_a_fault_is_found(name, arch):
    kernel, _, edit = MUTANTS[name]
    own = {"fwd": forward, "dkv": gradients, "reposition_bwd_kernel": repositioned}
    run = (own | dict.fromkeys(("products", "finish"), multiplied)).get(kernel, gathered)
    if " " in kernel:
        of, kernel = kernel.split()
        run = {"together's": together, "split's": of_case(TOGETHER["one_split_back"][1]), "fed": fed_forward}[of]
    edited = []

    def mutate(one, ptx, parameters):
        name = {"gathered": "fwd_kernel"}.get(kernel, kernel)
        if one != f"cross_attention_{name}_kernel" and not one.endswith(name):
            return ptx
        edited.append(edit(ptx, parameters))
        assert edited[-1] != ptx
        return edited[-1]

    with executed(arch, mutate) as launches:
        try:
            run(launches)
        except (Fault, AssertionError):
            assert edited  # and not the edit went wrong
            return
    raise AssertionError("nobody noticed")

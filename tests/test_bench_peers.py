"""The cases of the benchmark suite and its peers: everybody is right on every regime, those of a GPU on stand-ins."""

import dataclasses
import importlib
import inspect
import sys
import types

import pytest
import torch
from contests import MODULES, row

from diffmas import ops
from diffmas.benchmarks import bench_attention, bench_layer, bench_linear, ours, run
from diffmas.benchmarks.attention import libraries, sdpa
from diffmas.benchmarks.goals import GOALS, SDPA
from diffmas.benchmarks.gpu.steps import small
from diffmas.benchmarks.measure import OURS, Contest
from diffmas.benchmarks.result import results
from diffmas.ops import backends, reference


def test_every_module_has_cases_with_keys_of_their_own():
    keys, quick = [], set()
    for name, module in MODULES.items():
        assert OURS in module.PROVIDERS and callable(module.problem)
        keys += [c.key for c in module.CASES]
        quick |= {name for c in run.selected(module, quick=True, only="")}
    assert len(keys) == len(set(keys))
    assert quick == set(MODULES)


def test_peers_of_attention_agree_on_every_regime():
    seen = set()
    for case in bench_attention.CASES:
        shape = dataclasses.replace(case, N=min(case.N, 64), n=1 if case.n == 1 else 16 if case.n < case.N else 64, D=32)
        if (case.regime, case.phase, case.dtype) in seen or case.heads != "16/8":
            continue
        seen.add((case.regime, case.phase, case.dtype))
        providers = {k: v for k, v in bench_attention.PROVIDERS.items() if k not in bench_attention.SLOW}
        contest = Contest(bench_attention.problem(shape), providers)
        plain = {"sdpa"} if case.phase == "backward" and case.dtype != "float32" else {"sdpa", "eager"}
        assert not contest.notes and plain <= contest.trials.keys(), (case.key, contest.notes)


@pytest.mark.parametrize(
    "name", ["inject", "linear", "layer", "merge", "reposition", "deferred", "latent_step", "latent_run", "host"]
)
def test_the_smallest_case_of_every_phase_runs_right(name):
    module = importlib.import_module(f"diffmas.benchmarks.bench_{name}")
    for phase in {case.phase for case in module.CASES}:
        case = min((c for c in module.CASES if c.phase == phase), key=lambda c: c.n)
        contest = Contest(module.problem(case), module.PROVIDERS)
        assert OURS in contest.trials and len(contest.trials) > 1, contest.notes
        contest.warm_up()


def test_every_goal_has_its_case():
    for goal in GOALS:
        cases_of = lambda m: getattr(m, "CPU_CASES" if goal.device == "cpu" else "GPU_CASES", m.CASES)  # noqa: B023
        cases = [(m, c) for m in MODULES.values() for c in cases_of(m)]
        peer = "sdpa" if goal.peer == SDPA else goal.peer
        rows = [
            [row(who, 0.001, device=goal.device, roofline_percent=90, **c.columns()) for who in (OURS, peer)]
            for m, c in cases
            if not peer or peer in m.PROVIDERS
        ]
        assert any(goal.fits(result) for group in rows for result in results(group)), goal


GPU_ONLY = {"flex", "flashinfer", "compiled + static"}
WITH_GPU_CASES = [name for name, m in MODULES.items() if hasattr(m, "GPU_CASES")]


@pytest.mark.parametrize("name", WITH_GPU_CASES)
def test_cases_for_a_gpu_run_right(name):
    """Small and on the CPU: everybody's result is right, and a goal's peer takes part."""
    module, seen = MODULES[name], set()
    providers = {k: v for k, v in module.PROVIDERS.items() if k not in getattr(module, "SLOW", ())}
    for case in module.GPU_CASES:
        if (case.regime, case.phase) in seen:
            continue
        seen.add((case.regime, case.phase))
        contest = Contest(module.problem(small(case)), providers)
        assert OURS in contest.trials and not contest.notes, (case.key, contest.notes)
        wanted = {g.peer for g in GOALS if (g.op, g.regime, g.phase, g.device) == (case.op, case.regime, case.phase, "cuda")}
        assert wanted - GPU_ONLY - {"", SDPA} <= set(contest.trials), case.key
        assert SDPA not in wanted or "sdpa" in contest.trials, case.key


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_compiled_peers_of_inject(phase, monkeypatch):
    """They run right beside each other, and what is compiled in the gate is not compiled again when it is timed."""
    monkeypatch.setattr(ours, "on_gpu", lambda: True)
    module = MODULES["bench_inject"]
    case = next(c for c in module.GPU_CASES if (c.n, c.phase) == (64, phase))
    small = dataclasses.replace(case, N=32, n=16, heads="4/2", D=32, dtype="float32")
    compiled = {name: module.PROVIDERS[name] for name in ("compiled", "compiled + static")}
    contest = Contest(module.problem(small), {OURS: module.diffmas} | compiled)
    assert not contest.notes
    assert set(contest.trials) == {OURS, "compiled", *(["compiled + static"] if phase == "forward" else [])}
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            for trial in contest.trials.values():
                trial.call()
    finally:
        torch._dynamo.reset()


# ---- what a GPU has more ---------------------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(ours, "on_gpu", lambda: True)


def contest_of(regime: str, phase: str, dtype="float32", **providers) -> Contest:
    case = next(c for c in bench_attention.GPU_CASES if (c.regime, c.phase, c.heads) == (regime, phase, "16/8"))
    shape = dict(N=96, n=1 if case.n == 1 else 96 if case.n == case.N else 16, batch=min(case.batch, 3), D=16)
    p = bench_attention.problem(dataclasses.replace(case, dtype=dtype, heads="4/2", **shape))
    return Contest(p, {OURS: bench_attention.diffmas} | providers)


REGIMES = ["latent step", "prompt", "prompt on 63 segments", "short prompts"]


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("grouped", [True, False])
def test_sdpa_on_a_backend(grouped, regime, phase, as_on_a_gpu, monkeypatch):
    """On the CPU's flash attention: with groups and without, every form of mask."""
    asked = []
    can = lambda params: asked.append(params) or (grouped or not params.enable_gqa)
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", can)
    contest = contest_of(regime, phase, flash=sdpa.on_backend("flash"))
    assert "flash" in contest.trials, contest.notes
    assert [p.enable_gqa for p in asked] == ([True] if grouped else [True, False])
    assert (asked[0].attn_mask is None) == (regime != "short prompts")
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda params: False)
    contest = contest_of(regime, phase, flash=sdpa.on_backend("flash"))
    assert contest.notes == {"flash": "torch's flash attention does not serve it"}


def packed_attention(q, k, v, q_indptr, k_indptr, scale):
    """What libraries for packed sequences compute, in plain torch; causal from the bottom right."""
    outs = []
    for b in range(len(q_indptr) - 1):
        i, j = slice(*q_indptr[b : b + 2].tolist()), slice(*k_indptr[b : b + 2].tolist())
        L, N = i.stop - i.start, j.stop - j.start
        mask = torch.ones(L, N, dtype=torch.bool).tril(N - L)
        parts = (t.transpose(0, 1)[None] for t in (q[i], k[j], v[j]))
        o = torch.nn.functional.scaled_dot_product_attention(*parts, mask, scale=scale, enable_gqa=True)
        outs.append(o[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("new", [True, False])
def test_torch_varlen(new, regime, phase, as_on_a_gpu, monkeypatch):
    def old_attn(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
        assert is_causal and (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max())) and cu_q.dtype == torch.int32
        return packed_attention(q, k, v, cu_q, cu_k, q.shape[2] ** -0.5)

    def new_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa and window_size == (-1, 0) and scale == q.shape[2] ** -0.5
        return old_attn(q, k, v, cu_q, cu_k, max_q, max_k, True)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", new_attn if new else old_attn)
    contest = contest_of(regime, phase, varlen=libraries.varlen)
    assert "varlen" in contest.trials, contest.notes


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("new", [True, False])
def test_flash_attention_4(new, regime, phase, as_on_a_gpu, monkeypatch):
    """On what it is documented to compute: newer versions return lse too, older ones take no lengths."""

    def new_attn(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
        assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max()))
        return old_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal), None

    def old_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal):
        assert causal and cu_seqlens_q.dtype == torch.int32
        return packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)

    peer = {"flash-attn 4": bench_attention.PROVIDERS["flash-attn 4"]}
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    assert not contest_of(regime, phase, **peer).notes  # there is none for float32
    assert contest_of(regime, phase, "bfloat16", **peer).notes == {"flash-attn 4": "flash_attn.cute is not installed"}
    library = types.SimpleNamespace(flash_attn_varlen_func=new_attn if new else old_attn)
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(cute=library))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", library)
    contest = contest_of(regime, phase, "bfloat16", **peer)
    assert "flash-attn 4" in contest.trials, contest.notes


@pytest.mark.parametrize("regime", ["prompt", "short prompts"])
def test_flex_by_flash_attention(regime, as_on_a_gpu, monkeypatch):
    """FlexAttention is asked for its other backend; the mask of even sequences captures no tensor."""
    from torch.nn.attention import flex_attention as flex

    peer, asked = {"flex, flash": bench_attention.PROVIDERS["flex, flash"]}, []
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    assert contest_of(regime, "forward", "bfloat16", **peer).notes == {"flex, flash": "flash_attn.cute is not installed"}
    plain = flex.flex_attention

    def attend(q, k, v, *, block_mask, kernel_options, **rest):
        asked.append((kernel_options, inspect.getclosurevars(block_mask.mask_mod).nonlocals["even"]))
        return plain(q, k, v, block_mask=block_mask, **rest)

    monkeypatch.setitem(sys.modules, "flash_attn.cute", types.SimpleNamespace())
    monkeypatch.setattr(flex, "flex_attention", attend)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    contest = contest_of(regime, "forward", "bfloat16", **peer)
    assert "flex, flash" in contest.trials, contest.notes
    assert all(options == {"BACKEND": "FLASH"} and even == (regime == "prompt") for options, even in asked) and asked


class Ragged:
    """flashinfer.BatchPrefillWithRaggedKVCacheWrapper."""

    def __init__(self, workspace, layout):
        assert workspace.dtype == torch.uint8 and layout == "NHD"

    def plan(self, qo_indptr, kv_indptr, qo_heads, kv_heads, head_dim, *, causal, sm_scale, q_data_type, kv_data_type):
        assert causal and (qo_heads, kv_heads, head_dim) == (4, 2, 16) and q_data_type == kv_data_type == torch.float32
        self.given = qo_indptr, kv_indptr, sm_scale

    def run(self, q, k, v):
        return packed_attention(q, k, v, *self.given)


def single_prefill(q, k, v, *, causal, sm_scale):
    assert causal
    return packed_attention(q, k, v, torch.tensor([0, len(q)]), torch.tensor([0, len(k)]), sm_scale)


FLASHINFER = types.SimpleNamespace(
    BatchPrefillWithRaggedKVCacheWrapper=Ragged, single_prefill_with_kv_cache=single_prefill,
    single_decode_with_kv_cache=lambda q, k, v, *, sm_scale, use_tensor_cores: single_prefill(
        q[None], k, v, causal=True, sm_scale=sm_scale
    )[0],
)  # fmt: skip


class BlockDiagonalMask:
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen):
        mask = cls()
        mask.indptr = [torch.tensor([0, *n]).cumsum(0) for n in (q_seqlen, kv_seqlen)]
        return mask

    def make_causal_from_bottomright(self):
        return self


def memory_efficient_attention(q, k, v, attn_bias, scale):
    q, k, v = (t[0].flatten(1, 2) for t in (q, k, v))
    return packed_attention(q, k, v, *attn_bias.indptr, scale).unflatten(1, (2, -1))[None]


XFORMERS = types.SimpleNamespace(
    fmha=types.SimpleNamespace(attn_bias=types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)),
    memory_efficient_attention=memory_efficient_attention,
)


@pytest.mark.parametrize("regime", REGIMES)
def test_optional_libraries(regime, as_on_a_gpu, monkeypatch):
    """In their place, what they are documented to compute."""
    peers = {name: bench_attention.PROVIDERS[name] for name in ("flashinfer", "xformers")}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "flashinfer", None)
        patch.setitem(sys.modules, "xformers.ops", None)
        missing = {"flashinfer": "flashinfer is not installed", "xformers": "xformers.ops is not installed"}
        assert contest_of(regime, "forward", **peers).notes == missing
    monkeypatch.setitem(sys.modules, "flashinfer", FLASHINFER)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=XFORMERS))
    monkeypatch.setitem(sys.modules, "xformers.ops", XFORMERS)
    contest = contest_of(regime, "forward", **peers)
    assert set(peers) <= set(contest.trials), contest.notes


def test_variants_stand_beside_what_auto_takes(as_on_a_gpu, monkeypatch):
    """Not where a backend is the one of "auto", and not where "cuda" leaves the work to another."""

    class Forward(types.SimpleNamespace):
        """A backend's ops: cross_attention by another backend's."""

        def __init__(self, run):
            super().__init__(cross_attention=run)

    def backend(name, run, missing=None):
        monkeypatch.setitem(ops.BACKENDS, name, backends.Backend(name, Forward(run), ("cpu",), backends.FLOATS, missing))
        backends._choose.cache_clear()

    variants = {name: bench_attention.PROVIDERS[name] for name in ("diffmas, triton", "diffmas, cuda")}
    other = lambda *args: reference.cross_attention(*args)
    try:
        backend("triton", other)
        backend("cuda", torch.ops.diffmas_native.cross_attention)
        contest = contest_of("latent step", "forward", **variants)
        assert set(contest.trials) == {OURS, "diffmas, cuda"} and not contest.notes  # "auto" takes triton
        backend("cuda", other)
        backend("triton", reference.cross_attention)
        assert set(contest_of("latent step", "forward", **variants).trials) == {OURS}
        backend("triton", reference.cross_attention, "not here")
        assert contest_of("latent step", "forward", **variants).notes == {"diffmas, triton": "triton: not here"}
    finally:
        backends._choose.cache_clear()


@pytest.mark.parametrize("case", bench_layer.CPU_CASES[:2] + bench_layer.CPU_CASES[4:6], ids=lambda case: case.key)
def test_liger(case, as_on_a_gpu, monkeypatch):
    """In its place, what it is documented to compute."""
    name, peer = "liger_kernel.transformers.functional", {"Liger": bench_layer.liger}
    case = dataclasses.replace(case, D=32)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, None)
        assert Contest(bench_layer.problem(case), peer).notes == {"Liger": "liger_kernel is not installed"}

    def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        return torch.nn.functional.rms_norm(X, W.shape, W, eps)

    library = types.SimpleNamespace(liger_rms_norm=liger_rms_norm, liger_swiglu=lambda a, b: torch.nn.functional.silu(a) * b)
    monkeypatch.setitem(sys.modules, name, library)
    contest = Contest(bench_layer.problem(case), peer | {OURS: bench_layer.diffmas})
    assert set(contest.trials) == {OURS, "Liger"}, contest.notes


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("n", [3, 70])
def test_adapters_in_16_bits(n, phase, as_on_a_gpu):
    case = dataclasses.replace(bench_linear.GPU_CASES[0], n=n, phase=phase, model="small")
    contest = Contest(bench_linear.problem(case), bench_linear.PROVIDERS)
    assert set(contest.trials) == {OURS, "PEFT", "LoRA in 16 bits"}, contest.notes

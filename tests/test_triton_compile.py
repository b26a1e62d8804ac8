"""The Triton kernels compile for a GPU that is not there, without spills, and one compilation serves every length."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent  # tools/ is imported from here

# In a process of its own: kernels that were imported under TRITON_INTERPRET=1 cannot be compiled.
CODE = """
import json, re
ATTENTION = ["attention", "attention, many segments", "attention, latent step, offset", "attention_backward"]
ATTENTION += ["attention_backward, latent step"]
from tools.triton_report import HIDDEN, LAYER, OPS, binary, compiled, launches
for op in [*OPS, *LAYER]:
    if op.startswith("attention") and op not in ATTENTION:
        continue  # make kernel-report has them all
    D = HIDDEN if op in LAYER else 128
    for launch in launches(op, D):
        # not all of them are needed for one token
        same = [one == launch for n in (1, 17) for one in launches(op, D, n=n) if one.kernel is launch.kernel]
        if op.startswith("attention"):
            tokens = OPS[op][2].get("tokens", 2) + 1
            same += [one == launch for one in launches(op, tokens=tokens) if one.kernel is launch.kernel]
        # a stride, or one chosen of several, may be 2^31 or its product with a head or token: neither is left in 32 bits
        uses, chosen = [], set()
        for line in binary(launch, 90).asm["ttir"].splitlines():
            result, _, rest = (x.strip() for x in line.partition("="))
            if "tt.func" in line or not ("%stride_" in rest or chosen & {*re.findall(r"%\\w+", rest)}):
                chosen.discard(result)
            else:
                uses.append(line)
                chosen = chosen | {result} if "arith.select" in rest else chosen - {result}
        narrow = [x for x in uses if "arith.extsi" not in x and "arith.select" not in x]
        print(json.dumps([op, launch.kernel.__name__, same, len(uses), narrow, compiled(launch, 90)]))
"""
SHARED = 232448  # bytes a program can have on sm_90; compiling does not check it


def test_every_tile_is_in_the_table():
    from diffmas.kernels.blocks import ARCHITECTURES, HEAD_DIMS, NARROW, QUANTIZED, ROWS, table

    kinds = [(not arch, offset, arch) for offset in (False, True) for arch in (0, *ARCHITECTURES)]
    keys = {(k, rows, D, *kind) for k in ROWS for rows in ROWS[k] for D in HEAD_DIMS for kind in kinds}
    lines = {key for key in keys if key[-1] or key[2] <= 128}  # longer heads in float32 are not Triton's
    assert {key for key in table() if key[2] != NARROW and not key[0].endswith(QUANTIZED)} == lines


def test_warpgroups_of_hopper_do_not_compute_the_same_scores():
    """A product of 64 rows is one warpgroup's: a tile of 64 has four warps, or it does not fit in the registers of four."""
    from diffmas.kernels.blocks import table

    twice = {
        (kernel, head_dim, offset)
        for (kernel, _, head_dim, wide, offset, arch), line in table().items()
        if arch == 90 and not wide and line["num_warps"] == 8 and line["BLOCK_N" if kernel == "dkv" else "BLOCK_M"] == 64
    }
    assert twice == {("fwd", 256, False), ("dq", 128, True), ("dkv", 128, False)}


def printed_by(code: str) -> list:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    return list(map(json.loads, run.stdout.splitlines()))


def test_kernels_compile_for_sm_90():
    rows = printed_by(CODE)
    assert len(rows) >= 9 and sum(uses for _, _, _, uses, _, _ in rows) > 100
    for op, kernel, same, _, narrow, cost in rows:
        assert same and all(same), f"{op}: {kernel} is compiled anew for another length"
        assert not narrow, f"{op}: {kernel} multiplies strides in 32 bits: {narrow}"
        assert cost["stack"] == cost["spills"] == 0 and cost["shared"] <= SHARED, (kernel, cost)


TIGHT = """
import json
from tools.triton_report import compiled, fits, launches
cases = [("attention", 128, {}), ("attention", 128, dict(groups=2)), ("attention, many segments", 256, {})]
for op, D, flags in [*cases, ("attention_backward", 256, {}), ("attention_backward, many segments", 128, {})]:
    for launch in launches(op, D, arch=80, **flags):
        if launch.line:
            cost = compiled(launch, 80)
            print(json.dumps([op, D, launch.line, fits(cost, 80), cost]))
"""


def test_kernels_that_hardly_fit_compile_for_sm_80():
    """With registers near the most that there are, or so few more than another program needs that ptxas would rather spill."""
    rows = printed_by(TIGHT)
    assert len(rows) == 7
    for op, D, line, fit, cost in rows:
        assert fit and cost["mma"], (op, D, line, cost)


QUANTIZED = """
import json
from tools.triton_report import QUANTIZED, compiled, fits, launches
for op in QUANTIZED:
    for launch in launches(op):
        if "PAYLOAD" in launch.constants:
            cost = compiled(launch)
            print(json.dumps([launch.constants["PAYLOAD"], fits(cost, 90), cost]))
"""


def test_quantised_rows_compile_for_sm_90():
    rows = printed_by(QUANTIZED)
    assert [payload for payload, *_ in rows] == 6 * ["int8"] + 6 * ["e4m3"]
    for payload, fit, cost in rows:
        assert fit and cost["mma"], (payload, cost)


IDLE = """
import json
from tools.triton_report import binary, inner_loops, launches, opcodes
for op in ("attention_backward", "attention_backward, latent step"):
    for launch in launches(op, groups=2):
        if "dkv" in launch.kernel.__name__:
            kernel = binary(launch, 90)
            print(json.dumps([launch.kernel.__name__, opcodes(kernel).index("EXIT") + 1, len(inner_loops(kernel)[0])]))
"""


def test_a_program_of_dkv_without_work_ends_early():
    """Instructions until the first EXIT: of a tile of the pool that nobody reads, without the loop for more than 128 segments;
    and of a sequence's program beyond the tail."""
    rows = {name: (until_exit, loop) for name, until_exit, loop in printed_by(IDLE)}
    until_exit, loop = rows["cross_attention_bwd_kernel_dkv"]
    assert 0 < until_exit - loop < 60
    assert 0 < rows["cross_attention_bwd_kernel_dkv_tail"][0] < 20


LOOPS = """
import json
from tools.triton_report import HIDDEN, LAYER, binary, inner_loops, launches
for op in ("attention", "attention, latent step", "attention, many segments", "inject_backward", "linear, no adapter"):
    for launch in launches(op, HIDDEN if op in LAYER else 128):
        print(json.dumps([f"{op}: {launch.kernel.__name__}", inner_loops(binary(launch, 90))]))
"""


def test_what_a_loop_costs():
    """Of full tiles of the forward: 425 and 324 instructions before scores were scaled behind their maximum and pointers to a
    segment's rows were computed once. inject's backward had 19 barriers for 16 rows."""
    loops = dict(printed_by(LOOPS))
    products = lambda name: min(len(loop) for loop in loops[name] if {"HGMMA", "HMMA"} & {*loop})
    assert products("attention: cross_attention_fwd_kernel") < 0.9 * 425
    assert products("attention, latent step: cross_attention_fwd_kernel") < 0.9 * 324
    assert products("attention, many segments: cross_attention_fwd_kernel") < 400  # gathered row by row; 391 today
    assert products("linear, no adapter: linear_kernel_products") < 100  # 76 today, and nothing waits for a load
    assert not any("LDG" in loop for loop in loops["linear, no adapter: linear_kernel_products"])
    tiles = [loop for loop in loops["inject_backward: inject_bwd_kernel"] if "STG" in loop]
    assert sorted(loop.count("BAR") for loop in tiles) == [0, 1]  # q; k and v, whose gradients are read and then zeroed


HOST = """
import json
from tools.triton_host import OneToken
one = OneToken()
one.layer()
print(json.dumps([len(one.launches), one.looked_up]))
one.slot = one.slot + 1
one.layer()
print(json.dumps([len(one.launches), one.looked_up]))
print(json.dumps([[repr(x) for x in args[:3]] for args in one.launches]))
one.q, one.table = one.q.float(), one.table.float()
one.layer()
print(json.dumps([len(one.launches), one.looked_up]))
"""


def test_the_host_of_one_token():
    """inject and attention of a token that splits its view are three launches; what attention works on was found before. Triton
    looks their binaries up once, and again for arguments of another kind (`python -m tools.triton_host` says what it saves)."""
    first, second, grids, other_dtype = printed_by(HOST)
    assert first == [3, 3] and second == [6, 3] and grids[:3] == grids[3:]
    assert other_dtype[0] == 9 and other_dtype[1] > 3


BARRIERS = """
import json
from tools.triton_report import binary, launches
ops = ["inject_backward", "reposition_backward", "attention, offset", "attention_backward, offset"]
for launch in (launch for op in ops for launch in launches(op)):
    print(json.dumps([launch.kernel.__name__, binary(launch, 90).asm["ttir"].count("barrier")]))
"""


def test_programs_wait_before_they_write_what_others_of_them_read():
    """The interpreter cannot see it: it runs a program as one."""
    counts = {kernel.removesuffix("_kernel"): count for kernel, count in printed_by(BARRIERS) if count}
    assert counts == {"inject_bwd": 1, "reposition_bwd": 1, "cross_attention_fwd": 3, "cross_attention_bwd_kernel_dq": 9}


KERNEL = """
import triton
import triton.language as tl

ONE = tl.constexpr(1)
OTHER = 5


@triton.jit
def more(x):
    return x + ONE


@triton.jit
def kernel(p):
    "Adds."
    tl.store(p, more(tl.load(p)))  # in place
"""
CODES = """
import importlib, json, sys
from tools.kernel_code import fingerprint
sys.path.insert(0, {folder!r})
for name in {names!r}:
    print(json.dumps([fingerprint(importlib.import_module(name).kernel, with_what) for with_what in ("4 warps", "8 warps")]))
"""


def test_the_code_of_a_row_follows_what_is_compiled(tmp_path):
    edits = {
        "as_it_is": [],
        "comments": [("Adds.", "Adds one."), ("  # in place", ""), ("p, more", "p,  more"), ("OTHER = 5", "OTHER = 6")],
        "helper": [("x + ONE", "x - ONE")],
        "constant": [("constexpr(1)", "constexpr(2)")],
        "kernel_itself": [("tl.load(p)", "tl.load(p + 1)")],
    }
    for name, changes in edits.items():
        text = KERNEL
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / f"{name}.py").write_text(text)
    codes = printed_by(CODES.format(folder=str(tmp_path), names=list(edits)))
    assert codes[0] == codes[1] and codes[0][0] != codes[0][1]
    assert len({code for pair in codes[1:] for code in pair}) == 8


REPORTED = """
import json
from diffmas.kernels.blocks import table
from tools.triton_report import expected_rows, read_table, wrong
rows, expected = read_table(), expected_rows()
print(json.dumps([row for row in rows if wrong(row)]))
what = lambda row: [row[name] for name in ("op", "kernel", "dtype", "head_dim", "arch", "tile", "code")]
by_version = {}
for row in rows:
    by_version.setdefault(row["triton"], []).append(what(row))
print(json.dumps(by_version))
print(json.dumps([what(row) for row, _ in expected]))
print(json.dumps([line for line in table() if line not in {launch.line for _, launch in expected}]))
"""


def test_the_committed_report_is_of_these_kernels():
    wrong, by_version, expected, not_shown = printed_by(REPORTED)
    assert not wrong and not not_shown
    assert {"3.6.0"} < set(by_version)  # torch 2.10's, and a newer one
    stale = Counter((version, row[1]) for version, rows in by_version.items() for row in expected if row not in rows)
    assert not stale, f"`make kernel-report` compiles the rows again whose kernel or tile has changed: {dict(stale)}"
    for rows in by_version.values():
        assert {tuple(row[:-1]) for row in rows} <= {tuple(row[:-1]) for row in expected}

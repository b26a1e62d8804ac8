"""The executor of PTX itself (tests/ptx), on programs of a few lines."""

import numpy as np
import pytest
from ptx import block
from ptx.block import Block
from ptx.decode import Code
from ptx.memory import GlobalMemory, SharedMemory
from ptx.text import Fault, parse

HEAD = """
.visible .entry program(
	.param .u64 .ptr .global .align 1 program_param_0,
	.param .u64 .ptr .global .align 1 program_param_1
)
.reqntid {threads}
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<99>;
	.reg .b64 	%rd<99>;
	mov.u32 	%r0, %tid.x;
	ld.param.b64 	%rd0, [program_param_0];
	ld.param.b64 	%rd1, [program_param_1];
	mad.wide.u32 	%rd2, %r0, 4, %rd0;
	mad.wide.u32 	%rd3, %r0, 8, %rd1;
{body}
	ret;

}}
"""


def execute(body, threads=64, shared=4096, words=None, programs=1):
    """Runs a program on two tensors: of 4 bytes a thread and of 8. %r0 is the thread, %rd2 and %rd3 are where its words lie.
    -> the first, as int32, the second, as int64, and what the programs counted."""
    first = np.zeros(threads if words is None else words, np.int32)
    second = np.zeros(threads, np.int64)
    code = Code(parse(HEAD.format(threads=threads, body=body)))
    memory = GlobalMemory([x.view(np.uint8) for x in (first, second)], threads)
    given, counts = dict(zip(code.program.parameters, memory.addresses)), []
    with np.errstate(all="ignore"):
        for i in range(programs):
            memory.enter(i)
            counts.append(Block(code, given, memory, SharedMemory(shared, threads), (i, 0, 0), (programs, 1, 1)).run())
    memory.give_back()
    return first, second, counts


def result(instructions, kind="b32"):
    """What every thread has in %r9, or %rd9."""
    register, number, address = ("%r9", 0, "%rd2") if kind == "b32" else ("%rd9", 1, "%rd3")
    return execute(f"{instructions}\nst.global.{kind} [{address}], {register};", threads=32)[number]


# ---- arithmetic


@pytest.mark.parametrize("opcode, operands, expected", [
    ("add.s32", (2**31 - 1, 1), -(2**31)),
    ("div.s32", (-7, 2), -3),
    ("rem.s32", (-7, 2), -1),
    ("shl.b32", (1, 40), 0),
    ("shr.s32", (-8, 40), -1),
    ("shr.u32", (-8, 1), 2**31 - 4),
    ("mul.hi.s32", (-(2**20), 2**20), -256),
    ("bfe.u32", (0b1011_0110, 2, 4), 0b1101),
    ("bfe.s32", (0b1011_0110, 2, 4), -3),
    ("bfe.s32", (-1, 0, 32), -1),
    ("shf.l.wrap.b32", (-(2**31), 5, 33), 11),
    ("prmt.b32", (0x44332211, 0x66778855, "0x7610"), 0x66772211),
    ("prmt.b32", (0x44332281, 0, "0x1108"), 0x222281FF),
    ("lop3.b32", (0b1100, 0b1010, 0b1001, "0x80"), 0b1000),
    ("min.s32", (-3, 2), -3),
    ("min.u32", (-3, 2), 2),
])  # fmt: skip
def test_words(opcode, operands, expected):
    assert (result(f"{opcode} %r9, {', '.join(map(str, operands))};") == expected).all()


@pytest.mark.parametrize("opcode, operands, expected", [
    ("mul.lo.s64", (-3, 2**40), -3 * 2**40),
    ("mul.hi.s64", (-(2**40), 2**40), -(2**16)),
    ("mul.hi.u64", (-1, -1), -2),
    ("mad.wide.s32", (-(2**30), 8, 5), -(2**33) + 5),
    ("bfe.u64", (-1, 20, 40), 2**40 - 1),
    ("bfe.s64", (3 << 40, 30, 12), -1024),
    ("shr.s64", (-(2**40), 8), -(2**32)),
    ("cvt.s64.s32", (-5,), -5),
    ("cvt.u64.u32", (-5,), 2**32 - 5),
])  # fmt: skip
def test_double_words(opcode, operands, expected):
    assert (result(f"{opcode} %rd9, {', '.join(map(str, operands))};", "b64") == expected).all()


FLOATS = {"one": "0f3F800000", "third": "0f3EAAAAAB", "nan": "0f7FC00000", "tie": "0f3F808000", "odd_tie": "0f3F818000"}


@pytest.mark.parametrize("instructions, expected", [
    ("max.f32 %r9, {nan}, {one};", 0x3F800000),
    ("cvt.rn.bf16.f32 %rs1, {tie}; cvt.u32.u16 %r9, %rs1;", 0x3F80),
    ("cvt.rn.bf16.f32 %rs1, {odd_tie}; cvt.u32.u16 %r9, %rs1;", 0x3F82),
    ("cvt.rn.bf16x2.f32 %r9, {one}, {third};", 0x3F803EAB),
    ("cvt.rn.f16x2.f32 %r9, {one}, {third};", 0x3C003555),
    ("mov.b32 %r1, 0x3F804000; mov.b32 {{%rs1, %rs2}}, %r1; cvt.f32.bf16 %r9, %rs1;", 0x40000000),
    ("mov.b32 %r1, 0x3F804000; mov.b32 {{%rs1, %rs2}}, %r1; mov.b32 %r9, {{%rs2, %rs1}};", 0x40003F80),
    ("setp.lt.f32 %p1, {nan}, {one}; selp.b32 %r9, 1, 0, %p1;", 0),
    ("setp.geu.f32 %p1, {nan}, {one}; selp.b32 %r9, 1, 0, %p1;", 1),
    ("setp.ne.f32 %p1, {nan}, {one}; selp.b32 %r9, 1, 0, %p1;", 0),
    ("mov.b32 %r1, -5; cvt.rn.f32.s32 %r2, %r1; cvt.rzi.s32.f32 %r9, %r2;", -5),
])  # fmt: skip
def test_floats(instructions, expected):
    assert (result(instructions.format(**FLOATS)) == expected).all()


# ---- threads that part


LOOP = """
	mov.b32 %r9, 0;
$L_again:
	add.s32 %r9, %r9, 1;
	setp.le.u32 %p1, %r9, %r0;
	@%p1 bra $L_again;
	st.global.b32 [%rd2], %r9;
"""


CHOSEN = """
	mov.b32 	%r3, program_param_0;
	mov.b32 	%r4, program_param_1;
	setp.lt.s32 	%p1, %r0, 9;
	selp.b32 	%r5, %r3, %r4, %p1;
	ld.param.b64 	%rd9, [%r5];
"""


def test_a_parameter_that_is_chosen():
    first, second = "ld.param.b64 	%rd9, [program_param_0];", "ld.param.b64 	%rd9, [program_param_1];"
    apart = result(CHOSEN, "b64")
    assert (apart[:9] == result(first, "b64")[:9]).all() and (apart[9:] == result(second, "b64")[9:]).all()
    assert apart[0] != apart[9]
    with pytest.raises(Fault, match="no parameter"):
        result(CHOSEN.replace("[%r5]", "[%r5+32]"), "b64")


def test_a_loop_that_threads_leave_one_by_one():
    first, _, (counts,) = execute(LOOP)
    assert (first == np.arange(1, 65)).all()
    assert counts.instructions == 5 + 1 + 3 * 64 + 2  # together, and together again


def test_two_ways_with_a_barrier_on_each():
    first, *_ = execute("""
	mov.b32 %r1, global_smem;
	shl.b32 %r2, %r0, 2;
	add.s32 %r3, %r1, %r2;
	setp.lt.u32 %p1, %r0, 32;
	@%p1 bra $L_low;
	st.shared.b32 [%r3], %r0;
	bar.sync 0;
	bra.uni $L_end;
$L_low:
	bar.sync 0;
	ld.shared.b32 %r4, [%r3+128];
	st.global.b32 [%rd2], %r4;
$L_end:
""")
    assert (first[:32] == np.arange(32, 64)).all() and not first[32:].any()


def test_threads_that_end_early():
    first, *_ = execute("setp.lt.u32 %p1, %r0, 40;\n@%p1 ret;\nst.global.b32 [%rd2], 7;")
    assert (first[40:] == 7).all() and not first[:40].any()


def test_a_predicate_keeps_the_old_number():
    assert (result("mov.b32 %r9, 3; setp.lt.u32 %p1, %r0, 16; @%p1 mov.b32 %r9, 4;") == [4] * 16 + [3] * 16).all()


# ---- faults

FAULTS = {
    "instruction brev": "brev.b32 %r1, %r0;",
    "outside of global memory": "cvt.u32.u64 %r1, %rd2; cvt.u64.u32 %rd4, %r1; ld.global.b32 %r2, [%rd4];",
    "outside of every tensor": "ld.global.b32 %r1, [%rd2+4];",
    "does not end": "$L_x: bra.uni $L_x;",
    "misaligned": "ld.global.b32 %r1, [%rd2+2];",
    "outside of shared memory": "shl.b32 %r1, %r0, 2; ld.shared.b32 %r2, [%r1];",
    "nothing was written to": "bra.uni $L_y; mov.b32 %r2, 1; $L_y: add.s32 %r3, %r2, 1;",
    "part of it": "setp.lt.u32 %p1, %r0, 16; @%p1 bra $L_x; shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1; $L_x: mov.b32 %r3, 1;",
    "different numbers": "mov.b32 %r1, global_smem; st.shared.b32 [%r1], %r0;",
    "descriptor": "mov.b64 %rd4, 0; wgmma.fence.sync.aligned; "
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r2,%r3,%r4}, %rd4, %rd4, 0, 1, 1, 0, 0;",
}  # fmt: skip


@pytest.mark.parametrize("message", FAULTS)
def test_what_no_program_may(message, monkeypatch):
    monkeypatch.setattr(block, "LIMIT", 1000)
    threads = 128 if message == "descriptor" else 64
    with pytest.raises(Fault, match=message):
        execute(FAULTS[message].replace("; ", ";\n"), threads)


OWN = "mov.b32 %r1, global_smem; shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2; xor.b32 %r4, %r2, {other}; add.s32 %r5, %r1, %r4;"


@pytest.mark.parametrize("other", [4, 128])  # in the same warp, and in another
@pytest.mark.parametrize("first, second", [
    ("st.shared.b32 [%r3], %r0;", "ld.shared.b32 %r6, [%r5];"),
    ("ld.shared.b32 %r6, [%r5];", "st.shared.b32 [%r3], %r0;"),
    ("st.shared.b32 [%r3], %r0;", "st.shared.b32 [%r5], %r0;"),
])  # fmt: skip
def test_accesses_of_two_threads_need_a_barrier(first, second, other):
    program = OWN.format(other=other) + first + "{between}" + second
    execute(program.format(between="bar.sync 0;"))
    if other == 4:
        execute(program.format(between="bar.warp.sync -1;"))
    if other == 4 and first.startswith("ld"):
        return  # the lanes of a warp read before they write
    for between in ["", "bar.warp.sync -1;"][: 1 if other == 4 else 2]:
        with pytest.raises(Fault, match="race"):
            execute(program.format(between=between))


def test_races_are_of_bytes():
    """Neighbours in a word do not race."""
    program = "mov.b32 %r1, global_smem; add.s32 %r2, %r0, %r1; cvt.u16.u32 %rs1, %r0; st.shared.b8 [%r2], %rs1;"
    program += "ld.shared.b8 %rs2, [%r2"
    execute(program + "];")
    with pytest.raises(Fault, match="race"):
        execute(program + "+1];")


COPY = """
	mov.b32 %r1, global_smem;
	shl.b32 %r2, %r0, 2;
	add.s32 %r3, %r1, %r2;
	mov.b32 %r5, 77;
	st.global.b32 [%rd2], %r5;
	cp.async.ca.shared.global [%r3], [%rd2], 0x4;
	cp.async.commit_group;
	{wait}
	ld.shared.b32 %r4, [%r3];
	st.global.b32 [%rd2], %r4;
"""


def test_a_copy_is_there_when_it_was_waited_for():
    assert (execute(COPY.format(wait="cp.async.wait_group 0;"))[0] == 77).all()
    for wait in ("", "cp.async.wait_group 1;"):
        with pytest.raises(Fault, match="was not waited for"):
            execute(COPY.format(wait=wait))
    with pytest.raises(Fault, match="the program ends before"):
        execute(
            COPY.format(wait="cp.async.wait_group 0;\ncp.async.ca.shared.global [%r3], [%rd2], 0x4;\nbra.uni $L_end;")
            + "$L_end:"
        )


def test_programs_meet_in_atomic_operations_only():
    arrive = "setp.eq.u32 %p1, %r0, 0; @%p1 atom.global.gpu.acq_rel.add.u32 %r1, [%rd0], 1;"
    first, *_ = execute(arrive, words=1, programs=3)
    assert first == [3]
    with pytest.raises(Fault, match="another program"):
        execute("st.global.b32 [%rd2], %r0;", programs=2)
    execute(arrive.replace("%rd0", "%rd1") + "st.global.b32 [%rd2], %r0;", programs=2)


def test_shared_memory_is_poisoned():
    load = "mov.b32 %r1, global_smem; ld.shared.b32 %r9, [%r1];"
    assert (result(load) == -1).all()

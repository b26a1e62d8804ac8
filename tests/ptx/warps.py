"""Instructions among the threads of a warp, and fences."""

import numpy as np

from ptx.decode import decoder
from ptx.numbers import TYPES
from ptx.text import Fault

LANES = np.arange(32)
WHOLE = np.uint32(0xFFFFFFFF)


def of_whole_warps(code, text):
    """A check that all lanes take part."""
    members = code.source(text, "u32")

    def check(block, mask):
        block.whole_warps(mask)
        if (members(block.values)[block.active(mask)] != WHOLE).any():
            raise Fault("not all lanes of a warp are asked for")

    return check


@decoder("shfl")
def shuffle(code, one):
    *_, how, kind = one.opcode
    to, source, by, clamp, members = one.operands
    to, _, valid = to.partition("|")
    check, get, lane = of_whole_warps(code, members), code.source(source, kind), code.source(by, "u32")
    put, put_valid = code.target(to), code.target(valid) if valid else None
    if int(clamp, 0) != (0 if how == "up" else 31):
        raise Fault(f"only shuffles among all lanes can be executed: {one.text}")

    def execute(block, mask):
        check(block, mask)
        by = lane(block.values).reshape(-1, 32).astype(int)
        at = {"bfly": LANES ^ by, "idx": by & 31, "up": LANES - by, "down": LANES + by}[how]
        inside = (at >= 0) & (at < 32)
        values = np.take_along_axis(get(block.values).reshape(-1, 32), np.where(inside, at, LANES), 1)
        put(block, values.reshape(-1), mask)
        if put_valid:
            put_valid(block, inside.reshape(-1), mask)

    return execute


@decoder("redux")
def reduce_warp(code, one):
    to, source, members = one.operands
    kind, function = one.opcode[-1], {"add": np.add, "min": np.minimum, "max": np.maximum}[one.opcode[2]]
    check, get, put = of_whole_warps(code, members), code.source(source, kind), code.target(to)

    def execute(block, mask):
        check(block, mask)
        reduced = function.reduce(get(block.values).reshape(-1, 32), axis=1, dtype=TYPES[kind])
        put(block, np.repeat(reduced, 32), mask)

    return execute


@decoder("bar", "barrier")
def warp_barrier(code, one):
    """bar.warp.sync; barriers of the block are the block's business."""
    check = of_whole_warps(code, one.operands[0])

    def execute(block, mask):
        check(block, mask)
        warps = np.unique(block.active(mask) // 32)
        block.shared.order.meet(warps)
        block.memory.order.meet(warps)

    return execute


@decoder("fence", "membar")
def fence(code, one):
    if one.opcode[1:3] == ("proxy", "async"):
        return lambda block, mask: block.shared.fence()
    return lambda block, mask: None  # order in memory is the order of execution here

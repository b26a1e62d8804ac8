"""Matrix instructions: ldmatrix, stmatrix, mma, and the asynchronous wgmma of sm_90."""

import re

import numpy as np

from ptx.decode import decoder
from ptx.memory_access import names, waited
from ptx.numbers import IN_FLIGHT, from_bfloat16
from ptx.text import Fault

FLOAT32 = np.dtype("f4")


def elements(kind: str):
    """uint16 bits -> float32, for a type of matrix elements."""
    if kind not in ("bf16", "f16"):
        raise Fault(f"the executor multiplies no matrices of {kind}")
    return from_bfloat16 if kind == "bf16" else lambda bits: bits.view(np.float16).astype(np.float32)


def tiles(one) -> None:
    if "m8n8" not in one.opcode or one.opcode[-1] != "b16":
        raise Fault(f"the executor has not this matrix: {one.text}")


def row_addresses(address, block, i: int) -> np.ndarray:
    """Lanes 8 i to 8 i + 7 of a warp hold the addresses of the rows of tile i."""
    return address(block.values).reshape(-1, 32)[:, 8 * i : 8 * i + 8].reshape(-1)


def row_threads(block, i: int) -> np.ndarray:
    return block.everyone.reshape(-1, 32)[:, 8 * i : 8 * i + 8].reshape(-1)


@decoder("ldmatrix")
def load_matrices(code, one):
    """Tiles of 8 x 8 16-bit numbers. Lane l gets numbers 2 (l % 4) and the next of row l // 4; of the column, if transposed."""
    tiles(one)
    put = [code.target(text) for text in names(one.operands[0])]
    address, what, transposed = code.address(one.operands[1]), ".".join(one.opcode), "trans" in one.opcode

    def execute(block, mask):
        if mask is not None:
            raise Fault("ldmatrix: only all warps of a block together")
        for i, one_put in enumerate(put):
            rows = block.shared.load(row_addresses(address, block, i), 16, row_threads(block, i), what)
            tile = rows.view(np.uint16).reshape(-1, 8, 8)
            tile = np.ascontiguousarray(tile.transpose(0, 2, 1) if transposed else tile)
            one_put(block, tile.view(np.uint32).reshape(-1), mask)

    return execute


@decoder("stmatrix")
def store_matrices(code, one):
    tiles(one)
    get = [code.source(text, "b32") for text in names(one.operands[1])]
    address, what, transposed = code.address(one.operands[0]), ".".join(one.opcode), "trans" in one.opcode

    def execute(block, mask):
        if mask is not None:
            raise Fault("stmatrix: only all warps of a block together")
        for i, one_get in enumerate(get):
            tile = np.ascontiguousarray(one_get(block.values)).view(np.uint16).reshape(-1, 8, 8)
            tile = np.ascontiguousarray(tile.transpose(0, 2, 1) if transposed else tile)
            rows = tile.reshape(-1, 8).view(np.uint8)
            block.shared.store(row_addresses(address, block, i), rows, row_threads(block, i), what)

    return execute


def left_fragments(registers: list, convert) -> np.ndarray:
    """Four registers of each thread -> [warps, 16, 16]. Lane l of register i has row 8 (i % 2) + l // 4, columns 8 (i // 2) +
    2 (l % 4) and the next."""
    bits = np.stack(registers).view(np.uint16).reshape(2, 2, -1, 8, 4, 2)  # [column half, row half, warp, row, pair, one]
    return convert(bits.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16))


def right_fragments(registers: list, convert) -> np.ndarray:
    """Two registers -> [warps, 8, 16]: column l // 4 of the right matrix, rows 8 i + 2 (l % 4) and the next."""
    bits = np.stack(registers).view(np.uint16).reshape(2, -1, 8, 4, 2)
    return convert(bits.transpose(1, 2, 0, 3, 4).reshape(-1, 8, 16))


@decoder("mma")
def multiply(code, one):
    """d = a b + c, m16n8k16, each warp its own. Register i of a sum has row 8 (i // 2) + l // 4, column 2 (l % 4) + i % 2."""
    if one.opcode[3:6] != ("m16n8k16", "row", "col") or one.opcode[6] != "f32" or one.opcode[-1] != "f32":
        raise Fault(f"the executor has not this product: {one.text[:90]}")
    convert = elements(one.opcode[7])
    put = [code.target(text) for text in one.operands[0]]
    a, b = ([code.source(text, "b32") for text in operand] for operand in one.operands[1:3])
    c = [code.source(text, "f32") for text in one.operands[3]]

    def execute(block, mask):
        block.whole_warps(mask)
        block.counts.by_name["products"] += 1
        values = block.values
        left, right = left_fragments([x(values) for x in a], convert), right_fragments([x(values) for x in b], convert)
        sums = (left @ right.transpose(0, 2, 1)).reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        for i, one_put in enumerate(put):
            one_put(block, c[i](values) + sums[i], mask)

    return execute


# ---- wgmma

SWIZZLES = {1: 128, 2: 64, 3: 32}  # bytes of a row, by the mode of a descriptor


def element_addresses(descriptor: int, rows: int, across: bool) -> np.ndarray:
    """Where a shared operand [rows, 16] lies, [rows, 16] addresses. across: a line of memory has one k and many rows.

    A descriptor (PTX ISA, matrix descriptor) has the first address, a leading and a stride byte offset and the swizzle. Lines
    of 32, 64 or 128 bytes stand eight by eight; the swizzle exchanges the 16-byte columns by the number of the line.
    """
    field = lambda bit: (descriptor >> bit & 0x3FFF) << 4
    first, leading, stride, mode = field(0), field(16), field(32), descriptor >> 62
    if mode not in SWIZZLES or descriptor >> 49 & 7:
        raise Fault(f"wgmma: the executor has not this descriptor: {descriptor:#x}")
    width = SWIZZLES[mode]
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if across:
        per_line = width // 2
        at = first + row // per_line * leading + row % per_line * 2 + k // 8 * stride + k % 8 * width
    else:
        at = first + row // 8 * stride + row % 8 * width + k * 2
    return at ^ ((at >> 7 & (width // 16 - 1)) << 4)


@decoder("wgmma")
def warpgroup_product(code, one):
    if one.opcode[1] == "fence":

        def fence(block, mask):
            block.fenced = list(block.values)

        return fence
    if one.opcode[1] == "commit_group":

        def commit(block, mask):
            block.product_groups.append(block.products)
            block.products = []

        return commit
    if one.opcode[1] == "wait_group":
        keep = int(one.operands[0], 0)

        def wait(block, mask):
            block.product_groups = waited(block.product_groups, keep)

        return wait
    return asynchronous_product(code, one)


def asynchronous_product(code, one):
    """wgmma.mma_async: [64, 16] x [16, N] of each warpgroup. Sums are there once their group is waited for; until then their
    registers hold nothing, and operands in shared memory must stay as they are."""
    N = int(re.fullmatch(r"m64n(\d+)k16", one.opcode[4])[1])
    if one.opcode[5] != "f32":
        raise Fault(f"the executor has not this product: {one.text[:90]}")
    convert, what = elements(one.opcode[6]), ".".join(one.opcode[:5])
    sums, a, b, adds, *rest = one.operands
    negated, transposed = rest[:2], [bool(int(x)) for x in rest[2:]]
    if negated != ["1", "1"]:
        raise Fault(f"the executor does not negate operands: {one.text[:90]}")
    in_registers = isinstance(a, tuple)
    across = dict(zip("b" if in_registers else "ab", transposed, strict=True))
    slots = [code.slot(text) for text in sums]
    code.written.update(slots)
    left = [code.source(text, "b32") for text in a] if in_registers else code.source(a, "b64")
    left_slots = [code.slot(text) for text in a] if in_registers else []
    right, accumulates = code.source(b, "b64"), code.source(adds, "pred")

    def shared_operand(block, descriptors, group, rows, is_across, ends):
        own = descriptors[128 * group : 128 * group + 128]
        if (own != own[0]).any():
            raise Fault("wgmma: a descriptor is not the same in all threads of a warpgroup")
        addresses = element_addresses(int(own[0]), rows, is_across).reshape(-1)
        bits, end = block.shared.begin_product(addresses, 128 * group + 32 * np.arange(4), what)
        ends.append(end)
        return convert(bits.reshape(rows, 16))

    def execute(block, mask):
        if mask is not None:
            raise Fault("wgmma: only all warps of a block together")
        values = block.values
        check_fence(block, [*slots, *left_slots])
        groups, ends, total = block.threads // 128, [], []
        fragments = left_fragments([x(values) for x in left], convert).reshape(groups, 64, 16) if in_registers else None
        for group in range(groups):
            if in_registers:
                first = fragments[group]
            else:
                first = shared_operand(block, left(values), group, 64, across["a"], ends)
            second = shared_operand(block, right(values), group, N, across["b"], ends)
            total.append(first @ second.T)
        # Register i of a sum has row 16 warp + 8 (i // 2 % 2) + lane // 4, column 8 (i // 4) + 2 (lane % 4) + i % 2.
        parts = np.stack(total).reshape(-1, 2, 8, N // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(len(slots), -1)
        adding = accumulates(values)
        before = block.in_flight.get(slots[0]) or [values[slot] for slot in slots]
        if adding.any():
            parts = np.where(adding, np.stack([x.view(FLOAT32) for x in before]) + parts, parts)
        results = list(parts)
        block.in_flight[slots[0]] = results
        for slot in slots:
            values[slot] = IN_FLIGHT

        operands = [values[slot] for slot in left_slots]

        def end():
            for one_end in ends:
                one_end()
            if any(values[slot] is not value for slot, value in zip(left_slots, operands)):
                raise Fault("wgmma: a register of an operand was overwritten before the product was waited for")
            if block.in_flight.get(slots[0]) is results:  # else a later product adds to them
                del block.in_flight[slots[0]]
                for slot, value in zip(slots, results):
                    values[slot] = block.fenced[slot] = value

        block.counts.by_name["products"] += 1
        block.products.append(end)

    return execute


def check_fence(block, slots) -> None:
    """Registers that a product reads or writes were not written since the last wgmma.fence, but by products."""
    if block.fenced is None:
        raise Fault("wgmma: no wgmma.fence before the first product")
    for slot in slots:
        if block.values[slot] is not IN_FLIGHT and block.values[slot] is not block.fenced[slot]:
            raise Fault("wgmma: a register of a product was written after the last wgmma.fence")

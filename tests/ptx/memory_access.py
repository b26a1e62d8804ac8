"""Loads, stores, atomic operations, and asynchronous copies into shared memory."""

import numpy as np

from ptx.decode import PARAMETERS, decoder
from ptx.numbers import TYPES, UNSIGNED
from ptx.text import Fault


def space(one) -> str:
    """global or shared."""
    found = {name.partition("::")[0] for name in one.opcode} & {"global", "shared"}
    if len(found) != 1:
        raise Fault(f"only global and shared memory can be accessed: {one.text}")
    return found.pop()


def names(operand) -> tuple:
    return operand if isinstance(operand, tuple) else (operand,)


def chosen_parameter(code, one, wide: str, put):
    """A load of the parameter whose address is in a register."""
    slots = [code.slot(f"{name} {wide}") for name in code.program.parameters]
    address, dtype = code.address(one.operands[1]), UNSIGNED[TYPES[one.opcode[-1]].itemsize]

    def execute(block, mask):
        threads = block.active(mask)
        places = address(block.values)[threads] - PARAMETERS
        if (places % 16 | (places < 0) | (places >= 16 * len(slots))).any():
            raise Fault(f"no parameter lies there: {one.text}")
        value = np.zeros(block.threads, dtype)
        value[threads] = np.stack([block.values[slot] for slot in slots])[places // 16, threads].astype(dtype)
        put(block, value, mask)

    return execute


@decoder("ld")
def load(code, one):
    kind = one.opcode[-1]
    put = [code.target(text) for text in names(one.operands[0])]
    if one.opcode[1] == "param":
        wide = "u64" if TYPES[kind].itemsize == 8 else "u32"
        if one.operands[1].base.startswith("%"):
            return chosen_parameter(code, one, wide, put[0])
        slot = code.slot(f"{one.operands[1].base} {wide}")
        return lambda block, mask: put[0](block, block.values[slot].astype(UNSIGNED[TYPES[kind].itemsize]), mask)
    where, address = space(one), code.address(one.operands[1])
    dtype, what = TYPES[kind], ".".join(one.opcode)
    n = dtype.itemsize * len(put)

    def execute(block, mask):
        threads, addresses = block.active(mask), address(block.values)
        if where == "global":
            block.counts.by_name["global_loads"] += 1
        memory = block.memory if where == "global" else block.shared
        numbers = memory.load(addresses if mask is None else addresses[threads], n, threads, what).view(dtype)
        for i, one_put in enumerate(put):
            value = np.ascontiguousarray(numbers[:, i])
            if mask is not None:
                full = np.zeros(block.threads, dtype)
                full[threads] = value
                value = full
            one_put(block, value, mask)

    return execute


@decoder("st")
def store(code, one):
    kind = one.opcode[-1]
    get = [code.source(text, kind) for text in names(one.operands[1])]
    where, address, what = space(one), code.address(one.operands[0]), ".".join(one.opcode)

    def execute(block, mask):
        threads, addresses = block.active(mask), address(block.values)
        values = np.stack([x(block.values) for x in get], 1)
        if mask is not None:
            addresses, values = addresses[threads], values[threads]
        if where == "global":
            block.counts.by_name["global_stores"] += 1
        memory = block.memory if where == "global" else block.shared
        memory.store(addresses, values.view(np.uint8).reshape(len(threads), -1), threads, what)

    return execute


ATOMIC = {
    "add": lambda old, x: old + x, "min": min, "max": max, "exch": lambda old, x: x, "and": lambda old, x: old & x,
    "or": lambda old, x: old | x, "cas": lambda old, expected, x: x if old == expected else old,
}  # fmt: skip


@decoder("atom", "red")
def atomic(code, one):
    """One thread after the other."""
    kind = one.opcode[-1]
    name = next(part for part in one.opcode if part in ATOMIC)
    if space(one) != "global":
        raise Fault(f"only global memory has atomic operations: {one.text}")
    operands = list(one.operands)
    put = code.target(operands.pop(0)) if one.opcode[0] == "atom" else None
    address, get = code.address(operands[0]), [code.source(text, kind) for text in operands[1:]]

    def execute(block, mask):
        threads, addresses = block.active(mask), address(block.values)
        given = [x(block.values)[threads] for x in get]
        dtype = TYPES[kind]
        new = lambda i, old: dtype.type(ATOMIC[name](old, *(x[i] for x in given)))
        before = block.memory.atomic(addresses[threads], new, dtype, threads, ".".join(one.opcode))
        block.counts.by_name["atomics"] += 1
        if put:
            full = np.zeros(block.threads, dtype)
            full[threads] = before
            put(block, full, mask)

    return execute


def waited(groups: list, keep: int) -> list:
    """Ends what the older groups of asynchronous operations started. -> the `keep` newest ones."""
    for group in groups[: len(groups) - keep]:
        for end in group:
            end()
    return groups[max(len(groups) - keep, 0) :]


@decoder("cp")
def copy(code, one):
    """cp.async: the bytes are there once their group is waited for. A source size of 0 writes zeros."""
    what = ".".join(one.opcode)
    if one.opcode[1] != "async" or "bulk" in one.opcode:
        raise Fault(f"the executor has not this copy: {one.text}")
    if one.opcode[2] == "commit_group":

        def commit(block, mask):
            block.copy_groups.append(block.copies)
            block.copies = []

        return commit
    if one.opcode[2] in ("wait_group", "wait_all"):
        keep = int(one.operands[0], 0) if one.operands else 0

        def wait(block, mask):
            if not one.operands:
                block.copy_groups.append(block.copies)
                block.copies = []
            block.copy_groups = waited(block.copy_groups, keep)

        return wait
    to, source, n = code.address(one.operands[0]), code.address(one.operands[1]), int(one.operands[2], 0)
    size = code.source(one.operands[3] if len(one.operands) > 3 else str(n), "u32")

    def execute(block, mask):
        threads = block.active(mask)
        sizes = size(block.values)[threads]
        if ((sizes != 0) & (sizes != n)).any():
            raise Fault("the executor copies all bytes or none")
        block.counts.by_name["copies"] += 1
        values, live = np.zeros((len(threads), n), np.uint8), sizes == n
        values[live] = block.memory.load(source(block.values)[threads][live], n, threads[live], what)
        block.copies.append(block.shared.begin_copy(to(block.values)[threads], values, threads, what))

    return execute

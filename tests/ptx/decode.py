"""Instructions -> functions of a block and a mask. Registers are slots of a list, and so is every number in the text."""

import struct

import numpy as np

from ptx.memory import SHARED
from ptx.numbers import TYPES, UNWRITTEN, read
from ptx.text import Address, Fault, Instruction, Program

__all__ = ["PARAMETERS", "Code", "decoder", "instructions", "poison"]

instructions: dict = {}  # first part of an opcode -> a function of (Code, Instruction) to execute(block, mask)


def decoder(*names: str):
    """Registers a function for the instructions of these names."""

    def register(function):
        instructions.update(dict.fromkeys(names, function))
        return function

    return register


PARAMETERS = 1 << 30  # where parameters lie, 16 bytes apart: in 32 bits, and nothing else is there
NUMBERS = {"0f": ("<I", "<f"), "0d": ("<Q", "<d")}
SPECIAL = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"] + ["%laneid", "%warpid"]


def poison(threads: int, dtype: np.dtype) -> np.ndarray:
    """NaN as a float, far away as an address, -1 as a number."""
    return np.zeros(threads, bool) if dtype.kind == "b" else np.full(threads, ~dtype.type(0))


class Code:
    """A program, ready to run: `steps` are (slot of the predicate or None, negated, execute, kind, target of a branch); kind is
    None, branch, barrier or end."""

    def __init__(self, program: Program):
        self.program, self.threads = program, program.threads
        self.slots: dict = {}
        self.initial: list = []
        self.written: set[int] = set()
        self.steps = [self.step(one) for one in program.instructions]
        for text, slot in self.slots.items():  # the compiler reads what it does not write where the number does not matter
            if text.startswith("%") and text not in SPECIAL and slot not in self.written:
                self.initial[slot] = poison(self.threads, TYPES[program.width_of(text)])

    def step(self, one: Instruction) -> tuple:
        predicate = None if one.predicate is None else self.slot(one.predicate)
        head = one.opcode[0]
        kind, target, execute = None, None, None
        if head == "bra":
            kind, target = "branch", self.program.labels[one.operands[0]]
        elif head in ("ret", "exit"):
            kind = "end"
        elif head in ("bar", "barrier") and one.opcode[1] != "warp":
            if one.operands != ("0",):
                raise Fault(f"only barrier 0 of a whole block can be executed: {one.text}")
            kind = "barrier"
        elif head in instructions:
            execute = instructions[head](self, one)
        else:
            raise Fault(f"the executor has no instruction {'.'.join(one.opcode)}")
        return predicate, one.negated, execute, kind, target

    # ---- operands

    def slot(self, text: str, value=UNWRITTEN) -> int:
        """Of a register or of a constant array."""
        if text not in self.slots:
            self.slots[text] = len(self.initial)
            self.initial.append(value)
        return self.slots[text]

    def constant(self, text: str, dtype: np.dtype) -> int:
        """The slot of a number in the text, or of an address in shared memory."""
        if text[:2].lower() in NUMBERS:
            bits, float_ = NUMBERS[text[:2].lower()]
            number = struct.unpack(float_, struct.pack(bits, int(text[2:], 16)))[0]
            value = np.full(self.threads, number, np.dtype("f4" if float_ == "<f" else "f8"))
            if value.itemsize != dtype.itemsize:
                raise Fault(f"a number of {value.itemsize} bytes for {dtype}: {text}")
        elif text.startswith("global_smem"):
            value = np.full(self.threads, SHARED + int(text.partition("+")[2] or "0", 0), dtype)
        elif text in self.program.parameters:  # its address, as one of several may be chosen
            value = np.full(self.threads, PARAMETERS + 16 * self.program.parameters.index(text), dtype)
        else:
            number = int(text.rstrip("U"), 0)
            if dtype.kind == "b":
                value = np.full(self.threads, number != 0)
            else:
                bits = 8 * dtype.itemsize
                value = np.full(self.threads, number & ((1 << bits) - 1), f"u{dtype.itemsize}")
        value.flags.writeable = False
        return self.slot(f"{text} {dtype}", value)

    def source(self, text: str, kind: str):
        """-> a function of the list of values to an array of type `kind`."""
        dtype = TYPES[kind]
        slot = self.slot(text) if text.startswith("%") else self.constant(text, dtype)

        def get(values):
            value = values[slot]
            return value if value.dtype is dtype else read(value, dtype)

        return get

    def target(self, text: str):
        """-> a function of (block, value, mask) that writes a register, widened to it; nothing for `_`."""
        if text == "_":
            return lambda block, value, mask: None
        slot, width = self.slot(text), TYPES[self.program.width_of(text)]
        self.written.add(slot)

        def put(block, value, mask):
            if value.dtype.itemsize != width.itemsize:
                if value.dtype.itemsize > width.itemsize:
                    raise Fault(f"{value.dtype} does not fit into {text}")
                value = value.astype(width if value.dtype.kind != "i" else f"i{width.itemsize}")
            block.write(slot, value, mask)

        return put

    def address(self, operand: Address):
        """-> a function of the list of values to addresses [threads]."""
        if not operand.base.startswith("%"):
            slot = self.constant(operand.base, TYPES["u32"])
            return lambda values: values[slot].astype(np.int64) + operand.offset
        slot, offset = self.slot(operand.base), operand.offset
        return lambda values: values[slot].view(f"i{values[slot].itemsize}").astype(np.int64) + offset

    # ---- a block's registers

    def registers(self, arguments: dict, program: tuple, grid: tuple) -> list:
        """arguments: numbers by parameters' names."""
        values = list(self.initial)
        full = lambda number, kind: np.full(self.threads, number, TYPES[kind])
        special = {"%tid.x": np.arange(self.threads, dtype=np.uint32), "%ntid.x": full(self.threads, "u32")}
        special["%laneid"], special["%warpid"] = special["%tid.x"] % np.uint32(32), special["%tid.x"] // np.uint32(32)
        for i, axis in enumerate("xyz"):
            special[f"%ctaid.{axis}"], special[f"%nctaid.{axis}"] = full(program[i], "u32"), full(grid[i], "u32")
            if i:
                special[f"%tid.{axis}"], special[f"%ntid.{axis}"] = full(0, "u32"), full(1, "u32")
        for name, value in special.items():
            if name in self.slots:
                values[self.slots[name]] = value
        for name in self.program.parameters:
            for kind in ("u32", "u64"):
                if f"{name} {kind}" in self.slots:
                    bits = 32 if kind == "u32" else 64
                    values[self.slots[f"{name} {kind}"]] = full(arguments[name] & ((1 << bits) - 1), kind)
        return values

"""PTX text -> instructions. Only what Triton's compiler writes: one entry, no calls."""

import re
from dataclasses import dataclass

__all__ = ["Address", "Fault", "Instruction", "Program", "parse"]


class Fault(Exception):
    """The program does what no program may: a wild access, a race, a value used before it is there; or an instruction that the
    executor has not."""


@dataclass(frozen=True)
class Address:
    """[base + offset]; base is a register, or the name of a parameter or of shared memory."""

    base: str
    offset: int


@dataclass(frozen=True)
class Instruction:
    predicate: str | None
    negated: bool  # runs where the predicate is false
    opcode: tuple[str, ...]  # ld.global.b32 -> ("ld", "global", "b32")
    operands: tuple  # of str, Address, and tuples of str for {a, b}
    text: str


@dataclass
class Program:
    name: str
    parameters: list[str]
    threads: int  # of a block
    widths: dict[str, str]  # prefix of register names -> pred, b16, b32, b64
    instructions: list[Instruction]
    labels: dict[str, int]  # -> index of an instruction

    def width_of(self, register: str) -> str:
        return self.widths[register.rstrip("0123456789")]


STATEMENT = re.compile(r"(?:@(?P<not>!?)(?P<predicate>%\w+)\s+)?(?P<opcode>[a-z]\w*(?:\.[\w:]+)*)\s*(?P<operands>.*)", re.S)
ADDRESS = re.compile(r"\[\s*(?P<base>[%$\w.]+)\s*(?:\+\s*(?P<offset>-?\w+)\s*)?\]")


def split(text: str) -> list[str]:
    """At the commas outside of braces and brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", text)]


def operand(text: str):
    if text.startswith("{"):
        return tuple(split(text[1:-1]))
    if text.startswith("["):
        found = ADDRESS.fullmatch(text)
        if not found:
            raise Fault(f"address: cannot read {text!r}")
        return Address(found["base"], int(found["offset"] or "0", 0))
    return text


def instruction(text: str) -> Instruction:
    found = STATEMENT.fullmatch(text)
    if not found:
        raise Fault(f"statement: cannot read {text!r}")
    operands = tuple(map(operand, split(found["operands"])))
    return Instruction(found["predicate"], bool(found["not"]), tuple(found["opcode"].split(".")), operands, text)


def parse(ptx: str) -> Program:
    """The entry of a module."""
    head, body = ptx.split("\n{\n", 1)
    body = body.split("\n}\n", 1)[0]
    threads = re.search(r"\.reqntid (\d+)", head)
    program = Program(
        name=re.search(r"\.entry (\w+)", head)[1],
        parameters=re.findall(r"\.param [^,\n]*?(\w+_param_\d+)", head),
        threads=int(threads[1]),
        widths={prefix: width for width, prefix in re.findall(r"\.reg \.(\w+)\s+(%[a-z]+)<", body)},
        instructions=[],
        labels={},
    )
    pending = ""
    for line in body.splitlines():
        line = line.split("//")[0].strip()
        if not line or line.startswith("."):
            continue
        label = re.match(r"(\$\w+):", line)
        if label:
            program.labels[label[1]] = len(program.instructions)
            line = line[label.end() :]
        *statements, pending = (pending + " " + line).split(";")
        program.instructions += [instruction(" ".join(one.split())) for one in statements if one.strip()]
        pending = pending.strip()
    if pending:
        raise Fault(f"statement without an end: {pending!r}")
    return program

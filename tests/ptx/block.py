"""The threads of one program (a block), all of them at once: an instruction is one numpy operation.

Threads that take different ways at a branch go on as groups. The group that is furthest behind in the code runs, up to where
another one waits, and they are one again: so a loop ends for all before anybody goes on after it.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from ptx import arithmetic, memory_access, tensor_cores, warps  # noqa: F401  they fill `decode.instructions`
from ptx.decode import Code, poison
from ptx.memory import GlobalMemory, SharedMemory
from ptx.numbers import IN_FLIGHT, UNSIGNED, UNWRITTEN
from ptx.text import Fault

__all__ = ["LIMIT", "Block", "Counts"]

LIMIT = 100_000  # instructions of a program; those of the tests have at most a fifth


@dataclass
class Counts:
    """What a program did; an instruction of several groups of threads counts for each."""

    instructions: int = 0
    by_name: Counter = field(default_factory=Counter)  # barriers, global_loads, copies, products ..

    @property
    def barriers(self) -> int:
        return self.by_name["barriers"]

    @property
    def global_loads(self) -> int:
        return self.by_name["global_loads"]


@dataclass
class Group:
    at: int
    mask: np.ndarray | None  # None: every thread of the block
    waits: bool = False  # at a barrier


class Block:
    """One program of a grid."""

    def __init__(self, code: Code, arguments: dict, memory: GlobalMemory, shared: SharedMemory, program: tuple, grid: tuple):
        """arguments: numbers by the names of the parameters; program, grid: x, y, z."""
        self.code, self.threads, self.memory, self.shared = code, code.threads, memory, shared
        self.everyone = np.arange(code.threads)
        self.values = code.registers(arguments, program, grid)
        self.counts = Counts()
        self.copies, self.copy_groups = [], []  # functions that end what a wait will wait for
        self.products, self.product_groups = [], []
        self.in_flight = {}  # sums of products that were not waited for, by their first register
        self.fenced = None  # the registers as the last wgmma.fence saw them

    def run(self) -> Counts:
        groups = [Group(0, None)]
        while groups:
            ready = [group for group in groups if not group.waits]
            if not ready:
                self.shared.order.meet()
                self.memory.order.meet()
                for group in groups:
                    group.waits, group.at = False, group.at + 1
                groups = self.joined(groups)
                continue
            group = min(ready, key=lambda one: one.at)
            others = [one.at for one in ready if one is not group]
            groups = [one for one in groups if one is not group]
            groups = self.joined(groups + self.advance(group, min(others, default=len(self.code.steps)), alone=not groups))
        if self.copies or self.copy_groups or self.products or self.product_groups:
            raise Fault("the program ends before what it started asynchronously was waited for")
        return self.counts

    def joined(self, groups: list[Group]) -> list[Group]:
        """Groups at the same place become one."""
        found = {}
        for group in groups:
            key = group.at, group.waits
            if key in found:
                mask = found[key].mask | group.mask
                found[key].mask = None if mask.all() else mask
            else:
                found[key] = group
        return list(found.values())

    def advance(self, group: Group, limit: int, alone: bool) -> list[Group]:
        """Runs the group until it reaches `limit`, a barrier that others have to reach too, a branch that divides it, or its
        end. -> what became of it."""
        at, active, steps, values = group.at, group.mask, self.code.steps, self.values
        count = 0
        try:
            while at < len(steps):
                if at == limit:
                    return [Group(at, active)]
                predicate, negated, execute, kind, target = steps[at]
                count += 1
                mask = active
                if predicate is not None:
                    mask = ~values[predicate] if negated else values[predicate]
                    mask = mask if active is None else mask & active
                    if mask.all():
                        mask = None
                    elif not mask.any() and kind in (None, "barrier"):
                        at += 1
                        continue
                if kind is None:
                    execute(self, mask)
                elif kind == "barrier":
                    self.counts.by_name["barriers"] += 1
                    self.whole_warps(mask)
                    if predicate is not None and mask is not None:
                        raise Fault("the executor has no barriers of some threads")
                    if not alone or active is not None:
                        return [Group(at, active, waits=True)]
                    self.shared.order.meet()
                    self.memory.order.meet()
                elif mask is None or (active is not None and (mask == active).all()):  # a branch, or the end, of all
                    if kind == "end":
                        return []
                    if self.counts.instructions + count > LIMIT:
                        raise Fault(f"the program does not end within {LIMIT} instructions")
                    at = target
                    continue
                elif mask.any():
                    stay = ~mask if active is None else active & ~mask
                    return [Group(at + 1, stay)] + ([Group(target, mask)] if kind == "branch" else [])
                at += 1
            return []
        except Exception as error:
            what = str(error) if isinstance(error, Fault) else repr(error)
            where = f"{self.code.program.name}, instruction {at}: {self.code.program.instructions[at].text[:160]}"
            raise Fault(f"{what}\n  {where}") from error
        finally:
            self.counts.instructions += count

    def active(self, mask) -> np.ndarray:
        """The threads that run an instruction."""
        return self.everyone if mask is None else np.flatnonzero(mask)

    def whole_warps(self, mask) -> None:
        if mask is not None and (mask.reshape(-1, 32).any(1) != mask.reshape(-1, 32).all(1)).any():
            raise Fault("an instruction of a whole warp is run by a part of it")

    def write(self, slot: int, value: np.ndarray, mask) -> None:
        """A register gets `value` in the threads of the mask."""
        if mask is not None:
            old = self.values[slot]
            if old is UNWRITTEN:
                old = poison(self.threads, value.dtype if value.dtype.kind == "b" else UNSIGNED[value.itemsize])
            value = np.where(mask, value, old.view(value.dtype))
        elif self.values[slot] is IN_FLIGHT:
            raise Fault("a register is overwritten before the product that writes it was waited for")
        self.values[slot] = value

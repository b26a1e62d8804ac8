"""Global and shared memory of bytes. An access must lie in a tensor, or in the block's part of shared memory; be aligned to its
size; and be ordered by barriers against those of other threads."""

import numpy as np

from ptx.races import Order
from ptx.text import Fault

__all__ = ["GLOBAL", "SHARED", "GlobalMemory", "SharedMemory"]

GLOBAL = 1 << 40  # where tensors lie: an address that was cut to 32 bits hits nothing
SHARED = 1024  # where dynamic shared memory begins: 0 is nobody's
GAP = 4096  # bytes that belong to nobody, after each tensor
WORDS = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8"), 16: np.dtype("V16")}


class Memory:
    """bytes [size] from address `base` on. Accesses are of n bytes for each of k threads."""

    kind = "memory"

    def __init__(self, base: int, data: np.ndarray, threads: int):
        self.base, self.data, self.order = base, data, Order(len(data), threads)

    def rows(self, addresses: np.ndarray, n: int, threads: np.ndarray, what: str) -> np.ndarray:
        """Addresses [k] -> numbers of words of n bytes, after the checks that need no history."""
        at = addresses.astype(np.int64) - self.base
        if not len(at):
            return at
        wild = (at < 0) | (at + n > len(self.data))
        if wild.any():
            raise Fault(f"{what} of {n} bytes: outside of {self.kind} memory by thread {threads[wild.argmax()]}")
        if (at % n).any():
            raise Fault(f"{what} of {n} bytes: misaligned address by thread {threads[(at % n != 0).argmax()]}")
        return at // n

    def load(self, addresses, n: int, threads, what: str) -> np.ndarray:
        """-> [k, n] bytes."""
        rows = self.rows(addresses, n, threads, what)
        self.reads(rows, n, threads, what)
        return self.data.view(WORDS[n])[rows].view(np.uint8).reshape(len(rows), n)

    def store(self, addresses, values: np.ndarray, threads, what: str) -> None:
        """values [k, n] bytes."""
        n = values.shape[1]
        rows = self.rows(addresses, n, threads, what)
        self.writes(rows, n, threads, what)
        words, new = self.data.view(WORDS[n]), np.ascontiguousarray(values).view(WORDS[n])[:, 0]
        words[rows] = new
        if n <= 8 and (words[rows] != new).any():
            raise Fault(f"{what}: two threads store different numbers at one address")

    def reads(self, rows, n, threads, what) -> None:
        self.order.reads(rows, n, threads, what)

    def writes(self, rows, n, threads, what) -> None:
        self.order.writes(rows, n, threads, what)


class GlobalMemory(Memory):
    """The storages of a launch's tensors, apart from each other."""

    kind = "global"

    def __init__(self, storages: list[np.ndarray], threads: int):
        """storages: uint8 each."""
        self.storages, self.addresses, size = storages, [], 0
        for one in storages:
            self.addresses.append(GLOBAL + size)
            size += -(-(len(one) + GAP) // 256) * 256
        super().__init__(GLOBAL, np.zeros(size, np.uint8), threads)
        self.owned = np.zeros(size, bool)
        for one, part in zip(storages, self.parts()):
            self.data[part], self.owned[part] = one, True
        self.program = 0
        self.by = np.full(size, -1, np.int32)  # which program stored there
        self.synchronized = False  # the running program has done an atomic operation

    def parts(self) -> list[slice]:
        return [slice(at - GLOBAL, at - GLOBAL + len(one)) for at, one in zip(self.addresses, self.storages)]

    def give_back(self) -> None:
        """The bytes as the programs left them, into the storages."""
        for one, part in zip(self.storages, self.parts()):
            one[:] = self.data[part]

    def enter(self, program: int) -> None:
        """Another program begins. What came before is not ordered with it, but for atomic operations."""
        self.program, self.synchronized = program, False
        self.order.meet()

    def rows(self, addresses, n, threads, what):
        rows = super().rows(addresses, n, threads, what)
        owned = self.owned.reshape(-1, n)[rows]
        if not owned.all():
            raise Fault(f"{what} of {n} bytes: outside of every tensor by thread {threads[(~owned.all(1)).argmax()]}")
        return rows

    def reads(self, rows, n, threads, what):
        super().reads(rows, n, threads, what)
        self._among_programs(rows, n, what)

    def writes(self, rows, n, threads, what):
        super().writes(rows, n, threads, what)
        self._among_programs(rows, n, what)
        self.by.reshape(-1, n)[rows] = self.program

    def _among_programs(self, rows, n, what) -> None:
        by = self.by.reshape(-1, n)[rows]
        if not self.synchronized and ((by >= 0) & (by != self.program)).any():
            raise Fault(f"race: {what} of what another program stores")

    def atomic(self, addresses, new, dtype: np.dtype, threads, what) -> np.ndarray:
        """Each thread in turn replaces the number at its address by new(i, number). -> the numbers before, [k]."""
        rows, words = self.rows(addresses, dtype.itemsize, threads, what), self.data.view(dtype)
        self.synchronized = True
        before = np.empty(len(rows), dtype)
        for i, row in enumerate(rows):
            before[i] = words[row]
            words[row] = new(i, before[i])
        return before


class SharedMemory(Memory):
    """Poisoned at the start. Bytes that an asynchronous copy will write are nobody's until it is waited for, those that an
    asynchronous product reads must not be written until then."""

    kind = "shared"

    def __init__(self, size: int, threads: int, fenced_copies: bool = True):
        """fenced_copies: a fence has to stand between an asynchronous copy and a product, as between a store and a product."""
        super().__init__(SHARED, np.full(-(-size // 16) * 16, 0xFF, np.uint8), threads)
        self.arriving = np.zeros(len(self.data), bool)
        self.multiplied = np.zeros(len(self.data), np.int16)  # how many products read there
        self.unfenced = np.zeros(len(self.data), bool)  # stored by a thread, not yet visible to the matrix unit
        self.copies = self.products = 0  # on their way
        self.fenced_copies = fenced_copies

    def reads(self, rows, n, threads, what):
        if self.copies and self.arriving.reshape(-1, n)[rows].any():
            raise Fault(f"{what}: reads shared memory while a copy that was not waited for arrives there")
        super().reads(rows, n, threads, what)

    def writes(self, rows, n, threads, what):
        if self.copies and self.arriving.reshape(-1, n)[rows].any():
            raise Fault(f"{what}: writes shared memory while a copy that was not waited for arrives there")
        if self.products and self.multiplied.reshape(-1, n)[rows].any():
            raise Fault(f"{what}: writes shared memory that a product which was not waited for reads")
        super().writes(rows, n, threads, what)
        self.unfenced.reshape(-1, n)[rows] = True

    def fence(self) -> None:
        """What threads stored is visible to the matrix unit."""
        self.unfenced[:] = False

    def begin_copy(self, addresses, values: np.ndarray, threads, what):
        """values [k, n] bytes will be there. -> a function to be called when they are waited for."""
        n = values.shape[1]
        rows = self.rows(addresses, n, threads, what)
        self.writes(rows, n, threads, what)
        self.data.view(WORDS[n])[rows] = np.ascontiguousarray(values).view(WORDS[n])[:, 0]
        self.arriving.reshape(-1, n)[rows] = True
        self.copies += 1

        def end():
            self.copies -= 1
            self.arriving.reshape(-1, n)[rows] = False
            self.unfenced.reshape(-1, n)[rows] = self.fenced_copies
            self.order.writes(rows, n, threads, what)  # by its thread, now

        return end

    def begin_product(self, addresses, threads, what):
        """What an asynchronous product of a warpgroup reads, 2 bytes at each of the addresses. -> the bits, and a function to
        be called when the product is waited for. threads [4]: one of each warp."""
        everyone = np.broadcast_to(threads[:1], addresses.shape)
        rows = self.rows(addresses, 2, everyone, what)
        self.reads(rows, 2, everyone, what)
        if self.unfenced.reshape(-1, 2)[rows].any():
            raise Fault(f"{what}: reads what threads stored, without a fence.proxy.async after it")
        rows = np.unique(rows)
        self.multiplied.reshape(-1, 2)[rows] += 1
        self.products += 1

        def end():
            self.products -= 1
            self.multiplied.reshape(-1, 2)[rows] -= 1
            for thread in threads:
                self.order.reads(rows, 2, np.full(len(rows), thread), what)

        return self.data.view(np.uint16)[(addresses - self.base) // 2], end

"""Bytes of the tensors that are alive, by what made them: every storage that an op returns is counted until it is gone.

A resident set does not tell weights from activations, and a CPU's allocator keeps what was freed. This counts what a GPU's
allocator would be asked for, but for what single ops take and give back inside of themselves.
"""

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):
    """Inside, `now` has the bytes that are alive by kind, `most` the largest of each kind, `peak` all kinds together at their
    largest, and `at_peak` the kinds then. kind: of what is made from now on. shapes: of tensors that are of a kind of their
    own, whoever makes them."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.shapes, self._kinds = kind, {}, {}  # id of a storage -> reference, kind, bytes
        self.now: Counter[str] = Counter()
        self.restart()

    def restart(self) -> None:
        """From now on anew, with what is alive."""
        self.most, self.at_peak = Counter(self.now), Counter(self.now)

    @property
    def peak(self) -> int:
        return self.at_peak.total()

    @torch.no_grad()
    def see(self, tensors: Iterable[Tensor], kind: str | None = None) -> None:
        """Counts tensors, as `kind`; whatever else they were counted as."""
        for x in tensors:
            storage = (x.to_local() if isinstance(x, DTensor) else x).untyped_storage()
            known = self._kinds.get(id(storage))
            if known is None:
                made = kind or self.shapes.get(tuple(x.shape), self.kind)
                gone = weakref.ref(storage, functools.partial(self._gone, id(storage)))
                self._kinds[id(storage)] = [gone, made, 0]
                self._count(id(storage), storage.nbytes())
            elif kind is not None:
                self.now.subtract({known[1]: known[2]})
                self.now[kind] += known[2]
                known[1] = kind

    def rename(self, kinds: dict[str, str]) -> None:
        """Counts what is alive of some kinds as of others."""
        for known in self._kinds.values():
            if known[1] in kinds:
                self.now.subtract({known[1]: known[2]})
                known[1] = kinds[known[1]]
                self.now[known[1]] += known[2]

    @contextlib.contextmanager
    def counting(self, kind: str) -> Iterator[None]:
        before, self.kind, shapes, self.shapes = self.kind, kind, self.shapes, {}
        try:
            yield
        finally:
            self.kind, self.shapes = before, shapes

    def of(self, owner, name: str, kind: str):
        """A context: what a function or method makes is of this kind."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def counted(*args, **options):
            with self.counting(kind):
                return function(*args, **options)

        return replaced(owner, name, counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.see(x for x in tree_leaves(found) if isinstance(x, Tensor) and not x.is_meta)
        return found

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def counted(storage, size):  # which goes by no op
            found = resize(storage, size)
            if id(storage) in self._kinds:
                self._count(id(storage), storage.nbytes())
            return found

        self._resize = replaced(torch.UntypedStorage, "resize_", counted)
        self._resize.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        self._resize.__exit__(*error)
        return super().__exit__(*error)

    def _count(self, key: int, size: int) -> None:
        known = self._kinds[key]
        self.now[known[1]] += size - known[2]
        known[2] = size
        self.most[known[1]] = max(self.most[known[1]], self.now[known[1]])
        if self.now.total() > self.peak:
            self.at_peak = Counter(self.now)

    def _gone(self, key: int, _) -> None:
        _, kind, size = self._kinds.pop(key)
        self.now[kind] -= size


@contextlib.contextmanager
def replaced(owner, name: str, value) -> Iterator[None]:
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)

"""Huge pages for what a CPU reads from end to end, over and over: rows, and weights, which one core has from pages of 4 KB at
little more than half the rate."""

import ctypes
import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["ask_for_huge_pages", "gather_in_huge_pages"]

HUGE_PAGE = 2 << 20  # bytes
COLLAPSE = 25  # MADV_COLLAPSE: now, and memory that is in use; Linux 6.1 and newer
_libc = ctypes.CDLL(None) if hasattr(mmap, "MADV_HUGEPAGE") else None


def _advise(first: int, last: int, advice: int) -> None:
    if first < last:
        _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)


def ask_for_huge_pages(x: Tensor) -> None:
    """For fresh CPU memory of several huge pages; a wish that the system may ignore."""
    if _libc is None or not x.is_cpu or x.nbytes < 2 * HUGE_PAGE:
        return
    first = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    _advise(first, (x.data_ptr() + x.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)


def gather_in_huge_pages(tensors: Iterable[Tensor]) -> None:
    """For CPU memory that is in use: it stays where it is for the process, and the system copies it; a process that was forked
    no longer shares it with its parent. A wish, as above."""
    if _libc is None:
        return
    plain = (x.data for x in tensors if x.is_cpu and x.layout == torch.strided)
    storages = (x.untyped_storage() for x in plain if type(x) is Tensor)
    ranges = sorted({(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in storages if x.nbytes()})
    while ranges:
        first, last = ranges.pop()
        while ranges and ranges[-1][1] + HUGE_PAGE > first:  # neighbours that share a page
            first, last = ranges[-1][0], max(last, ranges.pop()[1])
        _advise(-(-first // HUGE_PAGE) * HUGE_PAGE, last // HUGE_PAGE * HUGE_PAGE, COLLAPSE)

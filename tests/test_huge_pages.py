"""Weights of a patched model in huge pages, where the system has them."""

import ctypes
import mmap
import sys

import pytest
import torch

from diffmas.ops import huge_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are Linux's")
SIZE = 4 * huge_pages.HUGE_PAGE


def kilobytes_in_huge_pages(x):
    """Of the mapping that x lies in."""
    inside = False
    for line in open("/proc/self/smaps"):
        word = line.split()[0]
        if not word.endswith(":"):
            first, last = (int(end, 16) for end in word.split("-"))
            inside = first <= x.data_ptr() + SIZE // 2 < last
        elif inside and word == "AnonHugePages:":
            return int(line.split()[1])


@pytest.fixture
def memory():
    """A mapping of its own, in small pages."""
    area = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    x = torch.frombuffer(area, dtype=torch.float32)
    x.copy_(torch.arange(len(x)))
    area.madvise(mmap.MADV_HUGEPAGE)
    if not _collapses():
        pytest.skip("this system gathers nothing in huge pages")
    return x


def _collapses() -> bool:
    """Whether a mapping can be gathered at all."""
    area = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.write(bytes(SIZE))
    x = torch.frombuffer(area, dtype=torch.uint8)
    first = -(-x.data_ptr() // huge_pages.HUGE_PAGE) * huge_pages.HUGE_PAGE
    size = ctypes.c_size_t(huge_pages.HUGE_PAGE)
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(first), size, huge_pages.COLLAPSE) == 0


def test_neighbours_are_gathered_together(memory):
    """Each is shorter than a huge page."""
    parts = memory.split(len(memory) // 16)
    before = memory.clone()
    assert not kilobytes_in_huge_pages(memory)
    huge_pages.gather_in_huge_pages([torch.nn.Parameter(x, requires_grad=False) for x in parts[::2]])
    assert kilobytes_in_huge_pages(memory) >= SIZE // 1024 // 2
    assert torch.equal(memory, before)


def test_what_is_elsewhere_or_not_memory_is_left_alone():
    few = torch.zeros(3), torch.empty(0), torch.empty(4, device="meta"), torch.zeros(2, 2).to_sparse()
    huge_pages.gather_in_huge_pages(few)

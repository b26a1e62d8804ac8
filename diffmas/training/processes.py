"""The end of a process under torchrun."""

import time

import torch.distributed as dist

__all__ = ["end_processes"]


def end_processes() -> None:
    """Last call of a script under torchrun, after success: ends torch.distributed, if it was begun.

    Gloo's threads outlive the process group, and one that still holds an object of Python's while the interpreter ends aborts
    the process ("terminate called without an active exception", pytorch issue 190489): they get a moment to let go.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.2)  # lends them the GIL

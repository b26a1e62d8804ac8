"""How the package runs a raw op: `diffmas.ops.call`, or what a commit that is older than it has (`--compare`)."""

import torch

from diffmas import ops

__all__ = ["run_op"]


def _through_the_dispatcher(name: str, lead, *args):
    return getattr(torch.ops.diffmas, name)(*args)


run_op = getattr(ops, "call", _through_the_dispatcher)

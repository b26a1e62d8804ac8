"""One backward pass on two threads, as on a GPU but without one: python fake_device.py, in a process of its own.

torch can be given a device that is written in Python; autograd starts a thread for it as for a GPU. Nodes with a tensor on it
run on that thread, and nodes that carry nothing but an order token, which lies on the CPU, beside it on the thread that called
backward(). Here one node of each kind waits for the other, and both ask one pool for the gradients of their pass at once.
"""

import gc
import sys
import threading

import torch
from threads import Meeting
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from diffmas.trace.pool import Pool

PASSES = 20


class Far(torch.Tensor):
    """A tensor that is said to be on the device; computed on the CPU."""

    @staticmethod
    def __new__(cls, x):
        far = torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device="far:0")
        far.x = x
        return far

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        near = torch.utils._pytree.tree_map_only(Far, lambda x: x.x, (args, kwargs or {}))
        return torch.utils._pytree.tree_map_only(torch.Tensor, Far, op(*near[0], **near[1]))


class Rows(torch.autograd.Function):
    """Like attend: o on the device, and an order token."""

    @staticmethod
    def forward(ctx, x, order, ask):
        ctx.ask = ask
        return Far(x.x.clone()), order.new_empty(0)

    @staticmethod
    def backward(ctx, grad, _):
        ctx.ask("device")
        return grad, None, None


class Order(torch.autograd.Function):
    """Like the nodes that carry an order token alone."""

    @staticmethod
    def forward(ctx, order, ask):
        ctx.ask = ask
        return order.new_empty(0)

    @staticmethod
    def backward(ctx, grad):
        ctx.ask("order")
        return grad, None


def main():
    _setup_privateuseone_for_python_backend("far")
    sys.setswitchinterval(1e-6)  # so that both are on their way through the pool together
    pool = Pool(16, 2, 8, torch.float64, torch.device("cpu"))
    for i in range(PASSES):
        meeting, seen = Meeting(), {}

        def ask(node, meeting=meeting, seen=seen):
            meeting.wait()
            grads = pool.grads()
            seen[node] = (threading.get_ident(), id(grads), [x.data_ptr() for lineage in (0, 1) for x in grads.of(lineage)])
            grads.of(0)[0].add_(1)
            meeting.wait()

        x, order = Far(torch.ones(3)).requires_grad_(), torch.zeros(0, requires_grad=True)
        y, _ = Rows.apply(x, order, ask)
        torch.autograd.grad([y, Order.apply(order, ask)], [x, order], [Far(torch.ones(3)), torch.zeros(0)])
        (device, *theirs), (caller, *ours) = seen["device"], seen["order"]
        assert caller == threading.get_ident() != device, "both nodes ran on one thread"
        assert theirs == ours, f"pass {i}: two gradients in one pass"
    gc.collect()
    assert not any(type(x).__name__ == "GradPools" for x in gc.get_objects()), "gradients outlive their pass"
    print("two threads, one gradient")


if __name__ == "__main__":
    main()

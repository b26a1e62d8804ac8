"""Latent steps with gradients, without the host.

One latent step is recorded while it is captured as a graph, which advances its own forward pass. A replay leaves what backward
needs of the step in the graph's memory, and the last hidden state; the backward of the recorded step is captured as a second
graph. So T steps are one graph of autograd's that is run T times: each step is a node (`Step`) that keeps its hidden state
alone. Its backward goes back to that step, replays its forward, which writes what it wrote before, and then its backward.

Node by node, gradients are summed in the order of steps that run one by one, to the same bits. What it costs is a second
forward, one more reading of the weights; what it saves beside the host's time is memory: T hidden states for T times all that a
step's backward needs.

Both captures are a run's own, the second one a backward pass's own: its gradient pools are not known before.
"""

import functools
import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from diffmas.models.capture import LEAST_REPLAYS, attempt, capture_pass, on_capture_stream
from diffmas.models.patch import Patch
from diffmas.trace import Trace
from diffmas.trace.autograd import begin, carrier
from diffmas.trace.forward_pass import ForwardPass
from diffmas.trace.layer_work import Borrowed
from diffmas.trace.pool import of_this_pass

__all__ = ["WHAT", "LearningSteps"]

WHAT = "latent steps with gradients"
BACKWARD = "the backward passes of latent steps"


class LearningSteps:
    """A run of latent steps, captured at one of them. h [B, hidden]: the last hidden states before it."""

    def __init__(self, patch: Patch, forward_pass: ForwardPass, h: Tensor, clipped: Callable[[Tensor], Tensor] | None = None):
        """forward_pass: of the first step; its extents have room for all steps. clipped: gives h as a step takes it; what is
        done there to gradients is outside of the graphs."""
        self.patch, self.forward_pass, self.h, self.clipped = patch, forward_pass, h.detach().clone(), clipped
        self.graph: torch.cuda.CUDAGraph | None = None
        self._at = self._first = forward_pass.work.step
        self._lock = threading.Lock()  # of two backward passes one uses the graph's memory
        self._backwards: weakref.WeakValueDictionary[int, Backward] = weakref.WeakValueDictionary()

    def capture(self, step: Callable[[Tensor], Tensor]) -> bool:
        """step: the latent step, of hidden states [B, hidden], on this forward pass. Returns False, with nothing changed, if it
        cannot be captured."""
        forward_pass, aliases = self.forward_pass, Aliases()

        def recorded() -> None:
            self.x = self.h.clone().requires_grad_()
            with torch.enable_grad(), aliases:
                self.out = step(self.x)
            self.h.copy_(self.out.detach())

        order, forward_pass.order = forward_pass.order, torch.zeros(0)  # the nodes stand in a row by their hidden states
        try:
            self.graph = capture_pass(self.patch, WHAT, forward_pass, recorded, self.h)
        finally:
            if self.graph is None:
                forward_pass.order = order
        if self.graph is None:
            return False
        self._step = step  # holds tables that the graph reads and autograd has not saved
        self._versions = self._versions_now()
        self._at -= 1  # the step at which the tables stand
        # Whoever stands behind the last step may read its rows and nothing else of it.
        self.rows_alone = begin(forward_pass.work, forward_pass.after)
        self.parameters, places = aliases.reached(self.out, self.x)
        self.inputs = [self.x, *places]
        self._storage = forward_pass.storage()  # the graph writes there, also when the pools have moved on
        return True

    def _versions_now(self) -> list[int]:
        return [w._version for w in self.patch.body.parameters() if not w.is_inference()]

    def check_weights(self) -> None:
        """A replay computes with the weights that there are; autograd itself watches only those that it has saved."""
        if self._versions_now() != self._versions:
            raise RuntimeError(
                "a weight has been modified by an inplace operation between the forward of latent steps and their backward"
            )

    def take(self, trace: Trace, h: Tensor, steps: int) -> Tensor:
        """Takes the steps and commits them to the trace; h: the last hidden states, [B, hidden], which it returns, with a
        gradient."""
        carried = carrier(self)
        for step in range(self._first, self._first + steps):
            h = Step.apply(h if self.clipped is None else self.clipped(h), carried, step, *self.parameters)
        with torch.no_grad():  # the steps are nodes of their own
            trace.commit_repeated(self.forward_pass)
            for _ in range(steps - 2):
                trace.commit_repeated(trace.plan(self.forward_pass.lengths, "latent"))
            last = trace.plan(self.forward_pass.lengths, "latent")
        self._hold = last.work.hold  # of all the rows that the steps write
        trace.commit_repeated(last, h)
        return h

    def forward(self) -> Tensor:
        """The next step's hidden states."""
        self.graph.replay()
        self._at += 1
        return self.h.clone()

    def backward(self, step: int, h: Tensor, dh: Tensor | None) -> list[Tensor | None]:
        """The gradients of h and of the parameters; dh: None where nobody has used the step's hidden states, only its rows."""
        with self._lock:
            backward = of_this_pass(self._backwards, functools.partial(Backward, self))
            if self._at != step - 1:
                self.forward_pass.move(self.h.device, step - 1 - self._at)
            self.h.copy_(h)
            self.graph.replay()
            self._at = step
            return backward.take(dh, left=step - self._first + 1)


class Step(torch.autograd.Function):
    """A latent step of a run."""

    @staticmethod
    def forward(ctx, h, run, step, *parameters):
        ctx.save_for_backward(h, run)
        ctx.step = step
        ctx.set_materialize_grads(False)
        return run.owned.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        h, run = ctx.saved_tensors
        dh, *of_parameters = run.owned.backward(ctx.step, h, dh)
        return dh, None, None, *of_parameters


class Backward:
    """What one backward pass goes through a run's steps with. The recorded step's backward is a graph task of its own, which
    takes the gradient pools of this one."""

    def __init__(self, run: LearningSteps):
        run.check_weights()
        self.run, self.work, self.dh = run, run.forward_pass.work, torch.empty_like(run.h)
        grads = [pool.grads() for pool in self.work.store.pools]
        for g in grads:
            g.of(self.work.lineage)  # no memory of the graph's
        self._grads, self._warm = grads, False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._found: Found | None = None  # in the graph's memory

    def clear(self) -> None:
        """The backward pass is over."""
        self._graph = self._found = self._grads = None

    def take(self, dh: Tensor | None, left: int) -> list[Tensor | None]:
        """The step whose forward the run has just replayed. left: steps, this one included."""
        if dh is None:
            return self._kept(self._recorded(self.run.rows_alone, torch.zeros(0)))
        self.dh.copy_(dh)
        if self._graph is None and self._warm and left > LEAST_REPLAYS:
            self._capture()
        self._warm = True  # a first step warms up: what is compiled or allocated once is no part of a capture
        if self._graph is None:
            return self._kept(self._recorded(self.run.out, self.dh))
        self._graph.replay()
        return self._kept(Found(_copies(self._found.grads), self._found.kept))

    def _recorded(self, root: Tensor, grad: Tensor) -> "Found":
        borrowed = self.work.borrowed = Borrowed(self._grads, {})
        try:
            with on_capture_stream(self.dh.device):
                found = torch.autograd.grad(root, self.run.inputs, grad, retain_graph=True, allow_unused=True)
        finally:
            self.work.borrowed = None
        return Found(list(found), borrowed.kept)

    def _capture(self) -> None:
        def work() -> None:
            self._found = self._recorded(self.run.out, self.dh)

        self._graph = attempt(self.run.patch, BACKWARD, work, self.dh)

    def _kept(self, found: "Found") -> list[Tensor | None]:
        """Puts what the flush needs of this step to the others', and returns the gradients."""
        copies = iter(_copies([x for of_layer in found.kept.values() for x in of_layer]))
        for i, of_layer in zip(found.kept, zip(*[copies] * 4)):
            self._grads[i].steps(self.work.lineage, self.work.deferred).append(of_layer)
        return found.grads


class Found(NamedTuple):
    """What the backward of the recorded step gives. grads: of its inputs. kept: as in `Borrowed`."""

    grads: list[Tensor | None]
    kept: dict[int, tuple[Tensor, ...]]


def _copies(xs: list[Tensor | None]) -> list[Tensor | None]:
    copies = [None if x is None else torch.empty_like(x) for x in xs]
    for dtype in {x.dtype for x in xs if x is not None}:  # of one dtype they are a few launches
        pairs = [(new, x) for new, x in zip(copies, xs) if x is not None and x.dtype == dtype]
        torch._foreach_copy_(*map(list, zip(*pairs)))
    return copies


class Aliases(TorchFunctionMode):
    """Inside, whoever computes with a trainable parameter gets an alias in its place. Autograd gives a parameter itself its
    gradient on the stream where it was first used, and no graph can be captured there."""

    def __init__(self):
        super().__init__()
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # by id(parameter), it and its alias

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*map(self._in, args), **{name: self._in(x) for name, x in (kwargs or {}).items()})

    def _in(self, x):
        if isinstance(x, (list, tuple)):
            return type(x)(map(self._in, x)) if type(x) in (list, tuple) else x
        if not isinstance(x, nn.Parameter) or not x.requires_grad:
            return x
        if id(x) not in self._known:
            with torch.enable_grad():
                self._known[id(x)] = x, x.view_as(x)
        return self._known[id(x)][1]

    def reached(self, out: Tensor, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that `out` was computed from, and what is in their place in its graph: an alias, or themselves where
        no function was asked. x: the leaf that is not one of them."""
        nodes = {alias.grad_fn: (p, alias) for p, alias in self._known.values()}
        found, seen, ahead = [], set(), [out.grad_fn]
        while ahead:
            node = ahead.pop()
            if node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if node in nodes:
                found.append(nodes[node])
            elif leaf is not None:
                found += [(leaf, leaf)] if leaf is not x else []
            else:
                ahead += [following for following, _ in node.next_functions if following is not None]
        return [p for p, _ in found], [place for _, place in found]

"""A patched body's `compile`: its hooks, which plan and commit a forward pass, stay outside of the graph."""

import functools

import torch
from torch import nn

from diffmas.models.linear_parts import is_ours

__all__ = ["CompiledForward", "compile_body", "uncompile_body"]


class CompiledForward:
    """A body's forward, compiled. A copy of the body gets one of its own, and so does one that is unpickled."""

    def __init__(self, body: nn.Module, args: tuple, kwargs: dict):
        self.body, self.args, self.kwargs = body, args, kwargs
        forward = body.__dict__.get("forward")
        self.replaced = None if is_ours(forward) else forward  # accelerate's

    @functools.cached_property
    def compiled(self):
        original = type(self.body).forward.__get__(self.body) if self.replaced is None else self.replaced
        return torch.compile(original, *self.args, **self.kwargs)

    def __getstate__(self) -> dict:
        return {name: x for name, x in vars(self).items() if name != "compiled"}

    def forward(self, *args, **kwargs):
        return self.compiled(*args, **kwargs)


def compile_body(body: nn.Module, *args, **kwargs) -> None:
    """torch.compile of its forward alone, in place of an earlier one."""
    uncompile_body(body)
    body.forward = CompiledForward(body, args, kwargs).forward


def uncompile_body(body: nn.Module) -> None:
    compiled = getattr(body.__dict__.get("forward"), "__self__", None)
    if isinstance(compiled, CompiledForward):
        del body.forward
        if compiled.replaced is not None:
            body.forward = compiled.replaced

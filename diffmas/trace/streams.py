"""CUDA streams of nodes that autograd would run on another one."""

import contextlib

import torch

__all__ = ["on_stream", "stream_of"]


def stream_of(device: torch.device):
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def on_stream(stream):
    """For the backward of a node that gives nothing but an order token. These lie on the CPU, so autograd would run it on the
    stream of whoever calls backward(), and not on that of its forward, where its neighbours run."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)

"""How the package runs a raw op: `diffmas.ops.call`, or what a commit that is older than it has (`--compare`); and the same on
a backend for GPUs by name, beside the one that "auto" takes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffmas import ops
from diffmas.benchmarks.measure import OURS, Cannot, Problem, Provider, Senseless, Trial

__all__ = ["on_gpu", "run_op", "variants"]


def _through_the_dispatcher(name: str, lead, *args):
    return getattr(torch.ops.diffmas, name)(*args)


run_op = getattr(ops, "call", _through_the_dispatcher)

NATIVE = "diffmas_native"  # the library of compiled kernels


class _Seen(TorchDispatchMode):
    """Notes the libraries of the ops that are called."""

    def __init__(self):
        super().__init__()
        self.libraries = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.libraries.add(function.namespace)
        return function(*args, **(kwargs or {}))


def on_gpu() -> bool:
    """What is measured on a GPU only asks here."""
    return torch.cuda.is_available()


def variants(op: str, make) -> dict[str, Provider]:
    """Providers "diffmas, triton" and "diffmas, cuda" from make(problem, run_op), which works by run_op(name, lead, *args).
    Only the backends that "auto" does not take for `op`, and "cuda" not where it leaves all of the work to Triton."""

    def variant(backend: str) -> Provider:
        def run_op(name, lead, *args):
            has = ops.BACKENDS[backend].has(name, lead.dtype, lead.shape[-1])
            return ops.implementation(name, lead, backend if has else "auto")(*args)

        def provider(p: Problem) -> Trial:
            if not on_gpu():
                raise Senseless
            if ops.BACKENDS[backend].why_missing:
                raise Cannot(f"{backend}: {ops.BACKENDS[backend].why_missing}")
            device = "cuda" if torch.cuda.is_available() else "cpu"
            lead = torch.empty(1, 1, p.case.D, dtype=getattr(torch, p.case.dtype), device=device)
            if ops.implementation(op, lead, "auto") == ops.implementation(op, lead, backend):
                raise Senseless
            if backend == "cuda":
                with _Seen() as seen:
                    make(p, run_op).call()
                if NATIVE not in seen.libraries:
                    raise Senseless
            return make(p, run_op)

        return provider

    return {f"{OURS}, {backend}": variant(backend) for backend in ("triton", "cuda")}

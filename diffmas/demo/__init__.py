"""`diffmas demo`: agents that learn to communicate in latent vectors, on a CPU, in minutes. See `diffmas.demo.experiment`."""

from diffmas.demo.experiment import run

__all__ = ["run"]

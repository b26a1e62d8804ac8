"""Reinforcement learning: a team of agents as the policy of TRL's trainer. Needs the package trl: pip install 'diffmas[rl]'."""

from importlib.util import find_spec

if find_spec("trl") is None:
    raise ImportError("diffmas.rl: expected the package trl, found none; pip install 'diffmas[rl]'")

from diffmas.rl.grpo import GRPOTrainer
from diffmas.rl.policy import answer_log_probs
from diffmas.rl.rewards import scored

__all__ = ["GRPOTrainer", "answer_log_probs", "scored"]

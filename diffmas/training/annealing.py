"""What changes with the share of a training that is over, apart from the learning rate."""

from transformers import TrainerCallback

__all__ = ["Annealing"]


class Annealing(TrainerCallback):
    """Tells the projectors of other models (`diffmas.agents.projector.Fuser.anneal`) at each step how far a training is."""

    def __init__(self, others):
        self.projectors = [other.projector for other in others if other.reading == "fused"]

    def on_step_begin(self, args, state, control, **kwargs):
        for projector in self.projectors:
            projector.anneal(state.global_step / max(state.max_steps, 1))

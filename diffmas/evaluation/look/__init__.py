"""A team on one question, to look at: who said what to whom. `look_at` a team or `look_at_file`, a trace that was saved; `page`
writes it as one HTML file, `plot` as a figure for a paper."""

from diffmas.evaluation.look.figures import Block, Lane, Look, Step
from diffmas.evaluation.look.file import look_at_file
from diffmas.evaluation.look.page import page
from diffmas.evaluation.look.plot import plot
from diffmas.evaluation.look.team import look_at

__all__ = ["Block", "Lane", "Look", "Step", "look_at", "look_at_file", "page", "plot"]

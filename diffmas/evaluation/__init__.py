"""Evaluation: tasks as rows of questions and answers, baselines side by side, metrics. See `diffmas.evaluation.run`."""

from typing import TYPE_CHECKING

from diffmas.lazy import importing

if TYPE_CHECKING:
    from diffmas.evaluation.audit_tables import audit_rows, audit_table, plot_audit, write_audit
    from diffmas.evaluation.baselines import (
        Answers,
        Latent,
        Method,
        Stitched,
        TextAgents,
        latent_mas,
        single_agent,
        stitch,
    )
    from diffmas.evaluation.c2c_baseline import C2C, c2c, load_c2c
    from diffmas.evaluation.causal_audit import Condition, audit, communicates
    from diffmas.evaluation.metrics import perplexity, wilson
    from diffmas.evaluation.picture import plot
    from diffmas.evaluation.run import (
        MethodsFailed,
        Result,
        evaluate,
        tables,
        write_answers,
        write_csv,
        write_entropy,
    )
    from diffmas.evaluation.scorer import Scorer
    from diffmas.evaluation.text_sft import Writers, right_turns

_IN = {
    "diffmas.evaluation.causal_audit": "Condition audit communicates",
    "diffmas.evaluation.audit_tables": "audit_rows audit_table plot_audit write_audit",
    "diffmas.evaluation.baselines": "Answers Latent Method Stitched TextAgents latent_mas single_agent stitch",
    "diffmas.evaluation.c2c_baseline": "C2C c2c load_c2c",
    "diffmas.evaluation.metrics": "perplexity wilson",
    "diffmas.evaluation.picture": "plot",
    "diffmas.evaluation.run": "MethodsFailed Result evaluate tables write_answers write_csv write_entropy",
    "diffmas.evaluation.scorer": "Scorer",
    "diffmas.evaluation.text_sft": "Writers right_turns",
}
_WHERE = {name: module for module, names in _IN.items() for name in names.split()}
__getattr__, __dir__ = importing(__name__, _WHERE)

__all__ = [
    "Answers", "C2C", "Condition", "Latent", "Method", "MethodsFailed", "Result", "Scorer", "Stitched", "TextAgents", "Writers",
    "audit", "audit_rows", "audit_table", "c2c", "communicates", "evaluate", "latent_mas", "load_c2c", "perplexity", "plot",
    "plot_audit", "right_turns", "single_agent", "stitch", "tables", "wilson", "write_answers", "write_audit", "write_csv",
    "write_entropy",
]  # fmt: skip

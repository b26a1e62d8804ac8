"""The prompts of the agents: the same four roles for every task, as latent agents, as text agents, and one agent alone."""

from diffmas.agents.agent import Agent

__all__ = ["FINAL", "WAYS", "agents"]

WAYS = ("latent", "text", "single")

FINAL = {
    "math": "Reason step by step, and put the final answer in \\boxed{{}}.",
    "options": "Think about the options, then put the letter of the right one in \\boxed{{}}.",
    "code": "Write the whole function, with its imports, in one Python code block.",
}
ROLES = {
    "planner": "You are the planner of a team. Work out how to answer the question below: what is asked, what is known, and "
    "which steps lead to the answer. Do not give the answer yet.",
    "critic": "You are the critic of a team. Check the plan for the question below: say which steps are wrong, missing or not "
    "needed, and how to mend them.",
    "refiner": "You are the refiner of a team. Improve the plan for the question below: keep what is right, and mend what the "
    "critic found.",
    "solver": "You are the solver of a team. Answer the question below with the help of the team's plan.",
}
LATENT = " What the team thought so far is in your memory."
TEXT = " What the team wrote so far:\n\n{messages}"


def agents(kind: str, latent_steps: int, way: str = "latent") -> list[Agent]:
    """The agents of a task, the solver last. kind: a key of FINAL. latent_steps: T of every agent but the last.

    way: one of WAYS; raises ValueError for another.
    """
    if way not in WAYS:
        raise ValueError(f"way: expected one of {WAYS}, got {way!r}")
    if way == "single":
        return [Agent("solver", f"Answer the question below. {FINAL[kind]}\n\n{{question}}")]
    crew = []
    for name, role in ROLES.items():
        so_far = "" if name == "planner" else LATENT if way == "latent" else TEXT
        last = name == "solver"
        prompt = f"{role}{so_far}\n\n{{question}}" + (f"\n\n{FINAL[kind]}" if last else "")
        crew.append(Agent(name, prompt, 0 if last or way == "text" else latent_steps))
    return crew

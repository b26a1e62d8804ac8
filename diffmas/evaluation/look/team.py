"""A team answers one question, watched."""

import numpy as np
import torch
from torch import Tensor

from diffmas.agents import adapters
from diffmas.agents.eval_mode import evaluating
from diffmas.agents.gradient_report import GradientReport, norm_of
from diffmas.agents.sampling import Sampling
from diffmas.agents.system import MultiAgentSystem
from diffmas.evaluation.baselines import TextAgents
from diffmas.evaluation.look.figures import Block, Lane, Look, Step
from diffmas.evaluation.look.lens import Lens, lens, rows_with, texts_of, token_text
from diffmas.evaluation.look.watch import Pass, Watch
from diffmas.models.parts import attention_layers, causal_lm_of
from diffmas.models.patch import patch_of
from diffmas.trace.views import SAID

__all__ = ["look_at"]


def look_at(
    system: MultiAgentSystem, question: str | dict, answer: str | None = None, *, text_agents: bool = False, nearest: int = 8,
    max_new_tokens: int | None = 64, temperature: float | None = 0.0, seed: int | None = 0, **generation,
) -> Look:  # fmt: skip
    """The team's turns on one question, and its answer, looked at.

    question: as in `MultiAgentSystem.forward`. answer: the right one, for the loss and its gradient, which a team without
    trainable parameters has not. text_agents: whether the same agents also write text to each other, on the bare model.
    nearest: tokens that are told of each latent step. Others: of `MultiAgentSystem.generate`, one sample.

        >>> look = look_at(system, "where is the key", max_new_tokens=4)
        >>> [(look.lanes[b.agent].name, b.kind, b.rows) for b in look.blocks][:2]
        [('planner', 'prompt', 6), ('planner', 'latent', 2)]
        >>> round(float(look.between_lanes()[-1].sum()), 3)
        1.0
    """
    if nearest < 1:
        raise ValueError(f"nearest: expected at least 1 token, got {nearest}")
    questions = system.fields_of([question])
    decoding = dict(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, **generation)
    decoding["seed"] = (sampling := Sampling.of(system, samples=1, **decoding)).seed
    ids = system.generate_tokens(questions, samples=1, **decoding)[0][0]
    with evaluating(system), torch.no_grad(), Watch(system) as watch:
        system(questions, [ids], trace=system.communicate(questions, seeds=[sampling.seed_of(0)]))  # with the same messages
    names, reads = [agent.name for agent in system.agents], system.graph.reads
    lanes = [Lane(name, [edge.agent for edge in edges]) for name, edges in zip(names, reads)]
    facts = [("answer", system.text_of(ids, generation.get("stop")))]
    blocks, found = _blocks(system, questions[0], watch.passes, len(ids), nearest)
    for block in blocks:
        agent = system.agents[block.agent]
        if block.kind == "prompt" and system.member(agent).chat_template:
            block.own = rows_with(block.texts, agent.render(questions[0]).strip())
    layers = max(len(p.weights) for p in watch.passes)
    look = Look(_title(questions[0]), [], layers, lanes, blocks, *_attention(found, blocks, layers))
    if answer is not None:
        facts.append(("right answer", answer))
        facts += _loss(system, questions, answer, look)
    if text_agents:
        said = _text_agents(system, questions, lanes, decoding)
        facts.append(("answer of text agents", said))
    facts.append(("model", causal_lm_of(system.model).config._name_or_path or ""))
    facts += _rows_that_differ(system, layers)
    look.facts = [(name, text) for name, text in facts if text]
    return look


def _rows_that_differ(system, layers: int) -> list[tuple[str, str]]:
    """What to say of rows that their readers do not have as they were written, and of lanes that are not like the others."""
    agents, told = system.agents, []
    for name, other in system.others.items():
        whose = ", ".join(agent.name for agent in agents if agent.model == name)
        text = f"{whose}: {other.model.config._name_or_path or name}"
        if other.reading == "embeddings":
            told.append(("encoder", f"{text}; what it makes of a text is not shown but by the rows that come of it"))
            continue
        own = len(attention_layers(patch_of(other.model).body))
        fewer = "" if own == layers else f"; its {own} layers are shown by number, and nothing at the others"
        told.append(("other model", f"{text}; tokens and probabilities are by its own tokenizer and head{fewer}"))
    if (own := len(attention_layers(patch_of(system.model).body))) != layers:
        told.append(("layers", f"{own} of the system's model, and nothing at the others"))
    for i, j in system.graph.fuses.items():
        told.append(("fused rows", f"of {agents[j].name} and {agents[i].name}: attention to them is shown at {agents[i].name}"))
    small = [f"{agent.name} in {agent.quantized}" for agent in agents[:-1] if agent.quantized is not None]
    coded = [agent.name for agent in agents if agent.low_rank]
    if small:
        told.append(("quantised rows", f"of {', '.join(small)}: attention is to the numbers that readers have of them"))
    if coded:
        told.append(("low-rank rows", f"of {', '.join(coded)}: attention is to what each reader's adapter makes of them"))
    return told


def _title(fields: dict) -> str:
    return str(fields["question"]) if "question" in fields else ", ".join(f"{k}: {v}" for k, v in fields.items())


# ---- blocks ----------------------------------------------------------------------------------------------------------


def _blocks(
    system, fields: dict, passes: list[Pass], answer: int, nearest: int
) -> tuple[list[Block], list[list[tuple[Pass, int]]]]:
    """The blocks, and for each the tokens of it: (pass, index). Of a latent row that several passes wrote, Jacobi passes
    (`diffmas.agents.jacobi`), the last one counts."""
    found: dict[tuple[str, str], dict[int, tuple[Pass, int]]] = {}
    for p in passes:
        kind = "prompt" if p.kind not in SAID or p.kind == "latent" and p.fed is None else p.kind
        rows = found.setdefault((p.agent, kind), {})
        rows.update({int(position): (p, i) for i, position in enumerate(p.positions)})
    tokens = [(agent, kind, list(rows.values())) for (agent, kind), rows in found.items()]
    agent, kind, last = tokens.pop()
    tokens += [(agent, kind, last[:-answer]), (agent, "answer", last[-answer:])]
    names, blocks = [agent.name for agent in system.agents], []
    for name, kind, rows in tokens:
        agent = system.agents[names.index(name)]
        tokenizer, texts = system.member(agent).tokenizer, [""] * len(rows)
        if kind != "latent":
            encoded = rows[0][0].ids is None
            ids = system.prompt_ids(agent, fields) if encoded else [int(p.ids[i]) for p, i in rows]
            texts = texts_of(tokenizer, ids)
        steps, speaker = [], system.writer(agent)  # whose head it is
        with adapters.of_agent(system, names.index(name)):  # which may have a head of its own
            if kind == "answer":  # each token was chosen by the row before it
                chosen = torch.tensor([int(p.ids[i]) for p, i in rows])
                steps = _steps(speaker, [(p, i - 1) for p, i in rows], nearest, chosen)
            elif kind == "latent":
                steps = _steps(speaker, rows, nearest)
        for step, text in zip(steps if kind == "answer" else [], texts):
            step.text = text
        blocks.append(Block(names.index(name), kind, int(rows[0][0].positions[rows[0][1]]), len(rows), texts, steps))
    return blocks, [rows for _, _, rows in tokens]


def _steps(speaker, rows: list[tuple[Pass, int]], nearest: int, ids: Tensor | None = None) -> list[Step]:
    """What the hidden states behind some tokens say. speaker: whose model and tokenizer it is. ids: the tokens that were
    chosen; None for latent steps."""
    states = [(p.fed if ids is None else p.h)[i] for p, i in rows]
    seen: Lens = lens(causal_lm_of(speaker.model), torch.stack(states), nearest, ids)
    steps = []
    for n, (p, i) in enumerate(rows):
        text = [token_text(speaker.tokenizer, t) for t in seen.ids[n].tolist()]
        embedding = None if ids is not None else float(p.x[i].float().norm())
        steps.append(
            Step(text[0], float(seen.chosen[n]), list(zip(text, seen.p[n].tolist())), float(seen.entropy[n]),
                 float(states[n].float().norm()), embedding)
        )  # fmt: skip
    return steps


# ---- who attends to whom ---------------------------------------------------------------------------------------------


def _attention(found: list[list[tuple[Pass, int]]], blocks: list[Block], layers: int) -> tuple[Tensor, Tensor]:
    """attention and rows of `Look`; found: of each block its tokens, (pass, index)."""
    number_of: dict[tuple[str, str], dict[int, int]] = {}  # of a row, by who wrote it and by its position
    block_of = []  # by row
    for b, rows in enumerate(found):
        for p, i in rows:
            number_of.setdefault((p.agent, p.kind), {})[int(p.positions[i])] = len(block_of)
            block_of.append(b)
    # By pass, for layers that see the same: the rows that they see, and the column of each, 0 for the first, then by block.
    columns: dict[int, list[tuple[list[int], Tensor, Tensor, Tensor]]] = {}
    for p in {id(p): p for rows in found for p, _ in rows}.values():
        # -1: of no token that is told; such a row may be seen, with a weight of 0.
        numbers = np.concatenate([
            [number_of.get((s.agent, s.kind), {}).get(s.position + i, -1) for i in range(s.length)] for s in p.segments
        ])  # fmt: skip
        alike: dict[bytes, list[int]] = {}
        for layer, sees in p.sees.items():
            alike.setdefault(sees.tobytes(), []).append(layer)
        columns[id(p)] = []
        for group in alike.values():
            rows = numbers[p.sees[group[0]]].astype(np.int64)
            unknown, rows = torch.from_numpy(rows < 0), rows.clip(0)
            into = 1 + np.array(block_of)[rows]
            into[0] = 0
            columns[id(p)].append((group, torch.from_numpy(rows), torch.from_numpy(into), unknown))
    attention, by_row = [], []
    for rows, block in zip(found, blocks):
        parts = [[row] for row in rows] if block.steps else [rows]
        for part in parts:
            mass, on_rows = torch.full((layers, 1 + len(blocks)), torch.nan), torch.zeros(len(block_of))
            mass[: len(part[0][0].weights)] = 0
            for p, i in part:
                for group, seen, into, unknown in columns[id(p)]:
                    weights = torch.stack([p.weights[layer][i] for layer in group]).float() / len(part)  # [layers, N]
                    if weights[:, unknown].any():
                        raise RuntimeError(f"rows that {p.agent} reads: expected those of the watched passes, got others")
                    mass[group] = mass[group].index_add(1, into, weights)
                    on_rows.index_add_(0, seen, weights.sum(0) / len(p.weights))
            attention.append(mass)
            by_row.append(on_rows)
    return torch.stack(attention), torch.stack(by_row)


# ---- an answer's gradient, and the agents in text --------------------------------------------------------------------


def _loss(system, questions: list[dict], answer: str, look: Look) -> list[tuple[str, str]]:
    """What to say of the loss; its gradient goes into the blocks."""
    why = "none: nothing is trained"
    with evaluating(system):
        if system.others:
            why = "not shown: who gets how much of it is measured where all agents have one model"
        elif any(p.requires_grad for p in system.parameters()):
            report = system.gradient_report(questions, [answer])
            _tell_gradient(report, look)
            return [("its loss", f"{report.loss:.3g} nats a token"), ("gradient norm", f"{report.norm:.3g}")]
        with torch.no_grad():
            loss = float(system(questions, [answer]).loss)
    return [("its loss", f"{loss:.3g} nats a token"), ("gradient norm", why)]


def _tell_gradient(report: GradientReport, look: Look) -> None:
    """The norms of dL/d(rows) of each block by layer. The last agent's prompt and the right answer are one pass, told at its
    answer; a latent step has a norm of its own where each was a pass of its own."""
    for block in look.blocks:
        name = look.lanes[block.agent].name
        passes = [p for p in report.passes if (p.agent, p.kind) == (name, block.kind)]
        if not passes:
            continue
        block.gradient = [norm_of(layer) for layer in zip(*(p.rows for p in passes))]
        if block.kind == "latent" and len(passes) == len(block.steps):
            for step, p in zip(block.steps, passes):
                step.gradient = norm_of(p.rows)


def _text_agents(system, questions: list[dict], lanes: list[Lane], decoding: dict) -> str:
    """Has the agents write text to each other; returns their answer."""
    turns, answers = TextAgents(system, decoding["max_new_tokens"] or 64).write(questions, **decoding)
    for lane, turn in zip(lanes[:-1], turns):
        lane.message, lane.tokens = turn.texts[0].strip(), turn.lengths[0]
    lanes[-1].message, lanes[-1].tokens = answers.texts[0][0].strip(), turns[-1].lengths[0]
    return lanes[-1].message

"""The figures of the page as one for a paper: what each agent says, who attends to what, and layer by layer."""

import textwrap
import warnings
from pathlib import Path

import torch

from diffmas.evaluation.look.figures import Look

__all__ = ["plot"]

COLOURS = ("#2b6cc4", "#b5482f", "#2c8a4b", "#8f4aa5", "#8c6d1f", "#2a8a99", "#b03a5b", "#5a7d2a")
WIDTH = 96  # of a line of steps, in units of which a character takes CHARACTER, and the frame around a step FRAME
CHARACTER, FRAME = 0.74, 1.5
TEXT = 118  # characters of a prompt
LINE = 0.25  # inches


def plot(look: Look, path, layer: int | None = None) -> Path:
    """Writes a figure, in the format that the path's suffix names (.pdf, .svg, .png). layer: whose attention; None is the mean
    of all. Of a saved trace: norms of the values. Raises ValueError for a layer that the model has not."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if layer is not None and not 0 <= layer < look.layers:
        raise ValueError(f"layer: expected one in [0, {look.layers}) or None, got {layer}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = _lines(look)
    heights = [LINE * (len(lines) + 1), 0.9 + 0.24 * len(look.blocks)]
    figure = Figure(figsize=(11, sum(heights) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)  # pyplot would need a display and keep global state
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)
    _draw_lines(top.add_subplot(), lines)
    gradients = [block.gradient for block in look.blocks]
    count = 1 if look.attention is None else 2 + any(gradients)
    axes = bottom.subplots(1, count, squeeze=False, sharey=count > 1, width_ratios=[1, 1, 0.45][:count])[0]
    names = [f"{look.lanes[b.agent].name} {b.kind}" for b in look.blocks]
    if look.attention is None:
        _heat(axes[0], [b.values for b in look.blocks], "norm of the values", "layer")
        _name(axes[0], look, names)
    else:
        mass = look.between_blocks(layer)
        where = "all layers" if layer is None else f"layer {layer}"
        _heat(axes[0], _gaps(mass[:, 1:].T), f"attention mass, {where}", "reader")
        axes[0].set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        _name(axes[0], look, names)
        last = look.attention[look.first_units()[-2] :].mean(0)[:, 1:]  # [layers, blocks]
        _heat(axes[1], _gaps(last.T), "attention of the answer, by layer", "layer")
        if any(gradients):
            norms = [0.0 if g is None else float(torch.tensor(g).norm()) for g in gradients]
            axes[2].barh(range(len(names)), norms, color=[COLOURS[b.agent % len(COLOURS)] for b in look.blocks])
            axes[2].set_title("norm of dL/d(rows)", fontsize=9)
            axes[2].tick_params(labelsize=8)
    title = textwrap.shorten(look.title, 220, placeholder=" …")
    figure.suptitle(textwrap.fill(title, 110), parse_math=False, fontsize=11, fontweight="bold")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # a token that the font does not have
        figure.savefig(path, dpi=160)
    return path


def _gaps(mass: torch.Tensor) -> list[list[float]]:
    """What is not seen at all stays white."""
    return mass.masked_fill(mass == 0, torch.nan).tolist()


def _lines(look: Look) -> list[tuple[int, str, list[tuple[str, float | None]]]]:
    """What agents say, as (lane, label, [(text, how dark)]) of at most WIDTH units."""
    lines = []
    for lane, agent in enumerate(look.lanes):
        for block in (b for b in look.blocks if b.agent == lane):
            label = (
                f"{agent.name}, {len(block.steps)} latent steps" if block.kind == "latent" else f"{agent.name}, {block.kind}"
            )
            if block.steps:
                most = max((s.values or 0 for s in block.steps), default=0) or 1
                parts = [
                    (str(i + 1), s.values / most if s.values else None) if s.text is None else (_shown(s.text), s.p)
                    for i, s in enumerate(block.steps)
                ]
            else:
                text = " ".join("".join(block.texts[slice(*block.own)] if block.own else block.texts).split())
                parts = [(_cut(text), None)]
            lines += [(lane, label if not n else "", line) for n, line in enumerate(_wrapped(parts))]
        if agent.message is not None:
            text = " ".join(agent.message.split()) or "(nothing)"
            lines.append((lane, f"{agent.name}, in text", [(_cut(text), None)]))
    return lines


def _cut(text: str) -> str:
    return text if len(text) <= TEXT else text[: TEXT - 2] + " …"


def _shown(text: str) -> str:
    text = text.replace("\n", "↵").replace("\t", "→")
    return text.strip() or ("␣" if text else "∅")


def _wrapped(parts: list) -> list[list]:
    lines, used = [[]], 0.0
    for part in parts:
        width = CHARACTER * len(part[0]) + FRAME
        if used + width > WIDTH and lines[-1]:
            lines.append([])
            used = 0.0
        lines[-1].append(part)
        used += width
    return lines


def _draw_lines(axis, lines) -> None:
    axis.set(xlim=(-30, WIDTH), ylim=(len(lines) - 0.4, -0.6))
    axis.axis("off")
    for y, (lane, label, parts) in enumerate(lines):
        colour, x = COLOURS[lane % len(COLOURS)], 0.0
        axis.text(-1.5, y, label, ha="right", va="center", color=colour, fontsize=8.5, parse_math=False)
        for text, dark in parts:
            box = (
                None
                if dark is None
                else {"boxstyle": "round,pad=0.22", "fc": (*_rgb(colour), 0.06 + 0.5 * dark), "ec": colour, "lw": 0.5}
            )
            font = {"fontsize": 8, "color": "0.35"} if dark is None else {"fontsize": 7.5, "family": "monospace"}
            axis.text(x, y, text, ha="left", va="center", bbox=box, parse_math=False, clip_on=True, **font)
            x += CHARACTER * len(text) + FRAME


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _heat(axis, rows, title: str, label: str) -> None:
    image = axis.imshow(rows, aspect="auto", cmap="magma_r", interpolation="nearest")
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(label, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.figure.colorbar(image, ax=axis).ax.tick_params(labelsize=7)


def _name(axis, look: Look, names: list[str]) -> None:
    axis.set_yticks(range(len(names)), names, parse_math=False)
    for label, block in zip(axis.get_yticklabels(), look.blocks):
        label.set_color(COLOURS[block.agent % len(COLOURS)])

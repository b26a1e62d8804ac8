"""Where the gradient of an answer's loss goes: to which agent, forward pass, layer and rows of the trace.

Three norms of each forward pass (an agent's prompt, each of its latent steps, the answer):

- *hidden*: dL/dh of the last hidden states. Hooks on the body see it, at no cost worth naming.
- *rows*: dL/dK and dL/dV of the rows that the pass wrote, by layer, from everybody who read them. Attention's backward has them
  at hand (`LayerWork.watch`).
- *parameters*: the pass's own part of the trainable parameters' gradient, by layer. A shared adapter serves all passes, so each
  pass, and each agent, computes with an alias of every parameter, and autograd itself sums what flows to either.

`GradientWatch` measures the first two while a trainer runs; `report` measures all three on demand, and changes nothing.
"""

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffmas.agents.gradient_report import GradientReport, PassGradient
from diffmas.models.parts import attention_layers
from diffmas.models.patch import patch_of
from diffmas.trace.views import SAID

__all__ = ["GradientWatch", "layers_of_parameters", "report"]


def layers_of_parameters(body: nn.Module) -> dict[int, int]:
    """The layer of each parameter in one, by id(parameter)."""
    inside = {id(child): module for module in body.modules() for child in module.children()}
    return {id(p): i for i, x in enumerate(attention_layers(body)) for p in inside[id(x)].parameters()}


class Norms:
    """Norms of parts, by a number; tensors until they are asked for, so that nothing waits for the device."""

    def __init__(self):
        self._parts: dict[int, Tensor] = {}

    def add(self, number: int, *parts: Tensor | None) -> None:
        for x in parts:
            if x is None:  # a hidden state that only told the order
                continue
            norm = torch.linalg.vector_norm(x, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
            before = self._parts.get(number)
            self._parts[number] = norm if before is None else torch.hypot(before, norm)

    def values(self, count: int) -> list[float]:
        """Of numbers 0 to count - 1; 0 where there was no part."""
        numbers = list(self._parts)
        by_device: dict[torch.device, list[int]] = {}
        for number in numbers:
            by_device.setdefault(self._parts[number].device, []).append(number)
        found = [0.0] * count
        for there in by_device.values():
            for number, norm in zip(there, torch.stack([self._parts[n].double() for n in there]).tolist()):
                found[number] = norm
        return found


class Place(NamedTuple):
    """A forward pass of an episode; see `PassGradient`."""

    agent: str
    kind: str
    step: int


class Measured(NamedTuple):
    """What is measured of a forward pass; must lead to no graph, since the graph leads here."""

    hidden: Norms
    rows: Norms
    parameters: Norms


class GradientWatch:
    """Measures the gradients that reach the forward passes of a system, from `start` to `stop`; as a context too.

    rows: whether dL/d(rows) is measured; the backward of attention then takes two calls a layer for one. Neither changes a
    gradient. While it watches, latent steps are forwards one by one, and agents take their turns alone, which can be told
    apart. Passes of several episodes, as accumulated micro-batches are, count together: the norms are those of the sum of
    their losses.
    """

    def __init__(self, system, rows: bool = True, aliases: "Aliases | None" = None):
        self.rows = rows
        self._agents, self._aliases = [agent.name for agent in system.agents], aliases
        self._body, self._realign = patch_of(system.model).body, system.realign
        self._layers = len(attention_layers(self._body))
        self._found: dict[Place, Measured] = {}
        self._place: Place | None = None  # of the forward pass that is running
        self._step = 0
        self._hooks: list = []
        self._system = system

    def start(self) -> None:
        self._system.together = False  # a pass is one agent's
        self._hooks = [
            self._body.register_forward_pre_hook(self._before, with_kwargs=True),
            self._body.register_forward_hook(self._after, with_kwargs=True),
        ]
        if self._aliases is not None:
            self._hooks.append(self._realign.register_forward_pre_hook(self._before_realign))

    def stop(self) -> None:
        self._system.together = True
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> "GradientWatch":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _before_realign(self, *_) -> None:
        self._aliases.next_pass()  # the realignment belongs to the step that it is for

    @torch.compiler.disable
    def _before(self, body, args, kwargs) -> None:
        forward_pass = kwargs.get("diffmas_trace")
        self._place = None
        if forward_pass is None or forward_pass.table is None:
            return
        newest = next(row[-1] for row, n in zip(forward_pass.table.segments, forward_pass.lengths) if n)
        if newest.agent is None:  # measures which rows an agent reads
            return
        kind = "answer" if newest.agent == self._agents[-1] else newest.kind
        self._step = self._step + 1 if kind in SAID else 0  # a prompt begins every turn
        self._place = Place(newest.agent, kind, self._step)
        parameters = Norms() if self._aliases is None else self._aliases.run(newest.agent)
        measured = self._found.setdefault(self._place, Measured(Norms(), Norms(), parameters))
        if self.rows:
            forward_pass.work.watch = measured.rows.add

    @torch.compiler.disable
    def _after(self, body, args, kwargs, output) -> None:
        if self._place is None:
            return
        h = output[0] if isinstance(output, tuple) else output.last_hidden_state
        if h.requires_grad:
            h.register_hook(functools.partial(self._found[self._place].hidden.add, 0))

    def take(self, scale: float = 1.0) -> list[PassGradient]:
        """What was measured since the last time, divided by `scale`, agent by agent."""
        found, self._found = self._found, {}
        passes = []
        for place in sorted(found, key=lambda place: (self._agents.index(place.agent), place.step)):
            counts = (1, self._layers, self._layers + 1)
            (hidden,), rows, parts = ([x / scale for x in norms.values(n)] for norms, n in zip(found[place], counts))
            passes.append(PassGradient(*place, hidden, rows, None if self._aliases is None else parts))
        return passes


class Aliases:
    """Stands in, in each forward pass, for every trainable parameter: an alias for the agent, and of that one for the pass. The
    gradient of an alias, and so what its hook gets, is what flows to it; and it flows on to the parameter.

    agents: by name, the norms of the agents' parts by layer, filled by backward.
    """

    def __init__(self, system):
        modules = [(m, name, p) for m in system.modules() for name, p in m._parameters.items()]
        self._owners = [(m, name, p) for m, name, p in modules if p is not None and p.requires_grad]
        layers = layers_of_parameters(patch_of(system.model).body)
        self.layers = len(attention_layers(patch_of(system.model).body))
        self.parameters = {id(p): p for _, _, p in self._owners}
        self.number = {key: layers.get(key, self.layers) for key in self.parameters}  # of the layer; the last: none
        self.agents = {agent.name: Norms() for agent in system.agents}
        self._of_agent: dict[str, dict[int, Tensor]] = {}
        self._agent: str | None = None
        self._begun: Norms | None = None

    def _alias(self, of: dict[int, Tensor], norms: Norms) -> dict[int, Tensor]:
        aliases = {key: x.view_as(x) for key, x in of.items()}
        for key, alias in aliases.items():
            alias.register_hook(functools.partial(norms.add, self.number[key]))
        return aliases

    def next_pass(self) -> Norms:
        """The same agent's next forward pass begins; returns where the norms of its parts will be."""
        norms = self._begun = Norms()
        if torch.is_grad_enabled():
            if self._agent not in self._of_agent:
                self._of_agent[self._agent] = self._alias(self.parameters, self.agents[self._agent])
            aliases = self._alias(self._of_agent[self._agent], norms)
            for module, name, p in self._owners:
                module._parameters[name] = aliases[id(p)]
        return norms

    def run(self, agent: str) -> Norms:
        """Its model runs now."""
        self._agent = agent
        norms = self._begun or self.next_pass()
        self._begun = None
        return norms

    def restore(self) -> None:
        for module, name, p in self._owners:
            module._parameters[name] = p


def report(system, questions, answers, num_items_in_batch=None) -> GradientReport:
    """See `MultiAgentSystem.gradient_report`."""
    if system.others:
        raise ValueError("gradient_report: expected agents of one model, got some of others")
    if system.agreement is not None:
        raise ValueError("gradient_report: expected a model that this process has alone, got one that several share")
    if answers is None:
        raise ValueError("answers: expected a list, got None")
    aliases = Aliases(system)
    if not aliases.parameters:
        raise ValueError("system: expected trainable parameters, got none; load an adapter with trainable=True")
    devices = [system.device] if system.device.type == "cuda" else []
    # Who trains goes on with the same random numbers, and nothing is compiled for aliases.
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), torch.enable_grad():
        with contextlib.ExitStack() as stack:
            stack.callback(aliases.restore)
            watch = stack.enter_context(GradientWatch(system, aliases=aliases))
            loss = system(questions, answers, num_items_in_batch).loss
        grads = torch.autograd.grad(loss, list(aliases.parameters.values()), allow_unused=True)
    total = Norms()
    for key, grad in zip(aliases.parameters, grads):
        if grad is not None:
            total.add(aliases.number[key], grad)
    count = aliases.layers + 1
    agents = {name: norms.values(count) for name, norms in aliases.agents.items()}
    return GradientReport(float(loss.detach()), watch.take(), agents, total.values(count))

"""The rooms of the package: imports go down only, no file imports itself through others, no file uses another's privates."""

from pathlib import Path

import pytest
from layout import circles, floors, imports, imports_of, private_reaches, sources

ROOT = Path(__file__).parent.parent
PACKAGES = {"diffmas": "diffmas", "diffmas.kernels": "kernels", "diffmas.benchmarks": "benchmarks"}

# From the ground up; a room imports from those below it and from itself. "" is diffmas/__init__.py, the public names.
ROOMS = (
    "lazy", "formats", "json_file", "ops", "trace", "models", "agents", "training", "", "evaluation", "rl", "serving", "demo",
    "cli",
)  # fmt: skip

# Private names of other libraries: nothing public does the same.
FOREIGN = {
    "_C": "torch: the graph task of a backward pass, dispatch modes",
    "_autograd": "torch._C",
    "_backward_hooks": "torch.nn.Module: whether somebody hooks into a call",
    "_backward_pre_hooks": "torch.nn.Module",
    "_buffers": "torch.nn.Module: those that a forward has put in the place of others",
    "_compiled_call_impl": "torch.nn.Module: what compile() has made of its call",
    "_cuda_endAllocateToPool": "torch._C: memory pools of captured graphs",
    "_cuda_releasePool": "torch._C",
    "_current_graph_task_id": "torch._C",
    "_dynamo": "torch: settings of torch.compile",
    "_execution_engine": "torch: callbacks at the end of a backward pass",
    "_exit": "os: ends a process that was forked, and nothing of its parent's",
    "_has_any_global_hook": "torch.nn.Module: whether somebody hooks into all calls",
    "_unsafe_view": "torch.ops.aten: another shape of a tensor that nobody else has, which is not a view to autograd",
    "_foreach_copy_": "torch: copies of many tensors in a few launches",
    "_foreach_norm": "torch: the norms of all gradients in a few launches",
    "_forward_hooks": "torch.nn.Module: a hook that is removed by its id, since handles cannot be pickled or copied",
    "_forward_hooks_with_kwargs": "torch.nn.Module",
    "_forward_pre_hooks": "torch.nn.Module",
    "_forward_pre_hooks_with_kwargs": "torch.nn.Module",
    "_functorch": "torch: settings of torch.compile's autograd",
    "_len_torch_dispatch_stack": "torch._C",
    "_modules": "torch.nn.Module: a submodule at the cost of a dict's lookup, for every layer of every step",
    "_parameters": "torch.nn.Module: a parameter likewise",
    "_schema": "torch: the argument names of a registered op",
    "_version": "torch: whether a tensor was written to",
    "_torchdynamo_orig_callable": "torch: the mark of a function that is compiled",
    "_top_saved_tensors_default_hooks": "torch._C._autograd: whether saved tensors are packed",
    "_current_frames": "sys: what other threads do",
    "_engine_run_backward": "torch.autograd.graph: where who calls backward waits for it",
    "_attn_implementation": "transformers: the attention that a config asks for",
    "_attn_implementation_internal": "transformers: its setter without the checks of a public name",
    "_gradient_checkpointing_func": "transformers: how layers are recomputed",
    "_n_gpu": "transformers.TrainingArguments: keeps it from DataParallel",
    "_no_split_modules": "transformers, accelerate: the modules that a model is sharded by",
    "_name_or_path": "transformers: where a config was loaded from",
    "_hf_hook": "accelerate: the mark of a module whose forward it has wrapped",
    "_old_forward": "accelerate: the forward inside its wrapper",
    "_replace": "namedtuple: public in spite of its name",
}


def room(module: str) -> str:
    return {"diffmas": "", "diffmas.__main__": "cli"}.get(module) or ".".join(module.split(".")[1:2])


def may_import(importer: str, imported: str) -> bool:
    a, b = room(importer), room(imported)
    if a == "benchmarks":
        return True
    if b == "benchmarks":
        return a == "cli"
    if a == "kernels":
        return b == "kernels" or imported == "diffmas.ops.reference"
    if b == "kernels":
        return a == "ops"
    return ROOMS.index(b) <= ROOMS.index(a)


def against_the_order(graph) -> list[str]:
    return [f"{a} imports {b}" for a in sorted(graph) for b in sorted(graph[a]) if not may_import(a, b)]


@pytest.fixture(scope="module")
def texts():
    return sources(ROOT, PACKAGES)


@pytest.fixture(scope="module")
def graph(texts):
    return imports(texts)


# ---- the package -----------------------------------------------------------------------------------------------------


def test_every_room_is_placed(texts):
    assert {room(name) for name in texts} == {*ROOMS, "kernels", "benchmarks"}


def test_imports_go_down(graph):
    assert not against_the_order(graph)


def test_the_extension_knows_nothing_of_the_package():
    texts = sources(ROOT, {**PACKAGES, "csrc": "csrc"})
    assert not [name for name in texts if name.startswith("csrc.") and imports_of(name, texts[name], texts)]


def test_no_circles(graph):
    assert circles(graph) == []


def test_no_file_uses_the_privates_of_another(texts):
    found = {module: private_reaches(text) for module, text in texts.items()}
    assert not [(module, line, name) for module, reaches in found.items() for line, name in reaches if name not in FOREIGN]
    used = {name for reaches in found.values() for _, name in reaches}
    assert FOREIGN.keys() <= used, f"names that nobody uses any more: {sorted(FOREIGN.keys() - used)}"


# ---- the checker -----------------------------------------------------------------------------------------------------


def package(**texts) -> dict[str, str]:
    """Sources by the name of a file in the package, dots as __."""
    return {".".join(("diffmas", *name.split("__"))): text for name, text in texts.items()}


@pytest.mark.parametrize(
    "text",
    [
        "import diffmas.agents.system",
        "from diffmas.agents import system",
        "from diffmas.agents.system import Agent",
        "def f():\n    from diffmas.agents import system",
        "if TYPE_CHECKING:\n    import diffmas.agents.system",
        "NAME = 'diffmas.agents.system'\n\ndef f():\n    return importlib.import_module(NAME)",
    ],
)
def test_an_import_is_found_in_any_form(text):
    texts = package(trace__trace=text, agents__system="")
    assert against_the_order(imports(texts)) == ["diffmas.trace.trace imports diffmas.agents.system"]


def test_what_is_no_import():
    texts = package(trace__trace='"""diffmas.agents.system"""\nNAME = "diffmas.agents.system"', agents__system="")
    assert not any(imports(texts).values())


def test_names_of_a_package_are_its_init(tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "__init__.py").write_text("from house.pool import rows")
    (tmp_path / "pool" / "rows.py").write_text("from house.pool import Row")
    texts = sources(tmp_path, {"house": "."})
    assert imports({**texts, "house.door": "from house.pool import Row"}) == {
        "house.pool": {"house.pool.rows"}, "house.pool.rows": {"house.pool"}, "house.door": {"house.pool"},
    }  # fmt: skip


@pytest.mark.parametrize(
    "importer, imported, allowed",
    [
        ("diffmas.cli.main", "diffmas.benchmarks.run", True),
        ("diffmas.demo.experiment", "diffmas.benchmarks.run", False),
        ("diffmas.kernels.inject", "diffmas.ops.reference", True),
        ("diffmas.kernels.inject", "diffmas.ops.checks", False),
        ("diffmas.ops.backends", "diffmas.kernels.backend", True),
        ("diffmas.trace.autograd", "diffmas.kernels.backend", False),
        ("diffmas.training.trainer", "diffmas", False),
        ("diffmas.__main__", "diffmas", True),
        ("diffmas", "diffmas.training", True),
        ("diffmas", "diffmas.evaluation", False),
    ],
)
def test_who_may_import_whom(importer, imported, allowed):
    assert may_import(importer, imported) == allowed


def test_relative_imports_are_refused():
    with pytest.raises(ValueError, match="diffmas.trace.trace: expected absolute imports"):
        imports(package(trace__trace="from ..agents import system", agents__system=""))


def test_circles_and_floors():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"d", "e"}, "d": {"b"}, "e": set(), "f": {"g"}, "g": {"f", "a"}}
    assert circles(graph) == [["b", "c", "d"], ["f", "g"]]
    assert floors(graph) == 4  # e, the circle of b, a, the circle of f
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == [] and floors({}) == 0


@pytest.mark.parametrize(
    "text, found",
    [
        ("x._a", [(1, "_a")]),
        ("x.y._a.b", [(1, "_a")]),
        ("x._a = 1", [(1, "_a")]),
        ("getattr(x, '_a')", [(1, "_a")]),
        ("from m import _a", [(1, "_a")]),
        ("def f(self):\n    return self.x._a", [(2, "_a")]),
        ("def f(self):\n    return self._a, super()._b, cls._c", []),
        ("class A:\n    def f(self, x):\n        self._a = x._a", []),
        ("def _f(): ...\nx._f", []),
        ("x.__dict__, x.a_", []),
    ],
)
def test_private_names(text, found):
    assert private_reaches(text) == found

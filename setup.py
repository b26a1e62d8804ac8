"""Builds diffmas/libdiffmas.so with a plain C++ compiler, and nvcc where there is one; other packaging facts: pyproject.toml.

The extension needs torch's headers (the LibTorch stable ABI) and nothing of torch at build time beyond them: one binary runs on
torch 2.10 and newer. Headers are taken from the torch that pip installs into, also in an isolated build, where that torch is on
disk but cannot be imported; only when there is none does the build ask for torch itself.

No compiler, no headers or a failed compilation: the package installs all the same, runs on the reference backend, and
diffmas/build_info.json says why. The same for the CUDA kernels, on their own: nvcc is $NVCC (empty: none), $CUDA_HOME/bin/nvcc,
on the path or in /usr/local/cuda; neither a GPU nor a CUDA build of torch is needed, and the library loads without them.
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

REPOSITORY = None  # its address on GitHub, once it has one
CSRC = Path("csrc")
LIBRARY = "libdiffmas.so"
BUILD_INFO = "build_info.json"
X86 = platform.machine().lower() in ("x86_64", "amd64")
ARM = platform.machine().lower() in ("aarch64", "arm64")

FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
# DIFFMAS_SANITIZE=1 checks every access; such a library needs libasan loaded first (make test-asan).
SANITIZE = []
if os.environ.get("DIFFMAS_SANITIZE") == "1":
    SANITIZE = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# csrc/cpu/kernels/ is compiled once per instruction set; csrc/cpu/dispatch.cpp picks one when the library is loaded.
# Where a loop starts within a line of code is worth up to 3 %: no kernel may lose that because another one has changed.
KERNEL_FLAGS = ["-falign-loops=64"]
# BFLOAT_ISAS: attention in bfloat16 (csrc/cpu/kernels/instructions.h); left out where the compiler does not know INSTRUCTION.
ISAS, BFLOAT_ISAS, INSTRUCTION, FLAG = {"generic": []}, {}, {}, {}
if X86:
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    dots, tiles = ["-mavx512bf16"], ["-mamx-tile", "-mamx-bf16"]
    ISAS |= {"avx2": avx2, "avx512": avx2 + avx512}
    BFLOAT_ISAS = {"avx512_bf16": avx2 + avx512 + dots, "amx": avx2 + avx512 + dots + tiles}
    FLAG = {"avx512_bf16": "avx512_bf16", "amx": "amx_bf16"}  # of a CPU that has it
    INSTRUCTION = {"avx512_bf16": "vdpbf16ps %zmm0, %zmm1, %zmm2", "amx": "tdpbf16ps %tmm0, %tmm1, %tmm2"}
if ARM:
    BFLOAT_ISAS, INSTRUCTION = {"arm_bf16": ["-march=armv8.2-a+bf16"]}, {"arm_bf16": "bfdot v0.4s, v1.8h, v2.8h"}
# Binaries for these only: an older or newer GPU has none, and diffmas.ops says so.
CUDA_TARGETS = ["80", "90a", "100a", "120a"]
CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-t2", "--compress-mode=size"]  # to a seventh
# One PTX for all of them, which halves the time; instructions of one architecture only are in files of their own.
ALL_TARGETS = f"-gencode=arch=compute_80,code=[{','.join(f'sm_{t}' for t in CUDA_TARGETS)}]"
SM90 = "-gencode=arch=compute_90a,code=sm_90a"


class BuildError(Exception):
    """Why there is no extension; the text is what the user reads."""


def find_compiler():
    words = shlex.split(os.environ.get("CXX", ""))
    if words:
        return words if shutil.which(words[0]) else None
    found = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    return [found] if found else None


def find_nvcc():
    given = os.environ.get("NVCC")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(given) if given is not None else shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def find_torch():
    """The torch package directory: importable here, or in the environment an isolated build was started from."""
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        return Path(spec.origin).parent
    for scheme in ("platlib", "purelib"):
        path = Path(sysconfig.get_path(scheme)) / "torch"
        if (path / "include" / "torch" / "csrc" / "stable").is_dir():
            return path
    return None


def say(text):
    """To the person who waits: pip keeps to itself what a build prints."""
    try:
        with open("/dev/tty", "w") as terminal:
            terminal.write(f"diffmas: {text}\n")
    except OSError:  # nobody is there
        print(text, flush=True)


def run(command, tool):
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        lines = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()
        raise BuildError(f"`{tool}` failed at install time: {next((x for x in lines if 'error' in x), lines[-1])}")


def compile_all(jobs, build_dir, what):
    """jobs: (source, object, command without them); -> the objects, compiled anew where a source is newer. what: they are."""
    headers = max(p.stat().st_mtime for p in [Path(__file__), *CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")])
    build_dir.mkdir(parents=True, exist_ok=True)
    outputs = [(build_dir / name, source, command) for source, name, command in jobs]
    missing = [o for o, source, _ in outputs if not o.exists() or o.stat().st_mtime < max(headers, source.stat().st_mtime)]
    workers, start, done, lock = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1)), time.monotonic(), [], threading.Lock()
    if missing:
        say(f"{what}: {len(missing)} files to compile, {workers} at once (MAX_JOBS)")

    def compile_one(job):
        output, source, command = job
        if output in missing:
            run([*command, "-c", str(source), "-o", str(output)], command[0])
            with lock:
                done.append(output)
                say(f"{what}: {len(done)} of {len(missing)}, {time.monotonic() - start:.0f} s, {output.name}")
        return str(output)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(compile_one, outputs))


def compile_cuda(build_dir):
    """-> objects and what to link with them."""
    nvcc = find_nvcc()
    if SANITIZE:
        raise BuildError("a library for the sanitizers has no CUDA kernels")
    if os.environ.get("NVCC") == "":
        raise BuildError("left out at install time, since NVCC was empty")
    if nvcc is None:
        raise BuildError("no nvcc found at install time (looked for $NVCC, the path, $CUDA_HOME and /usr/local/cuda)")
    dry = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True).stderr  # says where its libraries are
    runtimes = [Path(place, "libcudart_static.a") for place in re.findall(r'"-L([^"]+)"', dry)]
    runtime = next((x for x in runtimes if x.exists()), None)
    if runtime is None:
        raise BuildError(f"{nvcc} has no libcudart_static.a")
    command = lambda source: [nvcc, *CUDA_FLAGS, SM90 if source.stem.endswith("_sm90") else ALL_TARGETS, f"-I{CSRC}"]
    jobs = [(s, f"{s.stem}.cuda.o", command(s)) for s in sorted(CSRC.glob("cuda/*.cu"))]
    objects = compile_all(jobs, build_dir, "CUDA kernels (NVCC= leaves them out)")
    # The runtime is ours alone: torch may bring another one into the process.
    return objects, [str(runtime), "-Wl,--exclude-libs,libcudart_static.a", "-lpthread", "-ldl", "-lrt"]


def knows(command, isa, build_dir):
    """Whether the compiler takes the form's flags, and the assembler its instruction; for the sanitizers, which check what runs
    and take minutes to compile, also whether this machine can run it."""
    cpu = Path("/proc/cpuinfo")
    if SANITIZE and cpu.exists() and FLAG.get(isa, "") not in cpu.read_text():
        return False
    build_dir.mkdir(parents=True, exist_ok=True)
    source = build_dir / f"knows_{isa}.cpp"
    source.write_text(f'void f() {{ asm volatile("{INSTRUCTION[isa]}"); }}\n')
    command = [*command, *BFLOAT_ISAS[isa], "-c", str(source), "-o", str(source.with_suffix(".o"))]
    return subprocess.run(command, capture_output=True).returncode == 0


def compile_library(target, build_dir):
    """-> the forms of the CPU kernels in it, and why there are no CUDA kernels, or None."""
    compiler, torch = find_compiler(), find_torch()
    if compiler is None:
        raise BuildError("no C++ compiler found at install time (looked for $CXX, g++, c++, clang++)")
    if torch is None:
        raise BuildError("torch was not installed when diffmas was built")
    command = [*compiler, *FLAGS, *SANITIZE, f"-I{CSRC}"] + (["-DDIFFMAS_X86"] if X86 else [])
    bfloat_isas = {isa: more for isa, more in BFLOAT_ISAS.items() if knows(command, isa, build_dir)}
    forms = [f"-DDIFFMAS_HAS_{isa.upper()}" for isa in bfloat_isas]
    jobs = [(source, f"{source.stem}.cpu.o", [*command, *forms]) for source in sorted(CSRC.glob("cpu/*.cpp"))]
    jobs += [
        (source, f"{source.stem}.{isa}.o", [*command, f"-DDIFFMAS_ISA={isa}", *KERNEL_FLAGS, *more])
        for isas, sources in ((ISAS, ["*.cpp"]), (bfloat_isas, ["attention_*.cpp", "linear.cpp"]))
        for source in sorted(x for some in sources for x in CSRC.glob(f"cpu/kernels/{some}"))
        for isa, more in isas.items()
    ]
    objects = compile_all(jobs, build_dir, "CPU kernels")
    why_no_cuda, links, cuda = None, [], []
    try:
        more, links = compile_cuda(build_dir)
        objects, cuda = [*objects, *more], ["-DDIFFMAS_CUDA"]
    except (BuildError, OSError) as error:
        why_no_cuda = str(error)
    binding = [*command, *cuda, "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{torch / 'include'}"]
    kind = "binding.with_cuda" if cuda else "binding"
    sources = [s for s in sorted(CSRC.glob("binding/*.cpp")) if cuda or s.stem != "cuda"]
    objects += compile_all([(s, f"{s.stem}.{kind}.o", binding) for s in sources], build_dir, "torch's ops")
    target.parent.mkdir(parents=True, exist_ok=True)
    link = [*compiler, *SANITIZE, "-shared", *objects, *links, f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", str(target)]
    run(link, compiler[0])
    return [*ISAS, *bfloat_isas], why_no_cuda


class BuildExtension(build_ext):
    """One shared library that torch.ops.load_library opens; not a Python module."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        info = {"library": LIBRARY, "error": None, "cpu_forms": [], "cuda_targets": [], "cuda_error": None}
        try:
            info["cpu_forms"], info["cuda_error"] = compile_library(target, Path(self.build_temp))
            info["cpu_forms_left_out"] = [isa for isa in BFLOAT_ISAS if isa not in info["cpu_forms"]]
            info["cuda_targets"] = [] if info["cuda_error"] else CUDA_TARGETS
        except (BuildError, OSError) as error:
            target.unlink(missing_ok=True)
            info |= {"library": None, "error": str(error), "cuda_error": str(error)}
            print(f"\nWARNING: diffmas is built without its C++ kernels: {error}\n", file=sys.stderr, flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (target.parent / BUILD_INFO).write_text(json.dumps(info, indent=2) + "\n")

    def copy_extensions_to_source(self):  # pip install -e
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            for name in (LIBRARY, BUILD_INFO):
                Path("diffmas", name).unlink(missing_ok=True)
                if (built.parent / name).exists():
                    shutil.copy(built.parent / name, Path("diffmas", name))


def described(readme, repository):
    """A README as a package index shows it, where relative links lead nowhere: absolute ones, or none without an address."""
    link = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)")
    if repository is None:
        return link.sub(lambda match: "" if match[1] else match[2], readme)
    kind = lambda match: "raw" if match[1] else "blob"
    return link.sub(lambda match: f"{match[1]}[{match[2]}]({repository}/{kind(match)}/HEAD/{match[3]})", readme)


class Wheel(bdist_wheel):
    def get_tag(self):  # the library does not know Python's ABI
        return "py3", "none", super().get_tag()[2]


class SourceDist(sdist):
    """As the repository, where two packages are symlinks to directories at the top."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        for link in (path for path in Path("diffmas").iterdir() if path.is_symlink()):
            shutil.rmtree(Path(base_dir, link))
            Path(base_dir, link).symlink_to(os.readlink(link))


setup(
    long_description=described(Path("README.md").read_text(encoding="utf-8"), REPOSITORY),
    long_description_content_type="text/markdown",
    project_urls={"Repository": REPOSITORY, "Issues": f"{REPOSITORY}/issues"} if REPOSITORY else {},
    ext_modules=[Extension("diffmas.libdiffmas", sources=[], optional=True)],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel, "sdist": SourceDist},
    # Reported to pip as a requirement of the isolated build; see above.
    setup_requires=["torch>=2.10"] if find_compiler() and not find_torch() else [],
)

"""Compiling with g++, once: results are kept under a hash of all that went in."""

import contextlib
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CACHE = Path(
    os.environ.get("CUDA_ON_CPU_CACHE")
    or Path(tempfile.gettempdir()) / f"mfac_core-cuda-on-cpu-{os.getuid()}"
)
COMPILER = os.environ.get("CXX", "g++")

COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w"]
COMMON += ["-fno-strict-aliasing"]  # nvcc does not use it either
MODES = {
    "fast": ["-O2"],
    "check": [
        "-O1",
        "-gdwarf-4",  # addr2line of some binutils confuses the files of a later one
        "-fsanitize=thread",  # for its calls at every load and store; the runtime answers them
        "--param=tsan-instrument-func-entry-exit=0",
        "-fno-tree-loop-distribute-patterns",  # a loop is not to become an unseen memset
        "-fsanitize=undefined,float-cast-overflow",
        "-fno-sanitize=float-divide-by-zero",
        "-fsanitize-undefined-trap-on-error",
    ],
}


class BuildError(RuntimeError):
    """The kernels cannot be compiled for the CPU."""


@functools.cache
def compiler_version() -> str:
    """Return the compiler's version, or say clearly that there is none."""
    try:
        run = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        msg = (
            f"the tests of the CUDA kernels need the compiler {COMPILER!r}, which did not run "
            f"({error}); install g++ 12 or later, for example with 'apt install g++'"
        )
        raise BuildError(msg) from None
    return run.stdout.splitlines()[0]


def kernel_library(code: str, mode: str, macros: tuple[str, ...]) -> Path:
    """Compile a kernel's source, prepared for the CPU, to a library."""
    include = HERE / "include"
    headers = [path.read_text() for path in sorted(include.iterdir())]
    flags = [*COMMON, *MODES[mode], *macros, "-include", "cuda_cpu.h", f"-I{include}"]

    def build(target: Path) -> None:
        source, compiled = target.with_suffix(".cu"), target.with_suffix(".o")
        source.write_text(code)
        _run([COMPILER, *flags, "-x", "c++", "-c", "-o", str(compiled), str(source)])
        # Linked by itself: with -fsanitize g++ would add the sanitizers' own libraries.
        _run([COMPILER, "-shared", "-o", str(target), str(compiled)])
        source.unlink()
        compiled.unlink()

    return _kept([compiler_version(), code, *flags, *headers], build)


@functools.cache
def runtime_library() -> Path:
    """Compile the runtime."""
    sources = sorted((HERE / "runtime").iterdir())
    flags = [
        "-std=c++17",
        "-O2",
        "-gdwarf-4",  # addr2line of some binutils confuses the files of a later one
        "-fPIC",
        "-shared",
        "-Wall",
        "-Wl,-soname,libcuda_on_cpu.so",
    ]

    def build(target: Path) -> None:
        _run([COMPILER, *flags, "-o", str(target), str(HERE / "runtime" / "launch.cpp")])

    return _kept([compiler_version(), *flags, *(path.read_text() for path in sources)], build)


def _kept(ingredients, build) -> Path:
    key = hashlib.sha256("\0".join(ingredients).encode()).hexdigest()[:24]
    CACHE.mkdir(parents=True, exist_ok=True)
    library = CACHE / f"{key}.so"
    if not library.exists():
        # Built under another name, so that processes side by side do not load half a file. They may
        # build it at the same time: whoever is done first keeps it, and nobody replaces a file that
        # another has loaded, and looks for in its own memory map.
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            unfinished = Path(folder) / library.name
            build(unfinished)
            with contextlib.suppress(FileExistsError):
                library.hardlink_to(unfinished)
    return library


def _run(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise BuildError(f"{' '.join(command)}\n{run.stderr}")

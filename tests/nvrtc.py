"""NVIDIA's compiler by way of its wheels: no driver, no GPU, no CuPy."""

import ctypes
import functools
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path


class CompileError(ValueError):
    """What NVRTC has to say about a source."""


@dataclass(frozen=True)
class Usage:
    """What one kernel asks of a device."""

    registers: int
    spilled_bytes: int
    stack_bytes: int
    shared_bytes: int


def _file(distribution: str, pattern: str) -> Path:
    for name in importlib.metadata.files(distribution) or ():
        if re.search(pattern, str(name)):
            return Path(str(name.locate()))
    raise FileNotFoundError(f"{distribution} has no file like {pattern}")


@functools.cache
def library():
    """Load NVRTC from the wheel nvidia-cuda-nvrtc."""
    return ctypes.CDLL(str(_file("nvidia-cuda-nvrtc", r"libnvrtc\.so\.\d+$")))


@functools.cache
def include() -> Path:
    """Find CUDA's headers in the wheel nvidia-cuda-runtime."""
    return _file("nvidia-cuda-runtime", r"include/cuda_fp16\.h$").parent


def compile(source: str, architecture: str, options=()) -> dict[str, Usage]:
    """Compile for a real architecture and return what each kernel uses."""
    nvrtc, program, size = library(), ctypes.c_void_p(), ctypes.c_size_t()
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None
    )
    assert created == 0
    # As CuPy compiles, which adds -ftz=true; -v makes the assembler report what is used.
    flags = [
        f"-arch={architecture}",
        "-ftz=true",
        "--device-as-default-execution-space",
        "--ptxas-options=-v",
        f"-I{include()}",
        *options,
    ]
    failed = nvrtc.nvrtcCompileProgram(
        program, len(flags), (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    )
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    text = log.value.decode()
    if failed:
        raise CompileError(text)
    found = re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", text, re.S)
    return {name: _usage(report) for name, report in found}


def _usage(report: str) -> Usage:
    def number(pattern: str) -> int:
        match = re.search(pattern, report)
        return int(match[1]) if match else 0

    return Usage(
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        number(r"(\d+) bytes stack frame"),
        number(r"(\d+) bytes smem"),
    )

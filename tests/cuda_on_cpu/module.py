"""Modules and kernels with the call signatures of ``cupy.RawModule`` and ``cupy.RawKernel``."""

import ctypes
import functools
import re
import subprocess

import numpy as np

from .arrays import UNTOUCHED_BYTES, Guarded, host_view
from .build import kernel_library, runtime_library

KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(')
DYNAMIC_SHARED = re.compile(r"extern\s+__shared__\s+(\w+)\s+(\w+)\[\];")
ORDERS = {"forward": 0, "backward": 1, "random": 2}
LARGEST_REPORT = 1 << 14


class KernelError(RuntimeError):
    """What the checker has to say about a launch."""


@functools.cache
def runtime():
    """Load the runtime, whose symbols the kernels' libraries then find."""
    library = ctypes.CDLL(str(runtime_library()), mode=ctypes.RTLD_GLOBAL)
    library.cpu_launch.restype = ctypes.c_int
    return library


class Module:
    """A compiled source.

    Parameters
    ----------
    code : str
        CUDA C++.
    options : tuple of str
        As for CuPy; only macros matter here, and what begins with ``-f``, for g++ itself.
    mode : {"fast", "check"}
        See the package.
    """

    def __init__(self, code, options=(), mode="fast"):
        self.mode = mode
        runtime()
        macros = tuple(option for option in options if option.startswith(("-D", "-f")))
        names = KERNEL.findall(code)
        prepared = DYNAMIC_SHARED.sub(
            r"\1* const \2 = static_cast<\1*>(cpu_dynamic_shared());", code
        )
        prepared = "\n" + prepared + "\n" + "".join(f"CPU_KERNEL({name})\n" for name in names)
        self.path = kernel_library(prepared, mode, macros)
        self.library = ctypes.CDLL(str(self.path))
        self.begin, self.end = _image(self.path)

    def get_function(self, name):
        """Return a kernel by its name."""
        return Kernel(self, name)

    def source_line(self, match):
        """Turn an address of the kernel into its file and line."""
        offset = int(match.group(1), 16) - self.begin - 1
        command = ["addr2line", "-e", str(self.path), hex(offset)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        return "at " + run.stdout.split(" ")[0].strip().rsplit("/", 1)[-1]


def _image(path):
    """Return the addresses between which a library has been loaded."""
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(str(path))]
    return min(int(a, 16) for a, _ in spans), max(int(b, 16) for _, b in spans)


class Kernel:
    """A kernel; ``kernel(grid, block, arguments)`` launches it and waits.

    Unlike CuPy it checks the types of its arguments, and that arrays are contiguous. Set ``order``
    to the order in which threads and blocks run, and ``seconds`` to what a launch may take of a
    processor: one that takes more is taken for one that does not end.
    """

    order = "forward"
    seed = 0
    seconds = 60.0
    blocks = ()  # those of the grid that run, by their three numbers each; all where there are none
    max_dynamic_shared_size_bytes = 48 * 1024  # as on a GPU: more must be asked for

    def __init__(self, module, name):
        self.module, self.name = module, name
        self.function = getattr(module.library, f"cpu_run_{name}")
        signature = getattr(module.library, f"cpu_signature_{name}")
        signature.restype = ctypes.c_char_p
        self.signature = signature().decode().split()

    def __call__(self, grid, block, args, *, shared_mem=0):
        if len(args) != len(self.signature):
            msg = f"{self.name} takes {len(self.signature)} arguments, got {len(args)}"
            raise TypeError(msg)
        if shared_mem > self.max_dynamic_shared_size_bytes:
            msg = f"{self.name}: {shared_mem} bytes; set max_dynamic_shared_size_bytes first"
            raise KernelError(msg)
        arguments = [
            self._array(i, host_view(value), wanted)
            if wanted[0] in "pc"
            else self._number(i, value, wanted)
            for i, (value, wanted) in enumerate(zip(args, self.signature, strict=True))
        ]
        count, text = self._run(grid, block, arguments, shared_mem)
        for i, argument in enumerate(arguments):
            if isinstance(argument, Guarded) and not argument.finish():
                count += 1
                text += f"GUARD ZONE around argument {i} written to\n"
        if count:
            text = re.sub(r"pc=(0x[0-9a-f]+)", self.module.source_line, text)
            raise KernelError(f"{self.name}: {count} error(s)\n{text}")

    def _array(self, i, x, wanted):
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{self.name}: argument {i} must be an array, got {type(x).__name__}")
        have = {"bfloat16": "b2", "float16": "h2"}.get(x.dtype.name, x.dtype.kind + str(x.itemsize))
        bits_of_bfloat16 = wanted[1:] == "b2" and have == "i2"  # how other libraries' are lent
        if have != wanted[1:] and not bits_of_bfloat16:
            raise TypeError(
                f"{self.name}: argument {i} is {x.dtype}, the kernel takes {wanted[1:]}"
            )
        if not x.flags.c_contiguous:
            raise TypeError(f"{self.name}: argument {i} is not C-contiguous")
        if x.nbytes >= UNTOUCHED_BYTES and self.module.mode == "fast":
            return ctypes.c_void_p(x.ctypes.data)
        return Guarded(x, writable=wanted[0] == "p")

    def _number(self, i, value, wanted):
        number = np.asarray(value)  # int is 64 bits wide, as CuPy passes it
        if number.dtype.kind + str(number.itemsize) != wanted[1:]:
            msg = f"{self.name}: argument {i} is {number.dtype}, the kernel takes {wanted[1:]}"
            raise TypeError(msg)
        return number

    def _run(self, grid, block, arguments, shared_mem):
        held = [ctypes.c_void_p(a.address) if isinstance(a, Guarded) else a for a in arguments]
        addresses = [
            a.ctypes.data if isinstance(a, np.ndarray) else ctypes.addressof(a) for a in held
        ]
        buffers = (Buffer * max(len(arguments), 1))()
        arrays = [(i, a) for i, a in enumerate(arguments) if isinstance(a, Guarded)]
        for buffer, (i, a) in zip(buffers, arrays, strict=False):
            buffer.begin, buffer.size, buffer.argument = a.address, a.original.nbytes, i
        report = ctypes.create_string_buffer(LARGEST_REPORT)
        count = runtime().cpu_launch(
            self.function,
            self.module.library.cpu_shared_range,
            (ctypes.c_void_p * max(len(addresses), 1))(*addresses),
            _three(grid),
            _three(block),
            ctypes.c_size_t(shared_mem),
            ORDERS[self.order],
            ctypes.c_uint64(self.seed),
            int(self.module.mode == "check"),
            buffers,
            len(arrays),
            (ctypes.c_uint * (3 * len(self.blocks) + 1))(*(n for b in self.blocks for n in b)),
            len(self.blocks),
            ctypes.c_void_p(self.module.begin),
            ctypes.c_void_p(self.module.end),
            ctypes.c_double(self.seconds),
            report,
            LARGEST_REPORT,
        )
        return count, report.value.decode()


class Buffer(ctypes.Structure):
    """An array argument, as the runtime sees it."""

    _fields_ = (
        ("begin", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("argument", ctypes.c_int),
    )


def _three(sizes):
    return (ctypes.c_uint * 3)(*(max(1, int(n)) for n in (*sizes, 1, 1)[:3]))

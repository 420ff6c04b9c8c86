"""Run CUDA C++ kernels on the CPU, unchanged, and watch what they do.

g++ compiles a kernel's source with a header that supplies CUDA's words (``include/``); a small
runtime (``runtime/``) runs the threads of each block as fibers. There are two modes:

- *fast*: guard zones around every array, and shared memory full of NaN before each block.
- *check*: besides, every load and store is checked for bounds, for shared memory that nobody has
  written, and for races between barriers. Undefined arithmetic becomes an error.

Threads take turns forwards, backwards or at random: a kernel that depends on their order gives
itself away. What this cannot show is in ``docs/kernels.md``.
"""

from .arrays import host_array, host_view, untouched
from .build import BuildError
from .module import KernelError, Module

__all__ = ["BuildError", "KernelError", "Module", "host_array", "host_view", "untouched"]

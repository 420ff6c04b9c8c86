"""What stands between the kernels and CuPy: streams, devices, waits, borrowed buffers.

The library's own code runs above a runtime in which nothing happens before somebody waits
(``fake_cuda.py``). Each exercise is run with the code as it is, which must pass, and with one
mutant after another, each of which must fail in some exercise.
"""

import gc
import inspect
import sys
import types
import weakref
from dataclasses import dataclass
from typing import Any

import cupy
import fake_cuda
import ml_dtypes
import numpy as np
import pytest
import torch
from cuda_on_cpu import host_view
from fake_cuda import cuda_capsule, on_device
from host_machine import DeviceHome

from mfac_core import _arrays
from mfac_core import _validate as check
from mfac_core._ops import _generic, _precision, rows
from mfac_core._ops.cuda import blocks as cuda_blocks
from mfac_core._ops.cuda import machine as cuda_machine
from mfac_core._ops.cuda import passes as cuda_passes
from mfac_core._ops.cuda import queries as cuda_queries
from mfac_core._ops.cuda import sparse as cuda_sparse

SOURCE = inspect.getsource(cuda_machine)


@dataclass
class Bench:
    """A machine above the fake runtime."""

    runtime: Any
    cupy: Any
    classes: list
    module: Any
    machine: Any

    def tensor(self, x, dtype="float32", device=0):
        values = torch.from_numpy(np.array(x, "float64")).to(getattr(torch, dtype))
        return values.as_subclass(self.classes[device])


def bench(monkeypatch, source=SOURCE):
    """Execute a source of the machine's module, and put its machine in place."""
    runtime, cupy, classes = fake_cuda.install(monkeypatch)
    module = types.ModuleType(cuda_machine.__name__)
    monkeypatch.setitem(sys.modules, cuda_machine.__name__, module)
    exec(compile(source, cuda_machine.__file__, "exec"), module.__dict__)
    machine = module.current
    monkeypatch.setattr(module.Machine, "_cupy", lambda self: cupy)
    monkeypatch.setattr(cuda_machine, "current", machine)
    for user in (cuda_blocks, cuda_passes, cuda_queries, cuda_sparse):
        monkeypatch.setattr(user, "launch", module.launch)
    return Bench(runtime, cupy, classes, module, machine)


def plain(x):
    if isinstance(x, torch.Tensor):
        return x.as_subclass(torch.Tensor).double().numpy()
    return host_view(x).astype("float64")


def assert_near(x, expected, rtol=1e-12):
    assert plain(x).shape == np.shape(expected)
    assert abs(plain(x) - expected).max() <= rtol * (1 + abs(expected).max())


# ---- exercises ---------------------------------------------------------------------------------


def torch_on_its_stream(b):
    """Results are there once PyTorch's current stream has run, and that alone."""
    rng = np.random.default_rng(1)
    for device in range(2):
        b.runtime.torch_current[device] = stream = b.runtime.stream(device)
        for dtype, rtol in (("float32", 1e-12), ("bfloat16", 1e-2)):
            g = b.tensor(rng.standard_normal((5, 16)), dtype, device)
            c = b.tensor(rng.standard_normal(5), "float64", device)
            y = rows.combine(g, c, g[1], 2.0, dtype=torch.float64, float64=True)
            assert type(y) is b.classes[device]
            assert (plain(y) == -1).all(), "ran before anybody waited"
            stream.synchronize()
            assert_near(y, plain(g).T @ plain(c) + 2.0 * plain(g)[1])
            y = rows.combine(g, c, g[1], 2.0, dtype=g.dtype, float64=True)
            product = rows.project(g, g[2], float64=True, home=DeviceHome())
            stream.synchronize()
            assert y.dtype == g.dtype
            assert_near(y, plain(g).T @ plain(c) + 2.0 * plain(g)[1], rtol + 1e-6)
            assert_near(product, plain(g) @ plain(g)[2])
    assert b.runtime.device == 0
    assert all(len(streams) == 1 for streams in b.runtime.current)


def cupy_on_its_device(b):
    """Arrays of a device that is not the current one, of every dtype; and then of the other."""
    rng = np.random.default_rng(2)
    for device in (1, 0):
        for dtype in ("float32", "float64", "float16", ml_dtypes.bfloat16):
            g = on_device(rng.standard_normal((5, 16)).astype(dtype), device)
            assert _arrays.is_floating(g)
            x = on_device(rng.standard_normal(16), device)
            product = rows.project(g, x, float64=True, home=DeviceHome())
            stream = b.runtime.null[device]
            stream.synchronize()
            assert product.data.device_id == device
            assert_near(product, plain(g) @ plain(x))
            c = on_device(rng.standard_normal(5), device)
            y = rows.combine(g, c, None, 1.0, dtype=g.dtype, float64=True)
            stream.synchronize()
            assert y.dtype == g.dtype
            assert_near(y, plain(g).T @ plain(c), 1e-2)
    assert b.runtime.device == 0
    g = rng.standard_normal((2, 4100))  # of several chunks
    product = rows.project(on_device(g), on_device(g[0]), float64=True, home=DeviceHome())
    b.runtime.null[0].synchronize()
    assert_near(product, g @ g[0])


def what_is_not_contiguous(b):
    rng = np.random.default_rng(3)
    g = rng.standard_normal((5, 16))
    for x in (b.tensor(rng.standard_normal(32), "float64"), on_device(rng.standard_normal(32))):
        whole = b.tensor(g, "float64") if isinstance(x, torch.Tensor) else on_device(g)
        product = rows.project(whole, x[::2], float64=True, home=DeviceHome())
        b.runtime.null[0].synchronize()
        assert_near(product, g @ plain(x)[::2])
    columns = np.arange(32)[::2] % 16
    taken = rows.take(on_device(g), columns, DeviceHome())
    b.runtime.null[0].synchronize()
    assert_near(taken, g[:, columns])


def answers_that_come_later(b):
    """Asking does not wait, looking does; and for what was launched before, not since."""
    for x in (b.tensor([1.0, 2.0, 3.0], "float64"), on_device(np.array([1.0, 2.0, 3.0]))):
        b.runtime.torch_current[0] = b.runtime.stream(0)
        stream = b.runtime.torch_current[0] if isinstance(x, torch.Tensor) else b.runtime.null[0]
        waits, view = b.runtime.waits, host_view(on_device(np.zeros(3)))
        view = x.as_subclass(torch.Tensor).numpy() if isinstance(x, torch.Tensor) else host_view(x)
        stream.queue.append(lambda view=view: np.multiply(view, 7.0, out=view))
        look = rows.later(x)
        stream.queue.append(lambda view=view: view.fill(0.0))
        assert b.runtime.waits == waits, "asked and waited"
        assert (view == [1.0, 2.0, 3.0]).all(), "asked and waited"
        assert (look() == [7.0, 14.0, 21.0]).all()
        assert b.runtime.waits == waits + 1
        assert (view == [7.0, 14.0, 21.0]).all(), "waited for what was launched since"
        stream.synchronize()


def much_shared_memory(b):
    rng = np.random.default_rng(4)
    g = rng.standard_normal((7, 128))
    for device in range(2):
        there = on_device(g, device)
        assert cuda_blocks.serves_blocks(there, 128)
        inverses, failed = cuda_blocks.inverses(there, np.array([128]), 0.5, 7)
        b.runtime.null[device].synchronize()
        assert host_view(failed)[0] == 0
        assert_near(inverses, np.linalg.inv(0.5 * np.eye(128) + g.T @ g / 7)[None], 1e-10)


def results_of_every_kind(b):
    for dtype in ("float32", "float64", "float16", "bfloat16", "int32"):
        made = b.machine.empty((2, 3), dtype, b.tensor([1.0], device=1))
        assert (type(made), made.dtype) == (b.classes[1], getattr(torch, dtype))
        b.runtime.device = 1
        made = b.machine.empty((2, 3), dtype, on_device(np.ones(1), 1))
        b.runtime.device = 0
        assert (made.shape, made.dtype.name, made.data.device_id) == ((2, 3), dtype, 1)


def per_thread_default_streams(b):
    """With CuPy's, PyTorch's null stream is lent all the same."""
    b.runtime.default_pointer = 2
    torch_on_its_stream(b)
    b.runtime.torch_current[:] = b.runtime.null
    g = b.tensor(np.ones((2, 4)))
    product = rows.project(g, g[0], float64=True, home=DeviceHome())
    b.runtime.null[0].synchronize()
    assert_near(product, np.array([4.0, 4.0]))


class JaxDevice:
    platform = "gpu"

    def __init__(self, number, client="cuda 13000"):
        self.local_hardware_id = number
        self.client = types.SimpleNamespace(platform_version=client)


class JaxArray:
    """As much of JAX's array as the machine asks of one."""

    def __init__(self, x, *devices):
        self.x, self._devices, self.streams = torch.from_numpy(x), devices, []
        self.shape, self.dtype, self.ndim = x.shape, x.dtype, x.ndim

    def devices(self):
        return set(self._devices)

    def __dlpack_device__(self):
        return 2, self._devices[0].local_hardware_id

    def __dlpack__(self, *, stream):
        assert type(stream) is int
        assert stream > 0, "ambiguous in DLPack"
        self.streams.append(stream)
        return cuda_capsule(self.x, self._devices[0].local_hardware_id)


def borrowed_from_jax(b):
    """A buffer is held until the stream has come to where its loan ends, and no longer."""
    b.module.is_jax_array = lambda x: isinstance(x, JaxArray)
    b.module.is_torch_array = lambda x: isinstance(x, torch.Tensor)
    x = JaxArray(np.ones(3), JaxDevice(1))
    assert b.machine.holds(x)
    assert not b.machine.holds(JaxArray(np.ones(3), JaxDevice(0, "rocm 60000")))
    assert not b.machine.holds(JaxArray(np.ones(3), JaxDevice(0), JaxDevice(1)))
    stream = b.runtime.stream(1)
    for pointer, current in ((1, b.runtime.null[1]), (stream.ptr, stream)):
        b.runtime.current[1].append(current)
        with b.machine.at(x):
            assert b.runtime.device == 1
            inner, outer = None, weakref.ref(b.machine.borrow(x))
            with b.machine.at(x):
                inner = weakref.ref(b.machine.borrow(x))
            current.queue.append(lambda: None)
        assert x.streams[-2:] == [pointer, pointer]
        gc.collect()
        assert inner() is not None, "freed too early"
        assert outer() is not None, "freed too early"
        with b.machine.at(x):
            pass
        assert outer() is not None, "freed too early"
        current.synchronize()
        with b.machine.at(x):
            pass
        gc.collect()
        assert inner() is None, "held for ever"
        assert outer() is None, "held for ever"
        b.runtime.current[1].pop()


def what_no_graph_captures(b):
    g = b.tensor(np.ones((3, 4)))
    b.runtime.torch_current[0] = stream = b.runtime.stream(0)
    stream.capturing = True
    for act in (
        lambda: rows.exchange(g, 1, b.tensor(np.zeros(4)), DeviceHome()),
        lambda: rows.later(g[0]),
    ):
        with pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph"):
            act()
        assert not stream.queue
    stream.capturing = False
    rows.exchange(g, 1, b.tensor(np.zeros(4)), DeviceHome())
    stream.synchronize()
    assert (plain(g)[1] == 0).all()


def sums_that_the_device_is_good_at(b):
    """In float64 on the first device, in two float32 on the second, which has little float64."""
    g = np.random.default_rng(6).standard_normal((3, 16)).astype("float32")
    for device in (1, 0, 1):
        there = on_device(g, device)
        product = rows.project(there, there[0], float64=False, home=DeviceHome())
        y = rows.combine(there, on_device(np.ones(3), device), None, 1.0, dtype=None, float64=False)
        b.runtime.null[device].synchronize()
        exact = g.astype("float64")
        assert_near(product, exact @ exact[0])
        assert_near(y, exact.sum(axis=0))
        with b.machine.at(there):
            assert b.machine.has_little_float64() == (device == 1)


def what_is_held(b):
    assert not b.machine.holds(torch.ones(3))
    assert not b.machine.holds(np.ones(3))
    assert b.machine.holds(b.tensor([1.0]))
    assert b.machine.holds(on_device(np.ones(3)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.0")
        assert not b.machine.holds(b.tensor([1.0]))


EXERCISES = {
    function.__name__: function
    for function in (
        torch_on_its_stream,
        cupy_on_its_device,
        what_is_not_contiguous,
        answers_that_come_later,
        much_shared_memory,
        results_of_every_kind,
        per_thread_default_streams,
        borrowed_from_jax,
        what_no_graph_captures,
        sums_that_the_device_is_good_at,
        what_is_held,
    )
}


@pytest.mark.parametrize("exercise", EXERCISES)
def test_the_machine_as_it_is(monkeypatch, exercise):
    EXERCISES[exercise](bench(monkeypatch))


MUTANTS = {
    "the null stream": ("_Lent(theirs.cuda_stream)", "_Lent(0)"),
    "no stream": (
        "cuda.Stream.from_external(_Lent(theirs.cuda_stream)),",
        "contextlib.nullcontext(),",
    ),
    "the stream of another device": ("current_stream(x.device)", "current_stream(torch0)"),
    "the deprecated stream": (
        "cuda.Stream.from_external(_Lent(theirs.cuda_stream))",
        "cuda.ExternalStream(theirs.cuda_stream)",
    ),
    "no device for PyTorch": ("cuda.Device(x.device.index)", "contextlib.nullcontext()"),
    "no device for CuPy": ("cuda.Device(x.device.id)", "contextlib.nullcontext()"),
    "no device for JAX": (
        "cuda.Device(next(iter(x.devices())).local_hardware_id)",
        "contextlib.nullcontext()",
    ),
    "no wait before reading": ("            event.synchronize()\n", ""),
    "an event before the copy": (
        "            self.borrow(x).get(out=there, blocking=False)\n"
        "            event = self._cupy().cuda.Event(block=True, disable_timing=True)\n"
        "            event.record()\n",
        "            event = self._cupy().cuda.Event(block=True, disable_timing=True)\n"
        "            event.record()\n"
        "            self.borrow(x).get(out=there, blocking=False)\n",
    ),
    "an event never recorded": (
        "disable_timing=True)\n            event.record()\n",
        "disable_timing=True)\n",
    ),
    "a wait when asking": (
        "        def look() -> Any:\n            event.sync",
        "        event.synchronize()\n\n        def look() -> Any:\n            event.sync",
    ),
    "a part of the answer": (
        "self.borrow(x).get(out=there,",
        "self.borrow(x)[:1].get(out=there[:1],",
    ),
    "the copy on any stream": (
        "with self.at(x):\n            self.ref",
        "if True:\n            self.ref",
    ),
    "bfloat16 by value": (".view(sys.modules", ".to(sys.modules"),
    "bfloat16 not as bits": ('if dtype_name(x.dtype) == "bfloat16":', "if False:"),
    "on CuPy's stream": ("x.__dlpack__(stream=-1)", "x"),
    "PyTorch's as they lie": ("return x.contiguous()", "return x"),
    "CuPy's as they lie": (
        "ascontiguousarray(x) if is_cupy_array(x)",
        "asarray(x, order='K') if False",
    ),
    "borrowed as they lie": (
        "return self.borrow(self.contiguous(x))",
        "return self.borrow(x)",
    ),
    "kernels of any device": ("kernel(current, current.device(),", "kernel(current, 0,"),
    "always the first device": ("cuda.runtime.getDevice()", "cuda.runtime.getDevice() * 0"),
    "no more shared memory": ("if shared_bytes > ALWAYS_SHARED:", "if False:"),
    "no shared memory at launch": ("shared_mem=shared_bytes)", "shared_mem=0)"),
    "a part of the grid": ("found(grid, block", "found(grid[:1], block"),
    "results of PyTorch's first device": ("device=like.device)", "device=torch.device('cuda', 0))"),
    "float32 for bfloat16": ('importlib.import_module("ml_dtypes").bfloat16', '"float32"'),
    "freed at once": ("self._loans.taken.append(lent)", "pass"),
    "freed before it is read": ("if not loan[0].done]", "if False]"),
    "held for ever": (" if not loan[0].done]", "]"),
    "loans of the outer ended by the inner": (
        "outer, self.taken = self.taken, []",
        "outer = self.taken",
    ),
    "an event of loans not recorded": (
        "disable_timing=True)\n                event.record()\n",
        "disable_timing=True)\n",
    ),
    "JAX on the wrong stream": ("get_current_stream().ptr or 1", "Stream.null.ptr or 1"),
    "JAX on an ambiguous stream": ("get_current_stream().ptr or 1", "get_current_stream().ptr"),
    "JAX on ROCm": ('and "cuda" in first.client.platform_version', ""),
    "JAX on several devices": ("cuda and not others", "cuda"),
    "PyTorch on ROCm": (' and sys.modules["torch"].version.hip is None', ""),
    "float64 wherever it is": (">= LITTLE_FLOAT64", "< 0"),
    "two float32 wherever": (">= LITTLE_FLOAT64", ">= 0"),
    "the other way round": (">= LITTLE_FLOAT64", "< LITTLE_FLOAT64"),
    "as the first device is": ("(ratio, runtime.getDevice())", "(ratio, 0)"),
    "captured": ("if self._cupy().cuda.get_current_stream().is_capturing():", "if False:"),
    "a copy captured": (
        "            self.refuse_capture()\n            there",
        "            there",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_fails_some_exercise(mutant):
    old, new = MUTANTS[mutant]
    assert SOURCE.count(old) == 1, f"{old} is {SOURCE.count(old)} times in the source"
    mutated = "import torch\ntorch0 = torch.device('cuda', 0)\n" * ("torch" in new)
    head, future = SOURCE.split("from __future__ import annotations\n")
    source = f"{head}from __future__ import annotations\n{mutated}{future.replace(old, new)}"
    for exercise in EXERCISES.values():
        with pytest.MonkeyPatch.context() as patch:
            try:
                exercise(bench(patch, source))
            except (Exception, pytest.fail.Exception):  # whatever it is that goes wrong
                return
    pytest.fail(f"{mutant}: every exercise passes")


def test_without_a_compiler_or_headers_the_librarys_products_are_used(monkeypatch):
    """And one warning for each dtype says what to install."""
    b = bench(monkeypatch)
    compiled = []

    class NoHeaders(b.cupy.RawModule):
        def __init__(self, code, options):
            compiled.append(options)
            self.options = options
            super().__init__(code, options)

        def compile(self):
            if "-DUSE_BF16" in self.options:
                raise RuntimeError('common.cuh(10): error: cannot open source file "cuda_bf16.h"')

    b.cupy.RawModule = NoHeaders
    g = on_device(np.ones((2, 3), ml_dtypes.bfloat16))
    with pytest.warns(RuntimeWarning, match=r"cuda_bf16|cupy-cuda13x\[ctk\]") as caught:
        assert not cuda_passes.serves(g)
    assert "cupy-cuda13x[ctk]" in str(caught[0].message)
    assert "cuda_bf16.h" in str(caught[0].message)
    assert not cuda_passes.serves(g)
    assert cuda_passes.serves(on_device(np.ones((2, 3))))
    assert len(compiled) == 2


def test_cupys_bfloat16_passes_the_door():
    """By its name: CuPy's own isdtype refuses what is not NumPy's."""
    g = on_device(np.ones((4, 3), ml_dtypes.bfloat16))
    assert check.gradients_argument(g) is g
    assert check.vector_argument(g[0, :], "x", 3, ndim=(1,)).dtype == ml_dtypes.bfloat16
    assert _arrays.itemsize(g.dtype) == 2
    assert _arrays.promote(g, np.dtype("float32")) == np.float32
    with pytest.raises(TypeError, match="real floating"):
        check.gradients_argument(on_device(np.ones((4, 3), "int32")))


@pytest.mark.parametrize("switch", ["legacy", "cuda", "mkldnn"])
def test_pytorchs_grams_keep_the_bits_of_float32(switch):
    """Whatever a process allows its networks; and its switches are as they were."""
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = cuda.fp32_precision, cpu.fp32_precision, torch.get_float32_matmul_precision()
    seen = []

    class Watched(torch.Tensor):
        def __matmul__(self, other):
            seen.append((cuda.fp32_precision, cpu.fp32_precision))
            return torch.Tensor.__matmul__(
                self.as_subclass(torch.Tensor), other.as_subclass(torch.Tensor)
            )

    try:
        if switch == "legacy":
            torch.set_float32_matmul_precision("medium")
        else:
            (cuda if switch == "cuda" else cpu).fp32_precision = "tf32"
        allowed = cuda.fp32_precision, cpu.fp32_precision
        g = torch.ones((3, 5)).as_subclass(Watched)
        _generic.gram(g, float64=False, width=4, home=_arrays.home_of(g))
        assert set(seen) == {("ieee", "ieee")}
        assert (cuda.fp32_precision, cpu.fp32_precision) == allowed
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before[:2]
        torch.set_float32_matmul_precision(before[2])


def test_a_pytorch_before_switches_of_their_own(monkeypatch):
    """As of 2.6, where ``torch.backends.mkldnn`` knows no products."""
    cuda = types.SimpleNamespace(matmul=types.SimpleNamespace())
    backends = types.SimpleNamespace(cuda=cuda, mkldnn=types.SimpleNamespace())
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with monkeypatch.context() as patched:
            patched.setattr(torch, "backends", backends)
            with _precision.full_float32(torch.ones(1)):
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_switches_are_turned_back_when_the_last_thread_has_left():
    events = []
    guard = _precision._Guard(lambda: events.append("off") or (lambda: events.append("on")))
    with guard():
        with guard():
            assert events == ["off"]
        assert events == ["off"]
    assert events == ["off", "on"]
    with pytest.raises(ZeroDivisionError), guard():
        raise ZeroDivisionError
    assert events == ["off", "on"] * 2


def test_pytorch_before_2_9_has_one_switch(monkeypatch):
    old = types.SimpleNamespace(matmul=object())
    precision = ["high"]
    torch_before = types.SimpleNamespace(
        backends=types.SimpleNamespace(cuda=old, mkldnn=old),
        get_float32_matmul_precision=lambda: precision[0],
        set_float32_matmul_precision=lambda value: precision.__setitem__(0, value),
    )
    monkeypatch.setitem(sys.modules, "torch", torch_before)
    undo = _precision._torch_off()
    assert precision == ["highest"]
    undo()
    assert precision == ["high"]


def test_cupys_products_keep_the_bits_of_float32(monkeypatch):
    linalg, types_set = cupy._core._routines_linalg, []
    monkeypatch.setattr(linalg, "get_compute_type", lambda dtype: linalg.COMPUTE_TYPE_TF32)
    monkeypatch.setattr(linalg, "set_compute_type", lambda *args: types_set.append(args))
    with _precision.full_float32(on_device(np.ones(3, "float32"))):
        assert types_set == [(np.dtype("float32"), linalg.COMPUTE_TYPE_FP32)]
    assert types_set[1:] == [(np.dtype("float32"), linalg.COMPUTE_TYPE_TF32)]
    monkeypatch.setattr(linalg, "get_compute_type", lambda dtype: linalg.COMPUTE_TYPE_DEFAULT)
    with _precision.full_float32(on_device(np.ones(3, "float32"))):
        pass
    assert len(types_set) == 2

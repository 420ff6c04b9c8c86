"""Each kernel in each dtype through NVIDIA's compiler, for every architecture from Turing on."""

import importlib.resources

import nvrtc
import pytest

from mfac_core._ops.cuda import machine as cuda_machine

ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "sm_121"]
WIDEST = {"float": 4, "double": 2, "__half": 4, "__nv_bfloat16": 4}
LITTLE_FLOAT64 = {"sm_75", "sm_86", "sm_89", "sm_120", "sm_121"}
"""Where sums in two float32 are launched."""

REGISTERS = 65536  # of a multiprocessor


def product_macros(storage):
    """The forms of project and combine that differ most: narrow, wide, and of several columns."""
    yield {"G_T": storage, "X_T": "double", "COLUMNS": 1, "WIDTH": 1}
    yield {"G_T": storage, "X_T": storage, "COLUMNS": 1, "WIDTH": WIDEST[storage]}
    yield {"G_T": storage, "X_T": "double", "COLUMNS": 1, "WIDTH": WIDEST[storage]}
    yield {"G_T": storage, "X_T": storage, "COLUMNS": 4, "WIDTH": WIDEST[storage]}


def variants():
    """Every source with its macros, and the threads of a block."""
    for storage in WIDEST:
        for macros in product_macros(storage):
            yield "project.cu", macros, 256
            yield "combine.cu", {**macros, "OUT_T": macros["X_T"]}, 128
            if storage != "double" and (macros["X_T"] == storage or macros["WIDTH"] == 1):
                twofold = {**macros, "X_T": storage, "OUT_T": storage, "TWOFOLD": 1}
                yield "project.cu", twofold, 256
                yield "combine.cu", twofold, 128
        exchange = {"G_T": storage, "X_T": storage, "COLUMNS": 1, "WIDTH": WIDEST[storage]}
        yield "project.cu", {**exchange, "EXCHANGE": 1}, 256
        for x in {storage, "double"}:
            yield "sparse.cu", {"V_T": storage, "X_T": x, "OUT_T": x}, 128
        yield "sum.cu", {"X_T": storage, "OUT_T": storage}, 256
        yield "entries.cu", {"G_T": storage}, 512
        for width in (32, 64, 128):
            macros = {"BLOCK": width, "G_T": storage, "X_T": storage, "OUT_T": storage}
            yield "blocks.cu", macros, 256
    yield "dual.cu", {}, 256
    yield "diagonal.cu", {}, 256


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_within_a_devices_means(architecture):
    for file, macros, threads in variants():
        if "TWOFOLD" in macros and architecture not in LITTLE_FLOAT64:
            continue
        used = nvrtc.compile(cuda_machine.source(file), architecture, cuda_machine.options(macros))
        assert used, f"{file} has no kernel"
        for name, usage in used.items():
            what = f"{name} with {macros}: {usage}"
            assert usage.spilled_bytes == 0, what
            assert usage.stack_bytes == 0, what
            assert usage.shared_bytes <= 48 * 1024, what
            # Two blocks at least, so that one computes while the other waits for memory.
            assert usage.registers * threads <= REGISTERS // 2, what


def test_every_source_is_compiled():
    kernels = importlib.resources.files("mfac_core._ops") / "kernels"
    sources = {path.name for path in kernels.iterdir() if path.name.endswith(".cu")}
    assert sources == {file for file, _, _ in variants()}


def test_an_error_points_at_the_file_it_is_in():
    broken = cuda_machine.source("sum.cu").replace("return v; }", "return w; }")
    with pytest.raises(nvrtc.CompileError, match=r"common\.cuh\(\d+\): error"):
        nvrtc.compile(broken, "sm_90", cuda_machine.options({"X_T": "float", "OUT_T": "float"}))
    broken = cuda_machine.source("sum.cu").replace("double sum = 0.0", "double sum = nothing")
    with pytest.raises(nvrtc.CompileError, match=r"sum\.cu\(\d+\): error"):
        nvrtc.compile(broken, "sm_90", cuda_machine.options({"X_T": "float", "OUT_T": "float"}))

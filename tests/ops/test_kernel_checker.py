"""The checker itself: planted bugs must be caught, and what is right let through."""

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cuda_on_cpu import BuildError, KernelError, Module, build

ORDERS = ("forward", "backward", "random")


def run(body, *, parameters="const float* x, float* y", helpers="", **launch):
    """Run a kernel of 64 threads from x = 0, 1, ..., 255 to y."""
    code = (
        f'{helpers}\nextern "C" __global__ void k({parameters}) {{ int t = threadIdx.x; {body} }}'
    )
    kernel = Module(code, mode=launch.get("mode", "check")).get_function("k")
    kernel.order = launch.get("order", "forward")
    y = np.zeros(256, "float32")
    arguments = (np.arange(256, dtype="float32"), y, *launch.get("more", ()))
    kernel(
        launch.get("grid", (1,)),
        launch.get("block", (64,)),
        arguments,
        shared_mem=launch.get("shared", 0),
    )
    return y


SHARED = "__shared__ float s[64]; s[t] = x[t];"


@dataclass(frozen=True)
class Bug:
    """A kernel that is wrong, what the checker says, and the same kernel put right."""

    body: str
    says: str
    mended: str | None = None
    grid: tuple = (1,)
    shared: int = 0
    parameters: str = "const float* x, float* y"
    more: tuple = ()


BUGS = {
    "no barrier": Bug(
        f"{SHARED} y[t] = s[63 - t];",
        "RACE|UNINITIALISED",
        f"{SHARED} __syncthreads(); y[t] = s[63 - t];",
    ),
    "no barrier before writing again": Bug(
        f"{SHARED} __syncthreads(); float v = s[63 - t]; s[t] = v; y[t] = v;",
        "RACE: write after read|RACE: read after write",
        f"{SHARED} __syncthreads(); float v = s[63 - t]; __syncthreads(); s[t] = v; y[t] = v;",
    ),
    "threads of a warp without __syncwarp": Bug(
        f"{SHARED} y[t] = s[t ^ 1];",
        "RACE|UNINITIALISED",
        f"{SHARED} __syncwarp(); y[t] = s[t ^ 1];",
    ),
    "__syncwarp across warps": Bug(f"{SHARED} __syncwarp(); y[t] = s[t ^ 32];", "RACE|UNINIT"),
    "shared memory never written": Bug(
        "__shared__ float s[64]; if (t) s[t] = x[t]; __syncthreads(); y[t] = s[63 - t];",
        "UNINITIALISED",
    ),
    "past the end of an input": Bug(
        "y[t] = x[t + 193];", "OUT OF BOUNDS read", "y[t] = x[t + 192];"
    ),
    "past the end of an output": Bug(
        "y[t + 193] = x[t];", "OUT OF BOUNDS write", "y[t + 192] = x[t];"
    ),
    "before an array": Bug("y[t] = x[t - 1];", "OUT OF BOUNDS read .* byte -4"),
    "past static shared memory": Bug(
        "__shared__ float s[32]; if (t <= 32) s[t] = x[t]; __syncthreads(); y[t] = s[t % 32];",
        "OUT OF BOUNDS write|UNDEFINED",
    ),
    "too little dynamic shared memory": Bug(
        "extern __shared__ float s[]; s[t] = x[t]; y[t] = s[t];", "OUT OF BOUNDS", shared=4 * 63
    ),
    "two blocks write one place": Bug("y[t] = x[t];", "RACE: write after write", grid=(2,)),
    "one block reads what another writes": Bug(
        "if (blockIdx.x) y[t] = x[t]; else y[t + 64] = y[t];", "RACE", grid=(2,)
    ),
    "a misaligned vector load": Bug("y[t] = ((const float4*)(x + 1))[t % 8].x;", "UNDEFINED"),
    "integer overflow": Bug(
        "int i = (t + 1) * n; y[t] = x[i & 63];",
        "UNDEFINED",
        parameters="const float* x, float* y, int n",
        more=(np.int32(2**30),),
    ),
    "a barrier half the threads skip": Bug("if (t < 40) __syncthreads(); y[t] = x[t];", "EXITED"),
    "a barrier in each branch": Bug(
        "if (t < 32) { __syncthreads(); }\n else { __syncthreads(); } y[t] = x[t];", "DIVERGENT"
    ),
    "a shuffle in a divergent branch": Bug(
        "float v = x[t]; if (t % 32 < 16) v += __shfl_down_sync(0xffffffffu, v, 8); y[t] = v;",
        "DEADLOCK",
    ),
    "a lane outside its mask": Bug(
        "y[t] = __shfl_xor_sync(0x0000ffffu, x[t], 1);", "not in its own mask"
    ),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name, order):
    bug = BUGS[name]
    launch = {
        "grid": bug.grid,
        "shared": bug.shared,
        "parameters": bug.parameters,
        "more": bug.more,
        "order": order,
    }
    with pytest.raises(KernelError, match=bug.says):
        run(bug.body, **launch)
    if bug.mended:
        run(bug.mended, **launch)


def test_fast_mode_sees_writes_around_an_array_and_spoils_reads():
    with pytest.raises(KernelError, match="GUARD ZONE around argument 1"):
        run("y[t + 193] = x[t];", mode="fast")
    assert np.isnan(run("y[t] = x[t + 193];", mode="fast")[63])
    assert np.isnan(run("__shared__ float s[64]; y[t] = s[t];", mode="fast")[:64]).all()


def test_a_report_names_the_line():
    code = '#line 1 "some.cu"\nextern "C" __global__ void k(float* y) {\n  y[4] = 0.0f;\n}\n'
    with pytest.raises(KernelError, match=r"at some\.cu:2"):
        Module(code, mode="check").get_function("k")((1,), (1,), (np.zeros(4, "float32"),))


@pytest.mark.parametrize("mode", ["fast", "check"])
@pytest.mark.parametrize("body", ["", "__syncthreads();", "__shfl_sync(~0u, x[t], 3);"])
def test_a_launch_that_does_not_end_is_ended(mode, body):
    """Threads alone, and such that wait for each other; the next launch is as any other."""
    code = f"""extern "C" __global__ void k(const float* x, volatile float* y) {{
        int t = threadIdx.x; while (x[0] == 1.0f) {{ y[t] = 1.0f; {body} }} y[t] = 2.0f; }}"""
    kernel = Module(code, mode=mode).get_function("k")
    kernel.seconds = 0.05
    y = np.zeros(64, "float32")
    with pytest.raises(KernelError, match="RUNAWAY"):
        kernel((1,), (64,), (np.ones(64, "float32"), y))
    kernel((1,), (64,), (np.zeros(64, "float32"), y))
    assert (y == 2.0).all()


def test_shuffles_blocks_and_indices():
    sum_of_warp = "float v = x[t]; for (int o = 16; o; o /= 2) v += __shfl_down_sync(~0u, v, o);"
    y = run(f"{sum_of_warp} if (t % 32 == 0) y[t / 32] = v;")
    assert y[0] == sum(range(32))
    assert y[1] == sum(range(32, 64))
    y = run("y[t] = __shfl_xor_sync(~0u, x[t], 1) + __shfl_sync(~0u, x[t], 3);")
    assert (y[:64] == [(t ^ 1) + t // 32 * 32 + 3 for t in range(64)]).all()
    place = "int i = (blockIdx.y * gridDim.x + blockIdx.x) * 32 + threadIdx.y * 8 + t;"
    y = run(f"{place} y[i] = x[i] + 1;", grid=(2, 2), block=(8, 4))
    assert (y[:128] == np.arange(1, 129)).all()


@pytest.mark.parametrize("name", BUGS)
def test_a_failed_launch_leaves_nothing_behind(name):
    bug = BUGS[name]
    launch = {"grid": bug.grid, "shared": bug.shared, "parameters": bug.parameters}
    with pytest.raises(KernelError):
        run(bug.body, more=bug.more, **launch)
    y = run("y[t] = __shfl_xor_sync(~0u, x[t], 1);")
    assert (y[:64] == [t ^ 1 for t in range(64)]).all()


def test_arguments_of_the_wrong_type_are_refused():
    code = 'extern "C" __global__ void k(const float* x, double* y, int n) { y[0] = x[0] * n; }'
    kernel = Module(code).get_function("k")
    x, y = np.ones(4, "float32"), np.zeros(4)
    kernel((1,), (1,), (x, y, np.int32(1)))
    with pytest.raises(TypeError, match="argument 0 is float64, the kernel takes f4"):
        kernel((1,), (1,), (y, y, np.int32(1)))
    with pytest.raises(TypeError, match="argument 2 is int64, the kernel takes i4"):
        kernel((1,), (1,), (x, y, 1))
    with pytest.raises(TypeError, match="not C-contiguous"):
        kernel((1,), (1,), (x[::2], y, np.int32(1)))
    with pytest.raises(TypeError, match="takes 3 arguments"):
        kernel((1,), (1,), (x, y))
    with pytest.raises(TypeError, match="must be an array"):
        kernel((1,), (1,), (None, y, np.int32(1)))


def test_a_launch_no_device_takes_is_refused():
    kernel = Module('extern "C" __global__ void k(float* y) {}').get_function("k")
    y = np.zeros(1, "float32")
    with pytest.raises(KernelError, match="BAD LAUNCH"):
        kernel((1,), (1025,), (y,))
    with pytest.raises(KernelError, match="BAD LAUNCH"):
        kernel((1, 65536), (1,), (y,))
    with pytest.raises(KernelError, match="max_dynamic_shared_size_bytes"):
        kernel((1,), (1,), (y,), shared_mem=48 * 1024 + 1)


def test_without_a_compiler_the_message_says_so(monkeypatch):
    monkeypatch.setattr(build, "COMPILER", "no-such-compiler")
    build.compiler_version.cache_clear()
    with pytest.raises(BuildError, match="need the compiler 'no-such-compiler'"):
        build.compiler_version()
    build.compiler_version.cache_clear()


def test_a_library_that_another_process_has_built_meanwhile_stays(monkeypatch, tmp_path):
    """It may have been loaded, and must then be found under its name in the memory map."""
    code = 'extern "C" __global__ void k(float* y) { y[0] = 1.0f; }'
    Module(code)  # the runtime with it
    monkeypatch.setattr(build, "CACHE", tmp_path)
    run, other = build._run, []

    def beside_another(command):
        run(command)
        if "-shared" in command and not other:
            other.append(None)
            other[0] = Module(code)  # which is quicker

    monkeypatch.setattr(build, "_run", beside_another)
    y, module = np.zeros(1, "float32"), Module(code)
    for each in (module, other[0]):
        each.get_function("k")((1,), (1,), (y,))
        assert (each.path, each.begin) == (module.path, module.begin)
    assert list(tmp_path.iterdir()) == [module.path]
    assert f"{module.path} (deleted)" not in Path("/proc/self/maps").read_text()


def nearest(x, dtype):
    """Round to the nearest of all finite numbers of a 16-bit dtype, halfway to the even one."""
    bits = np.arange(0x8000, dtype="uint16")
    with np.errstate(invalid="ignore"):
        magnitudes = bits.view(dtype).astype("float64")
    magnitudes = magnitudes[np.isfinite(magnitudes)]  # ascending, from zero
    above = np.searchsorted(magnitudes, abs(x)).clip(1, len(magnitudes) - 1)
    to_above, to_below = magnitudes[above] - abs(x), abs(x) - magnitudes[above - 1]
    even = above - 1 + (above - 1) % 2
    index = np.where(to_above == to_below, even, np.where(to_above < to_below, above, above - 1))
    return np.copysign(magnitudes[index], x), magnitudes


@pytest.mark.parametrize(
    ("dtype", "stand_in", "narrow", "widen"),
    [
        (np.dtype("float16"), "fp16", "__double2half", "__half2float"),
        (np.dtype(ml_dtypes.bfloat16), "bf16", "__double2bfloat16", "__bfloat162float"),
    ],
    ids=["float16", "bfloat16"],
)
def test_the_stand_in_conversions_round_as_they_should(dtype, stand_in, narrow, widen):
    """All numbers of a type, what lies halfway between neighbours, and either side of that."""
    code = f"""
    #include <cuda_{stand_in}.h>
    extern "C" __global__ void k(const double* x, float* y, int n) {{
        int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < n) y[i] = {widen}({narrow}(x[i]));
    }}"""
    _, magnitudes = nearest(np.zeros(1), dtype)
    halves = (magnitudes[1:] + magnitudes[:-1]) / 2
    beside = [np.nextafter(halves, np.inf), np.nextafter(halves, -np.inf)]
    x = np.concatenate([magnitudes, halves, *beside])
    x = np.concatenate([x, -x, [1e300, -1e300, np.inf, np.nan]])
    y = np.zeros(x.size, "float32")
    Module(code).get_function("k")((-(-x.size // 256),), (256,), (x, y, np.int32(x.size)))
    np.testing.assert_array_equal(y[:-4], nearest(x[:-4], dtype)[0])
    np.testing.assert_array_equal(y[-4:], [np.inf, -np.inf, np.inf, np.nan])

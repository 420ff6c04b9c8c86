"""How set-up, products and a window's step scale: in d, in m, in vectors at once, in the dtype.

Beside each time stands its floor on this machine, measured in turn with it. A set-up takes d·m²
multiplications and additions at the rate of a square sgemm, or one pass over the gradients by
sgemv if that is longer; a product or a step two such passes; k products at once two sgemms. Times
are medians; memory is the peak beyond the gradients, in multiples of them.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from measure import (
    NDArray,
    correlated_rows,
    medians,
    peak_memory,
    relative_error,
    two_passes,
    unit_rows,
    woodbury,
)
from report import Report, Row, arguments, panels

import mfac_core as mfac

DAMPING = 1e-2


def inverse(rng: np.random.Generator, m: int, d: int, repeats: int) -> Row:
    """Measure the static inverse's set-up and product."""
    g = unit_rows(rng, m, d)
    x = rng.standard_normal(d, dtype=np.float32)
    side = min(2000, d)
    square = rng.standard_normal((side, side), dtype=np.float32)
    operator = mfac.InverseFisher(g, damping=DAMPING)

    def set_up() -> object:
        return mfac.InverseFisher(g, damping=DAMPING)

    setup_s, product_s, gemm_s, passes_s = medians(
        set_up,
        lambda: operator @ x,
        lambda: square @ square,
        two_passes(g, rng),
        repeats=repeats,
    )
    setup_floor_s = max(gemm_s * d * m**2 / (2 * side**3), passes_s / 2)
    memory = {
        "setup_memory": extra(set_up, g),
        "product_memory": extra(lambda: operator @ x, g),
    }
    return {
        "m": m,
        "d": d,
        "setup_s": setup_s,
        "setup_floor_s": setup_floor_s,
        "setup_ratio": setup_s / setup_floor_s,
        "product_s": product_s,
        "product_floor_s": passes_s,
        "product_ratio": product_s / passes_s,
        **memory,
    }


def extra(act: Any, g: NDArray) -> float | None:
    """Return the peak memory of an act as a multiple of the gradients."""
    peak = peak_memory(act)
    return None if peak is None else peak / g.nbytes


def step(rng: np.random.Generator, m: int, d: int, repeats: int) -> Row:
    """Measure a step of a full window."""
    g = unit_rows(rng, m, d)
    window = mfac.SlidingInverseFisher(d, m, damping=DAMPING)
    for row in g:
        window.append(row)
    again = itertools.cycle(g)  # each in its own place: the window never holds one twice
    step_s, floor_s = medians(
        lambda: window.append_matvec(next(again)),
        two_passes(g, rng),
        repeats=repeats,
    )
    return {"step_s": step_s, "step_floor_s": floor_s, "step_ratio": step_s / floor_s}


def vectors(
    rng: np.random.Generator, m: int, d: int, counts: Sequence[int], repeats: int
) -> list[Row]:
    """Measure products with several vectors at once."""
    g = unit_rows(rng, m, d)
    operator = mfac.InverseFisher(g, damping=DAMPING)
    results = []
    for k in counts:
        x = rng.standard_normal((d, k), dtype=np.float32)
        c = rng.standard_normal((m, k), dtype=np.float32)
        product_s, floor_s, passes_s = medians(
            lambda x=x: operator @ x,
            lambda x=x, c=c: (g @ x, g.T @ c),
            two_passes(g, rng),
            repeats=repeats,
        )
        results.append(
            {
                "k": k,
                "each_s": product_s / k,
                "each_floor_s": floor_s / k,
                "one_floor_s": passes_s,
                "each_ratio": product_s / floor_s,
                "one_ratio": product_s / k / passes_s,
            }
        )
    return results


def storage(rng: np.random.Generator, m: int, d: int, repeats: int) -> list[Row]:
    """Measure time and error of gradients in each dtype, in PyTorch."""
    import torch

    wide = correlated_rows(rng, m, d).astype(np.float64)
    x = wide.T @ rng.standard_normal(m)
    given = woodbury(wide, DAMPING)(x)
    dtypes = {
        "float32": torch.float32,
        "float64": torch.float64,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
    }
    stored = {name: torch.from_numpy(wide).to(dtype) for name, dtype in dtypes.items()}
    # The vector stays in float32 or above, so that only the gradients' rounding is seen.
    vector = {
        name: torch.from_numpy(x).to(torch.promote_types(g.dtype, torch.float32))
        for name, g in stored.items()
    }
    setups = [lambda g=g: mfac.InverseFisher(g, damping=DAMPING) for g in stored.values()]
    setup_s = medians(*setups, repeats=repeats)
    operators = [set_up() for set_up in setups]
    products = [lambda o=o, x=vector[n]: o @ x for n, o in zip(stored, operators, strict=True)]
    product_s = medians(*products, repeats=repeats)
    results = []
    for i, (name, g) in enumerate(stored.items()):
        y = products[i]()
        held = woodbury(g.double().numpy(), DAMPING)(vector[name].double().numpy())
        results.append(
            {
                "dtype": name,
                "bytes": g.element_size(),
                "setup_s": setup_s[i],
                "product_s": product_s[i],
                "setup_ratio": setup_s[i] / setup_s[0],
                "product_ratio": product_s[i] / product_s[0],
                "error": relative_error(y.double(), held),
                "with_rounding": relative_error(y.double(), given),
            }
        )
    return results


def draw(rows: Sequence[Row], along: str, what: Sequence[str], label: str) -> Any:
    """Draw times with their floors over a size, and memory beside them if it was measured."""
    memory = [key for key in rows[0] if key.endswith("_memory") and rows[0][key] is not None]
    figure, axes = panels(1, len(what) + bool(memory))
    sizes = [row[along] for row in rows]
    for key, axis in zip(what, axes, strict=False):
        axis.loglog(sizes, [row[f"{key}_s"] for row in rows], marker=".", label="mfac_core")
        floor = [row[f"{key}_floor_s"] for row in rows]
        axis.loglog(sizes, floor, "--", color="grey", label=FLOORS[key])
        if key == "each":
            single = [row["one_floor_s"] for row in rows]
            axis.loglog(sizes, single, ":", color="grey", label="two sgemv passes for each")
        axis.set_title(TITLES[key], fontsize="small")
        axis.set_xlabel(label)
        axis.set_ylabel("seconds")
        axis.set_ylim(min(floor) / 4)  # room for the legend
        axis.legend(fontsize="small", loc="lower right")
    for key in memory:
        name = TITLES[key.removesuffix("_memory")]
        axes[-1].semilogx(sizes, [row[key] for row in rows], marker=".", label=name)
    if memory:
        axes[-1].set_title("peak memory beyond the gradients", fontsize="small")
        axes[-1].set_xlabel(label)
        axes[-1].set_ylabel("multiples of the gradients")
        axes[-1].set_ylim(bottom=0)
        axes[-1].legend(fontsize="small")
    return figure


TITLES = {
    "setup": "set-up",
    "product": "a product",
    "step": "a step of a full window",
    "each": "products at once, each",
}
FLOORS = {
    "setup": "floor: d·m² at the sgemm rate, or a pass",
    "product": "floor: two sgemv passes",
    "step": "floor: two sgemv passes",
    "each": "floor: two sgemms",
}

COLUMNS = {
    "m": "{m:,}",
    "d": "{d:,}",
    "set-up": "{setup_s:.3g} s",
    "× floor": "{setup_ratio:.2f}",
    "its memory": "{setup_memory:.2f}",
    "a product": "{product_s:.2g} s",
    "× two passes": "{product_ratio:.2f}",
    "product's memory": "{product_memory:.2f}",
}
STEP = {"a window's step": "{step_s:.2g} s", "× the two passes": "{step_ratio:.2f}"}


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    options = arguments(__doc__, argv)
    rng = np.random.default_rng(options.seed)
    report = Report(
        "scaling", options.output, seed=options.seed, packages=("numpy", "scipy", "torch")
    )
    quick = options.quick
    repeats = 1 if quick else 5

    lengths = [100, 1000] if quick else [10_000, 100_000, 1_000_000, 10_000_000]
    rows = [inverse(rng, 16, d, repeats) for d in lengths]
    report.table("d", rows, COLUMNS)
    report.figure("d", lambda: draw(rows, "d", ["setup", "product"], "d, for m 16"))

    d = 200 if quick else 10_000
    counts = [4, 16] if quick else [16, 64, 256, 512, 1024, 2048]
    rows = [{**inverse(rng, m, d, repeats), **step(rng, m, d, repeats)} for m in counts]
    report.table("m", rows, COLUMNS | STEP)
    report.figure("m", lambda: draw(rows, "m", ["setup", "product", "step"], f"m, for d {d:,}"))

    m, d = (8, 400) if quick else (256, 20_000)
    rows = vectors(rng, m, d, [1, 4] if quick else [1, 4, 16, 64, 256], repeats)
    report.table(
        "vectors",
        rows,
        {
            "vectors": "{k}",
            "each": "{each_s:.2g} s",
            "× two sgemms": "{each_ratio:.2f}",
            "× two sgemv passes for each": "{one_ratio:.2f}",
        },
    )
    report.figure(
        "vectors", lambda: draw(rows, "k", ["each"], f"vectors at once, for m {m}, d {d:,}")
    )

    if importlib.util.find_spec("torch"):
        report.table(
            "storage",
            storage(rng, m, d, repeats),
            {
                "gradients in": "{dtype}",
                "bytes each": "{bytes}",
                "set-up, × float32's": "{setup_ratio:.2f}",
                "a product, × float32's": "{product_ratio:.2f}",
                "error of F⁻¹x, for the gradients as stored": "{error:.0e}",
                "and for those given, in float64": "{with_rounding:.0e}",
            },
        )
    else:
        print("storage in each dtype: left out, torch is not installed")
    report.write()


if __name__ == "__main__":
    main()

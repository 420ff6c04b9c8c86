"""The error of F⁻¹x against the damping, for every way this package and others have to it.

Rows are in float32, d numbers each, of mean squared norm 1: drawn, independent or correlated, and
with PyTorch the gradients of a small residual network. The oracle is the Woodbury identity in 50
digits (mpmath), on the same rows; errors are relative to its result. Beside them, the rounding
error of float32 times the condition number of F, which no method that only sees F can be sure to
beat.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
from measure import NDArray, correlated_rows, network_rows, relative_error, unit_rows, woodbury
from report import Report, Row, arguments, panels

import mfac_core as mfac
from mfac_core.testing import StaticRecursion

DIGITS = 50


def gradients(rng: np.random.Generator, m: int, d: int) -> NDArray:
    """Return gradients of a network, of the columns that vary the first d or less."""
    rows = network_rows(m, 4)
    rows = rows[:, np.any(rows != 0.0, axis=0)][:, :d].copy()
    rows *= np.float32(np.sqrt(m) / np.linalg.norm(rows))
    return rows


ROWS = {"independent": unit_rows, "correlated": correlated_rows}
if importlib.util.find_spec("torch") is not None:
    ROWS["of a network"] = gradients


def oracle(g: NDArray) -> Callable[[NDArray, float], NDArray]:
    """Return (x, λ) ↦ F⁻¹x = (x − Gᵀ(mλ I + GGᵀ)⁻¹Gx)/λ in many digits, rounded at the end."""
    exact = np.vectorize(mpmath.mpf, otypes=[object])
    rows = exact(g.astype(np.float64))
    gram = rows @ rows.T

    def inverse(x: NDArray, damping: float) -> NDArray:
        wide, shift = exact(x.astype(np.float64)), mpmath.mpf(damping)
        dual = mpmath.matrix((gram + len(g) * shift * np.eye(len(g), dtype=int)).tolist())
        c = np.array(list(mpmath.cholesky_solve(dual, mpmath.matrix((rows @ wide).tolist()))))
        return ((wide - c @ rows) / shift).astype(np.float64)

    return inverse


def window(g: NDArray, damping: float) -> Callable[[NDArray], Any]:
    """Return F⁻¹g by a window that g enters as its newest."""
    sliding = mfac.SlidingInverseFisher(g.shape[1], len(g), damping=damping)
    for row in g[:-1]:
        sliding.append(row)
    return sliding.append_matvec


def single(g: NDArray, damping: float) -> Callable[[NDArray], Any]:
    """Return the static inverse of float32 gradients."""
    return mfac.InverseFisher(g, damping=damping).matvec


def refined(g: NDArray, damping: float) -> Callable[[NDArray], Any]:
    """Return the same with one step of refinement."""
    inverse = mfac.InverseFisher(g, damping=damping)
    return lambda x: inverse.matvec(x, refine=1)


def double(g: NDArray, damping: float) -> Callable[[NDArray], Any]:
    """Return the static inverse of the same gradients in float64."""
    inverse = mfac.InverseFisher(g.astype(np.float64), damping=damping)
    return lambda x: inverse @ x.astype(np.float64)


def recursion(g: NDArray, damping: float) -> Callable[[NDArray], Any]:
    """Return the paper's static algorithm in float32."""
    return StaticRecursion(g, damping=damping, dtype=np.float32).matvec


METHODS = {
    "float32": single,
    "float32, refine=1": refined,
    "float64": double,
    "float32, append_matvec": window,
    "paper's recursion, float32": recursion,
    "Woodbury by hand, float32": woodbury,
}


def errors(rng: np.random.Generator, m: int, d: int, kind: str, exponents: range) -> list[Row]:
    """Return the errors of all methods over the damping, for two kinds of x."""
    g = ROWS[kind](rng, m, d)
    exact = oracle(g)
    largest = np.linalg.norm(g.astype(np.float64), 2) ** 2 / m
    vectors = {
        "a random vector": rng.standard_normal(d, dtype=np.float32),
        "the last gradient": g[-1].copy(),
    }
    results = []
    for exponent in exponents:
        damping = 10.0**exponent
        for what, x in vectors.items():
            y = exact(x, damping)
            row: dict[str, Any] = {"rows": kind, "x": what, "exponent": exponent}
            row["condition"] = 1 + largest / damping
            for name, method in METHODS.items():
                if method is not window or what == "the last gradient":
                    row[name] = error(method, g, damping, x, y)
            results.append(row)
    return results


def error(
    method: Callable[..., Any], g: NDArray, damping: float, x: NDArray, y: NDArray
) -> float | None:
    """Return a method's error, or None where it breaks down."""
    try:
        with np.errstate(all="ignore"):
            value = relative_error(method(g, damping)(x), y)
    except np.linalg.LinAlgError:  # a Gram that rounding made indefinite
        return None
    return value if np.isfinite(value) else None


def draw(results: list[Row]) -> Any:
    """Draw a panel for each kind of gradients and of x."""
    figure, axes = panels(len(ROWS), 2)
    kinds = list(dict.fromkeys((row["rows"], row["x"]) for row in results))
    for (kind, what), axis in zip(kinds, axes, strict=True):
        rows = [row for row in results if (row["rows"], row["x"]) == (kind, what)]
        damping = [10.0 ** row["exponent"] for row in rows]
        for name in METHODS:
            values = [row.get(name) for row in rows]
            ours = METHODS[name] in (single, refined, double, window)
            axis.loglog(
                damping,
                [np.nan if value is None else value for value in values],
                label=f"mfac_core, {name}" if ours else name,
                linewidth=2.0 if ours else 1.2,
                linestyle="-" if ours else "--",
                marker=".",
            )
        bound = [2.0**-24 * row["condition"] for row in rows]
        axis.loglog(damping, bound, color="grey", linestyle=":", label="2⁻²⁴ · condition of F")
        axis.set_title(f"gradients: {kind}, x: {what}", fontsize="small")
        axis.set_xlabel("λ / mean ‖g‖²")
        axis.set_ylabel("relative error of F⁻¹x")
        axis.set_ylim(1e-17, 1e3)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    return figure


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    options = arguments(__doc__, argv)
    rng = np.random.default_rng(options.seed)
    m, d = (8, 64) if options.quick else (64, 512)
    exponents = range(0, -11, -5 if options.quick else -1)
    report = Report(
        "accuracy", options.output, seed=options.seed, packages=("numpy", "scipy", "mpmath")
    )
    with mpmath.workdps(DIGITS):
        results = [row for kind in ROWS for row in errors(rng, m, d, kind, exponents)]
    report.keep("all", results)
    columns = {"gradients": "{rows}", "λ": "1e{exponent}", "condition of F": "{condition:.0e}"}
    columns |= {name: f"{{{name}:.0e}}" for name in METHODS}
    held = [row for row in results if row["x"] == "the last gradient"]
    report.table("damping", [row for row in held if row["exponent"] % 2 == 0], columns)
    report.figure("damping", lambda: draw(results))
    report.write()


if __name__ == "__main__":
    main()

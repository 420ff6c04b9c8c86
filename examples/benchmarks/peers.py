"""F⁻¹x by this package and by others that can give it: time, accuracy and memory.

All are given the same gradients and asked for F⁻¹x, x a combination of gradients. Their times are
medians measured in turn and shown as multiples of this package's; errors are against the Woodbury
identity in float64. All run on one thread: NumPy, SciPy and PyTorch bring threads of their own,
which would take the cores from one another. A peer that is not installed is left out, and the
script says so:

    python -m pip install "mfac_core[benchmarks]"

Conjugate gradients stop at a relative residual of 1e-5. "By hand" is the Woodbury identity in
float32; the paper's recursions are those of mfac_core.testing, in float32.
"""

from __future__ import annotations

import importlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse.linalg
from measure import (
    NDArray,
    correlated_rows,
    medians,
    network_rows,
    peak_memory,
    relative_error,
    unit_rows,
    woodbury,
)
from report import Report, Row, arguments, panels
from threadpoolctl import threadpool_limits

import mfac_core as mfac
from mfac_core.testing import DynamicRecursion, StaticRecursion

# linear_operator is written with what PyTorch now deprecates.
warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)

Solve = Callable[[NDArray], Any]

RESIDUAL = 1e-5  # at which conjugate gradients stop
MOST_STEPS = 2000


def ours(g: NDArray, damping: float) -> Solve:
    """Invert NumPy arrays."""
    return mfac.InverseFisher(g, damping=damping).__matmul__


def refined(g: NDArray, damping: float) -> Solve:
    """Invert NumPy arrays, and refine once."""
    inverse = mfac.InverseFisher(g, damping=damping)

    def solve(x: NDArray) -> Any:
        return inverse.matvec(x, refine=1) if x.ndim == 1 else inverse.matmat(x, refine=1)

    return solve


def ours_torch(g: NDArray, damping: float) -> Solve:
    """Invert PyTorch tensors."""
    import torch

    inverse = mfac.InverseFisher(torch.from_numpy(g), damping=damping)
    return lambda x: inverse @ torch.from_numpy(x)


def linear_operator(g: NDArray, damping: float) -> Solve:
    """Make a LowRankRootAddedDiagLinearOperator, whose solve is the Woodbury identity."""
    import torch
    from linear_operator.operators import LowRankRootLinearOperator

    root = torch.from_numpy(g).T / len(g) ** 0.5
    fisher = LowRankRootLinearOperator(root).add_diagonal(torch.tensor(damping, dtype=root.dtype))
    return lambda x: fisher.solve(torch.from_numpy(x))


def curvlinops(g: NDArray, damping: float) -> Solve:
    """Make a CGInverseLinearOperator of the operators that curvlinops has for such a sum."""
    import torch
    from curvlinops import CGInverseLinearOperator
    from curvlinops.examples import IdentityLinearOperator, OuterProductLinearOperator

    m, d = g.shape
    rows = torch.from_numpy(g)
    fisher = OuterProductLinearOperator(torch.full((m,), 1 / m), rows.T)
    identity = IdentityLinearOperator([(d,)], rows.device, rows.dtype)
    inverse = CGInverseLinearOperator(
        fisher + damping * identity, tolerance=RESIDUAL, max_iter=MOST_STEPS
    )
    return lambda x: inverse @ torch.from_numpy(x)


def scipy_cg(g: NDArray, damping: float) -> Solve:
    """Run SciPy's cg on the forward operator, one vector after the other."""
    fisher = mfac.EmpiricalFisher(g, damping=damping).to_scipy()

    def solve(x: NDArray) -> NDArray:
        return scipy.sparse.linalg.cg(fisher, x, rtol=RESIDUAL, maxiter=MOST_STEPS)[0]

    return columnwise(solve)


def recursion(algorithm: Callable[..., Any]) -> Callable[[NDArray, float], Solve]:
    """Return a maker for one of the paper's algorithms."""
    return lambda g, damping: columnwise(algorithm(g, damping=damping, dtype=np.float32).matvec)


def columnwise(solve: Solve) -> Solve:
    """Return a solve that takes the columns of a matrix one after the other."""
    return lambda x: solve(x) if x.ndim == 1 else np.stack([solve(c) for c in x.T], axis=1)


class Peer(NamedTuple):
    """A way to F⁻¹x."""

    make: Callable[[NDArray, float], Solve]
    package: str = "numpy"  # has to be installed


OURS = "mfac_core"
PEERS = {
    OURS: Peer(ours),
    "mfac_core, refine=1": Peer(refined),
    "mfac_core, PyTorch": Peer(ours_torch, "torch"),
    "linear_operator": Peer(linear_operator, "linear_operator"),
    "Woodbury by hand, NumPy": Peer(woodbury),
    "SciPy's CG": Peer(scipy_cg),
    "curvlinops' CG": Peer(curvlinops, "curvlinops"),
    "paper's static recursion": Peer(recursion(StaticRecursion)),
    "paper's dynamic recursion": Peer(recursion(DynamicRecursion)),
}


def installed() -> dict[str, Peer]:
    """Return the peers that are there, and print those that are not."""
    present = {}
    for name, peer in PEERS.items():
        try:
            importlib.import_module(peer.package)
        except ModuleNotFoundError:
            print(f"{name}: left out, {peer.package} is not installed")
        else:
            present[name] = peer
    return present


def of_a_network(rng: np.random.Generator, m: int, d: int) -> NDArray:
    """Return the first d columns of gradients of a residual network, their lengths far apart."""
    channels = next(n for n in itertools.count(4) if 36 * n * n > d)
    rows = np.ascontiguousarray(network_rows(m, channels)[:, :d])
    rows *= np.float32(np.sqrt(m) / np.linalg.norm(rows))
    return rows


KINDS = {unit_rows: "independent", correlated_rows: "correlated", of_a_network: "of a network"}


class Case(NamedTuple):
    """A problem: m gradients of length d and mean squared norm 1, and a damping."""

    m: int
    d: int
    damping: float
    rows: Callable[[np.random.Generator, int, int], NDArray]

    @property
    def name(self) -> str:
        """What it is, in words."""
        kind = KINDS[self.rows]
        return f"m {self.m}, d {self.d:,}, {kind}, λ {self.damping:g}"


def cases(quick: bool) -> Iterator[Case]:
    """Yield the problems: few gradients, then large and small damping, then many gradients."""
    if quick:
        yield Case(4, 400, 1e-1, unit_rows)
        yield Case(16, 400, 1e-2, correlated_rows)
        yield Case(16, 400, 1e-4, of_a_network)
        return
    yield Case(16, 200_000, 1e-1, unit_rows)
    yield Case(256, 20_000, 1e-1, correlated_rows)
    yield Case(256, 20_000, 1e-4, correlated_rows)
    yield Case(512, 20_000, 1e-3, unit_rows)
    yield Case(256, 20_000, 1e-1, of_a_network)
    yield Case(256, 20_000, 1e-5, of_a_network)


def static(
    rng: np.random.Generator, case: Case, peers: dict[str, Peer], block: int, repeats: int
) -> list[Row]:
    """Measure set-up, products and memory of each peer on one problem."""
    g = case.rows(rng, case.m, case.d)
    x = g.T @ rng.standard_normal(case.m, dtype=np.float32)
    several = g.T @ rng.standard_normal((case.m, block), dtype=np.float32)
    exact = woodbury(g.astype(np.float64), case.damping)(x.astype(np.float64))

    def anew(peer: Peer) -> Callable[[], Any]:
        return lambda: peer.make(g, case.damping)(x)

    first = medians(*map(anew, peers.values()), repeats=repeats)
    memory = [peak_memory(anew(peer)) for peer in peers.values()]
    solves = [peer.make(g, case.damping) for peer in peers.values()]
    again = medians(*(lambda s=s: s(x) for s in solves), repeats=repeats)
    columns = medians(*(lambda s=s: s(several) for s in solves), repeats=repeats)
    results = [
        {
            "case": case.name,
            "title": "",
            "peer": peer,
            "first_s": first_s,
            "again_s": again_s,
            "columns_s": columns_s,
            "error": relative_error(solve(x), exact),
            "memory": None if peak is None else peak / g.nbytes,
        }
        for peer, first_s, again_s, columns_s, solve, peak in zip(
            peers, first, again, columns, solves, memory, strict=True
        )
    ]
    results[0]["title"] = case.name
    return [times_ours(row, results[0]) for row in results]


def window(rng: np.random.Generator, case: Case, peers: dict[str, Peer], repeats: int) -> list[Row]:
    """Measure a step of a full window: one gradient exchanged, then F⁻¹ of it."""
    ring = case.rows(rng, case.m, case.d)
    fresh = itertools.cycle(case.rows(rng, case.m, case.d))
    sliding = mfac.SlidingInverseFisher(case.d, case.m, damping=case.damping)
    for row in ring:
        sliding.append(row)
    steps = [sliding.append_matvec, *(exchange(ring, case.damping, p) for p in peers.values())]
    names = [f"{OURS}, the window", *(f"{name}, anew" for name in peers)]
    acts = [lambda step=step: step(next(fresh)) for step in steps]
    seconds = medians(*acts, repeats=2 * repeats - 1)
    results = [
        {"case": case.name, "title": "", "peer": name, "step_s": step_s}
        for name, step_s in zip(names, seconds, strict=True)
    ]
    results[0]["title"] = case.name
    return [times_ours(row, results[0]) for row in results]


def exchange(ring: NDArray, damping: float, peer: Peer) -> Callable[[NDArray], Any]:
    """Return the step of a peer without a window: all anew after each gradient."""
    slots = itertools.cycle(range(len(ring)))

    def step(g: NDArray) -> Any:
        ring[next(slots)] = g
        return peer.make(ring, damping)(g)

    return step


def times_ours(row: Row, our: Row) -> Row:
    """Add to each time what multiple of ours it is."""
    return {**row, **{f"{k}_ratio": row[k] / our[k] for k in row if k.endswith("_s")}}


def draw(results: list[Row]) -> Any:
    """Draw the time of k products, with their set-up, over k."""
    names = list(dict.fromkeys(row["case"] for row in results))
    figure, axes = panels(-(-len(names) // 2), 2)
    products = np.logspace(0, 3, 60)
    for name, axis in zip(names, axes, strict=False):  # the last panel may stay empty
        rows = [row for row in results if row["case"] == name and "refine" not in row["peer"]]
        totals = [row["first_s"] + (products - 1) * row["again_s"] for row in rows]
        for row, total in zip(rows, totals, strict=True):
            width = 2.5 if row["peer"] == OURS else 1.3
            axis.loglog(products, total / totals[0], label=row["peer"], linewidth=width)
        axis.set_title(name, fontsize="small")
        axis.set_xlabel("products with the same gradients")
        axis.set_ylabel("time / time of mfac_core")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    return figure


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    options = arguments(__doc__, argv)
    rng = np.random.default_rng(options.seed)
    packages = ("numpy", "scipy", "torch", "linear_operator", "curvlinops-for-pytorch")
    report = Report("peers", options.output, seed=options.seed, packages=packages)
    peers = installed()
    problems = list(cases(options.quick))
    block, repeats = 4, 1 if options.quick else 3
    without = {name: peers[name] for name in peers if "refine" not in name and "paper" not in name}
    with threadpool_limits(1):  # of all libraries that are imported by now
        results = [row for case in problems for row in static(rng, case, peers, block, repeats)]
        steps = [row for case in problems[1::2] for row in window(rng, case, without, repeats)]
    report.table(
        "static",
        results,
        {
            "gradients": "{title}",
            "": "{peer}",
            "set-up and a product": "{first_s_ratio:.2f}",
            "a further product": "{again_s_ratio:.2f}",
            f"{block} further at once": "{columns_s_ratio:.2f}",
            "error": "{error:.0e}",
            "memory / gradients": "{memory:.2f}",
        },
    )
    report.figure("static", lambda: draw(results))
    columns = {"gradients": "{title}", "": "{peer}", "a step": "{step_s_ratio:.2f}"}
    report.table("window", steps, columns)
    report.write()


if __name__ == "__main__":
    main()

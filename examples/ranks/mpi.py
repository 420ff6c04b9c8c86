"""Gradients spread over MPI ranks: each holds some columns, and only m-sized sums travel.

Run ``mpiexec -n 3 python examples/ranks/mpi.py``; needs mpi4py and an MPI, for example from
``python -m pip install mpi4py mpich``.
"""

from __future__ import annotations

import numpy as np
from mpi4py import MPI

import mfac_core as mfac

comm = MPI.COMM_WORLD
M, D = 64, 30_000


def main() -> None:
    """Compare products and a sliding window over ranks with the same on one."""
    rng = np.random.default_rng(0)  # every rank draws everything, to have something to compare
    gradients, x = rng.standard_normal((M, D)), rng.standard_normal(D)
    stops = np.linspace(0, D, comm.size + 1).astype(int)
    mine = slice(stops[comm.rank], stops[comm.rank + 1])

    inverse = mfac.InverseFisher(gradients[:, mine], damping=1e-3, reduce=comm.allreduce)
    window = mfac.SlidingInverseFisher(
        mine.stop - mine.start, M // 2, damping=1e-3, reduce=comm.allreduce
    )
    for g in gradients:
        step = window.append_matvec(g[mine])

    alone = mfac.InverseFisher(gradients, damping=1e-3)
    held = mfac.InverseFisher(gradients[-(M // 2) :], damping=1e-3)
    pairs = {
        "F⁻¹x": (inverse @ x[mine], (alone @ x)[mine]),
        "diag F⁻¹": (inverse.diagonal(), alone.diagonal()[mine]),
        "log det F⁻¹": (inverse.logdet(), alone.logdet()),
        "xᵀF⁻¹x": (inverse.quadratic(x[mine]), alone.quadratic(x)),
        "window": (step, held.matvec(gradients[-1], refine=1)[mine]),
    }
    errors = {
        name: comm.allreduce(float(np.linalg.norm(a - b) / np.linalg.norm(b)), op=MPI.MAX)
        for name, (a, b) in pairs.items()
    }
    duals = comm.gather((inverse.dual.tobytes(), window.dual.tobytes()))
    refused = 0
    bad = gradients[0, mine].copy()
    bad[0] = np.nan if comm.rank == 0 else bad[0]
    try:
        window.append(bad)
    except ValueError:
        refused = 1
    refusals = comm.allreduce(refused)
    if comm.rank == 0:
        assert duals is not None
        print(f"{comm.size} ranks of {D // comm.size:,} columns; relative errors against one rank:")
        for name, error in errors.items():
            print(f"{name:>12}  {error:.1e}")
        print(f"the duals are the same bit for bit: {len(set(duals)) == 1}")
        print(f"a NaN on one rank is refused by {refusals} of {comm.size}")


if __name__ == "__main__":
    main()

"""F⁻¹ as a preconditioner for conjugate gradients, in SciPy and in lineax.

Newton's method for logistic regression solves H s = g with the Hessian

    H = λI + (1/n) Σ pᵢ(1 − pᵢ) xᵢ xᵢᵀ

of all n samples by conjugate gradients, each iteration of which is a pass over all the data. F has
the same form over a few of the samples. Its inverse, factored once, costs little to apply; its
damping is a few times λ, as what so few samples say of the rest is uncertain.

Run ``python preconditioner.py``: the model tells digits below five from the others by the products
of all pairs of pixels. It prints the iterations of each step of Newton's method, and the last
system once more with lineax where it is installed (``pip install lineax``).
"""

import argparse

import numpy as np
from scipy.sparse.linalg import LinearOperator, cg
from scipy.special import expit
from sklearn.datasets import load_digits

import mfac_core as mfac

PENALTY, DAMPING, RTOL = 1e-4, 5e-4, 1e-6


def load(n, rng):
    """Return the products of pairs of pixels, with a column of ones, and whether y < 5."""
    images, digits = load_digits(return_X_y=True)
    chosen = rng.choice(len(digits), n, replace=False)
    i, j = np.triu_indices(64)
    x = images[chosen][:, i] * images[chosen][:, j] / 256
    return np.column_stack([x[:, x.std(axis=0) > 0], np.ones(n)]), digits[chosen] < 5


def rows(x, p, m, rng):
    """Return the rows of G for m of the samples: GᵀG/m estimates H − λI."""
    few = rng.choice(len(x), m, replace=False)
    return x[few] * np.sqrt(p * (1 - p))[few, None]


def hessian(x, weights):
    """Return the product with H as a function, for arrays of NumPy and of JAX."""
    return lambda v: x.T @ (weights * (x @ v)) / len(x) + PENALTY * v


def solve(x, p, g, gradients=None):
    """Solve H s = g by SciPy; return s and the number of iterations."""
    system = LinearOperator((len(g), len(g)), matvec=hessian(x, p * (1 - p)), dtype=x.dtype)
    preconditioner = None
    if gradients is not None:
        preconditioner = mfac.InverseFisher(gradients, damping=DAMPING).to_scipy()
    iterations = []
    s, _ = cg(system, g, rtol=RTOL, M=preconditioner, callback=iterations.append)
    return s, len(iterations)


def count_lineax(x, p, g, gradients=None):
    """Return how many iterations lineax takes; it also waits for s to stand still."""
    import jax
    import jax.numpy as jnp
    import lineax as lx

    jax.config.update("jax_enable_x64", True)
    x, weights, g = jnp.asarray(x), jnp.asarray(p * (1 - p)), jnp.asarray(g)
    positive, options = lx.positive_semidefinite_tag, {}
    if gradients is not None:
        inverse = mfac.InverseFisher(jnp.asarray(gradients), damping=DAMPING)
        preconditioner = lx.FunctionLinearOperator(inverse.matvec, g, positive)
        options = {"preconditioner": preconditioner}
    system = lx.FunctionLinearOperator(hessian(x, weights), g, positive)
    solver = lx.CG(rtol=0.0, atol=RTOL * float(jnp.linalg.norm(g)), norm=jnp.linalg.norm)
    solution = lx.linear_solve(system, g, solver, options=options)
    return int(solution.stats["num_steps"])


def main(argv=None):
    """Train by Newton's method, and count the iterations."""
    parser = argparse.ArgumentParser(description="preconditioned conjugate gradients on digits")
    parser.add_argument("--seed", type=int, default=0, help="of the samples taken, all and few")
    parser.add_argument("--quick", action="store_true", help="fewer samples and steps")
    args = parser.parse_args(argv)

    rng = np.random.default_rng(args.seed)
    n, steps = (300, 2) if args.quick else (1000, 6)
    x, y = load(n, rng)
    sizes = (n // 10, n // 4)
    print("step   ‖gradient‖   plain CG", *(f"  F of {m:3} samples" for m in sizes))
    w = np.zeros(x.shape[1])
    for step in range(steps):
        p = expit(x @ w)
        g = x.T @ (p - y) / n + PENALTY * w
        gradients = [rows(x, p, m, rng) for m in sizes]
        s, plain = solve(x, p, g)
        ours = [solve(x, p, g, few)[1] for few in gradients]
        print(f"{step:4} {np.linalg.norm(g):12.1e} {plain:10}", *(f"{k:17}" for k in ours))
        last, w = (x, p, g), w - s
    try:
        counts = [count_lineax(*last, few) for few in (None, *gradients)]
    except ImportError:
        print("lineax is not installed")
    else:
        print(f"the last by lineax {counts[0]:9}", *(f"{k:17}" for k in counts[1:]))


if __name__ == "__main__":
    main()

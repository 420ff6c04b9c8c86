"""Natural gradients with samples as rows: the ground state of a Heisenberg chain, by minSR.

A wave function ψ(s) of spins s, here a restricted Boltzmann machine, is moved down the gradient of
its energy in the metric of the states: the step x solves Jx = −ε for the centred derivatives J of
log ψ, a row for each sample, and the centred local energies ε. Where there are more parameters than
samples it is Gᵀ(GGᵀ + mλI)⁻¹e, with a matrix as large as the samples are many:
``InverseFisher.solve_rows``. SPRING is the same with a momentum, and goes on from the step before.

The chain is short enough that all states can be summed over, each as a sample with the weight of
its probability, and that the exact energy is known. Run ``python ground_state.py``: it compares
steps and numbers in float32 with all of it in float64.
"""

import argparse
import itertools

import numpy as np

import mfac_core as mfac

DAMPING = 1e-4
LEARNING_RATE = 0.1
MOMENTUM = 0.8


def chain(n):
    """Return the states without magnetisation (m, n), and the Hamiltonian Σ Sᵢ·Sᵢ₊₁ of a ring.

    The signs of Marshall's rule are put into the states, so that the ground state is positive.
    """
    states = [s for s in itertools.product((-1, 1), repeat=n) if sum(s) == 0]
    number = {s: k for k, s in enumerate(states)}
    h = np.zeros((len(states), len(states)))
    for k, s in enumerate(states):
        for i in range(n):
            j = (i + 1) % n
            h[k, k] += s[i] * s[j] / 4
            if s[i] != s[j]:
                flipped = list(s)
                flipped[i], flipped[j] = s[j], s[i]
                h[k, number[tuple(flipped)]] -= 1 / 2
    return np.array(states, float), h


def log_amplitudes(weights, states):
    """Return log ψ = Σⱼ log cosh(W s + b)ⱼ for each state, and its derivatives (m, d)."""
    m, n = states.shape
    w = weights.reshape(-1, n + 1)
    x = np.column_stack([states, np.ones(m, states.dtype)])
    angles = x @ w.T
    derivatives = np.tanh(angles)[:, :, None] * x[:, None, :]
    values = np.logaddexp(angles, -angles).sum(axis=1)
    return values, derivatives.reshape(m, -1)


def energies(weights, states, h):
    """Return probabilities, local energies and derivatives of the states."""
    values, derivatives = log_amplitudes(weights, states)
    psi = np.exp(values - values.max())
    return psi**2 / np.sum(psi**2), h @ psi / psi, derivatives


def step(probabilities, local, derivatives, before, momentum):
    """Return the step down the energy: rows of unit weight are √(m p) (J − mean J)."""
    m = len(local)
    root = np.sqrt(m * probabilities)
    rows = root[:, None] * (derivatives - probabilities @ derivatives)
    e = -root * (local - probabilities @ local)
    inverse = mfac.InverseFisher(rows, damping=DAMPING)
    return momentum * before + inverse.solve_rows(e - momentum * (rows @ before))


def descend(n, hidden, steps, momentum, dtype, seed):
    """Return the energies of all steps."""
    states, h = (array.astype(dtype) for array in chain(n))
    rng = np.random.default_rng(seed)
    weights = (0.1 * rng.standard_normal(hidden * (n + 1))).astype(dtype)
    x, course = np.zeros_like(weights), []
    for _ in range(steps):
        probabilities, local, derivatives = energies(weights, states, h)
        course.append(float(probabilities @ local))
        x = step(probabilities, local, derivatives, x, momentum)
        weights = weights + dtype(LEARNING_RATE) * x
    return course


def main(argv=None):
    """Descend, and compare with the exact ground state."""
    parser = argparse.ArgumentParser(description="ground state of a Heisenberg chain")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights")
    parser.add_argument("--quick", action="store_true", help="a shorter chain")
    args = parser.parse_args(argv)
    n, hidden, steps = (6, 8, 100) if args.quick else (10, 32, 200)
    states, h = chain(n)
    exact = np.linalg.eigvalsh(h)[0]
    print(f"{n} spins, {len(states)} states, {hidden * (n + 1)} parameters")
    print(f"exact energy            {exact:.8f}")
    print(f"error after steps       {steps // 4:>9} {steps // 2:>9} {steps:>9}")
    for name, momentum, dtype in (
        ("minSR, float32", 0.0, np.float32),
        ("minSR, float64", 0.0, np.float64),
        ("SPRING, float32", MOMENTUM, np.float32),
        ("SPRING, float64", MOMENTUM, np.float64),
    ):
        course = descend(n, hidden, steps, momentum, dtype, args.seed)
        errors = [course[k - 1] - exact for k in (steps // 4, steps // 2, steps)]
        print(f"{name:23} " + " ".join(f"{error:9.1e}" for error in errors))


if __name__ == "__main__":
    main()

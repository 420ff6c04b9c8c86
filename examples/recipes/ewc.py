"""Elastic weight consolidation: learn a second task without forgetting the first.

Kirkpatrick et al. ("Overcoming catastrophic forgetting in neural networks", PNAS 2017) train on
task B with a penalty for leaving the weights w_A of task A in directions that mattered to it,

    ½ (w − w_A)ᵀ F_A (w − w_A)

and keep only the diagonal of F_A, since the whole is too large to form. It need not be formed: F_A
is an operator. Its gradients are those of labels drawn from the model itself, so that its mean is
the Fisher matrix; with the true labels it would be the empirical one, which is small where the
model is sure.

Run ``python ewc.py``: task A is digits, task B the same with their pixels in another order.
"""

import argparse

import numpy as np
from softmax import accuracy, draw_labels, fit, gradients, l2, load

import mfac_core as mfac

PENALTY = 1e-3


def consolidation(fisher, old, strength):
    """Return the penalty (strength/2) (w − old)ᵀ F (w − old), and its gradient."""

    def penalty(weights):
        step = weights - old
        return strength / 2 * fisher.quadratic(step), strength * (fisher @ step)

    return penalty


def diagonal_consolidation(fisher, old, strength):
    """Return the same with the diagonal of F: the usual form."""
    diagonal = fisher.diagonal()

    def penalty(weights):
        step = diagonal * (weights - old)
        return strength / 2 * step @ (weights - old), strength * step

    return penalty


def tasks(rng, m):
    """Return training and test images of both tasks; no image is in two of them."""
    x, y = load(rng)
    order = np.append(rng.permutation(x.shape[1] - 1), x.shape[1] - 1)  # the ones stay last
    parts = [(x[a:b], y[a:b]) for a, b in ((0, m), (m, 2 * m), (2 * m, None))]
    test = parts[2]
    a = parts[0], test
    b = tuple((images[:, order], digits) for images, digits in (parts[1], test))
    return a, b


def main(argv=None):
    """Train on A, then on B in several ways, and print the accuracy on both."""
    parser = argparse.ArgumentParser(description="elastic weight consolidation on digits")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks and the drawn labels")
    parser.add_argument("--quick", action="store_true", help="one strength of the penalty")
    args = parser.parse_args(argv)

    rng = np.random.default_rng(args.seed)
    (train_a, test_a), (train_b, test_b) = tasks(rng, 600)
    old = fit(*train_a, l2(PENALTY))
    drawn = draw_labels(old, train_a[0], rng)
    fisher = mfac.EmpiricalFisher(gradients(old, train_a[0], drawn), damping=PENALTY)

    print("accuracy on                 task A   task B    mean")
    both = [np.concatenate(pair) for pair in zip(train_a, train_b, strict=True)]
    report("before task B", old, test_a, test_b)
    report("no penalty", fit(*train_b, l2(PENALTY), start=old), test_a, test_b)
    for strength in (1,) if args.quick else (0.3, 1, 3):
        for name, form in (("diagonal", diagonal_consolidation), ("full", consolidation)):
            new = fit(*train_b, form(fisher, old, strength), start=old)
            report(f"{name} F, strength {strength:g}", new, test_a, test_b)
    report("both tasks at once", fit(*both, l2(PENALTY)), test_a, test_b)


def report(name, weights, test_a, test_b):
    """Print a line of the table."""
    a, b = accuracy(weights, *test_a), accuracy(weights, *test_b)
    print(f"{name:26} {a:7.3f}  {b:7.3f} {(a + b) / 2:7.3f}")


if __name__ == "__main__":
    main()

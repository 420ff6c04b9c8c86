"""Influence functions: which training images help, which harm, and which labels are wrong.

Koh and Liang ("Understanding Black-box Predictions via Influence Functions", ICML 2017) ask how
the loss on other images would change if training image i had never been seen, without training
again. To first order it is

    gᵀ H⁻¹ gᵢ / m

with gᵢ the gradient of image i's loss at the trained weights, g the mean gradient of the other
images' loss, m the number of training images, and H the Hessian of the training loss, in whose
place stands F = λI + (1/m) Σ gᵢ gᵢᵀ. The damping λ is the L2 penalty of the training.

Run ``python influence.py``: on digits of which a tenth have wrong labels it prints how well this
predicts real retraining, and where the wrong labels rank.
"""

import argparse

import numpy as np
from softmax import fit, gradients, l2, load, losses

import mfac_core as mfac

PENALTY = 1e-2


def influences(weights, train, test):
    """Return the predicted change of the test loss when each training image is left out."""
    g = gradients(weights, *train)
    inverse = mfac.InverseFisher(g, damping=PENALTY)
    return g @ (inverse @ gradients(weights, *test).mean(axis=0)) / len(g)


def leave_out(i, weights, train, test):
    """Return the change of the test loss when image i is left out and the model trained again."""
    x, y = (np.delete(part, i, axis=0) for part in train)
    penalty = l2(PENALTY * len(train[1]) / len(y))  # the same objective, less one of its terms
    without = fit(x, y, penalty, start=weights)
    return losses(without, *test).mean() - losses(weights, *test).mean()


def main(argv=None):
    """Train, rank, and check against retraining."""
    parser = argparse.ArgumentParser(description="influence functions on digits")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the wrong labels")
    parser.add_argument("--quick", action="store_true", help="leave out fewer images")
    args = parser.parse_args(argv)

    rng = np.random.default_rng(args.seed)
    x, y = load(rng)
    m, wrong = 600, 60
    train, test = (x[:m], y[:m].copy()), (x[m:], y[m:])
    flipped = rng.choice(m, wrong, replace=False)
    train[1][flipped] = (train[1][flipped] + rng.integers(1, 10, wrong)) % 10

    weights = fit(*train, l2(PENALTY))
    predicted = influences(weights, train, test)

    n = 5 if args.quick else 20
    chosen = np.append(np.argsort(-np.abs(predicted))[:n], rng.choice(m, n, replace=False))
    actual = [leave_out(i, weights, train, test) for i in chosen]
    correlation = np.corrcoef(predicted[chosen], actual)[0, 1]
    slope = np.polyfit(predicted[chosen], actual, 1)[0]
    print(f"Left out and retrained, the {n} of largest influence and {n} at random:")
    print(f"  correlation of predicted and actual change   {correlation:.3f}")
    print(f"  slope, actual over predicted                 {slope:.2f}")

    rankings = {
        "influence, most harmful first": predicted,
        "the same with I in place of F": gradients(weights, *train)
        @ gradients(weights, *test).mean(axis=0),
        "own loss, largest first": -losses(weights, *train),
    }
    print(f"Share of the {wrong} wrong labels among the first {wrong} by:")
    for name, score in rankings.items():
        print(f"  {name:44} {np.isin(np.argsort(score)[:wrong], flipped).mean():.2f}")


if __name__ == "__main__":
    main()

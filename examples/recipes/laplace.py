"""Laplace approximation: error bars for a trained network, and a damping chosen without test data.

MacKay ("A Practical Bayesian Framework for Backpropagation Networks", 1992) takes the posterior of
the weights to be normal around the trained ones, with the inverse curvature as its covariance: here
F⁻¹/m, with one row J(x)/σ of G for each observation, J the derivative of the network's output by
its weights and σ the noise. A prediction's variance is σ² + J F⁻¹ Jᵀ/m, and the logarithm of the
probability of the data under the model (the evidence) is

    log p(y | w) − mλ‖w‖²/2 + (d log λ + log det F⁻¹)/2

which says what damping λ, that is, what prior precision mλ, the data ask for.

Run ``python laplace.py``: for a network on scikit-learn's diabetes data it prints the evidence and
the quality of the predictions for several λ. The test data have no part in the choice.
"""

import argparse

import numpy as np
from scipy.optimize import minimize
from scipy.stats import norm
from sklearn.datasets import load_diabetes

import mfac_core as mfac

HIDDEN, NOISE = 20, 0.7  # the noise σ, in standard deviations of y


def outputs(weights, x):
    """Return the outputs of a network with one layer of tanh, and that layer's outputs."""
    hidden = np.tanh(x @ weights[:-HIDDEN].reshape(-1, HIDDEN))
    return hidden @ weights[-HIDDEN:], hidden


def jacobian(weights, x):
    """Return the derivative of each output by the weights, one a row."""
    hidden = outputs(weights, x)[1]
    back = (1 - hidden**2) * weights[-HIDDEN:]
    return np.hstack([np.einsum("mi,mh->mih", x, back).reshape(len(x), -1), hidden])


def fit(x, y, damping, start):
    """Minimise the mean negative log-likelihood plus λ‖w‖²/2."""

    def objective(weights):
        output, hidden = outputs(weights, x)
        error = (output - y) / NOISE**2 / len(y)
        back = (1 - hidden**2) * weights[-HIDDEN:] * error[:, None]
        slope = np.append((x.T @ back).ravel(), hidden.T @ error) + damping * weights
        return (output - y) @ error / 2 + damping / 2 * weights @ weights, slope

    return minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000}).x


def laplace(weights, x, y, x_new, damping):
    """Return the evidence, and the variance of the network's outputs for new inputs."""
    m, d = len(y), len(weights)
    inverse = mfac.InverseFisher(jacobian(weights, x) / NOISE, damping=damping)
    likelihood = norm.logpdf(y, outputs(weights, x)[0], NOISE).sum()
    prior = d * np.log(damping) - m * damping * weights @ weights
    evidence = likelihood + (prior + inverse.logdet()) / 2
    return evidence, inverse.quadratic(jacobian(weights, x_new).T) / m


def quality(y, mean, deviation):
    """Return the mean negative log-likelihood, and the share of y inside the 90 % intervals."""
    inside = np.abs(y - mean) <= norm.ppf(0.95) * deviation
    return f"{-norm.logpdf(y, mean, deviation).mean():12.3f} {inside.mean():7.0%}"


def main(argv=None):
    """Train with several dampings and print the table."""
    parser = argparse.ArgumentParser(description="Laplace approximation on diabetes")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the first weights")
    parser.add_argument("--quick", action="store_true", help="fewer dampings")
    args = parser.parse_args(argv)

    rng = np.random.default_rng(args.seed)
    x, y = load_diabetes(return_X_y=True)
    order, m = rng.permutation(len(y)), 100
    x, y = x[order], y[order]
    y = (y - y[:m].mean()) / y[:m].std()
    x = np.column_stack([x / x[:m].std(axis=0), np.ones(len(y))])
    start = rng.standard_normal((x.shape[1] + 1) * HIDDEN) / np.sqrt(HIDDEN)

    print("      λ   evidence       σ alone          with Laplace")
    print("                         NLL  in 90 %         NLL  in 90 %")
    for damping in (0.01, 0.1, 1.0) if args.quick else 10.0 ** np.arange(-3, 0.6, 0.5):
        weights = fit(x[:m], y[:m], damping, start)
        evidence, variance = laplace(weights, x[:m], y[:m], x[m:], damping)
        mean = outputs(weights, x[m:])[0]
        plain, ours = (quality(y[m:], mean, np.sqrt(NOISE**2 + v)) for v in (0, variance))
        print(f"{damping:7.4f} {evidence:10.1f} {plain} {ours}")


if __name__ == "__main__":
    main()

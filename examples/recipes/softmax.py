"""Softmax regression on the digits of scikit-learn: what two of the recipes share.

The model is p(class | image) = softmax(image @ W) with one column of W for each class; its d = 650
weights, biases included, are one flat vector.
"""

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.datasets import load_digits

CLASSES = 10


def load(rng):
    """Return the images, with a column of ones for the biases, and their digits, shuffled."""
    x, y = load_digits(return_X_y=True)
    order = rng.permutation(len(y))
    return np.column_stack([x / 16, np.ones(len(y))])[order], y[order]


def logits(weights, x):
    """Return the model's outputs before the softmax, shape (images, classes)."""
    return x @ weights.reshape(-1, CLASSES)


def losses(weights, x, y):
    """Return the cross-entropy of each image."""
    return -log_softmax(logits(weights, x), axis=1)[np.arange(len(y)), y]


def gradients(weights, x, y):
    """Return the gradient of each image's cross-entropy, one a row."""
    delta = softmax(logits(weights, x), axis=1) - np.eye(CLASSES)[y]
    return np.einsum("mi,mc->mic", x, delta).reshape(len(x), -1)


def accuracy(weights, x, y):
    """Return the share of images whose most probable digit is the right one."""
    return np.mean(logits(weights, x).argmax(axis=1) == y)


def draw_labels(weights, x, rng):
    """Draw a digit for each image from the model's own probabilities."""
    cumulative = softmax(logits(weights, x), axis=1).cumsum(axis=1)
    return (rng.random((len(x), 1)) > cumulative[:, :-1]).sum(axis=1)


def fit(x, y, penalty, start=None):
    """Minimise the mean cross-entropy plus ``penalty(weights)``, a value and its gradient."""

    def objective(weights):
        value, slope = penalty(weights)
        delta = softmax(logits(weights, x), axis=1) - np.eye(CLASSES)[y]
        slope = slope + (x.T @ delta / len(y)).ravel()
        return losses(weights, x, y).mean() + value, slope

    start = np.zeros(x.shape[1] * CLASSES) if start is None else start
    options = {"maxiter": 5000, "maxcor": 30, "ftol": 1e-15, "gtol": 1e-7}
    return minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x


def l2(damping):
    """Return the penalty λ‖w‖²/2: to an inverse Fisher, λ is the damping."""
    return lambda weights: (damping / 2 * weights @ weights, damping * weights)

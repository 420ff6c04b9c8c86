"""What only JAX needs: a model's gradients as rows that are never stored."""

from mfac_core.jax._model_gradients import ModelGradients as ModelGradients

__all__ = ["ModelGradients"]

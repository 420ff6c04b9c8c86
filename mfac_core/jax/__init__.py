"""What only JAX needs: a model's gradients as rows that are never stored."""

from mfac_core._extras import missing

try:
    from mfac_core.jax._model_gradients import ModelGradients as ModelGradients
except ModuleNotFoundError as error:
    raise missing(error, "jax") from None

__all__ = ["ModelGradients"]

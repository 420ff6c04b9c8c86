"""The optimiser for PyTorch, and gradients of single samples."""

from mfac_core.torch._optimizer import MFAC as MFAC
from mfac_core.torch._per_sample import per_sample_gradients as per_sample_gradients

__all__ = ["MFAC", "per_sample_gradients"]

"""The optimiser for PyTorch, gradients of its models, and pruning them."""

from mfac_core.torch._optimizer import MFAC as MFAC
from mfac_core.torch._per_sample import per_sample_gradients as per_sample_gradients
from mfac_core.torch._rows import gradient_rows as gradient_rows

__all__ = ["MFAC", "gradient_rows", "per_sample_gradients"]

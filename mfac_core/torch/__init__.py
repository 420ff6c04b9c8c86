"""The optimiser for PyTorch, gradients of its models, and pruning them."""

from mfac_core._extras import missing

try:
    from mfac_core.torch._model_gradients import ModelGradients as ModelGradients
except ModuleNotFoundError as error:
    raise missing(error, "torch") from None
from mfac_core.torch._optimizer import MFAC as MFAC
from mfac_core.torch._per_sample import per_sample_gradients as per_sample_gradients
from mfac_core.torch._pruner import Pruner as Pruner
from mfac_core.torch._report import LayerReport as LayerReport
from mfac_core.torch._report import Report as Report
from mfac_core.torch._report import StepReport as StepReport
from mfac_core.torch._rows import gradient_rows as gradient_rows
from mfac_core.torch._schedule import prune_model as prune_model

__all__ = [
    "MFAC",
    "LayerReport",
    "ModelGradients",
    "Pruner",
    "Report",
    "StepReport",
    "gradient_rows",
    "per_sample_gradients",
    "prune_model",
]

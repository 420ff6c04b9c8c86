"""Pruning by the inverse Fisher matrix: what to remove, and how to change what is kept.

To second order, changing the weights by δ raises the loss by ½ δᵀFδ. Removing the weights S sets
δ_S = −w_S; the best change of the kept weights R is then δ_R = F_RR⁻¹ F_RS w_S, the *joint* update.
"""

from mfac_core.pruning._gradual import GradualStep as GradualStep
from mfac_core.pruning._gradual import exponential_schedule as exponential_schedule
from mfac_core.pruning._gradual import gradual as gradual
from mfac_core.pruning._gradual import polynomial_schedule as polynomial_schedule
from mfac_core.pruning._layers import LayerShare as LayerShare
from mfac_core.pruning._prune import PrunedWeights as PrunedWeights
from mfac_core.pruning._prune import obs_update as obs_update
from mfac_core.pruning._prune import prune as prune
from mfac_core.pruning._prune import saliency as saliency

__all__ = [
    "GradualStep",
    "LayerShare",
    "PrunedWeights",
    "exponential_schedule",
    "gradual",
    "obs_update",
    "polynomial_schedule",
    "prune",
    "saliency",
]

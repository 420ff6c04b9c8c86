"""Which training samples help, which harm, and what leaving some of them out would do.

Between gradients of samples all of it is m-sized. With the gradients g₁ … g_m of the training
samples as rows of G, F = λI + GᵀG/m for the Hessian of the training loss, and A = mλI + GGᵀ,

    g_qᵀ F⁻¹ gᵢ / m = [G g_q]ᵀ A⁻¹ eᵢ

so that one projection of the queries is all that touches the d parameters.
"""

from mfac_core.influence._influence import Influence as Influence
from mfac_core.influence._influence import Selection as Selection

__all__ = ["Influence", "Selection"]

"""What is said where an optional package is missing."""

from __future__ import annotations


def missing(error: ModuleNotFoundError, extra: str) -> ModuleNotFoundError:
    """Return an error that names the extra for what could not be imported.

    Of a package that is there but broken the own error says more.
    """
    if error.name not in ("torch", "jax", "jaxlib", "optax"):
        return error
    msg = (
        f"this part of mfac_core needs {error.name}, which is not installed: python -m pip install "
        f'"mfac_core[{extra}]", or any other build of it'
    )
    return ModuleNotFoundError(msg, name=error.name)

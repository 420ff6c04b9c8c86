"""Gradients sharded by JAX over several devices: no ``reduce`` is needed, JAX moves what it must.

Run ``python examples/ranks/jax_sharding.py``: it makes two devices of one CPU.
"""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mfac_core as mfac

M, D = 64, 30_000


def main() -> None:
    """Compare a product over devices with the same on one."""
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((M, D)).astype(np.float32)
    x = rng.standard_normal(D).astype(np.float32)
    mesh = jax.make_mesh((jax.device_count(),), ("params",), axis_types=(AxisType.Auto,))
    columns = NamedSharding(mesh, PartitionSpec(None, "params"))
    params = NamedSharding(mesh, PartitionSpec("params"))

    sharded = jax.device_put(jnp.asarray(gradients), columns)
    inverse = mfac.InverseFisher(sharded, damping=1e-3)
    y = inverse @ jax.device_put(jnp.asarray(x), params)
    expected = mfac.ihvp(gradients, x, damping=1e-3)
    error = np.linalg.norm(np.asarray(y) - expected) / np.linalg.norm(expected)
    print(f"{jax.device_count()} devices, the product lives on {len(y.sharding.device_set)}")
    print(f"relative error {error:.1e}")


if __name__ == "__main__":
    main()

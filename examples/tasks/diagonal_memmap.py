"""Compute the diagonal of F⁻¹ from 4 GB of gradients in a file, and keep little of it in memory."""

import numpy as np

import mfac_core as mfac

M, D, FILE = 256, 4_000_000, "gradients.npy"
if __name__ == "__main__":
    rng = np.random.default_rng(0)
    gradients = np.lib.format.open_memmap(FILE, "w+", np.float32, (M, D))
    for row in gradients:  # yours come from a model, one after the other
        row[:] = rng.standard_normal(D, dtype=np.float32)
    gradients.flush()

    inverse = mfac.InverseFisher(np.load(FILE, mmap_mode="r"), damping=1e-3)  # reads it once,
    diagonal = inverse.diagonal()  # and once more
    np.save("diagonal.npy", diagonal)
    print(f"least {diagonal.min():.6g}, largest {diagonal.max():.6g}, mean {diagonal.mean():.6g}")

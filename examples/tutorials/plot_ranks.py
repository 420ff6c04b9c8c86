"""
Several ranks
=============

You have processes or machines, and each holds some columns of the gradients: its shards of the
parameters. With a ``reduce=`` that sums a small array over ranks, each asks the same questions as
on one machine, and gets the answers for its own columns.
"""

# %%
# Ranks, here as threads
# ----------------------
#
# So that this page runs anywhere, its ranks are threads, and the sum waits for all of them. It
# stands for the call of a library:
#
# - mpi4py: ``reduce = comm.allreduce``
# - torch.distributed: ``t = torch.from_numpy(x); dist.all_reduce(t); return t.numpy()``, and with
#   NCCL ``.cuda()`` before and ``.cpu()`` after.

import threading
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import mfac_core as mfac
from mfac_core.torch import per_sample_gradients


class Ranks:
    def __init__(self, size):
        self.size, self.travelled = size, 0
        self._there, self._parts = threading.Barrier(size, timeout=60), [None] * size

    def reduce_of(self, rank):
        def reduce(x):
            self._parts[rank] = x
            self._there.wait()
            total = np.sum(self._parts, axis=0)
            self.travelled += x.nbytes if rank == 0 else 0
            self._there.wait()
            return total

        return reduce

    def run(self, program):
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(program, range(self.size)))


# %%
# The gradients
# -------------
#
# Those of a small network for the handwritten digits. Every rank would compute its own columns, by
# ``gradient_rows(..., group=group)`` or under ``fully_shard``: see
# :func:`~mfac_core.torch.gradient_rows`. Here one array is cut.

torch.manual_seed(0)
x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
rows = per_sample_gradients(model, cross_entropy, x[:256].float() / 16, y[:256]).numpy()
m, d = rows.shape
direction = np.random.default_rng(0).standard_normal(d, dtype=np.float32)
print(f"{m} gradients of {d:,} weights")

# %%
# One program for each rank
# -------------------------
#
# Vectors, diagonals and indices are those of the rank's own columns; numbers such as ``logdet``
# are of the whole matrix, the same on all ranks. All ranks make the same calls in the same order.

CALLS = ("set-up", "product", "diagonal", "log det")


def asked(size):
    ranks = Ranks(size)
    stops = np.linspace(0, d, size + 1).astype(int)

    def program(rank):
        mine, sent = slice(stops[rank], stops[rank + 1]), [0]
        own = rows[:, mine]
        inverse = mfac.InverseFisher(own, damping=1e-3, reduce=ranks.reduce_of(rank))
        sent.append(ranks.travelled)
        product = inverse @ direction[mine]
        sent.append(ranks.travelled)
        diagonal = inverse.diagonal()
        sent.append(ranks.travelled)
        logdet = inverse.logdet()
        sent.append(ranks.travelled)
        return product, diagonal, float(logdet), own.nbytes, np.diff(sent)

    return ranks.run(program)


alone = mfac.InverseFisher(rows, damping=1e-3)
for size in (2, 4):
    products, diagonals, logdets, *_ = zip(*asked(size), strict=True)
    assert len(set(logdets)) == 1
    for name, found, expected in (
        ("product", np.concatenate(products), alone @ direction),
        ("diagonal", np.concatenate(diagonals), alone.diagonal()),
        ("log det", logdets[0], alone.logdet()),
    ):
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        print(f"{size} ranks, {name:8} relative difference from one rank {error:.1e}")
        assert error < 1e-5

# %%
# What is held, and what travels
# ------------------------------
#
# The gradients are shared out; of them nothing travels. What does are sums of m × m numbers once
# and of m numbers or fewer in a query, whatever d is. How fast that is depends on the network
# between the ranks, and threads in one process cannot show it.

sizes = (1, 2, 4, 8)
found = [asked(size)[0] for size in sizes]
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
left.bar([str(size) for size in sizes], [nbytes / 1e6 for *_, nbytes, _ in found])
left.set(xlabel="ranks", ylabel="MB of gradients on the first rank")
right.bar(CALLS, found[1][-1])
right.axhline(rows.nbytes, linestyle=":", label="the gradients")
right.set(yscale="log", ylim=1, ylabel="bytes that a rank puts into sums")
right.legend()
assert found[1][-1].max() < rows.nbytes / 5

# %%
# A window on every rank
# ----------------------
#
# The sliding form takes ``reduce=`` as well; an optimiser that runs on shards needs nothing else.
# A gradient that holds a NaN on one rank makes the sums NaN on all, and all refuse it together:
# nobody waits for a rank that has stopped.


def window_of(rank):
    own = rows[:, rank * (d // 2) : d if rank else d // 2]
    window = mfac.SlidingInverseFisher(own.shape[1], 32, damping=1e-3, reduce=two.reduce_of(rank))
    for g in own[:48]:
        step = window.append_matvec(g)
    bad = own[48].copy()
    bad[0] = np.nan if rank == 0 else bad[0]
    try:
        window.append(bad)
    except ValueError as error:
        return step, str(error)
    raise AssertionError("a NaN was taken")


two = Ranks(2)
(left_step, refusal), (right_step, other) = two.run(window_of)
held = mfac.InverseFisher(rows[16:48], damping=1e-3) @ rows[47]
error = np.linalg.norm(np.append(left_step, right_step) - held) / np.linalg.norm(held)
print(f"the step differs from that on one rank by {error:.1e}")
print("rank 0:", refusal)
print("rank 1:", other)
assert error < 1e-4

# %%
# :class:`~mfac_core.torch.MFAC` does all this by itself for DTensors, as of ``fully_shard``: see
# :doc:`../optimisers`. JAX arrays that are sharded need no ``reduce``. Complete programs for
# mpi4py, torch.distributed and JAX are in ``examples/ranks``; :doc:`../storage` says what travels
# in which call.

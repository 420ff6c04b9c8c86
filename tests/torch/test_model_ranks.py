"""Rows and pruning on two ranks, against one rank that has all batches."""

import subprocess
import sys
import textwrap
from pathlib import Path

PREAMBLE = """
import os
import sys
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from mfac_core.torch import Pruner, gradient_rows

rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)
    )

def loss_fn(model, batch):
    return cross_entropy(model(batch[0]), batch[1])

generator = torch.Generator().manual_seed(1)
data = [
    (torch.randn(4, 5, generator=generator), torch.randint(3, (4,), generator=generator))
    for _ in range(12)
]
"""


def on_two_ranks(tmp_path, body):
    # Left at once: threads of gloo that DDP still has may end an interpreter that winds down.
    script = PREAMBLE + textwrap.dedent(body) + "\ndist.destroy_process_group()\nos._exit(0)\n"
    store = tmp_path / "store"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(store)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors


def test_rows_of_all_ranks_by_columns(tmp_path):
    on_two_ranks(
        tmp_path,
        """
        model = network().eval()
        own = data[rank::2]
        rows = gradient_rows(model, loss_fn, own, group=dist.group.WORLD)
        expected = gradient_rows(model, loss_fn, data)
        assert torch.allclose(rows, expected.tensor_split(2, dim=1)[rank], rtol=0, atol=1e-6)
        inside = DistributedDataParallel(model)
        assert torch.equal(gradient_rows(inside, loss_fn, own), expected[rank::2])
        try:
            gradient_rows(model, loss_fn, own[rank:], group=dist.group.WORLD)
        except ValueError as error:
            assert "as many on every rank, got [6, 5]" in str(error)
        else:
            raise AssertionError
        """,
    )


def test_a_model_is_pruned_alike_on_all_ranks(tmp_path):
    on_two_ranks(
        tmp_path,
        """
        model, alone = network(), network()
        inside = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(inside.parameters(), 0.1)
        pruner = Pruner(inside, loss_fn, data[rank::2])
        report = pruner.step(0.5)
        expected = Pruner(alone, loss_fn, data[::2] + data[1::2]).step(0.5)
        assert report.rows == expected.rows == 12
        assert abs(report.loss_before - expected.loss_before) < 1e-6
        for a, b in zip(model.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-5)
        for batch in data[rank::2]:
            optimizer.zero_grad()
            loss_fn(inside, batch).backward()
            optimizer.step()
        pruner.step(0.75)
        pruner.finalize()
        for p in model.parameters():
            parts = [torch.empty_like(p) for _ in range(2)]
            dist.all_gather(parts, p.detach())
            assert torch.equal(*parts)
        assert sum(int((model[i].weight == 0).sum()) for i in (0, 2)) == 24
        """,
    )


def test_rows_of_a_sharded_model_are_the_columns_of_its_shards(tmp_path):
    """By the operators' ``reduce``, the numbers of one process that has all batches."""
    on_two_ranks(
        tmp_path,
        """
        import numpy as np
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from mfac_core import InverseFisher
        from mfac_core.torch import per_sample_gradients

        model, alone = network().eval(), network().eval()
        whole = [
            (torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]))
            for a, b in zip(data[::2], data[1::2], strict=True)
        ]
        expected = gradient_rows(alone, loss_fn, whole)
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        before = [p.to_local().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: (_ for _ in ()).throw(AssertionError))
        rows = gradient_rows(model, loss_fn, data[rank::2])
        columns, start = [], 0
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            assert p.grad is None and p.requires_grad
            index = torch.arange(start, start + q.numel()).reshape(q.shape)
            parts = index.tensor_split([-(-len(q) // 2)])
            columns.append(parts[rank].flatten())
            start += q.numel()
        assert torch.allclose(rows, expected[:, torch.cat(columns)], rtol=0, atol=1e-6)
        assert all(torch.equal(p.to_local(), q) for p, q in zip(model.parameters(), before))

        def reduce(x):
            total = torch.from_numpy(x)
            dist.all_reduce(total)
            return total.numpy()

        x = torch.linspace(-1.0, 1.0, start)
        y = InverseFisher(rows, damping=0.1, reduce=reduce) @ x[torch.cat(columns)]
        z = InverseFisher(expected, damping=0.1) @ x
        assert torch.allclose(y, z[torch.cat(columns)], rtol=0, atol=1e-5)

        bad = [list(each) for each in data[rank::2]]
        if rank:
            bad[2][0] = bad[2][0] * torch.nan
        for batches, words in ((bad, "for batch 2"), (data[rank::2][rank:], "as many on every")):
            try:
                gradient_rows(model, loss_fn, batches)
            except ValueError as error:
                assert words in str(error), error
            else:
                raise AssertionError
        assert torch.equal(gradient_rows(model, loss_fn, data[rank::2]), rows)
        for refused in (
            lambda: Pruner(model, loss_fn, data),
            lambda: per_sample_gradients(model, cross_entropy, *data[0]),
            lambda: gradient_rows(model, loss_fn, data, group=dist.group.WORLD),
        ):
            try:
                refused()
            except NotImplementedError as error:
                assert "DTensor" in str(error)
            else:
                raise AssertionError
        """,
    )

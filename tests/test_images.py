"""The image data module: splits, noise, augmentation, resuming, bad input; its sources are in `test_image_sources`."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from lightning.pytorch import LightningModule, Trainer
from scipy import stats
from scripts import run_script
from sklearn.datasets import load_digits
from test_image_sources import all_of, make_folder, ready, write_folder
from test_loaders import SaveEverywhere

from lit_logits.datamodules import ImageDataModule
from lit_logits.datamodules.images.presets import PRESETS
from lit_logits.datamodules.images.transforms import (
    centre_box,
    crop_to_array,
    normalize,
    random_box,
    shift_and_flip,
    to_rgb,
)
from lit_logits.datamodules.sampling import add_label_noise, hash_uniform, hold_out, pick_balanced

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def make(digits_cache):
    """Build a data module over the digits, ready for use."""
    return lambda **kwargs: ready(ImageDataModule(**{"cache_dir": digits_cache, **kwargs}))


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_transformers_dicts(make, num_workers):
    data = make(num_workers=num_workers, batch_size=50)
    for loader, count in ((data.train_dataloader(), 21), (data.val_dataloader(), 8)):
        batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
        assert len(batches) == len(loader) == count
        for batch in batches:
            assert list(batch) == ["pixel_values", "labels"]
            size = len(batch["labels"])
            assert batch["pixel_values"].shape == (size, 3, 8, 8)
            assert (batch["pixel_values"].dtype, batch["labels"].dtype) == (torch.float32, torch.int64)
        assert {len(batch["labels"]) for batch in batches[:-1]} == {50}
    assert len(batches[-1]["labels"]) == 9  # the last batch of validation is short, and kept
    assert all(batch["pixel_values"].dtype == torch.uint8 for batch in loader)  # on the wire


def test_classes_are_known_before_anything_is_prepared(tmp_path):
    data = ImageDataModule(cache_dir=str(tmp_path / "cache"))
    assert (data.num_classes, data.class_names) == (10, list("0123456789"))
    assert not (tmp_path / "cache").exists()


def test_all_digits_are_there_once_and_normalised(make):
    """Oracle: scikit-learn's arrays, scaled in float64."""
    digits = load_digits()
    data = make(augment=False, batch_size=1079)
    mean, std = (digits.images / 16).mean(), (digits.images / 16).std()
    found = Counter()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batch = all_of(data, loader)
        grey = batch["pixel_values"] * std + mean
        assert torch.equal(batch["pixel_values"][:, 0], batch["pixel_values"][:, 2])
        values = (grey[:, 0] * 16).round().int().flatten(1)
        assert (grey[:, 0] * 16 - values.view(-1, 8, 8)).abs().max() < 0.04  # of 255 / 16 rounded
        found.update((*row, label) for row, label in zip(values.tolist(), batch["labels"].tolist(), strict=True))
    rows = digits.data.astype(int).tolist()
    assert found == Counter((*row, label) for row, label in zip(rows, digits.target.tolist(), strict=True))


def test_constants_of_the_digits_are_those_of_the_data():
    values = load_digits().images / 16
    assert PRESETS["digits"].mean == (round(values.mean(), 4),) * 3
    assert PRESETS["digits"].std == (round(values.std(), 4),) * 3


def test_given_constants_replace_those_of_the_source(make):
    plain = make(augment=False)
    own = make(augment=False, mean=[0.1, 0.2, 0.3], std=[0.5, 1.0, 2.0])
    raw = torch.cat([batch["pixel_values"] for batch in own.val_dataloader()]).double() / 255
    expected = torch.stack([(raw[:, c] - m) / s for c, (m, s) in enumerate([(0.1, 0.5), (0.2, 1.0), (0.3, 2.0)])], 1)
    torch.testing.assert_close(all_of(own, own.val_dataloader())["pixel_values"].double(), expected, atol=1e-6, rtol=0)
    only_std = make(augment=False, std=[1.0, 1.0, 1.0])
    scaled = all_of(only_std, only_std.val_dataloader())["pixel_values"]
    torch.testing.assert_close(scaled, all_of(plain, plain.val_dataloader())["pixel_values"] * 0.376)


def test_digits_are_enlarged_on_request(make, tmp_path):
    data = make(image_size=20, augment=False, cache_dir=str(tmp_path))
    small = make(augment=False)
    item, own = data._items["val"][3], small._items["val"][3]
    image = PIL.Image.fromarray(own["pixel_values"][0].numpy())
    expected = np.asarray(image.resize((20, 20), PIL.Image.Resampling.BILINEAR))
    assert np.array_equal(item["pixel_values"][1].numpy(), expected)
    assert item["labels"] == own["labels"]


def test_batches_reach_the_model_in_the_trainers_precision(make):
    data = make(batch_size=400)
    seen = []

    class Model(LightningModule):
        def validation_step(self, batch, batch_idx):
            seen.append((batch["pixel_values"].dtype, batch["labels"].dtype))

    for precision in ("bf16-true", "64-true", "32-true"):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        Trainer(precision=precision, **quiet).validate(Model(), datamodule=data, verbose=False)
    assert seen == [(kind, torch.int64) for kind in (torch.bfloat16, torch.float64, torch.float32)]


# ---------------------------------------------------------------- augmentation


def loop_crop_and_flip(images, shifts, flips, padding_mode):
    """Pad, cut out and mirror one image after the other."""
    out, p = [], int(shifts.abs().max())
    for image, (dy, dx), flip in zip(images, shifts.tolist(), flips.tolist(), strict=True):
        mode = "constant" if padding_mode == "zeros" else "reflect"
        padded = torch.nn.functional.pad(image[None].float(), (p,) * 4, mode=mode)[0].to(image.dtype)
        height, width = image.shape[1:]
        crop = padded[:, p + dy : p + dy + height, p + dx : p + dx + width]
        out.append(crop.flip(-1) if flip else crop)
    return torch.stack(out)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("shape", [(40, 3, 7, 5), (40, 1, 32, 32), (1, 3, 4, 4)])
def test_shift_and_flip_is_a_loop_over_padded_crops(shape, padding_mode):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    shifts = torch.randint(-3, 4, (shape[0], 2), generator=generator)
    flips = torch.rand(shape[0], generator=generator) < 0.5
    expected = loop_crop_and_flip(images, shifts, flips, padding_mode)
    result = shift_and_flip(images, shifts, flips=flips, padding_mode=padding_mode)
    assert result.dtype == torch.uint8
    assert torch.equal(result, expected)
    floats = shift_and_flip(images.float(), shifts, flips=flips, padding_mode=padding_mode)
    assert torch.equal(floats, expected.float())


def test_normalize_is_the_formula_in_float64():
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.3, 0.4])
    expected = (images.double() / 255 - mean.double()[:, None, None]) / std.double()[:, None, None]
    result = normalize(images, mean, std)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, atol=2e-6, rtol=0)


def test_training_digits_are_shifted_by_a_pixel_and_never_mirrored(make):
    data, plain = make(), make(augment=False)
    items = data._items["train"].__getitems__(list(range(1000)))
    assert Counter(map(tuple, items["shifts"].tolist())).keys() == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    assert not items["flips"].any()
    batch = data.on_after_batch_transfer(items, 0)
    raw = plain._items["train"].__getitems__(list(range(1000)))
    expected = loop_crop_and_flip(raw["pixel_values"], items["shifts"], items["flips"], "zeros")
    torch.testing.assert_close(batch["pixel_values"], normalize(expected, *data._moments))
    assert "shifts" not in data._items["val"][0]


def test_draws_differ_between_images_epochs_and_seeds_and_come_back(make):
    def shifts(epoch, seed=42):
        items = make(seed=seed)._items["train"]
        items.set_epoch(epoch)
        return items.__getitems__(list(range(200)))["shifts"]

    assert torch.equal(shifts(1), shifts(1))
    assert len(set(map(tuple, shifts(0).tolist()))) == 9
    for other in (shifts(0), shifts(2), shifts(1, seed=7)):
        assert 0.03 < (shifts(1) == other).all(1).float().mean() < 0.25  # 1 / 9 by chance


def test_epochs_of_the_loader_draw_anew(make):
    """Also in a worker, which gets a copy of the items."""
    loader = make(num_workers=1, batch_size=500).train_dataloader()
    for epoch in range(2):
        shifts = torch.cat([batch["shifts"] for batch in loader])
        generator = torch.Generator().manual_seed(42 * 1_000_003 + epoch)
        order = torch.randperm(1079, generator=generator)[:1000].numpy()
        draws = hash_uniform(order, 3, "augment", 42, epoch)
        assert shifts.tolist() == (np.floor(draws[:, 1:] * 3) - 1).astype(int).tolist()


# ---------------------------------------------------------------- crops of large images


def loop_random_box(width, height, draws):
    """torchvision's `RandomResizedCrop.get_params`, with its draws handed in."""
    left_draw, upper_draw, areas, ratios = draws[0], draws[1], draws[2:12], draws[12:22]
    for area_draw, ratio_draw in zip(areas, ratios, strict=True):
        area = width * height * (0.08 + (1.0 - 0.08) * area_draw)
        log_ratio = np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * ratio_draw
        w, h = round(np.sqrt(area * np.exp(log_ratio))), round(np.sqrt(area / np.exp(log_ratio)))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(left_draw * (width - w + 1)), int(upper_draw * (height - h + 1))
            return left, upper, left + w, upper + h
    ratio = width / height
    if ratio < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif ratio > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


@pytest.mark.parametrize("size", [(100, 80), (30, 200), (400, 20), (1, 1), (5, 3)])
def test_random_box_is_torchvisions(size):
    draws = np.random.default_rng(0).random((300, 22))
    draws[0] = 1 - 2**-53
    for row in draws:
        box = random_box(*size, row)
        assert tuple(box) == loop_random_box(*size, row)
        assert 0 <= box.left < box.right <= size[0]
        assert 0 <= box.upper < box.lower <= size[1]


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 112)])
def test_central_crop_is_that_of_the_resized_image(size):
    """Oracle: resize the shorter side to 16 · 8 / 7, then cut; both sides divide."""
    rng = np.random.default_rng(0)
    image = PIL.Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    small = image.resize((size[0] // 2, size[1] // 2), PIL.Image.Resampling.BILINEAR)
    left, upper = (small.width - 28) // 2, (small.height - 28) // 2
    expected = np.asarray(small.crop((left, upper, left + 28, upper + 28))).transpose(2, 0, 1)
    result = crop_to_array(image, centre_box(*size, ratio=256 / 224), 28)
    assert np.abs(result.astype(int) - expected).max() <= 1


def test_large_images_are_cropped_where_they_are_decoded(tmp_path):
    write_folder(tmp_path / "images", size=(120, 90), count=10)
    data = ready(make_folder(tmp_path, image_size=72, val_fraction=0.2, test_fraction=0, num_workers=1))
    assert not (tmp_path / "cache").exists()
    train, val = data._items["train"], data._items["val"]
    assert len(train) == 16
    files = [tmp_path / "images" / name / f"{i}.png" for name in "ab" for i in (0, 1, *range(2, 10))]
    rows = data.images.splits["train"]
    assert {Path(rows[int(row)]["image"].filename) for row in (*train.rows, *val.rows)} == set(files)
    for i in range(len(val)):
        image = rows[int(val.rows[i])]["image"].convert("RGB")
        side = 90 * 224 / 256
        box = ((120 - side) / 2, (90 - side) / 2, (120 + side) / 2, (90 + side) / 2)
        expected = np.asarray(image.resize((72, 72), PIL.Image.Resampling.BILINEAR, box=box)).transpose(2, 0, 1)
        assert np.array_equal(val[i]["pixel_values"].numpy(), expected)
    loader = data.train_dataloader()
    raw = [batch for _ in range(2) for batch in loader]
    flips = torch.cat([batch["flips"] for batch in raw])
    assert 4 < flips.sum() < len(flips) - 4
    train.set_epoch(1)
    draws = hash_uniform(np.arange(16), 23, "augment", 42, 1)
    for i in range(16):
        image = rows[int(train.rows[i])]["image"].convert("RGB")
        box = loop_random_box(120, 90, draws[i, 1:])
        expected = np.asarray(image.resize((72, 72), PIL.Image.Resampling.BILINEAR, box=box)).transpose(2, 0, 1)
        item = {name: tensor[None] for name, tensor in train[i].items()}
        assert np.array_equal(item["pixel_values"][0].numpy(), expected)
        expected = expected[:, :, ::-1] if draws[i, 0] < 0.5 else expected
        result = data.on_after_batch_transfer(item, 0)["pixel_values"]
        torch.testing.assert_close(result[0], normalize(torch.tensor(expected.copy())[None], *data._moments)[0])


def test_large_digits_are_shifted_and_not_cropped(make, tmp_path):
    data = make(image_size=72, max_train_samples=20, batch_size=4, cache_dir=str(tmp_path))
    batch = next(iter(data.train_dataloader()))
    assert batch["pixel_values"].shape == (4, 3, 72, 72)
    assert batch["shifts"].abs().max() <= 9
    assert not list(tmp_path.glob("images-*"))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1", "I;16"])
def test_every_mode_becomes_rgb(mode, recwarn):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels)
    if mode == "I;16":
        image = PIL.Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        expected = np.repeat(pixels[..., :1], 3, axis=2)
    else:
        image = image.convert(mode)
        expected = np.asarray(image.convert("RGB"))
    if mode == "P":
        image.info["transparency"] = b"\x00\xff"
    result = to_rgb(image)
    assert result.mode == "RGB"
    assert np.array_equal(np.asarray(result), expected)
    assert not recwarn.list


# ---------------------------------------------------------------- draws, splits, noise


def test_hash_uniform_is_splitmix64_in_whole_numbers():
    """Oracle: the algorithm in Python's integers, started at the digest."""
    import hashlib

    start = int(hashlib.sha256(repr(("a", 1)).encode()).hexdigest()[:16], 16)

    def number(position):
        z = (start + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return ((z ^ (z >> 31)) >> 11) / 2**53

    draws = hash_uniform(np.array([0, 7, 123_456_789]), 3, "a", 1)
    assert draws.tolist() == [[number(3 * i + j) for j in range(3)] for i in (0, 7, 123_456_789)]


def test_hash_uniform_is_uniform_and_uncorrelated():
    draws = hash_uniform(np.arange(20_000), 3, "x", 0)
    other = hash_uniform(np.arange(20_000), 3, "x", 1)
    for column in draws.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    pairs = np.corrcoef(np.concatenate([draws[:-1], draws[1:], other[1:]], axis=1).T) - np.eye(9)
    assert np.abs(pairs).max() < 0.04  # 5 standard deviations


@pytest.mark.parametrize("fractions", [{"val": 0.2}, {"val": 0.1, "test": 0.25}, {"val": 0.0, "test": 0.3}])
def test_held_out_rows_are_stratified_and_disjoint(fractions):
    rng = np.random.default_rng(0)
    labels = rng.choice(5, 997, p=[0.5, 0.3, 0.1, 0.09, 0.01])
    held = hold_out(labels, fractions, seed=3)
    assert sorted(np.concatenate(list(held.values())).tolist()) == list(range(997))
    for name, fraction in fractions.items():
        assert len(held[name]) == round(fraction * 997)
        for label, count in enumerate(np.bincount(labels)):
            assert abs((labels[held[name]] == label).sum() - len(held[name]) * count / 997) < 1
    assert all((np.diff(rows) > 0).all() for rows in held.values())
    again, other = hold_out(labels, fractions, seed=3), hold_out(labels, fractions, seed=4)
    for name, fraction in fractions.items():
        assert np.array_equal(held[name], again[name])
        assert not fraction or not np.array_equal(held[name], other[name])


def test_rare_class_stays_in_training():
    labels = np.array([0] * 50 + [1, 2, 2])
    for seed in range(20):
        held = hold_out(labels, {"val": 0.3, "test": 0.3}, seed)
        assert set(labels[held["train"]]) == {0, 1, 2}


def test_every_row_of_a_class_of_one_is_dealt_out_where_nothing_else_is_left():
    held = hold_out(np.arange(10), {"val": 0.2, "test": 0.3}, seed=0)
    assert {name: len(rows) for name, rows in held.items()} == {"train": 5, "val": 2, "test": 3}
    assert sorted(np.concatenate(list(held.values())).tolist()) == list(range(10))


def test_small_fraction_holds_out_an_image():
    assert len(hold_out(np.zeros(10, int), {"val": 0.01}, seed=0)["val"]) == 1


def test_subset_is_balanced_and_grows():
    rng = np.random.default_rng(0)
    labels = rng.choice(4, 500, p=[0.55, 0.3, 0.14, 0.01])
    small, large = pick_balanced(labels, 15, seed=1), pick_balanced(labels, 90, seed=1)
    assert np.ptp(np.bincount(labels[small])) <= 1
    assert np.ptp(np.bincount(labels[large])[:3]) <= 1  # the rarest class is used up
    assert set(small) < set(large)
    assert len(large) == len(set(large.tolist())) == 90
    assert np.array_equal(pick_balanced(labels, 1000, seed=1), np.arange(500))
    assert not np.array_equal(small, pick_balanced(labels, 15, seed=2))


def test_noise_takes_its_share_and_every_other_class_alike():
    labels = np.arange(20_000) % 5
    noisy = add_label_noise(labels, 0.4, 5, seed=0)
    assert (noisy != labels).sum() == 8000
    table = np.zeros((5, 5), int)
    np.add.at(table, (labels, noisy), 1)
    for label in range(5):
        assert stats.chisquare(np.delete(table[label], label)).pvalue > 1e-3
    little = add_label_noise(labels, 0.1, 5, seed=0)
    wrong = little != labels
    assert wrong.sum() == 2000
    assert np.array_equal(little[wrong], noisy[wrong])
    assert np.array_equal(noisy, add_label_noise(labels, 0.4, 5, seed=0))
    assert not np.array_equal(noisy, add_label_noise(labels, 0.4, 5, seed=1))


def test_noise_and_subset_are_for_training_only(make):
    plain, hard = make(), make(max_train_samples=100, label_noise=0.3)
    for name in ("val", "test"):
        assert np.array_equal(hard._items[name].labels, plain._items[name].labels)
        assert np.array_equal(hard._items[name].rows, plain._items[name].rows)
    train, target = hard._items["train"], load_digits().target
    assert len(train) == 100
    assert set(train.rows) < set(plain._items["train"].rows)
    assert np.bincount(target[train.rows]).tolist() == [10] * 10
    assert (train.labels != target[train.rows]).sum() == 30
    assert np.array_equal(plain._items["train"].labels, target[plain._items["train"].rows])


def test_seed_draws_another_subset_and_other_noise(make):
    """Nothing is held out, so these two draws are all that the seed changes."""
    options = {"val_fraction": 0.0, "test_fraction": 0.0}
    subsets = [make(max_train_samples=50, seed=seed, **options)._items["train"].rows.tolist() for seed in (0, 1, 0)]
    noisy = [make(label_noise=0.1, seed=seed, **options)._items["train"].labels.tolist() for seed in (0, 1, 0)]
    for first, other, again in (subsets, noisy):
        assert first == again != other


def test_splits_of_the_digits_are_stratified_and_disjoint(make):
    data, target = make(val_fraction=0.1, test_fraction=0.3), load_digits().target
    rows = {name: items.rows for name, items in data._items.items()}
    assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(1797))
    assert {name: len(own) for name, own in rows.items()} == {"train": 1078, "val": 180, "test": 539}
    for name, fraction in (("val", 0.1), ("test", 0.3)):
        assert np.abs(np.bincount(target[rows[name]]) - fraction * np.bincount(target)).max() < 1.01
    assert np.array_equal(make(val_fraction=0.1, test_fraction=0.3)._items["val"].rows, rows["val"])
    assert not np.array_equal(make(val_fraction=0.1, test_fraction=0.3, seed=1)._items["val"].rows, rows["val"])


def test_split_that_is_switched_off_has_no_batches(make):
    data = make(val_fraction=0.0, test_fraction=0.0)
    assert data.val_dataloader() == data.test_dataloader() == data.predict_dataloader() == []
    assert len(data._items["train"]) == 1797


def test_trainer_sees_every_image_of_evaluation(make):
    data = make(eval_batch_size=100, batch_size=32)

    class Model(LightningModule):
        def predict_step(self, batch, batch_idx):
            return batch["labels"]

    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    labels = trainer.predict(Model(), datamodule=data)
    assert [len(batch) for batch in labels] == [100, 100, 100, 59]
    assert torch.equal(torch.cat(labels), torch.from_numpy(data._items["test"].labels))


# ---------------------------------------------------------------- order and resuming


class Recorder(LightningModule):
    """A linear classifier that writes down the pixels and labels that it took a step on."""

    def __init__(self, pixels=8 * 8 * 3):
        super().__init__()
        self.head = torch.nn.Linear(pixels, 10)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch["labels"].tolist(), batch["pixel_values"].double().sum((1, 2, 3)).tolist()))
        return torch.nn.functional.cross_entropy(self.head(batch["pixel_values"].flatten(1)), batch["labels"])

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, ckpt_path=None, callbacks=(), **kwargs):
    module = Recorder()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    defaults = {"max_epochs": 2, "accelerator": "cpu", "enable_model_summary": False, **quiet}
    Trainer(**{**defaults, **kwargs}, callbacks=list(callbacks)).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.seen


def digits(cache, **kwargs):
    return ImageDataModule(cache_dir=cache, **{"max_train_samples": 100, "batch_size": 16, **kwargs})


@pytest.mark.parametrize(
    ("trainer", "data", "every"),
    [
        ({"val_check_interval": 4}, {}, 3),
        ({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}, {}, 5),
        ({}, {"num_workers": 2, "val_fraction": 0.0}, 6),
    ],
)
def test_resumed_run_sees_what_the_uninterrupted_run_would_have_seen(digits_cache, tmp_path, trainer, data, every):
    """The same images in the same order, and augmented alike."""
    saver = SaveEverywhere(tmp_path)
    whole = fit(digits(digits_cache, **data), callbacks=[saver], **trainer)
    assert len({str(batch) for batch in whole}) == len(whole) == 6 * trainer.get("max_epochs", 2)
    for path, seen, _ in saver.saved[::every]:
        assert fit(digits(digits_cache, **data), path, **trainer) == whole[seen:]


@pytest.mark.parametrize("change", [{"batch_size": 8}, {"val_fraction": 0.3}])
def test_changed_order_is_reported_on_resume(digits_cache, tmp_path, change):
    saver = SaveEverywhere(tmp_path)
    fit(digits(digits_cache), callbacks=[saver], max_epochs=1)
    name = "batch_size" if "batch_size" in change else "data"
    with pytest.warns(UserWarning, match=rf"Expected the checkpoint's \['{name}'\] .* some images of this epoch"):
        fit(digits(digits_cache, **change), saver.saved[1][0], max_epochs=1)


def batches_of(cache, world_size=1, rank=0, **kwargs):
    """A rank's batches of two epochs, as sets of (label, pixels)."""
    data = ready(digits(cache, **kwargs))
    plugin = SimpleNamespace(convert_input=lambda batch: batch)
    state = SimpleNamespace(fn=None)
    data.trainer = SimpleNamespace(world_size=world_size, global_rank=rank, state=state, precision_plugin=plugin)
    loader = data.train_dataloader()
    for batch in (data.on_after_batch_transfer(batch, 0) for _ in range(2) for batch in loader):
        pixels = batch["pixel_values"].flatten(1).tolist()
        yield [(label, *row) for label, row in zip(batch["labels"].tolist(), pixels, strict=True)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_the_batches_of_one_process(digits_cache, world_size):
    """To the last augmented pixel."""
    whole = list(batches_of(digits_cache, batch_size=8 * world_size))
    ranks = [list(batches_of(digits_cache, world_size, rank, batch_size=8)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(whole)}
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert sorted(row for part in parts for row in part) == sorted(batch)


TWO_RANKS = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_images import Recorder, digits
from lightning.pytorch import Callback, Trainer

class Dump(Callback):
    def on_fit_end(self, trainer, module):
        Path({folder!r}, str(trainer.global_rank)).write_text(json.dumps(module.seen))

if __name__ == "__main__":
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    trainer = Trainer(devices=2, strategy="ddp_fork", max_epochs=2, callbacks=[Dump()], **quiet)
    trainer.fit(Recorder(), datamodule=digits({cache!r}, batch_size=8))
"""


@pytest.mark.slow
def test_two_processes(digits_cache, tmp_path):
    """Two gloo ranks of the real Trainer against one process."""
    run_script(
        tmp_path / "run.py",
        TWO_RANKS.format(tests=str(Path(__file__).parent), folder=str(tmp_path), cache=digits_cache),
    )
    ranks = [json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    whole = fit(digits(digits_cache))
    assert len(whole) == len(ranks[0]) == len(ranks[1])
    for batch, *parts in zip(whole, *ranks, strict=True):
        rows = sorted(zip(*batch, strict=True))
        assert sorted(tuple(row) for part in parts for row in zip(*part, strict=True)) == rows


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "Expected `batch_size` to be at least 1, but got 0."),
        ({"eval_batch_size": 0}, "Expected `eval_batch_size` to be at least 1, but got 0."),
        ({"num_workers": -1}, "Expected `num_workers` to be at least 0, but got -1."),
        ({"image_size": 3}, "Expected `image_size` to be at least 4, but got 3."),
        ({"max_train_samples": 0}, "Expected `max_train_samples` to be at least 1, but got 0."),
        ({"val_fraction": 1.0}, r"Expected `val_fraction` to be in \[0, 1\), but got 1.0."),
        ({"test_fraction": -0.1}, r"Expected `test_fraction` to be in \[0, 1\), but got -0.1."),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "to be below 1, but got 0.5"),
        ({"label_noise": 1.0}, r"Expected `label_noise` to be in \[0, 1\), but got 1.0."),
        ({"padding_mode": "wrap"}, "Expected `padding_mode` to be 'zeros' or 'reflect', but got 'wrap'."),
        ({"mean": [0.5]}, "Expected `mean` to have a value for each of 3 channels"),
        ({"std": [0.5, 0.5, 0.0]}, "Expected `std` to be positive"),
    ],
)
def test_argument_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule(**kwargs)


def test_batch_larger_than_the_training_split(make):
    data = make(batch_size=2000)
    with pytest.raises(ValueError, match=r"Expected at least 2000 training images .* got 1079. Lower `batch_size`"):
        data.train_dataloader()


def test_noise_needs_a_second_class(tmp_path):
    DatasetDict(
        {
            "train": Dataset.from_dict(
                {"image": [np.zeros((8, 8, 3), np.uint8)] * 4, "label": [0] * 4},
                Features({"image": Image(), "label": ClassLabel(names=["a"])}),
            )
        }
    ).save_to_disk(tmp_path / "one")
    options = {"image_size": 8, "cache_dir": str(tmp_path), "val_fraction": 0.0, "test_fraction": 0.0}
    with pytest.raises(ValueError, match=r"Expected `label_noise` to be 0 for data of one class, but got 0\.5"):
        ready(ImageDataModule(str(tmp_path / "one"), label_noise=0.5, **options))

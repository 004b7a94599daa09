"""The image data module: splits, noise, the cache and its promises, augmentation, resuming, bad input."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from lightning.pytorch import Callback, LightningModule, Trainer
from scipy import stats
from sklearn.datasets import load_digits

from lit_logits.datamodules import ImageDataModule
from lit_logits.datamodules.image_presets import PRESETS, find_preset
from lit_logits.datamodules.image_sampling import add_label_noise, hash_uniform, hold_out, pick_balanced
from lit_logits.datamodules.image_transforms import (
    centre_box,
    crop_to_array,
    normalize,
    random_box,
    shift_and_flip,
    to_rgb,
)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture(scope="session")
def digits_cache(tmp_path_factory):
    """One decoded copy of the digits for all tests that are not about the cache."""
    folder = tmp_path_factory.mktemp("digits")
    ImageDataModule(cache_dir=str(folder)).prepare_data()
    return str(folder)


@pytest.fixture
def make(digits_cache):
    """Build a data module over the digits, ready for use."""
    return lambda **kwargs: ready(ImageDataModule(**{"cache_dir": digits_cache, **kwargs}))


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def all_of(data, loader):
    """All batches of a loader as they reach the model, joined."""
    batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
    return {name: torch.cat([batch[name] for batch in batches]) for name in ("pixel_values", "labels")}


def write_folder(folder, classes="ab", count=12, size=(20, 16), seed=0, mode="RGB"):
    """Random images as folder/class/i.png."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).convert(mode).save(folder / name / f"{i}.png")
    return folder


def make_folder(tmp_path, **kwargs):
    defaults = {"cache_dir": str(tmp_path / "cache"), "batch_size": 4, "image_size": 16}
    return ImageDataModule(str(tmp_path / "images"), **{**defaults, **kwargs})


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
    rows = data.source.splits["train"]
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


# ---------------------------------------------------------------- sources


def write_data_set(folder, sizes, *, names=("img", "fine_label", "coarse_label"), unlabelled=()):
    """A saved `datasets` data set with two columns of classes, as CIFAR-100 on the hub has."""
    image, fine, coarse = names
    features = {image: Image(), fine: ClassLabel(names=list("vwxyz")), coarse: ClassLabel(names=["p", "q"])}
    rng = np.random.default_rng(0)

    def rows(split, size):
        labels = [-1] * size if split in unlabelled else [i % 5 for i in range(size)]
        images = list(rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8))
        return Dataset.from_dict(
            {image: images, fine: labels, coarse: [i % 2 for i in range(size)]}, Features(features)
        )

    DatasetDict({split: rows(split, size) for split, size in sizes.items()}).save_to_disk(folder)
    return str(folder)


@pytest.fixture
def cifar100(monkeypatch, tmp_path):
    """The short name opens a small data set in a folder."""
    path = write_data_set(tmp_path / "hub", {"train": 60, "test": 20})
    monkeypatch.setitem(PRESETS, "cifar100", PRESETS["cifar100"]._replace(path=path))
    return lambda **kwargs: ready(
        ImageDataModule("cifar100", **{"cache_dir": str(tmp_path), "batch_size": 4, **kwargs})
    )


def test_short_name_opens_the_data_set_as_the_field_does(cifar100):
    data = cifar100()
    assert data.class_names == list("vwxyz")  # and not the coarse ones
    assert {name: len(items) for name, items in data._items.items()} == {"train": 54, "val": 6, "test": 20}
    val = set(data._items["val"].rows)
    assert not val & set(data._items["train"].rows)
    splits = data.source.splits
    for name, own in (("train", "train"), ("val", "train"), ("test", "test")):
        items = data._items[name]
        for i in (0, len(items) - 1):
            row = splits[own][int(items.rows[i])]
            assert np.array_equal(items[i]["pixel_values"].permute(1, 2, 0).numpy(), np.asarray(row["img"]))
            assert items[i]["labels"] == row["fine_label"]
    shifts = data._items["train"].__getitems__(list(range(54)))["shifts"]
    assert shifts.abs().max() == 4
    assert data._moments.tolist() == [pytest.approx([0.5071, 0.4867, 0.4408]), pytest.approx([0.2675, 0.2565, 0.2761])]


def test_without_a_fraction_cifar_is_validated_on_its_test_split(cifar100):
    data = cifar100(val_fraction=0.0)
    assert len(data._items["train"]) == 60
    assert torch.equal(
        all_of(data, data.val_dataloader())["pixel_values"], all_of(data, data.test_dataloader())["pixel_values"]
    )


def test_other_columns_can_be_chosen(cifar100):
    assert cifar100(label_column="coarse_label").class_names == ["p", "q"]
    with pytest.raises(ValueError, match=r"Expected `image_column` to be one of \['img'\], but got 'fine_label'"):
        cifar100(image_column="fine_label")
    with pytest.raises(ValueError, match=r"Expected `label_column` to be one of \['img', 'fine_label'.*got 'label'"):
        cifar100(label_column="label")


def test_path_on_the_hub_is_as_good_as_the_short_name():
    assert find_preset("uoft-cs/cifar10") is find_preset("cifar10")
    assert find_preset("zh-plus/tiny-imagenet").image_size == 64
    assert find_preset("somebody/birds").mean == (0.485, 0.456, 0.406)


def test_hub_data_set_is_opened_by_name(monkeypatch, tmp_path):
    """What `datasets` would fetch; the class names come from its builder, before any download."""
    from datasets import load_from_disk

    path, loads = write_data_set(tmp_path / "hub", {"train": 60, "valid": 10}), []
    saved = load_from_disk(path)
    info = SimpleNamespace(features=saved["train"].features)
    module = "lit_logits.datamodules.image_reading"
    builder = SimpleNamespace(hash="1", info=info)
    monkeypatch.setattr(f"{module}.load_dataset_builder", lambda name, subset: builder)
    monkeypatch.setattr(f"{module}.load_dataset", lambda name, subset: loads.append((name, subset)) or saved)
    options = {"label_column": "fine_label", "image_size": 32, "batch_size": 4, "cache_dir": str(tmp_path)}
    data = ImageDataModule("some/thing", "small", **options)
    assert (data.num_classes, loads) == (5, [])
    ready(data)
    assert loads == [("some/thing", "small")]
    assert {name: len(items) for name, items in data._items.items()} == {"train": 54, "test": 6, "val": 10}
    again = ready(ImageDataModule("some/thing", "small", **options))
    assert len(loads) == 1  # the cache holds images and labels
    before = data.library.directory
    builder.hash = "2"  # another revision
    assert ImageDataModule("some/thing", "small", **options).library.directory != before == again.library.directory


def test_split_without_labels_counts_as_absent(monkeypatch, tmp_path):
    """ImageNet's test images are labelled -1 on the hub; its validation split serves as both."""
    names = ("image", "label", "other")
    path = write_data_set(
        tmp_path / "hub", {"train": 40, "validation": 10, "test": 10}, names=names, unlabelled=["test"]
    )
    monkeypatch.setitem(PRESETS, "imagenet", PRESETS["imagenet"]._replace(path=path))
    options = {"label_column": "label", "batch_size": 4, "cache_dir": str(tmp_path)}
    for size in (32, 72):
        data = ImageDataModule("imagenet", image_size=size, **options)
        with pytest.warns(UserWarning, match="Expected the test split of .* to have labels, but all of them are -1"):
            ready(data)
        assert {name: len(items) for name, items in data._items.items()} == {"train": 40, "val": 10, "test": 10}
        assert data._items["test"].labels.tolist() == data._items["val"].labels.tolist() == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize("labels", [[0, -1, 1, None], [None] * 4])
@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_labels_are_never_trained_on(tmp_path, labels, split):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    images = [np.zeros((8, 8, 3), np.uint8)] * 4
    good = Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]}, features)
    bad = Dataset.from_dict({"image": images, "label": labels}, features)
    DatasetDict({"train": good, split: bad}).save_to_disk(tmp_path / "data")
    data = ImageDataModule(str(tmp_path / "data"), image_size=8, cache_dir=str(tmp_path))
    if split == "test" and set(labels) == {None}:
        with pytest.warns(UserWarning, match="It is taken for absent; see `test_fraction`"):
            data.prepare_data()
        return
    count = 4 if set(labels) == {None} else 2
    with pytest.raises(ValueError, match=f"{count} of 4 in the {split} split are -1 or null. Remove these rows"):
        data.prepare_data()
    assert not [path for path in tmp_path.glob("images-*") if path.is_dir()]


@pytest.mark.parametrize("values", [[7, 3, 7, 9], ["cat", "dog", "cat", "ant"]])
def test_plain_columns_of_classes(tmp_path, values):
    rows = {"image": [np.zeros((8, 8, 3), np.uint8)] * 8, "kind": values * 2}
    features = Features({"image": Image(), "kind": Value("string" if isinstance(values[0], str) else "int64")})
    DatasetDict({"train": Dataset.from_dict(rows, features)}).save_to_disk(tmp_path / "data")
    data = ready(ImageDataModule(str(tmp_path / "data"), label_column="kind", image_size=8, cache_dir=str(tmp_path)))
    assert data.class_names == [str(value) for value in sorted(set(values))]
    for items in data._items.values():
        named = [data.class_names[label] for label in items.labels]
        assert named == [str(rows["kind"][row]) for row in items.rows]


def test_folder_of_classes(tmp_path):
    write_folder(tmp_path / "images", classes=["cat", "dog"], count=10, size=(20, 16))
    data = ready(make_folder(tmp_path))
    assert data.class_names == ["cat", "dog"]
    assert {name: len(items) for name, items in data._items.items()} == {"train": 16, "val": 2, "test": 2}
    for items in data._items.values():
        for i in range(len(items)):
            item = items[i]
            name = data.class_names[int(item["labels"])]
            number = next(
                n for n in range(10) if np.array_equal(item["pixel_values"], central(tmp_path / "images" / name, n))
            )
            assert 0 <= number < 10


def central(folder, number):
    image = PIL.Image.open(folder / f"{number}.png")
    return np.asarray(image.crop((2, 0, 18, 16))).transpose(2, 0, 1)


def test_folder_with_splits(tmp_path):
    for split, count in (("train", 8), ("validation", 3), ("test", 2)):
        write_folder(tmp_path / "images" / split, classes="abc", count=count, size=(16, 16), seed=count)
    data = ready(make_folder(tmp_path))
    assert {name: len(items) for name, items in data._items.items()} == {"train": 24, "val": 9, "test": 6}
    file = PIL.Image.open(tmp_path / "images" / "validation" / "b" / "1.png")
    assert any(np.array_equal(data._items["val"][i]["pixel_values"].permute(1, 2, 0), file) for i in range(9))


def test_folder_of_parquet_files(tmp_path):
    write_folder(tmp_path / "images", size=(16, 16))
    from datasets import load_dataset

    (tmp_path / "parquet").mkdir()
    rows = load_dataset("imagefolder", data_dir=str(tmp_path / "images"), split="train")
    rows.to_parquet(tmp_path / "parquet" / "train.parquet")
    options = {"image_size": 16, "cache_dir": str(tmp_path / "cache"), "batch_size": 4}
    data = ready(ImageDataModule(str(tmp_path / "parquet"), **options))
    assert data.class_names == ["a", "b"]
    assert np.array_equal(
        np.load(data.library.directory / "train.npy"),
        np.load(ready(make_folder(tmp_path)).library.directory / "train.npy"),
    )


# ---------------------------------------------------------------- cache


CHANGES = {"image_size": 12, "file": None, "label_column": "other", "source": None}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_setting_never_meets_a_stale_cache(tmp_path, name):
    options = {"label_column": "label", "cache_dir": str(tmp_path / "cache"), "batch_size": 4, "image_size": 32}
    source = write_data_set(tmp_path / "a", {"train": 20}, names=("image", "label", "other"))
    if name == "file":
        source, options = str(write_folder(tmp_path / "images")), {**options, "image_size": 16}
    before = ready(ImageDataModule(source, **options))
    pixels = np.load(before.library.directory / "train.npy")
    if name == "file":  # the same names, other content, one file after the other
        write_folder(tmp_path / "images", seed=1, classes="b")
    elif name == "source":
        source = write_data_set(tmp_path / "b", {"train": 25}, names=("image", "label", "other"))
    else:
        options[name] = CHANGES[name]
    after = ready(ImageDataModule(source, **options))
    assert after.library.directory != before.library.directory
    if name == "label_column":
        assert after.num_classes == 2 != before.num_classes
        assert after._items["train"].labels.max() == 1
    else:
        assert not np.array_equal(np.load(after.library.directory / "train.npy"), pixels)
    fresh = ready(ImageDataModule(source, **{**options, "cache_dir": str(tmp_path / "other")}))
    for split, items in fresh._items.items():
        assert torch.equal(items[0]["pixel_values"], after._items[split][0]["pixel_values"])


def test_settings_of_the_splits_share_a_cache_entry_and_still_take_effect(make, digits_cache):
    before = set(Path(digits_cache).iterdir())
    sizes = {len(make(val_fraction=share, seed=seed)._items["val"]) for share in (0.1, 0.3) for seed in (0, 1)}
    assert sizes == {180, 539}
    assert set(Path(digits_cache).iterdir()) == before


def test_same_setting_reads_the_cache(make, monkeypatch):
    monkeypatch.setattr("lit_logits.datamodules.image_storage.to_rgb", lambda _: pytest.fail("decoded again"))
    assert len(make(batch_size=2)._items["train"]) == 1079


def test_setup_only_reads(tmp_path):
    with pytest.raises(RuntimeError, match="Expected `prepare_data` to have written"):
        ImageDataModule(cache_dir=str(tmp_path)).setup()


def test_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    write_folder(tmp_path / "images")
    count = iter(range(1000))

    def interrupt(image):
        if next(count) == 20:
            raise KeyboardInterrupt
        return to_rgb(image)

    data = make_folder(tmp_path)
    monkeypatch.setattr("lit_logits.datamodules.image_storage.to_rgb", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.prepare_data()
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    monkeypatch.undo()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    assert len(ready(data)._items["train"]) == 20


def test_processes_that_prepare_at_once_decode_once(tmp_path, monkeypatch):
    write_folder(tmp_path / "images", count=4)
    data = make_folder(tmp_path)
    log = tmp_path / "log"

    def slow(image):
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.02)
        return to_rgb(image)

    monkeypatch.setattr("lit_logits.datamodules.image_storage.to_rgb", slow)
    _ = data.source.labels  # read before the fork
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=data.prepare_data) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    lines = log.read_text().split()
    assert len(lines) == 8
    assert len(set(lines)) == 1


def test_pickled_items_do_not_carry_the_images(make):
    items = make()._items["train"]
    _ = items[0]
    pickled = pickle.dumps(items)
    assert len(pickled) < 40_000  # rows and labels, 8 bytes each
    assert torch.equal(pickle.loads(pickled)[5]["pixel_values"], items[5]["pixel_values"])


def test_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ImageDataModule().cache_dir == tmp_path / "lit_logits"
    assert ImageDataModule(cache_dir="~/x").cache_dir == Path.home() / "x"


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


class SaveEverywhere(Callback):
    """Saves a checkpoint after every batch, validation and epoch, and notes how many batches were seen by then."""

    def __init__(self, folder):
        self.folder, self.saved = folder, []

    def save(self, trainer, module):
        path = self.folder / f"{len(self.saved)}.ckpt"
        trainer.save_checkpoint(path)
        self.saved.append((path, len(module.seen)))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.save(trainer, pl_module)

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, pl_module)


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
    for path, seen in saver.saved[::every]:
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
    script = tmp_path / "run.py"
    script.write_text(TWO_RANKS.format(tests=str(Path(__file__).parent), folder=str(tmp_path), cache=digits_cache))
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
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


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "nobody/nothing-here",
            r"Expected `source` to be 'digits', .* but got 'nobody/nothing-here'. As a folder: there",
        ),
        ("./missing", "As a folder: there is none in .* that is no name of a data set"),
        ("cifar1000", "Expected `source` to be 'digits', 'cifar10', 'cifar100', .* but got 'cifar1000'"),
    ],
)
def test_unknown_source(source, message):
    data = ImageDataModule(source)
    for use in (lambda: data.num_classes, data.prepare_data):
        with pytest.raises(ValueError, match=message):
            use()


def test_folder_without_images(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "notes.txt").write_text("none here")
    with pytest.raises(ValueError, match=r"As a folder: it is there\. .* it holds neither images nor parquet files"):
        make_folder(tmp_path).prepare_data()


def test_folder_without_classes(tmp_path):
    write_folder(tmp_path / "images", classes=["."])
    with pytest.raises(ValueError, match=r"Expected one column of type ClassLabel among .* lie in folder/class/"):
        make_folder(tmp_path).prepare_data()


def test_columns_that_are_missing_or_ambiguous(tmp_path):
    path = write_data_set(tmp_path / "two", {"train": 10})
    with pytest.raises(ValueError, match=r"but got \['fine_label', 'coarse_label'\]. Give one as `label_column`"):
        ImageDataModule(path, cache_dir=str(tmp_path)).prepare_data()
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    rows = Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features)
    rows.save_to_disk(tmp_path / "text")
    with pytest.raises(ValueError, match=r"Expected one column of type Image among \['text', 'label'\], but got \[\]"):
        ImageDataModule(str(tmp_path / "text"), cache_dir=str(tmp_path)).prepare_data()


@pytest.mark.parametrize("size", [16, 72])
def test_broken_file_is_named(tmp_path, size):
    write_folder(tmp_path / "images", count=4)
    (tmp_path / "images" / "b" / "2.png").write_bytes(b"no image")
    data = make_folder(tmp_path, image_size=size)
    with pytest.raises(ValueError, match=r"Expected .*b/2.png to be an image, but it cannot be read"):
        _ = [item for split in ready(data)._items.values() for item in split]


def test_data_without_a_training_split(tmp_path):
    path = write_data_set(tmp_path / "x", {"test": 10})
    with pytest.raises(ValueError, match=r"a split named 'train', but its splits are \['test'\]"):
        ImageDataModule(path, label_column="fine_label", cache_dir=str(tmp_path)).prepare_data()


def test_batch_larger_than_the_training_split(make):
    data = make(batch_size=2000)
    with pytest.raises(ValueError, match=r"Expected at least 2000 training images .* got 1079. Lower `batch_size`"):
        data.train_dataloader()


def test_subset_of_what_has_none(tmp_path):
    with pytest.raises(ValueError, match="Expected `subset` to be None for 'digits', but got 'x'"):
        ImageDataModule(subset="x", cache_dir=str(tmp_path)).prepare_data()


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

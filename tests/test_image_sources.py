"""Where images come from and how they are kept: data sets, folders, broken files, the cache and its promises."""

import multiprocessing
import os
import pickle
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from lit_logits.datamodules import ImageDataModule, ImageSource
from lit_logits.datamodules.images.presets import PRESETS, find_preset
from lit_logits.datamodules.images.transforms import to_rgb

pytestmark = pytest.mark.usefixtures("no_network")


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

    def build(columns=None, **kwargs):
        source = ImageSource("cifar100", **(columns or {}))
        return ready(ImageDataModule(source, **{"cache_dir": str(tmp_path), "batch_size": 4, **kwargs}))

    return build


def test_short_name_opens_the_data_set_as_the_field_does(cifar100):
    data = cifar100()
    assert data.class_names == list("vwxyz")  # and not the coarse ones
    assert {name: len(items) for name, items in data._items.items()} == {"train": 54, "val": 6, "test": 20}
    val = set(data._items["val"].rows)
    assert not val & set(data._items["train"].rows)
    splits = data.images.splits
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
    assert cifar100({"label_column": "coarse_label"}).class_names == ["p", "q"]
    with pytest.raises(ValueError, match=r"Expected `image_column` to be one of \['img'\], but got 'fine_label'"):
        cifar100({"image_column": "fine_label"})
    with pytest.raises(ValueError, match=r"Expected `label_column` to be one of \['img', 'fine_label'.*got 'label'"):
        cifar100({"label_column": "label"})


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
    module = "lit_logits.datamodules.images.reading"
    builder = SimpleNamespace(hash="1", info=info)
    monkeypatch.setattr(f"{module}.load_dataset_builder", lambda name, subset: builder)
    monkeypatch.setattr(f"{module}.load_dataset", lambda name, subset: loads.append((name, subset)) or saved)
    source = ImageSource("some/thing", "small", label_column="fine_label")
    options = {"image_size": 32, "batch_size": 4, "cache_dir": str(tmp_path)}
    data = ImageDataModule(source, **options)
    assert (data.num_classes, loads) == (5, [])
    ready(data)
    assert loads == [("some/thing", "small")]
    assert {name: len(items) for name, items in data._items.items()} == {"train": 54, "test": 6, "val": 10}
    again = ready(ImageDataModule(source, **options))
    assert len(loads) == 1  # the cache holds images and labels
    before = data.library.directory
    builder.hash = "2"  # another revision
    assert ImageDataModule(source, **options).library.directory != before == again.library.directory


def test_split_without_labels_counts_as_absent(monkeypatch, tmp_path):
    """ImageNet's test images are labelled -1 on the hub; its validation split serves as both."""
    names = ("image", "label", "other")
    path = write_data_set(
        tmp_path / "hub", {"train": 40, "validation": 10, "test": 10}, names=names, unlabelled=["test"]
    )
    monkeypatch.setitem(PRESETS, "imagenet", PRESETS["imagenet"]._replace(path=path))
    source = {"path": "imagenet", "label_column": "label"}
    options = {"batch_size": 4, "cache_dir": str(tmp_path)}
    for size in (32, 72):
        data = ImageDataModule(source, image_size=size, **options)
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
    source = ImageSource(str(tmp_path / "data"), label_column="kind")
    data = ready(ImageDataModule(source, image_size=8, cache_dir=str(tmp_path)))
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
    options = {"cache_dir": str(tmp_path / "cache"), "batch_size": 4, "image_size": 32}
    path = write_data_set(tmp_path / "a", {"train": 20}, names=("image", "label", "other"))
    source = {"path": path, "label_column": "label"}
    if name == "file":
        source, options = ImageSource(str(write_folder(tmp_path / "images"))), {**options, "image_size": 16}
    before = ready(ImageDataModule(source, **options))
    pixels = np.load(before.library.directory / "train.npy")
    if name == "file":  # the same names, other content, one file after the other
        write_folder(tmp_path / "images", seed=1, classes="b")
    elif name == "source":
        source["path"] = write_data_set(tmp_path / "b", {"train": 25}, names=("image", "label", "other"))
    elif name == "label_column":
        source[name] = CHANGES[name]
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


def test_settings_of_the_splits_share_a_cache_entry_and_still_take_effect(digits_cache):
    before = set(Path(digits_cache).iterdir())
    made = [ImageDataModule(cache_dir=digits_cache, val_fraction=v, seed=seed) for v in (0.1, 0.3) for seed in (0, 1)]
    sizes = {len(ready(data)._items["val"]) for data in made}
    assert sizes == {180, 539}
    assert set(Path(digits_cache).iterdir()) == before


def test_same_setting_reads_the_cache(digits_cache, monkeypatch):
    monkeypatch.setattr("lit_logits.datamodules.images.storage.to_rgb", lambda _: pytest.fail("decoded again"))
    assert len(ready(ImageDataModule(cache_dir=digits_cache, batch_size=2))._items["train"]) == 1079


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
    monkeypatch.setattr("lit_logits.datamodules.images.storage.to_rgb", interrupt)
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

    monkeypatch.setattr("lit_logits.datamodules.images.storage.to_rgb", slow)
    _ = data.images.labels  # read before the fork
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


def test_pickled_items_do_not_carry_the_images(digits_cache):
    items = ready(ImageDataModule(cache_dir=digits_cache))._items["train"]
    _ = items[0]
    pickled = pickle.dumps(items)
    assert len(pickled) < 40_000  # rows and labels, 8 bytes each
    assert torch.equal(pickle.loads(pickled)[5]["pixel_values"], items[5]["pixel_values"])


def test_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ImageDataModule().cache_dir == tmp_path / "lit_logits"
    assert ImageDataModule(cache_dir="~/x").cache_dir == Path.home() / "x"


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "nobody/nothing-here",
            r"Expected `source` to be 'digits', .* but got 'nobody/nothing-here'. As a folder: it",
        ),
        ("./missing", "As a folder: it is not in .* that is not the name of a data set"),
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
        ImageDataModule(ImageSource(path, label_column="fine_label"), cache_dir=str(tmp_path)).prepare_data()


def test_subset_of_what_has_none(tmp_path):
    with pytest.raises(ValueError, match="Expected `subset` to be None for 'digits', but got 'x'"):
        ImageDataModule(ImageSource("digits", "x"), cache_dir=str(tmp_path)).prepare_data()

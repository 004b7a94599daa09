"""Folders of images as people have them, and images of modes without a range of their own."""

import numpy as np
import PIL.Image
import pytest
from test_image_sources import all_of, make_folder, ready, write_folder

from lit_logits.datamodules import ImageDataModule
from lit_logits.datamodules.images.transforms import to_rgb

pytestmark = pytest.mark.usefixtures("no_network")


def test_an_empty_class_folder_is_told(tmp_path):
    """It was dropped without a word, and all classes behind it had other numbers."""
    write_folder(tmp_path / "images", "ac")
    (tmp_path / "images" / "b").mkdir()
    (tmp_path / "images" / ".cache").mkdir()
    with pytest.warns(UserWarning, match=r"every class folder of '.*images', but \['b'\] \(1\) have none"):
        assert make_folder(tmp_path).class_names == ["a", "c"]


def test_an_empty_class_folder_within_splits_is_told(tmp_path, recwarn):
    for split, classes in (("train", "ab"), ("test", "a")):
        write_folder(tmp_path / "images" / split, classes, count=4)
    (tmp_path / "images" / "test" / "b").mkdir()  # of this class only the test has none
    assert make_folder(tmp_path).class_names == ["a", "b"]
    assert not [w for w in recwarn if "class folder" in str(w.message)]
    (tmp_path / "images" / "train" / "c").mkdir()
    with pytest.warns(UserWarning, match=r"\['c'\] \(1\) have none"):
        assert make_folder(tmp_path).class_names == ["a", "b"]


def test_one_class_folder_and_a_wrong_path_are_said_in_their_own_words(tmp_path):
    write_folder(tmp_path / "images", "a")
    with pytest.raises(ValueError, match=r"lie in folder/class/, and of two classes at least\."):
        _ = make_folder(tmp_path).class_names
    with pytest.raises(ValueError, match=r"As a folder: there is none\. As a data set"):
        _ = ImageDataModule(str(tmp_path / "nowhere")).class_names


def write_tiny_imagenet(folder, wnids=("n02", "n01"), count=3):
    rng = np.random.default_rng(0)

    def save(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)

    for wnid in wnids:
        for i in range(count):
            save(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
    lines = []
    for i in range(4):
        save(folder / "val" / "images" / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{wnids[i % 2]}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    save(folder / "test" / "images" / "test_0.JPEG")
    return folder


def test_tiny_imagenet_is_read_as_its_authors_pack_it(tmp_path):
    """Its images were all taken for one class: "Expected one column of type ClassLabel"."""
    folder = write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    data = ready(ImageDataModule(str(folder), cache_dir=str(tmp_path / "cache"), batch_size=2, augment=False))
    assert data.image_size == 64
    assert data.class_names == ["n01", "n02"]
    assert data.library.labels["train"].tolist() == [0] * 3 + [1] * 3
    held = all_of(data, data.val_dataloader())
    assert held["labels"].tolist() == [1, 0, 1, 0]
    pixels = np.asarray(PIL.Image.open(folder / "val" / "images" / "val_1.JPEG"))
    found = data.library.store("val").read(np.array([1]))[0].transpose(1, 2, 0)
    np.testing.assert_array_equal(found, pixels)
    assert all_of(data, data.test_dataloader())["labels"].tolist() == [1, 0, 1, 0]  # the test split has no labels


def test_tiny_imagenet_that_was_not_unpacked_whole_is_named(tmp_path):
    folder = write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    for file in (folder / "train" / "n02" / "images").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"but \['n02'\] have none\. Unpack the archive again"):
        _ = ImageDataModule(str(folder), cache_dir=str(tmp_path)).class_names


GREY = np.array([[0, 51], [102, 255]])


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        ((GREY / 255).astype(np.float32), "tiff"),
        (GREY.astype(np.float32), "tiff"),
        (GREY.astype(np.int32), "tiff"),
        ((GREY * 256).astype(np.int32), "tiff"),
        ((GREY * 256).astype(np.uint16), "png"),
        ((GREY * 256).astype(np.float32), "tiff"),
    ],
)
def test_images_of_floats_and_of_32_bits_keep_their_greys(tmp_path, values, suffix):
    """Floats in [0, 1], and 32-bit integers, became black."""
    PIL.Image.fromarray(values).save(tmp_path / f"image.{suffix}")
    with PIL.Image.open(tmp_path / f"image.{suffix}") as image:
        np.testing.assert_array_equal(np.asarray(to_rgb(image))[..., 0], GREY)


def test_a_dark_png_of_16_bits_stays_dark(tmp_path):
    PIL.Image.fromarray(np.full((2, 2), 255, np.uint16)).save(tmp_path / "dark.png")
    with PIL.Image.open(tmp_path / "dark.png") as image:
        assert np.asarray(to_rgb(image)).max() == 0


@pytest.mark.parametrize("values", [np.full((8, 8), -1.0, np.float32), np.full((8, 8), 10**9, np.int32)])
def test_values_of_which_nothing_tells_white_are_named(tmp_path, values):
    write_folder(tmp_path / "images", "ab", count=6)
    PIL.Image.fromarray(values).save(tmp_path / "images" / "a" / "x.tiff")
    with pytest.raises(ValueError, match=r"x\.tiff to be an image, .* of which nothing tells what is white"):
        make_folder(tmp_path).prepare_data()

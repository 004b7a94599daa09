"""Logits of a teacher that are kept on disk, and the views of images that come again."""

import lightning as L
import pytest
import torch
from tiny_classifiers import CLASSES, Net
from torch import nn

from lit_logits.datamodules import ImageDataModule
from lit_logits.dual_head_kd import DualHeadKD
from lit_logits.modules.dual_head_kd.teacher import FrozenTeacher
from lit_logits.modules.dual_head_kd.teacher_cache import TeacherCache
from lit_logits.storage.rows import RowFile

pytestmark = pytest.mark.usefixtures("no_network")


class Counting(nn.Module):
    """A teacher that counts the images it was shown."""

    def __init__(self):
        super().__init__()
        self.flat, self.fc, self.seen = nn.Flatten(), nn.Linear(192, 10), 0

    def forward(self, pixel_values):
        self.seen += len(pixel_values)
        return self.fc(self.flat(pixel_values))


def digits(tmp_path, **kwargs):
    settings = {"num_views": 2, "max_train_samples": 40, "batch_size": 8, "cache_dir": str(tmp_path / "images")}
    return ImageDataModule("digits", **{**settings, **kwargs})


def train(tmp_path, epochs=4, data=None, seed=0, precision="32-true", **kwargs):
    torch.manual_seed(seed)
    teacher = Counting()
    torch.manual_seed(0)
    model = DualHeadKD(Counting(), teacher, optimizer=lambda p: torch.optim.SGD(p, lr=0.01), **kwargs)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_epochs=epochs, limit_val_batches=0, accelerator="cpu", logger=False, precision=precision, **quiet
    )
    trainer.fit(model, datamodule=data or digits(tmp_path))
    return model, teacher


def test_the_teacher_runs_once_for_each_view_and_the_student_learns_the_same(tmp_path):
    plain, every_time = train(tmp_path)
    cached, once = train(tmp_path, teacher_cache=tmp_path / "logits")
    assert (every_time.seen, once.seen) == (4 * 40, 2 * 40)
    assert torch.equal(plain.net.aux_head.classifier.weight, cached.net.aux_head.classifier.weight)
    again, never = train(tmp_path, teacher_cache=tmp_path / "logits")
    assert never.seen == 0
    assert torch.equal(plain.net.aux_head.classifier.weight, again.net.aux_head.classifier.weight)
    untaught, _ = train(tmp_path, kd_factor=0.0)
    assert not torch.equal(plain.net.aux_head.classifier.weight, untaught.net.aux_head.classifier.weight)


def test_images_that_an_epoch_left_out_are_asked_for_later(tmp_path):
    """Four of 44 are in the last short batch, others in each epoch."""
    _, teacher = train(tmp_path, 2, digits(tmp_path, max_train_samples=44), teacher_cache=tmp_path / "logits")
    assert teacher.seen == 2 * 40
    _, later = train(tmp_path, 6, digits(tmp_path, max_train_samples=44), teacher_cache=tmp_path / "logits")
    assert 0 < later.seen <= 2 * 4


def test_another_teacher_and_other_views_have_files_of_their_own(tmp_path):
    others = ({"seed": 1}, {"max_train_samples": 24}, {"num_views": 3}, {"augment": False}, {"padding_mode": "reflect"})
    others += ({"mean": [0.1, 0.2, 0.3]}, {"image_size": 16})
    sources = [{}, {"seed": 1}, {"precision": "bf16-mixed"}]
    sources += [{"data": digits(tmp_path, **other)} for other in others if "image_size" not in other]
    for kwargs in sources:
        _, teacher = train(tmp_path, epochs=1, teacher_cache=tmp_path / "logits", **kwargs)
        assert teacher.seen > 0
    assert len(list((tmp_path / "logits").iterdir())) == len(sources)
    prints = {digits(tmp_path, **other).views_fingerprint for other in ({}, *others)}
    assert len(prints) == 1 + len(others)


def test_views_come_again_in_turn(tmp_path):
    data = digits(tmp_path)
    data.prepare_data()
    data.setup()
    items, views = data._items["train"], []
    for epoch in range(4):
        items.set_epoch(epoch)
        views.append(items.__getitems__([3, 5]))
    for name in views[0]:
        assert torch.equal(views[0][name], views[2][name])
        assert torch.equal(views[1][name], views[3][name])
    assert [view["sample_ids"].tolist() for view in views[:2]] == [[6, 10], [7, 11]]
    assert not torch.equal(views[0]["shifts"], views[1]["shifts"])
    assert digits(tmp_path, num_views=None).views_fingerprint is None
    still = digits(tmp_path, num_views=5, augment=False)
    assert still.num_views == 1  # all would be the same
    with pytest.raises(ValueError, match="`num_views` to be at least 1, but got 0"):
        digits(tmp_path, num_views=0)


def test_what_cannot_be_kept_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"draws new ones in each epoch or numbers none\. Set `num_views`"):
        train(tmp_path, data=digits(tmp_path, num_views=None), teacher_cache=tmp_path / "logits")
    with pytest.raises(ValueError, match="with a `teacher_cache`, as mixed images do not come again"):
        train(tmp_path, teacher_cache=tmp_path / "logits", mixup_alpha=1.0)
    with pytest.raises(ValueError, match="to have `views_fingerprint`, by which cached logits"):
        TeacherCache(tmp_path, FrozenTeacher(Net()), None, CLASSES)
    cache = TeacherCache(tmp_path, FrozenTeacher(Net()), digits(tmp_path), CLASSES)
    with pytest.raises(ValueError, match=r"batches with `sample_ids`.* but got \['x'\]"):
        cache({"x": torch.zeros(2, 6)})


def test_rows_are_there_for_another_process_and_for_one_that_was_killed(tmp_path):
    first, second = RowFile(tmp_path / "deep" / "rows", 3), RowFile(tmp_path / "deep" / "rows", 3)
    numbers, rows = torch.tensor([70_000, 2]), torch.randn(2, 3)
    assert not second.read(numbers)[1].any()
    first.write(numbers, rows)
    values, known = second.read(torch.tensor([2, 3, 70_000, 10**6]))
    assert known.tolist() == [True, False, True, False]
    assert torch.equal(values[known], rows.flip(0))
    second.write(torch.tensor([3]), rows[:1])
    assert first.read(torch.tensor([3]))[1].all()
    assert torch.equal(first.read(numbers)[0], rows)
    nothing, none = first.read(torch.tensor([], dtype=torch.long))
    assert (nothing.shape, none.shape) == ((0, 3), (0,))

# %% [markdown]
# # A head that collapses, and one that does not
#
# A student that learns from labels and from a teacher's logits has two masters. Labels pull the rows of its last layer towards a
# simplex, all as far from each other as they can be: neural collapse. The teacher says that some classes are alike. Dual-head
# distillation gives each a head of its own.
#
# Here a ResNet-20 teaches a ResNet-8 to read handwritten digits, while one label in five is wrong. It takes about three minutes on
# two cores.

# %%
import os
import tempfile
from io import BytesIO
from pathlib import Path

import lightning as L
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_logits import DualHeadKD
from lit_logits.callbacks import NeuralCollapseMonitor
from lit_logits.datamodules import ImageDataModule

folder = Path(tempfile.mkdtemp())
epochs = int(os.environ.get("EXAMPLE_STEPS", 20))  # the tests run fewer


def fit(model, data, callbacks=()):
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=L.pytorch.loggers.TensorBoardLogger(folder, name=model.method) if callbacks else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(model, data)
    return trainer


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


def schedule(optimizer):
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs * 6 // 10, epochs * 8 // 10], gamma=0.1)


# %% [markdown]
# The teacher learns from clean labels.

# %%
L.seed_everything(0, verbose=False)
teacher = DualHeadKD("resnet20", num_classes=10, method="ce", optimizer=sgd, lr_scheduler=schedule)
clean = ImageDataModule("digits", batch_size=64)
accuracy = fit(teacher, clean).validate(teacher, clean, verbose=False)[0]["val/acc"]
print(f"teacher: {accuracy:.1%}")

# %% [markdown]
# Two students of one start. The first has both losses on one head, the second has two. `NeuralCollapseMonitor` measures how far
# the rows of a head are from the simplex, `nc2`, and the angle between the gradients of both losses.

# %%
noisy = ImageDataModule("digits", batch_size=64, label_noise=0.2)
trainers = {}
for method in ("single_head", "dual_head"):
    L.seed_everything(0, verbose=False)
    student = DualHeadKD(
        "resnet8", teacher.student, num_classes=10, method=method, optimizer=sgd, lr_scheduler=schedule
    )
    trainer = fit(student, noisy, [NeuralCollapseMonitor(measure_gradients_every_n_steps=10)])
    accuracy = trainer.validate(student, noisy, verbose=False)[0]["val/acc"]
    print(f"{method:12} accuracy {accuracy:.1%}")
    trainers[method] = trainer

# %% [markdown]
# The head that learns from labels, and the one that learns from the teacher. On the left are the cosines between the rows of two
# classes, on the right how often each comes; the line marks the simplex. Look at how wide each is spread.

# %%
log = EventAccumulator(trainers["dual_head"].logger.log_dir, size_guidance={"images": 0}).Reload()
pictures = [tag for tag in log.Tags()["images"] if "cosines" in tag]
print(pictures)
Image.open(BytesIO(log.Images("nc/cosines")[-1].encoded_image_string))

# %%
Image.open(BytesIO(log.Images("nc_aux/cosines")[-1].encoded_image_string))

# %% [markdown]
# The cosine between the gradients of both losses on the backbone, in the mean over the measured steps. Below 0 they pull apart.

# %%
for method, trainer in trainers.items():
    own = EventAccumulator(trainer.logger.log_dir).Reload()
    values = [event.value for event in own.Scalars("kd/grad_cosine")]
    print(f"{method:12} mean cosine {sum(values) / len(values):+.2f}")

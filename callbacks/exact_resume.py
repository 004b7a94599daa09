"""`ExactResume`: checkpoints from which training goes on as if it had not stopped.

A window is the micro-batches between two steps of the optimizer.
"""

import copy
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_logits.callbacks.parts import averaging_callback, data_module, swap_averages
from lit_logits.functional.distributed import is_distributed
from lit_logits.functional.reductions import at_least_float32

__all__ = ["ExactResume"]


class _WindowStart(NamedTuple):
    """What a window changes before its step, as it was before the window.

    Attributes:
        step: steps taken by then.
        buffers: of the model, such as running statistics.
        random: states of this rank's random generators.
        loops: Lightning's counters of epochs and batches; like what follows None for a window of one batch.
        data: state of the data module, which is the position of its loader.
        callbacks: states of all callbacks, which a validation inside the window may change.
    """

    step: int
    buffers: dict[str, Tensor]
    random: dict[str, Any]
    loops: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    callbacks: dict[str, Any] | None = None


class ExactResume(Callback):
    """Add to every checkpoint what a resumed run needs to repeat the uninterrupted one bit for bit.

    These are the states of the random generators of Python, NumPy and torch, on the CPU and on the CUDA device of each
    rank, so that dropout draws the same. With `accumulate_grad_batches` a checkpoint may fall between two micro-batches
    of a window, as after a validation or on SIGTERM. Lightning's own goes on behind them and loses their gradient.
    Here it goes on at the start of the window: its micro-batches are read again, with the running statistics and random
    numbers of the first time, and a validation among them is repeated. At the end of an epoch and on SIGTERM, counters
    are kept from which Lightning goes on with the right step and epoch, which its own are not under `max_steps`.

    A checkpoint holds the weights as they are when it is saved, by any callback. Loaders must be able to return to a
    position, as those of the library's data modules are. A run on another number of ranks goes on without the
    generators' states. Under manual optimization only these are kept.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[ExactResume()], logger=False)
    """

    def __init__(self) -> None:
        self._window: _WindowStart | None = None
        self._validation: dict[str, Any] | None = None  # the generators' states before the one that runs
        self._weights: Tensor | None = None  # sums of the model's own weights while a validation runs
        self._random: dict[str, Any] | None = None
        self._buffers: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore generators and buffers, after all that draws or loads while a run starts, before the first batch."""
        self._window = self._validation = None
        if self._random is not None:
            _set_random_states(self._random, trainer.strategy.root_device)
        buffers = dict(pl_module.named_buffers())
        for name, value in self._buffers.items():
            buffers[name].copy_(value)
        self._random, self._buffers = None, {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the state before the first micro-batch of a window."""
        size = trainer.accumulate_grad_batches
        by_itself = trainer.strategy.handles_gradient_accumulation  # as DeepSpeed does, over the end of an epoch too
        if batch_idx % size or by_itself or not pl_module.automatic_optimization:
            return
        self._window = _WindowStart(
            step=trainer.global_step,
            buffers={name: buffer.detach().clone() for name, buffer in pl_module.named_buffers()},
            random=_random_states(trainer.strategy.root_device),
        )
        if size > 1:
            data = data_module(trainer)
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            self._window = self._window._replace(
                loops=_between_batches(trainer.fit_loop.state_dict(), trainer.global_step),
                data=copy.deepcopy(data.state_dict()) if isinstance(data, LightningDataModule) else None,
                callbacks={callback.state_key: copy.deepcopy(callback.state_dict()) for callback in callbacks},
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the generators' states: SIGTERM may stop a validation, which is then repeated.

        From here on a callback that averages weights may put its averages in their place.
        """
        self._weights = _weight_sums(pl_module) if averaging_callback(trainer) else None
        if not trainer.sanity_checking:
            self._validation = _random_states(trainer.strategy.root_device)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what was noted."""
        self._validation = self._weights = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the model its own weights back, before any is saved, if a validation of averages was stopped.

        Whether they are in the model is asked of the weights: other callbacks may raise before or after the exchange.
        """
        if self._weights is not None and not torch.equal(self._weights, _weight_sums(pl_module)):
            swap_averages(trainer, pl_module)
        self._weights = None
        has_read = trainer.fit_loop.epoch_loop.val_loop.batch_progress.current.ready > 0
        if trainer.validating and self._validation is None and not has_read:  # a callback before this one raised
            self._validation = _random_states(trainer.strategy.root_device)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the generators' states, and put a checkpoint inside a window back to the window's start."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        window = self._window if self._window is not None and self._window.step == trainer.global_step else None
        noted = self._validation if window is None else window.random
        states = [noted or _random_states(trainer.strategy.root_device)]
        if is_distributed():
            mine, states = states[0], [{}] * trainer.world_size
            dist.all_gather_object(states, mine)
        buffers = {} if window is None else window.buffers
        buffers = {name: buffer for name, buffer in buffers.items() if name in checkpoint["state_dict"]}
        checkpoint["exact_resume"] = {"random": states, "buffers": buffers}
        if not pl_module.automatic_optimization:
            return
        loops = checkpoint["loops"]
        if window is None or window.loops is None:
            resumable = _resumable if self._validation is None else _at_validation
            loops["fit_loop"] = resumable(loops["fit_loop"], trainer)
            return
        loops["fit_loop"] = window.loops
        checkpoint["callbacks"] |= {key: state for key, state in (window.callbacks or {}).items() if state}
        if window.data:
            checkpoint[type(data_module(trainer)).__qualname__] = window.data

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take back what `on_save_checkpoint` added, to train on."""
        saved = checkpoint.get("exact_resume")
        if saved is None or trainer.state.fn != TrainerFn.FITTING:
            return
        if len(saved["random"]) == trainer.world_size:
            self._random = saved["random"][trainer.global_rank]
        self._buffers = saved["buffers"]


def _weight_sums(model: LightningModule) -> Tensor:
    """Return the sum of each parameter and buffer of floats, by which weights are told from their averages."""
    tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    sums = [at_least_float32(tensor).sum().cpu() for tensor in tensors]
    return torch.stack(sums).nan_to_num() if sums else torch.zeros(0)


# ---------------------------------------------------------------------- counters of Lightning's loops


def _resumable(loops: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    """Return a form of the state of Lightning's loops from which they go on where they are.

    They do by themselves from what they have when a callback saves at the end of a batch, of a validation, or of an
    epoch without `max_steps`.
    """
    epoch, batch = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    is_last = batch["is_last_batch"] or batch["current"]["ready"] == trainer.num_training_batches
    if epoch["total"]["processed"] == epoch["total"]["ready"] > 0:
        # With `max_steps` they would count this epoch twice, or ask it for another batch.
        return _at_next_epoch(loops, trainer.global_step) if is_last and trainer.max_steps != -1 else loops
    is_logged = trainer.global_step == loops["epoch_loop.state_dict"]["_batches_that_stepped"]
    is_between = trainer.max_steps != -1 if batch["total"]["ready"] == 0 else is_logged and not is_last
    if batch["current"]["ready"] > batch["current"]["processed"] or is_between:
        # An exception, SIGTERM, or nothing yet. They would count a step twice in what is logged.
        return _between_batches(loops, trainer.global_step)
    return loops


def _at_validation(loops: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    """Return the state of the loops in which they begin the validation that was stopped."""
    progress = loops["epoch_loop.val_loop.batch_progress"]
    completed = progress["total"]["completed"]
    progress["total"] = {**progress["total"], "processed": completed, "ready": completed + 1, "started": completed + 1}
    progress["current"] = dict.fromkeys(progress["current"], 0)
    progress["is_last_batch"] = False
    return loops


def _between_batches(loops: dict[str, Any], step: int) -> dict[str, Any]:
    """Return the state of the loops in which they go on with the batch after the last one that is complete.

    It is what a callback finds at the end of that batch, before the batch counts as complete, and its step as logged.
    """
    progress = loops["epoch_loop.batch_progress"]
    for tracker in (progress["total"], progress["current"]):
        tracker["ready"] = tracker["started"] = tracker["processed"] = tracker["completed"]
        tracker["completed"] -= 1
    progress["is_last_batch"] = False
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1
    return loops


def _at_next_epoch(loops: dict[str, Any], step: int) -> dict[str, Any]:
    """Return the state of the loops in which they start the epoch after the one that has just been processed."""
    for tracker in loops["epoch_progress"].values():
        tracker["started"] = tracker["completed"] = tracker["processed"]
        tracker["ready"] = tracker["processed"] + 1
    progress = loops["epoch_loop.batch_progress"]
    progress["current"] = dict.fromkeys(progress["current"], 0)
    return _between_batches(loops, step)


# ---------------------------------------------------------------------- random generators


def _random_states(device: torch.device) -> dict[str, Any]:
    """Return the states of this process's generators, as tensors and plain data."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)

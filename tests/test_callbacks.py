"""The callbacks of the vector-quantised head, in the real Trainer and read back from a real event file."""

import io
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_vq_models import make_trainer
from torch.utils.data import DataLoader

from lit_logits.callbacks import CodebookMonitor, CodebookReinit, codebook_monitor
from lit_logits.callbacks.codebook_reinit import reset_optimizer_rows
from lit_logits.callbacks.parts import find_part, find_parts
from lit_logits.callbacks.pictures.codebook import CodeTokens, tokens_figure
from lit_logits.modules import VQLogitsHead

D, V, K = 6, 41, 8
ADAM = partial(torch.optim.Adam, lr=0.05)
SGD = partial(torch.optim.SGD, lr=0.5, momentum=0.9)


class Bigram(LightningModule):
    """An embedding and a head: the smallest module that the callbacks can serve. They find the head by type."""

    def __init__(self, optimizer=ADAM, head=True, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(V, D)
        self.dense = torch.nn.Linear(D, V)
        self.inner = torch.nn.ModuleDict({"output": VQLogitsHead(D, V, K, **kwargs)}) if head else None
        self.optimizer = optimizer

    @property
    def head(self):
        return self.inner["output"]

    def training_step(self, batch, batch_idx):
        hidden = self.embedding(batch[:, :-1])
        if self.inner is None:
            return torch.nn.functional.cross_entropy(self.dense(hidden).flatten(0, 1), batch[:, 1:].flatten())
        return self.head.loss(hidden, batch[:, 1:]) + 0.1 * self.head.commitment_loss()

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        if self.inner is not None:
            self.head.after_step()

    def validation_step(self, batch, batch_idx):
        self.log("val/ppl", self.head.loss(self.embedding(batch[:, :-1]), batch[:, 1:]).exp())

    def configure_optimizers(self):
        return self.optimizer(p for p in self.parameters() if p.requires_grad)


def loader(count=24, batch_size=4, vocab_size=V):
    """Only the first `vocab_size` tokens occur, the low ids most."""
    g = torch.Generator().manual_seed(0)
    ids = (vocab_size * torch.rand(count, 7, generator=g) ** 2).long()
    return DataLoader(ids, batch_size=batch_size)


def fit(model, callbacks, data=None, val=None, ckpt_path=None, **kwargs):
    trainer = make_trainer(None, callbacks=callbacks, **kwargs)
    trainer.fit(model, data or loader(), val, ckpt_path=ckpt_path)
    return trainer


def use_few_codes(model):
    """Most tokens that occur sit in code 0; the last two codes own nothing."""
    mapping = torch.arange(V) % (K - 2)
    mapping[:12] = 0
    model.head.set_codes(token_to_code=mapping)


# ---------------------------------------------------------------------- revival


class Recorder(Callback):
    """Codebook and moments after each batch; stands after the callback that it watches."""

    def __init__(self):
        self.steps, self.codebooks, self.dead, self.moments = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append(trainer.global_step)
        self.codebooks.append(pl_module.head.codebook.detach().clone())
        self.dead.append(pl_module.head.dead_codes(0.0).tolist())
        state = trainer.optimizers[0].state.get(pl_module.head.codebook, {})
        self.moments.append({k: v.clone() for k, v in state.items() if v.shape == pl_module.head.codebook.shape})


@pytest.mark.parametrize("optimizer", [ADAM, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize("mapping", ["fixed", "learned"])
def test_the_next_update_does_not_undo_a_revival(optimizer, mapping):
    """Momentum of the old vector would carry the new one away at once."""
    model, recorder = Bigram(optimizer, mapping=mapping), Recorder()
    use_few_codes(model)
    revived = [6, 7]
    with torch.no_grad():
        model.head.codebook[revived] = 30.0  # where the dead codes stood

    class Stale(Callback):
        """Give the dead codes the momentum that codes have that died lately."""

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                for value in trainer.optimizers[0].state[pl_module.head.codebook].values():
                    if value.shape == pl_module.head.codebook.shape:
                        value[revived] = 50.0

    fit(model, [Stale(), CodebookReinit(every_n_steps=3, min_usage=0.0), recorder], max_steps=4, max_epochs=-1)
    assert recorder.dead[1] == revived
    assert recorder.dead[2] == recorder.dead[3] == []
    assert recorder.moments[2]
    for moment in recorder.moments[2].values():
        assert torch.equal(moment[revived], torch.zeros(2, D))
        assert moment.abs().sum() > 0
    assert (recorder.codebooks[2][revived] < 5).all()
    moved = (recorder.codebooks[3] - recorder.codebooks[2])[revived].abs().max()
    assert 0 < moved < 0.5  # it trains, and one ordinary update is all that happened
    without = Recorder()  # the test can fail: the same run without the reset
    model = Bigram(optimizer, mapping=mapping)
    use_few_codes(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_logits.callbacks.codebook_reinit.reset_optimizer_rows", lambda *_: None)
        fit(model, [Stale(), CodebookReinit(every_n_steps=3, min_usage=0.0), without], max_steps=4, max_epochs=-1)
    assert (without.codebooks[3] - without.codebooks[2])[revived].abs().max() > 2 * moved


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Adamax", "NAdam"])
def test_rows_of_every_moment_are_cleared(name):
    parameter = torch.nn.Parameter(torch.randn(5, 3))
    extra = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {"amsgrad": True} if name == "Adam" else {}
    optimizer = getattr(torch.optim, name)([parameter], lr=0.1, **extra)
    for _ in range(3):
        parameter.square().sum().backward()
        optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[parameter].items() if v.shape == parameter.shape}
    assert before
    reset_optimizer_rows(optimizer, parameter, torch.tensor([1, 4]))
    for key, old in before.items():
        new = optimizer.state[parameter][key]
        assert new[[1, 4]].abs().sum() == 0
        assert torch.equal(new[[0, 2, 3]], old[[0, 2, 3]])
    reset_optimizer_rows(optimizer, torch.zeros(5, 3), torch.tensor([0]))  # a parameter that it does not know


def test_looks_once_per_optimizer_step_under_accumulation(monkeypatch):
    looks = []
    monkeypatch.setattr(VQLogitsHead, "dead_codes", lambda self, share: looks.append(share) or torch.tensor([]).long())
    fit(Bigram(), [CodebookReinit(every_n_steps=2, min_usage=0.3)], loader(48), accumulate_grad_batches=3)
    assert looks == [0.3, 0.3]  # 12 batches are 4 steps; looks at 2 and 4


def test_ranks_agree_on_what_is_dead(monkeypatch):
    """What rank 0 says counts, also for a rank whose counts round to another side of the threshold."""
    model = Bigram()
    use_few_codes(model)

    def rank_zero_says(*tensors):
        for tensor in tensors:
            tensor.copy_(torch.tensor([0, 0, 0, 1, 0, 0, 0, 0]))

    revived = []
    monkeypatch.setattr("lit_logits.modules.vq_logits.moving.broadcast_", rank_zero_says)
    monkeypatch.setattr(VQLogitsHead, "revive", lambda self, dead, generator: revived.append(dead.tolist()) or dead)
    fit(model, [CodebookReinit(every_n_steps=6, min_usage=0.0)])
    assert revived == [[3]]


def test_stop_step_and_arguments():
    model = Bigram()
    use_few_codes(model)
    fit(model, [CodebookReinit(every_n_steps=2, stop_step=2)])
    assert model.head.dead_codes().numel() == 2
    fit(model, [CodebookReinit(every_n_steps=2, min_usage=0.0, stop_step=3)])
    assert model.head.dead_codes().numel() == 0
    with pytest.raises(ValueError, match="`every_n_steps` to be at least 1"):
        CodebookReinit(every_n_steps=0)
    with pytest.raises(ValueError, match="`min_usage` to be in"):
        CodebookReinit(min_usage=1.0)


def test_reinit_logs_the_codes_that_were_revived():
    """Not those that were dead: where nothing is left to split a code stays without tokens."""
    model = Bigram(optimizer=partial(torch.optim.SGD, lr=0.0))
    use_few_codes(model)
    reinit = CodebookReinit(every_n_steps=6, min_usage=0.0)
    trainer = fit(model, [reinit])
    assert trainer.callback_metrics["vq/reinit"] == 2
    # Only token 0 occurs, alone in code 0: no code holds two counted tokens.
    model.head.set_codes(token_to_code=torch.cat([torch.zeros(1), torch.ones(V - 1)]).long())
    model.head.token_counts.zero_()
    trainer = fit(model, [CodebookReinit(every_n_steps=6, min_usage=0.0)], loader(vocab_size=1))
    assert model.head.dead_codes().numel() == K - 2
    assert trainer.callback_metrics["vq/reinit"] == 0


@pytest.mark.parametrize("callback", [CodebookReinit(), CodebookMonitor()], ids=["reinit", "monitor"])
def test_without_a_head_it_warns_and_does_nothing(callback, tmp_path):
    model = Bigram(head=False)
    with pytest.warns(UserWarning, match="found no head (in the model that can revive|with codes)"):
        fit(model, [callback], max_steps=2, max_epochs=-1)


# ---------------------------------------------------------------------- the monitor


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def monitored(tmp_path, monitor, model=None, name="run", **kwargs):
    model = model or Bigram()
    logger = TensorBoardLogger(tmp_path, name=name, version="")
    settings = {"max_epochs": 2, "log_every_n_steps": 1, "logger": logger}
    trainer = fit(model, [monitor], kwargs.pop("data", None), kwargs.pop("val", loader(8)), **{**settings, **kwargs})
    return model, trainer, read(tmp_path / name)


class Watch(Callback):
    """What the scalars should be, computed from the head's buffers by loops."""

    def __init__(self, min_usage):
        self.min_usage, self.expected = min_usage, {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        head = pl_module.head
        counts, codes = head.token_counts.double(), head.token_to_code.tolist()
        bias = head.token_bias.detach().double()
        mass = [sum(counts[v].item() for v in range(V) if codes[v] == k) for k in range(K)]
        total = sum(mass)
        probs = torch.tensor([m / total for m in mass]).double()
        norm = torch.stack([torch.logsumexp(bias[[v for v in range(V) if codes[v] == codes[u]]], 0) for u in range(V)])
        self.expected[trainer.global_step] = {
            "vq/used_codes": sum(m > 0 for m in mass),
            "vq/code_perplexity": float((-(probs * probs.clamp(min=1e-30).log()).sum()).exp()),
            "vq/dead_codes": sum(codes.count(k) == 0 or mass[k] / total * K < self.min_usage for k in range(K)),
            "vq/ppl_floor": float(((counts * (norm - bias)).sum() / total).exp()),
        }


def test_scalars_in_the_event_file(tmp_path):
    model, watch = Bigram(), Watch(0.4)
    use_few_codes(model)
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    monitor = CodebookMonitor(every_n_steps=4, min_usage=0.4)
    fit(model, [monitor, watch], max_epochs=2, logger=logger, log_every_n_steps=1)
    events = read(tmp_path / "run")
    for name in ("vq/used_codes", "vq/code_perplexity", "vq/dead_codes", "vq/ppl_floor"):
        # Lightning numbers the first step 0; looks are after steps 1, 4, 8 and 12.
        logged = {event.step + 1: event.value for event in events.Scalars(name)}
        assert set(logged) == {1, 4, 8, 12}, name
        for step, value in logged.items():
            assert value == pytest.approx(watch.expected[step][name], rel=1e-4), (name, step)
    assert 2 <= watch.expected[12]["vq/dead_codes"] < K


def test_the_picture_in_the_event_file(tmp_path):
    _, _, events = monitored(tmp_path, CodebookMonitor(every_n_steps=2))
    images = events.Images("vq/usage")
    assert [image.step for image in images] == [6, 12]
    picture = Image.open(io.BytesIO(images[-1].encoded_image_string))
    assert picture.size == (images[-1].width, images[-1].height)
    assert 600 <= picture.width <= 2000
    assert 300 <= picture.height <= 1000
    pixels = torch.tensor(
        list(
            picture.convert("L").get_flattened_data()
            if hasattr(picture, "get_flattened_data")
            else picture.convert("L").getdata()
        )
    ).float()
    assert pixels.std() > 10
    assert images[0].encoded_image_string != images[1].encoded_image_string


def test_the_figure_shows_the_usage_it_was_given():
    """Rows are codes, most used first; columns are looks."""
    snapshots = torch.tensor([[0.25, 0.25, 0.5], [0.1, 0.6, 0.3]])
    figure = codebook_monitor.usage_figure(snapshots, [10, 20])
    heat, curve = figure.axes[:2]
    shown = torch.tensor(heat.images[0].get_array().filled().tolist())  # type: ignore[attr-defined]
    torch.testing.assert_close(10**shown, 3 * snapshots[:, [1, 2, 0]].T, rtol=1e-4, atol=1e-4)
    assert [tick.get_text() for tick in heat.get_xticklabels()] == ["10", "20"]
    torch.testing.assert_close(torch.tensor(curve.lines[0].get_xdata().tolist()), torch.tensor([1.8, 0.9, 0.3]))
    flat = codebook_monitor.usage_figure(torch.zeros(1, 3), [1])  # nothing counted yet
    assert flat.axes


class Tokenizer:
    def decode(self, ids):
        return {0: " the", 1: "|", 2: "a\nb", 3: "`"}.get(ids[0], f"word{ids[0]}")


def test_the_text_in_the_event_file(tmp_path):
    from lightning.pytorch import LightningDataModule

    class Data(LightningDataModule):
        tokenizer = Tokenizer()

        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return loader(8)

    model = Bigram()
    use_few_codes(model)
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[CodebookMonitor(num_codes=3, num_tokens=5)],
        log_every_n_steps=1,
    )
    trainer.fit(model, datamodule=Data())
    events = read(tmp_path / "run")
    (text,) = (event.tensor_proto.string_val[0].decode() for event in events.Tensors("vq/tokens/text_summary"))
    lines = text.splitlines()
    assert len(lines) == 2 + 3
    usage, counts = model.head.usage(), model.head.token_counts
    heaviest = int(usage.argmax())
    assert lines[2].startswith(f"| {heaviest} | {usage[heaviest].item():.3%} | ")
    assert all(word in text for word in ("`·the`", "`&#124;`", "`a⏎b`", "`'`"))
    top = [v for v in counts.argsort(descending=True).tolist() if model.head.token_to_code[v] == heaviest]
    assert lines[2].count("`") == 2 * 5
    assert top[0] == 0
    assert all(line.count("|") == 5 for line in lines)  # a token cannot break the table


def test_without_tokenizer_or_tensorboard(tmp_path):
    _, _, events = monitored(tmp_path, CodebookMonitor(every_n_steps=2))
    lines = events.Tensors("vq/tokens/text_summary")[0].tensor_proto.string_val[0].decode().splitlines()
    shown = [line.split("|")[-2].split() for line in lines[2:]]  # ids where nothing spells them out
    assert len(shown) == K
    assert sorted(int(token.strip("`")) for tokens in shown for token in tokens) == list(range(V))
    fit(Bigram(), [CodebookMonitor(every_n_steps=2)], val=loader(8))  # no logger at all


def test_monitor_looks_once_per_optimizer_step_and_not_before_the_first(tmp_path):
    """Under accumulation several batches end at one step, and the first ones at step 0."""
    monitor = CodebookMonitor(every_n_steps=2)
    monitored(tmp_path, monitor, data=loader(48), max_epochs=1, accumulate_grad_batches=3)
    assert monitor.steps == [1, 2, 4]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_monitor_survives_a_resume(at, tmp_path, monkeypatch):
    """The picture of a resumed run is that of an uninterrupted one, also once every second look is dropped."""
    monkeypatch.setattr(codebook_monitor, "_MAX_SNAPSHOTS", 4)

    def run(epochs, ckpt_path=None):
        monitor = CodebookMonitor(every_n_steps=1)
        model = Bigram()
        trainer = fit(model, [monitor], loader(20), max_epochs=epochs, ckpt_path=ckpt_path)
        return monitor, trainer

    whole, _ = run(5)
    part, trainer = run(at)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    resumed, _ = run(5, tmp_path / "part.ckpt")
    assert len(part.steps) < 4
    assert len(set(torch.tensor(whole.steps).diff().tolist())) == 1  # evenly spaced
    assert resumed.steps == whole.steps
    torch.testing.assert_close(torch.stack(resumed.snapshots), torch.stack(whole.snapshots))


def test_monitor_warns_once_when_the_floor_is_in_the_way(tmp_path):
    model = Bigram(bias=False)
    model.head.set_codes(token_to_code=torch.zeros(V, dtype=torch.long))  # one code: perplexity V, whatever is learned
    with pytest.warns(UserWarning, match=r"no perplexity below 41\.00, and `target_ppl` is 20") as caught:
        monitored(tmp_path, CodebookMonitor(every_n_steps=1, target_ppl=20.0), model)
    assert sum("allows no perplexity" in str(warning.message) for warning in caught) == 1
    with pytest.warns(UserWarning, match="and validation reached 41"):
        monitored(tmp_path, CodebookMonitor(every_n_steps=1), model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*allows no perplexity.*")
        monitored(tmp_path, CodebookMonitor(every_n_steps=1, target_ppl=400.0), Bigram())


def test_monitor_only_draws_on_rank_zero(tmp_path, monkeypatch):
    monitor, drawn = CodebookMonitor(every_n_steps=1), []
    monkeypatch.setattr(monitor, "_code_tokens", lambda *_: drawn.append(1) or [])
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    fit(Bigram(), [monitor], val=loader(8), logger=TensorBoardLogger(tmp_path))
    assert drawn == []
    assert monitor.steps == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="`every_n_steps` to be at least 1"):
        CodebookMonitor(every_n_steps=0)


@pytest.mark.parametrize("callback", [CodebookMonitor, CodebookReinit])
@pytest.mark.parametrize("min_usage", [-0.1, 1.0, 5, float("nan")])
def test_a_share_at_which_even_use_is_dead_is_refused_by_both(callback, min_usage):
    """The monitor once took what the re-initialisation refused."""
    with pytest.raises(ValueError, match=r"`min_usage` to be in \[0, 1\), in units of 1/K, but got"):
        callback(min_usage=min_usage)


def test_parts_are_found_by_type_in_their_order():
    model = Bigram()
    assert find_part(model, VQLogitsHead) is model.head
    assert find_part(model, torch.nn.Embedding) is model.embedding
    assert find_part(Bigram(head=False), VQLogitsHead) is None
    own = [module for module in model.children() if type(module) is not torch.nn.ModuleDict]
    assert find_parts(model, torch.nn.Module)[0] is model
    assert [part for part in find_parts(model, torch.nn.Module) if part in own] == [model.embedding, model.dense]
    assert find_parts(model, torch.nn.Conv1d) == []


def test_the_picture_of_tokens_fits_and_holds_what_matplotlib_would_read_as_a_formula():
    """A line a code; what does not fit is left out at a token's end, and a dollar sign stays one."""
    codes = [
        CodeTokens(7, 0.25, 1200, ["·the", "$x$", "a_b"]),
        CodeTokens(3, 0.001, 40, [f"word{i}" for i in range(40)]),
    ]
    figure = tokens_figure(codes)
    figure.canvas.draw()
    words = figure.axes[1]
    first, second = (text.get_text() for text in words.texts)
    assert first.replace("\\$", "$").split() == ["1,200", "·the", "$x$", "a_b"]
    assert second.split() == ["40", *(f"word{i}" for i in range(len(second.split()) - 1))]
    for text in words.texts:
        assert text.get_window_extent().x1 <= figure.bbox.x1
    bars: Any = figure.axes[0].patches
    assert [bar.get_width() for bar in bars] == [25, 0.1]

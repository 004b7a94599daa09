"""What fusion did, logged by the real Trainer, read back from a real event file and compared with the predictions."""

import io
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lit_logits.callbacks import FusionWeightLogger
from lit_logits.callbacks.pictures.fusion import curve_figure, text_figure
from lit_logits.callbacks.pictures.tokens import token_texts
from lit_logits.datamodules.tokenization import load_tokenizer, train_bpe
from lit_logits.dynamic_fusion import DynamicFusionDecoder
from lit_logits.modules import FusedCausalLM

V = 300
ENDS = list(range(0, V, 5))  # a fifth of the ids end a text, so that lengths differ
SAMPLING = {"max_new_tokens": 9, "do_sample": True}
DOCUMENTS = ["def price(apples):\n\treturn 3 * apples  # in $", "the price of the apples is what the apples cost"] * 9


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(DOCUMENTS, 280, folder)  # models have 20 ids more, which are padding
    return load_tokenizer(folder)


def llama(seed):
    """Random, but not close to uniform."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.4,
        )
    )


def decoder(tokenizer, num_experts=2, **kwargs):
    models = [llama(seed) for seed in range(2 + num_experts)]
    arguments = {"eos_token_id": ENDS, "generation": SAMPLING, "tokenizer": tokenizer, **kwargs}
    return DynamicFusionDecoder(models[0], models[1], models[2:], **arguments)


def batches(count=3, size=2, length=11):
    """Prompts of 3 tokens, then responses of different lengths; `rows` do not start at 0."""
    made = []
    for number in range(count):
        g = torch.Generator().manual_seed(number)
        ids = torch.randint(1, 280, (size, length), generator=g)
        labels, mask = ids.clone(), torch.ones_like(ids)
        labels[:, :3] = -100
        for row in range(size):
            labels[row, length - row - 1 :], mask[row, length - row - 1 :] = -100, 0
        rows = 40 + number * size + torch.arange(size)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels, "rows": rows})
    return made


def loader(data):
    return DataLoader(data, batch_size=None)


class Watch(Callback):
    """The last trace of each batch."""

    def __init__(self):
        self.traces, self.batch = [], []

    def setup(self, trainer, pl_module, stage):
        pl_module.fused.register_trace_hook(self.batch.append)

    def on_test_batch_end(self, trainer, pl_module, *_):
        self.traces += self.batch[-1:]
        self.batch.clear()

    on_predict_batch_end = on_test_batch_end


def run(stage, model, callbacks, data=None, folder=None, logger=None, **kwargs):
    logger = logger or (TensorBoardLogger(folder, name="run", version="") if folder else False)
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": logger}
    trainer = Trainer(**settings, callbacks=callbacks, **kwargs)
    torch.manual_seed(7)
    return getattr(trainer, stage)(model, data or loader(batches()))


def read(folder):
    sizes = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    return EventAccumulator(str(folder / "run"), size_guidance=sizes).Reload()


def scalars(events, name):
    return {event.step: event.value for event in events.Scalars(name)}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("mode", ["single", "joint"])
def test_predictions_and_event_file_agree(tokenizer, tmp_path, mode):
    watch = Watch()
    predictions = run(
        "predict", decoder(tokenizer, mode=mode), [FusionWeightLogger(num_texts=0), watch], folder=tmp_path
    )
    events = read(tmp_path)
    assert len({len(record["tokens"]) for records in predictions for record in records}) > 1  # some texts end early
    for expert, name in enumerate(("expert_0", "expert_1")):
        alphas = [[a for record in records for a in record["alpha"][name]] for records in predictions]
        assert scalars(events, f"fusion/alpha/{name}") == pytest.approx(dict(enumerate(map(mean, alphas))), abs=1e-4)
        exact = [trace.alpha[expert][trace.mask].tolist() for trace in watch.traces]  # the predictions are rounded
        active = {i: mean(a > 0 for a in values) for i, values in enumerate(exact)}
        assert scalars(events, f"fusion/active/{name}") == pytest.approx(active, abs=1e-6)
        assert 0 < mean(active.values()) <= 1
        (event,) = events.Histograms(f"fusion/alpha_hist/{name}")
        histogram, seen = event.histogram_value, [a for values in alphas for a in values]
        assert (event.step, histogram.num, sum(histogram.bucket)) == (0, len(seen), len(seen))
        assert histogram.sum == pytest.approx(sum(seen), abs=1e-3)
        assert histogram.sum_squares == pytest.approx(sum(a * a for a in seen), abs=1e-3)
        assert (histogram.min, histogram.max) == (0, 2)
        for limit, below in zip(histogram.bucket_limit, torch.tensor(histogram.bucket).cumsum(0), strict=True):
            assert sum(a < limit - 2e-4 for a in seen) <= below <= sum(a <= limit + 2e-4 for a in seen)
    for name in ("kl_forward", "kl_reverse"):
        expected = {i: mean(v for r in records for v in r[name]) for i, records in enumerate(predictions)}
        assert scalars(events, f"fusion/{name}") == pytest.approx(expected, abs=1e-4)
        assert max(expected.values()) > 0.01


def test_scored_texts_and_the_means_that_the_module_logs(tokenizer, tmp_path):
    """Under its own name, or TensorBoard would draw the module's mean as one more batch."""
    model, watch = decoder(tokenizer), Watch()
    data = batches(4)
    data[1]["labels"][0] = -100  # a text of which nothing counts
    data[2]["labels"][:] = -100  # a batch of them
    (means,) = run("test", model, [FusionWeightLogger(num_texts=0), watch], loader(data), tmp_path)
    events = read(tmp_path)
    for name in ("kl_forward", "kl_reverse"):
        assert scalars(events, f"fusion/{name}") == {0: pytest.approx(means[f"fusion/{name}"])}
        logged = scalars(events, f"fusion/{name}_batch")
        assert set(logged) == {0, 1, 3}
        counts = {i: int(trace.mask.sum()) for i, trace in enumerate(watch.traces)}
        total = sum(logged[i] * counts[i] for i in logged)
        assert total / sum(counts.values()) == pytest.approx(means[f"fusion/{name}"], rel=1e-4)
    for number, trace in enumerate(watch.traces):
        for expert in range(2):
            kept = [
                float(trace.alpha[expert, b, n])
                for b in range(trace.mask.shape[0])
                for n in range(trace.mask.shape[1])
                if data[number]["labels"][b, n + 1] != -100
            ]
            if kept:
                assert scalars(events, f"fusion/alpha/expert_{expert}")[number] == pytest.approx(mean(kept), abs=1e-6)
    (event,) = events.Histograms("fusion/alpha_hist/expert_1")
    assert event.histogram_value.num == sum(int(trace.mask.sum()) for trace in watch.traces)


def test_batches_are_counted_over_data_loaders_and_from_0_in_the_next_run(tokenizer, tmp_path):
    class OfSeveral(DynamicFusionDecoder):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return super().predict_step(batch, batch_idx)

    models, logger = [llama(seed) for seed in range(3)], FusionWeightLogger(every_n_batches=2, num_texts=0)
    model = OfSeveral(models[0], models[1], models[2:], tokenizer=tokenizer, eos_token_id=0, generation=SAMPLING)
    loaders = [loader(batches(3)), loader(batches(2))]
    run("predict", model, [logger], loaders, tmp_path / "a")
    run("predict", model, [logger], loaders[1:], tmp_path / "b")
    first, second = read(tmp_path / "a"), read(tmp_path / "b")
    assert set(scalars(first, "fusion/kl_forward")) == {0, 2, 4}
    assert set(scalars(second, "fusion/kl_forward")) == {0}
    nums = [events.Histograms("fusion/alpha_hist/expert_0")[0].histogram_value.num for events in (first, second)]
    assert nums[0] > nums[1] > 10  # every batch counts
    assert first.Tags()["images"] == []


def test_a_batch_without_a_trace_of_its_own_is_left_out(tokenizer, tmp_path):
    """The trace of the batch before it, or of an earlier run, is not logged twice."""

    class Lazy(DynamicFusionDecoder):
        def predict_step(self, batch, batch_idx):
            return super().predict_step(batch, batch_idx) if batch_idx == 1 else None

    models = [llama(seed) for seed in range(3)]
    model = Lazy(models[0], models[1], models[2:], tokenizer=tokenizer, eos_token_id=0, generation=SAMPLING)
    model.generate(torch.tensor([[3]]), max_new_tokens=1, pad_token_id=0)
    run("predict", model, [FusionWeightLogger(num_texts=1)], folder=tmp_path)
    assert set(scalars(read(tmp_path), "fusion/kl_forward")) == {1}


@pytest.mark.parametrize("alpha", [1.0, [0.5, -0.25], 0.0])
def test_static_alpha(tokenizer, tmp_path, alpha):
    model = decoder(tokenizer, static_alpha=alpha)
    run("predict", model, [FusionWeightLogger(num_texts=1)], folder=tmp_path)
    events = read(tmp_path)
    for name, value in zip(("expert_0", "expert_1"), alpha if isinstance(alpha, list) else [alpha] * 2, strict=True):
        assert set(scalars(events, f"fusion/alpha/{name}").values()) == {value}
        assert set(scalars(events, f"fusion/active/{name}").values()) == {float(value != 0)}
        histogram = events.Histograms(f"fusion/alpha_hist/{name}")[0].histogram_value
        full = [i for i, count in enumerate(histogram.bucket) if count]
        assert len(full) == 1
        below = histogram.bucket_limit[full[0] - 1] if full[0] else histogram.min
        assert below - 1e-6 <= value <= histogram.bucket_limit[full[0]] + 1e-6
    assert len(events.Images("fusion/text")) == 1


# ---------------------------------------------------------------------- who watches what, and where


class NoFusion(LightningModule):
    def predict_step(self, batch, batch_idx):
        return batch["rows"]

    test_step = predict_step


def test_without_experts_it_warns_once_and_does_nothing(tokenizer, tmp_path):
    for model in (NoFusion(), decoder(tokenizer, num_experts=0)):
        callback = FusionWeightLogger()
        with pytest.warns(UserWarning, match="found no FusedCausalLM with experts"):
            run("predict", model, [callback], folder=tmp_path)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*FusionWeightLogger.*")
            run("test", model, [callback], folder=tmp_path)
        tags = read(tmp_path).Tags()
        assert [tag for tag in tags["scalars"] if tag.startswith("fusion/")] == tags["images"] == []


def test_it_finds_the_part_by_its_type(tmp_path):
    """Also in another module, without a tokenizer."""

    class Own(LightningModule):
        def __init__(self):
            super().__init__()
            models = [llama(seed) for seed in range(3)]
            self.parts = torch.nn.ModuleDict({"one": FusedCausalLM(models[0], models[1], models[2:])})

        def predict_step(self, batch, batch_idx):
            self.parts["one"].score(batch["input_ids"], batch["labels"])

    run("predict", Own(), [FusionWeightLogger()], folder=tmp_path)
    events = read(tmp_path)
    assert set(scalars(events, "fusion/alpha/expert_0")) == {0, 1, 2}
    assert len(events.Images("fusion/text")) == 4


def test_other_loggers_get_the_scalars(tokenizer, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    run("predict", decoder(tokenizer), [FusionWeightLogger()], logger=logger)
    header, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert {"fusion/alpha/expert_0", "fusion/kl_reverse", "step"} <= set(header.split(","))
    assert len(lines) == 3
    run("predict", decoder(tokenizer), [FusionWeightLogger()])  # no logger at all


def test_other_ranks_log_nothing(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    run("predict", decoder(tokenizer), [FusionWeightLogger()], folder=tmp_path)
    tags = read(tmp_path).Tags()
    assert [tag for tag in tags["scalars"] if tag.startswith("fusion/")] == tags["images"] == tags["histograms"] == []


@pytest.mark.parametrize("name", ["every_n_batches", "num_texts", "max_tokens"])
def test_arguments(name):
    with pytest.raises(ValueError, match=f"Expected `{name}` to be at least .*, but got -1"):
        FusionWeightLogger(**{name: -1})


# ---------------------------------------------------------------------- pictures


def test_pictures_in_the_event_file(tokenizer, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*([Gg]lyph|[Ff]ont|matplotlib|tight|constrained).*")
        run("predict", decoder(tokenizer), [FusionWeightLogger(num_texts=3)], folder=tmp_path)
    events = read(tmp_path)
    for tag in ("fusion/text", "fusion/alpha_curve"):
        images = events.Images(tag)
        assert [image.step for image in images] == [0, 1, 2]
        assert len({image.encoded_image_string for image in images}) == 3
        for image in images:
            picture = Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB")
            assert 600 <= picture.width <= 2000
            assert 100 <= picture.height <= 1000
            colors = picture.getcolors(picture.width * picture.height)
            assert len(colors) > 50
            assert max(count for count, _ in colors) < 0.99 * picture.width * picture.height


def test_titles_tell_where_a_text_comes_from(tokenizer, tmp_path, monkeypatch):
    drawn = []

    def draw(pieces, alpha, *, title, **kwargs):
        drawn.append((title, len(pieces), len(alpha[0])))
        return text_figure(pieces, alpha, title=title, **kwargs)

    monkeypatch.setattr("lit_logits.callbacks.fusion_weight_logger.text_figure", draw)
    generation = {**SAMPLING, "num_return_sequences": 2}
    model = decoder(tokenizer, generation=generation, eos_token_id=0)
    run("predict", model, [FusionWeightLogger(num_texts=5, max_tokens=4)], folder=tmp_path)
    titles = ["text 0 (row 40, sample 0)", "text 1 (row 40, sample 1)", "text 2 (row 41, sample 0)"]
    titles = [f"batch 0, {title}" for title in [*titles, "text 3 (row 41, sample 1)"]]
    titles = [f"{title}, first 4 of 9 tokens" for title in [*titles, "batch 1, text 0 (row 42, sample 0)"]]
    assert [title for title, *_ in drawn] == titles
    assert all(4 == tokens == weights for _, tokens, weights in drawn)
    drawn.clear()
    data = batches(1)
    data[0]["labels"][0] = -100  # of no text nothing is drawn
    del data[0]["attention_mask"]
    run("test", model, [FusionWeightLogger()], loader(data), tmp_path)
    assert drawn == [("batch 0, text 1 (row 41), 6 tokens", 6, 6)]


def test_with_exact_match_the_generated_answers_are_shown(tokenizer, tmp_path, monkeypatch):
    """Of several choices only the right ones are answered, so that texts are fewer than sequences."""
    drawn = []

    def draw(pieces, alpha, *, title, **kwargs):
        drawn.append(title)
        return text_figure(pieces, alpha, title=title, **kwargs)

    monkeypatch.setattr("lit_logits.callbacks.fusion_weight_logger.text_figure", draw)
    (batch,) = batches(1, size=4)
    batch |= {"rows": torch.tensor([8, 8, 9, 9]), "correct": torch.tensor([False, True, True, False])}
    batch["choices"] = torch.tensor([0, 1, 0, 1])
    batch["response_ends"] = (batch["labels"] >= 0).long().cumsum(1)
    model, watch = decoder(tokenizer, exact_match=True, eos_token_id=0), Watch()
    run("test", model, [FusionWeightLogger(), watch], loader([batch]), tmp_path)
    assert drawn == ["batch 0, text 0 (row 8), 9 tokens", "batch 0, text 1 (row 9), 9 tokens"]
    (trace,) = watch.traces
    shown = scalars(read(tmp_path), "fusion/alpha/expert_0")
    assert shown == {0: pytest.approx(trace.alpha[0][trace.mask].mean().item(), abs=1e-6)}


def test_pieces_join_to_the_text(tokenizer):
    text = "def price(apples):\n\treturn 3 * apples  # in $, é and 🐉!"
    ids = tokenizer.encode(text)
    pieces = token_texts(ids, tokenizer)
    assert len(pieces) == len(ids) > 10
    joined = "".join(pieces).replace("⏎\n", "\n").replace("⇥", "\t")
    # Letters of several bytes are tokens of one byte each here; DejaVu has é but no dragon.
    assert joined == text.replace("é", "·é").replace("🐉", "···□")


def test_pieces_of_odd_tokens(tokenizer):
    one = {character: tokenizer.encode(character) for character in ("\x07", "中", "\r", "é")}
    assert token_texts(one["\x07"], tokenizer) == ["\\x07"]
    assert token_texts(one["\r"], tokenizer) == ["\\r"]
    assert token_texts(one["中"], tokenizer) == ["·", "·", "□"]
    a = tokenizer.encode("a")
    assert token_texts([one["é"][0], *a], tokenizer) == ["·", "a"]  # a byte that stays alone
    assert token_texts([*a, 299, *a], tokenizer) == ["a", "⟨299⟩", "a"]  # padding of the vocabulary
    assert token_texts([tokenizer.eos_token_id], tokenizer) == ["<|endoftext|>"]
    assert token_texts([], tokenizer) == []


def test_pieces_of_a_tokenizer_that_writes_the_first_token_differently():
    """SentencePiece drops the space in front of a text, so a token alone does not tell."""

    class Sentence:
        def decode(self, ids, **kwargs):
            return "".join([" the", " app", "les"][i] for i in ids).lstrip()

    assert token_texts([0, 1, 2, 0], Sentence()) == ["the", " app", "les", " the"]


def boxes(figure):
    """Token → colours of what it lies on, and its place, from the finished figure."""
    page = figure.axes[0]
    found = []
    for path, color, text in zip(
        page.collections[0].get_paths(), page.collections[0].get_facecolors(), page.texts, strict=True
    ):
        found.append((text.get_text(), tuple(color[:3]), path.get_extents()))
    return found


def test_the_colour_is_the_weight_of_the_largest_expert():
    alpha = torch.tensor([[0.0, 2.0, 0.5, 1.0], [0.0, 0.0, 1.0, 2.0]])
    names = {"expert_names": ["maths", "_code $x$"], "alpha_range": (0.0, 2.0), "title": "batch 0"}
    figure = text_figure(["none", " first", " some", " second"], alpha, **names)
    none, first, some, second = (color for _, color, _ in boxes(figure))
    assert none == (1, 1, 1)
    full = {name: [0.75 * channel + 0.25 for channel in to_rgb(f"tab:{name}")] for name in ("blue", "orange")}
    assert first == pytest.approx(full["blue"], abs=0.01)
    assert second == pytest.approx(full["orange"], abs=0.01)
    assert some == pytest.approx([(1 + channel) / 2 for channel in full["orange"]], abs=0.01)
    assert [axes.get_title(loc="left") for axes in figure.axes[1:]] == ["α of maths", "α of _code $x$"]
    for bar in figure.axes[1:]:
        assert bar.get_xlim() == (0, 2)


def test_lines_are_wrapped_in_front_of_words_and_nothing_lies_outside():
    words = [" word", "ly", " $x_1$"] * 40 + [" " + "x" * 400, "end⏎\n", "    return", "⏎\n", "⏎\n", "中文" * 100]
    alpha = torch.linspace(0, 2, len(words)).unsqueeze(0)
    figure = text_figure(words, alpha, expert_names=["a"], alpha_range=(0.0, 2.0), title="t")
    figure.canvas.draw()
    page, placed = figure.axes[0], boxes(figure)
    assert "".join(text for text, *_ in placed) == "".join(words).replace("\n", "")
    spots = set()
    for text, _, box in placed:
        assert box.width == pytest.approx(len(text))
        line = int(box.y0)
        for column in range(round(box.x0), round(box.x1)):
            assert (line, column) not in spots  # no two characters in one place
            spots.add((line, column))
        assert 0 <= box.x0 < box.x1 <= page.get_xlim()[1]
        assert 0 <= box.y0 < box.y1 <= page.get_ylim()[0]
    assert all(box.x0 > 0 for text, _, box in placed if text == "ly")  # a word is not broken
    (code,) = (box for text, _, box in placed if text == "    return")
    (end,) = (box for text, _, box in placed if text == "end⏎")
    assert code.x0 == 0
    assert int(code.y0) == int(end.y0) + 1
    renderer = FigureCanvasAgg(figure).get_renderer()
    for text, (_, _, box) in zip(page.texts[:60], placed[:60], strict=True):  # letters fill their boxes
        drawn = text.get_window_extent(renderer).transformed(page.transData.inverted())
        assert drawn.x0 == pytest.approx(box.x0, abs=0.5)
        assert drawn.x1 == pytest.approx(box.x1, abs=0.5)


def test_a_text_of_many_lines_is_cut():
    figure = text_figure(
        ["⏎\n"] * 400, torch.ones(1, 400), expert_names=["a"], alpha_range=(0.0, 2.0), title="batch 0, text 0"
    )
    assert figure.get_size_inches()[1] < 16
    assert figure.texts[0].get_text() == "batch 0, text 0, 340 more not shown"


def test_curves_show_what_they_were_given():
    alpha, forward, reverse = torch.rand(2, 30), torch.rand(30), torch.rand(30)
    pieces = [f" t{i}" for i in range(30)]
    figure = curve_figure(
        pieces, alpha, forward, reverse, expert_names=["_a", "$b"], alpha_range=(0.0, 2.0), title="batch 0"
    )
    figure.canvas.draw()
    weights, divergences = figure.axes
    for index, row in enumerate(alpha):
        for patch in weights.patches[2 * index : 2 * index + 2]:  # the area and its edge
            torch.testing.assert_close(torch.tensor(patch.get_data().values), row)  # type: ignore[attr-defined]
            assert patch.get_data().edges.tolist() == [n - 0.5 for n in range(31)]  # type: ignore[attr-defined]
    for line, row in zip(divergences.lines, (forward, reverse), strict=True):
        assert line.get_xdata().tolist() == list(range(30))
        torch.testing.assert_close(torch.tensor(line.get_ydata()), row)
    labels = [text.get_text() for text in weights.get_legend().get_texts()]
    assert labels == [f"α of {name}, mean {row.mean():.2f}" for name, row in zip(["_a", "$b"], alpha, strict=True)]
    highest = int(torch.maximum(forward, reverse).argmax())
    assert f"t{highest}" in [text.get_text() for text in divergences.texts]

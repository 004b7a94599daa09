"""`GWApproximationLogger` in the real Trainer: event files read back."""

import io
import itertools
import random
import sys
import warnings
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from lit_logits.callbacks import GWApproximationLogger, gw_approximation_logger
from lit_logits.callbacks.pictures.gw import graph_figure, scatter_figure
from lit_logits.functional import top_k_logits, vocabulary_graph
from lit_logits.modules.gld_fusion.criterion import GraphAlignment

ot = pytest.importorskip("ot")

V, K = 40, 5


class Net(nn.Module):
    """Logits of the next token from this one."""

    def __init__(self, seed, vocab_size):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(vocab_size, 8)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(8, vocab_size)

    def forward(self, ids):
        return 2 * self.head(self.dropout(self.table(ids)))


class Toy(L.LightningModule):
    """A student and frozen sources, whose reading of the text is one position longer."""

    def __init__(self, names=("source",), skip=(), **kwargs):
        super().__init__()
        self.student = Net(0, V)
        self.sources = nn.ModuleList(Net(1 + i, V + 10 * i).eval().requires_grad_(False) for i in range(len(names)))
        self.names, self.skip = names, skip
        self.parts = nn.ModuleDict({"graphs": GraphAlignment(**kwargs)})
        self.seen = []  # of each micro-batch: name → what the part was given

    def training_step(self, batch, batch_idx):
        ids, mask = batch["ids"], batch["mask"]
        top = top_k_logits(self.student(ids), K)
        loss = -top.log_probs[mask].mean()
        self.seen.append({})
        longer = torch.cat([ids, ids[:, :1]], 1)
        for name, source in zip(self.names, self.sources, strict=True):
            if (name, batch_idx) in self.skip:
                continue
            of_source = top_k_logits(source(longer), K + 2)
            masks = mask, torch.cat([mask, mask[:, :1]], 1)
            if name == "source":
                bound = self.parts["graphs"](top, of_source, *masks)
            else:
                named = {"student_mask": masks[0], "source_mask": masks[1]}
                bound = self.parts["graphs"](student=top, source=of_source, **named, name=name)
            self.seen[-1][name] = [x.detach() for x in (top.log_probs, *top[1:])], list(of_source), *masks
            loss = loss + 0.1 * bound.mean()
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9)


def batches(count=8, size=3, length=7, empty=()):
    """`empty`: (batch, sample) of which nothing counts."""
    made = []
    for number in range(count):
        g = torch.Generator().manual_seed(number)
        ids, mask = torch.randint(V, (size, length), generator=g), torch.rand(size, length, generator=g) < 0.8
        mask[:, 0] = True
        for row in range(size):
            if (number, row) in empty:
                mask[row] = False
        made.append({"ids": ids, "mask": mask})
    return made


def fit(model, *callbacks, folder=None, data=None, logger=None, datamodule=None, ckpt_path=None, **kwargs):
    logger = logger or (TensorBoardLogger(folder, name="run", version="") if folder else False)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    defaults = {"max_epochs": 1, "enable_checkpointing": False, "logger": logger}
    trainer = L.Trainer(**{**quiet, **defaults, **kwargs}, callbacks=list(callbacks))
    torch.manual_seed(7)
    if datamodule is not None:
        trainer.fit(model, datamodule=datamodule)
    else:
        trainer.fit(model, DataLoader(data or batches(), batch_size=None), ckpt_path=ckpt_path)
    return trainer


def read(folder):
    sizes = {"scalars": 0, "images": 0}
    return EventAccumulator(str(folder / "run"), size_guidance=sizes).Reload()


def scalars(events, name):
    return {event.step: event.value for event in events.Scalars(name)}


def tags(events):
    found = events.Tags()
    return {tag for kind in ("scalars", "images") for tag in found[kind] if tag.startswith("gw/")}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def standardized(top):
    """From the definition: logits less their mean, in units of their deviation."""
    log_probs, ids, _, log_normalizer, average, deviation = top
    values = (log_probs + log_normalizer[..., None] - average[..., None]) / deviation[..., None]
    return values[..., :K].double(), ids[..., :K]


def oracle(call, by_id=False, max_nodes=32, max_samples=4):
    """Sorted bound, GW over all permutations and both graphs of each sample, by loops over positions."""
    student, source, student_mask, source_mask = call
    found = []
    for row in range(len(student_mask)):
        graphs = []
        for top, mask in ((student, student_mask), (source, source_mask)):
            values, ids = standardized(top)
            kept = mask[row].nonzero().squeeze(1).tolist()
            nodes = sorted({int(i) for t in kept for i in ids[row, t]}) if by_id else range(K)
            graph = np.zeros((len(nodes), len(nodes)))
            for t in kept:
                z = np.zeros(len(nodes))
                for place in range(K):
                    z[nodes.index(int(ids[row, t, place])) if by_id else place] = values[row, t, place]
                graph += np.outer(z, z) / len(kept)
            largest = np.argsort(-graph.sum(1), kind="stable")[:max_nodes] if by_id else np.arange(K)[:max_nodes]
            graphs.append(graph[np.ix_(largest, largest)])
        size = min(map(len, graphs))
        if size and len(found) < max_samples and student_mask[row].any() and source_mask[row].any():
            C1, C2 = (graph[:size, :size] for graph in graphs)
            bound = np.abs(np.sort(C1.mean(1)) - np.sort(C2.mean(1))).mean()
            edges = np.sqrt(np.square(np.sort(C1.ravel()) - np.sort(C2.ravel())).mean())
            exact = np.sqrt(min(np.square(C1 - C2[np.ix_(p, p)]).mean() for p in itertools.permutations(range(size))))
            found.append((bound, exact, edges))
    return found


# ---------------------------------------------------------------------- the part


def test_the_part_is_a_bound_for_each_sample():
    """Against GW over all permutations; n GW ≥ GW~, whatever the mask, and no gradient to the source."""
    torch.manual_seed(0)
    logits = torch.randn(4, 6, V, requires_grad=True), torch.randn(4, 9, V + 7, requires_grad=True)
    student, source = top_k_logits(logits[0], K), top_k_logits(logits[1], K + 2)
    masks = torch.rand(4, 6) < 0.7, torch.rand(4, 9) < 0.7
    masks[0][1], masks[1][2] = False, False
    bound = GraphAlignment()(student, source, *masks)
    assert bound[1:3].tolist() == [0, 0]
    expected = oracle(([x.detach() for x in student], [x.detach() for x in source], *masks))
    for row, (sorted_bound, exact, _) in zip((0, 3), expected, strict=True):
        assert bound[row].item() == pytest.approx(K * sorted_bound, rel=1e-5)
        assert bound[row].item() <= K * exact * (1 + 1e-5)
    bound.sum().backward()
    assert logits[1].grad is None
    gradient = logits[0].grad
    assert gradient[0][masks[0][0]].abs().sum() > 0
    assert gradient[0][~masks[0][0]].abs().sum() == gradient[1:3].abs().sum() == 0
    empty = GraphAlignment()(student, source, torch.zeros_like(masks[0]), masks[1])
    assert empty.tolist() == [0] * 4
    assert empty.requires_grad


def test_a_hook_gets_what_the_part_compares():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, V, requires_grad=True)
    student, source = top_k_logits(logits, K), top_k_logits(torch.randn(2, 4, V), K)
    masks, seen, part = (torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)), [], GraphAlignment()
    handle = part.register_graph_hook(seen.append)
    part(student, source, *masks)
    part(student, source, *masks, name="large").sum().backward()
    handle.remove()
    part(student, source, *masks)
    assert [pair.name for pair in seen] == ["source", "large"]
    assert all(torch.equal(a, b) for a, b in zip(seen[0].student, student, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen[0].source, source, strict=True))
    assert seen[0][3:] == masks
    assert not any(tensor.requires_grad for tensor in seen[0].student)
    assert part.state_dict() == {}


def test_the_part_compares_as_many_ids_as_both_have():
    torch.manual_seed(0)
    student, source = top_k_logits(torch.randn(3, 2, V), K), top_k_logits(torch.randn(3, 9, V), K)
    masks = torch.ones(3, 2, dtype=torch.bool), torch.ones(3, 9, dtype=torch.bool)
    masks[0][1, 1] = masks[0][2, :] = False
    bound = GraphAlignment(nodes="vocabulary")(student, source, *masks)
    for row in range(3):
        strengths = []
        for top, mask in ((student, masks[0]), (source, masks[1])):
            values, ids = standardized(top)
            graph = vocabulary_graph(values[row], ids[row], mask[row]).graph
            strengths.append(graph.mean(1).sort(descending=True).values)
        size = min(map(len, strengths))
        assert size == (0 if row == 2 else 5 if row == 1 else size)
        expected = (strengths[0][:size] - strengths[1][:size]).abs().sum()
        assert bound[row].item() == pytest.approx(expected.item(), rel=1e-5)


# ---------------------------------------------------------------------- scalars


@pytest.mark.parametrize("nodes", ["rank", "vocabulary", "matched"])
def test_scalars_are_the_definitions_at_the_right_steps(tmp_path, nodes):
    model, max_nodes = Toy(nodes=nodes), 5 if nodes == "rank" else 6
    callback = GWApproximationLogger(every_n_steps=3, max_samples=2, max_nodes=max_nodes, num_starts=20)
    trainer = fit(model, callback, folder=tmp_path, data=batches(empty=[(2, 0), (5, 1), (5, 2)]))
    events = read(tmp_path)
    pairs = []
    for step in (0, 2, 5):
        expected = oracle(model.seen[step]["source"], nodes != "rank", max_nodes, max_samples=2)
        assert len(expected) == (1 if step == 5 else 2)
        bound, exact, edges = (mean(column) for column in zip(*expected, strict=True))
        assert scalars(events, "gw/sorted")[step] == pytest.approx(bound, rel=1e-5)
        assert scalars(events, "gw/edges")[step] == pytest.approx(edges, rel=1e-5)
        assert scalars(events, "gw/exact")[step] >= exact * (1 - 1e-6)
        assert scalars(events, "gw/exact")[step] == pytest.approx(exact, rel=1e-5)
        assert scalars(events, "gw/ratio")[step] == pytest.approx(mean(a / b for a, b, _ in expected), rel=1e-5)
        pairs += [(a, b) for a, b, _ in expected]
    for name in ("sorted", "exact", "edges", "ratio"):
        assert set(scalars(events, f"gw/{name}")) == {0, 2, 5}
    for step, count in ((2, 4), (5, 5)):  # Spearman's: Pearson's of the ranks
        ranks = [np.argsort(np.argsort(column)) for column in zip(*pairs[:count], strict=True)]
        assert scalars(events, "gw/rank_correlation")[step] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-6)
    assert set(scalars(events, "gw/rank_correlation")) == {2, 5}
    assert list(callback._pairs) == ["source"]
    assert all(0 < bound <= exact + 1e-12 for bound, exact in callback._pairs["source"])
    assert trainer.callback_metrics["gw/ratio"].item() == pytest.approx(scalars(events, "gw/ratio")[5])
    for name in ("gw/scatter", "gw/graph"):
        assert [image.step for image in events.Images(name)] == [0, 2, 5]
    assert tags(events) == {
        f"gw/{name}" for name in ("sorted", "exact", "edges", "ratio", "rank_correlation", "scatter", "graph")
    }


@pytest.mark.parametrize("values", ["softmax", "standardize", "logits"])
def test_bound_below_exact_on_every_pair(values):
    callback = GWApproximationLogger(every_n_steps=1)
    fit(Toy(values=values, nodes="vocabulary"), callback, data=batches(12))
    pairs = callback._pairs["source"]
    assert len(pairs) == 36
    assert all(bound <= exact * (1 + 1e-12) for bound, exact in pairs)
    assert len({exact for _, exact in pairs}) == 36


def test_several_sources(tmp_path):
    """Each under its own name, also where one is not asked in every batch, or has no positions."""
    names = ("a/b", "c d")
    model = Toy(names, skip=[("c d", 1)])
    callback = GWApproximationLogger(every_n_steps=1, window=4)
    fit(model, callback, folder=tmp_path, data=batches(4, empty=[(3, 0), (3, 1), (3, 2)]))
    events = read(tmp_path)
    for name, steps in ((names[0], [0, 1, 2]), (names[1], [0, 2])):
        logged = scalars(events, f"gw/sorted/{name}")
        assert list(logged) == steps
        for step in steps:
            assert logged[step] == pytest.approx(mean(row[0] for row in oracle(model.seen[step][name])), rel=1e-5)
        assert [image.step for image in events.Images(f"gw/graph/{name}")] == steps
        assert len(callback._pairs[name]) == 4  # the window
    assert [image.step for image in events.Images("gw/scatter")] == [0, 1, 2]
    assert not {"gw/sorted", "gw/graph"} & tags(events)


def test_accumulation_looks_at_the_first_micro_batch(tmp_path):
    model, heard = Toy(), []
    callback = GWApproximationLogger(every_n_steps=2)

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            heard.append(len(pl_module.parts["graphs"]._graph_hooks))

    fit(model, callback, Watch(), folder=tmp_path, accumulate_grad_batches=2)
    assert heard == [1, 0, 1, 0, 0, 0, 1, 0]
    logged = scalars(read(tmp_path), "gw/sorted")
    assert list(logged) == [0, 1, 3]
    for step, value in logged.items():
        assert value == pytest.approx(mean(row[0] for row in oracle(model.seen[2 * step]["source"])), rel=1e-5)


def test_a_resumed_run_goes_on_with_the_multiples(tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="at3")
    fit(Toy(), GWApproximationLogger(4), checkpoint, enable_checkpointing=True, max_steps=3)
    callback = GWApproximationLogger(4)
    fit(Toy(), callback, folder=tmp_path, ckpt_path=tmp_path / "at3.ckpt", max_epochs=2)
    assert list(scalars(read(tmp_path), "gw/sorted")) == [3, 7]
    fit(Toy(), callback, max_steps=1)
    assert len(callback._pairs["source"]) == 3  # a new fit starts a new window


def test_values_that_are_not_finite_are_left_out(tmp_path):
    model, steps = Toy(), iter(range(99))

    def spoil(module, args, output):
        return output.index_fill(0, torch.tensor([0]), torch.nan) if next(steps) == 0 else output

    model.sources[0].register_forward_hook(spoil)
    callback = GWApproximationLogger(every_n_steps=1, max_samples=2)
    fit(model, callback, folder=tmp_path, data=batches(1))
    (call,) = model.seen
    assert call["source"][1][0][0].isnan().all()
    logged = scalars(read(tmp_path), "gw/sorted")
    second = oracle([[x[1:2] for x in part] if isinstance(part, list) else part[1:2] for part in call["source"]])
    assert logged == {0: pytest.approx(second[0][0], rel=1e-5)}


def test_other_loggers_get_the_scalars(tmp_path):
    fit(Toy(), GWApproximationLogger(3), logger=CSVLogger(tmp_path, name="", version=""))
    header, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert {"gw/sorted", "gw/exact", "gw/edges", "gw/ratio", "step"} <= set(header.split(","))
    assert len(lines) == 3
    fit(Toy(), GWApproximationLogger(3))  # no logger at all


# ---------------------------------------------------------------------- what it must not do


def trained(*callbacks, **kwargs):
    model = Toy(("a", "b"))
    calls = {"part": 0, "student": 0, "source": 0}

    def count(name):
        def hook(module, args, kwargs):
            calls[name] += 1

        return hook

    parts = {"part": model.parts["graphs"], "student": model.student, "source": model.sources[0]}
    for name, part in parts.items():
        part.register_forward_pre_hook(count(name), with_kwargs=True)
    np.random.seed(3)
    random.seed(3)
    trainer = fit(model, *callbacks, **kwargs)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    momentum = [state["momentum_buffer"] for state in trainer.optimizers[0].state.values()]
    return model, calls, states, momentum


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_the_same_to_the_bit(tmp_path, accumulate):
    with_it = trained(GWApproximationLogger(2), folder=tmp_path / "a", accumulate_grad_batches=accumulate)
    without = trained(folder=tmp_path / "b", accumulate_grad_batches=accumulate)
    for name, tensor in with_it[0].state_dict().items():
        assert torch.equal(tensor, without[0].state_dict()[name]), name
    assert with_it[1] == without[1] == {"part": 16, "student": 8, "source": 8}
    assert torch.equal(with_it[2][0], without[2][0])
    assert with_it[2][1:] == without[2][1:]
    for mine, other in zip(with_it[3], without[3], strict=True):
        assert torch.equal(mine, other)


def test_nothing_happens_between(monkeypatch):
    """A hook hangs on the part within the batches that are due, and on nothing else; afterwards nothing is left."""
    hooked, looks = [], []
    callback = GWApproximationLogger(every_n_steps=4)
    compare = callback._compare
    monkeypatch.setattr(callback, "_compare", lambda *args: (looks.append(args[0].global_step), compare(*args)))

    class Watch(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            within = len(pl_module.parts["graphs"]._graph_hooks)
            hooked.append((trainer.global_step + 1, within, sorted(callback._seen)))
            assert all(not tensor.requires_grad for pair in callback._seen.values() for tensor in pair.student)

        def on_train_batch_end(self, trainer, pl_module, *_):
            assert not pl_module.parts["graphs"]._graph_hooks
            assert all(not module._forward_hooks for module in pl_module.modules())
            assert callback._seen == {}

    fit(Toy(), callback, Watch())
    assert hooked == [(step, *((1, ["source"]) if step in (1, 4, 8) else (0, []))) for step in range(1, 9)]
    assert looks == [1, 4, 8]


def test_a_failure_leaves_nothing_behind():
    class Fails(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            raise RuntimeError("no")

    model, callback = Toy(), GWApproximationLogger()
    with pytest.raises(RuntimeError, match="no"):
        fit(model, callback, Fails())
    assert not model.parts["graphs"]._graph_hooks
    assert callback._seen == {}


def test_other_ranks_do_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(L.Trainer, "is_global_zero", property(lambda self: False))
    callback = GWApproximationLogger(every_n_steps=1)
    fit(Toy(), callback, folder=tmp_path)
    assert tags(read(tmp_path)) == set()
    assert callback._pairs == {}


def test_without_the_part():
    class Without(Toy):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict()

    with pytest.raises(ValueError, match=r"Expected a GraphAlignment among the modules .* but Without has none"):
        fit(Without(), GWApproximationLogger())


def test_a_part_that_configure_model_makes():
    class Late(Toy):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict()

        def configure_model(self):
            self.parts = nn.ModuleDict({"graphs": GraphAlignment()})

    callback = GWApproximationLogger()
    fit(Late(), callback)
    assert len(callback._pairs["source"]) == 3


def test_without_pot(monkeypatch):
    """It is missed when the callback is made, and not after models were loaded or trained."""
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ValueError, match=r"Expected POT.*pip install -e \"\.\[ot\]\""):
        GWApproximationLogger()


@pytest.mark.parametrize(
    ("name", "least"), [("every_n_steps", 1), ("max_samples", 1), ("max_nodes", 2), ("num_starts", 1), ("window", 3)]
)
def test_arguments(name, least):
    with pytest.raises(ValueError, match=f"^Expected `{name}` to be at least {least}, but got {least - 1}.$"):
        GWApproximationLogger(**{name: least - 1})
    assert getattr(GWApproximationLogger(**{name: least}), name) == least


# ---------------------------------------------------------------------- pictures


class Data(L.LightningDataModule):
    def __init__(self):
        super().__init__()
        texts = [" the", "$x_1$", "\n", "é", "a" * 50]
        self.tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(texts[i % 5] for i in ids))

    def train_dataloader(self):
        return DataLoader(batches(3), batch_size=None)


def test_pictures_in_the_event_file(tmp_path, monkeypatch):
    drawn = []

    def draw(*graphs, **kwargs):
        drawn.append((graphs, kwargs))
        return graph_figure(*graphs, **kwargs)

    monkeypatch.setattr(gw_approximation_logger, "graph_figure", draw)
    model = Toy(("one", "two"), nodes="vocabulary")
    callback = GWApproximationLogger(every_n_steps=2, max_nodes=9)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*([Gg]lyph|[Ff]ont|matplotlib|tight|constrained).*")
        fit(model, callback, folder=tmp_path, datamodule=Data())
    events = read(tmp_path)
    for tag in ("gw/scatter", "gw/graph/one", "gw/graph/two"):
        images = events.Images(tag)
        assert [image.step for image in images] == [0, 1]
        assert len({image.encoded_image_string for image in images}) == 2
        for image in images:
            picture = Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB")
            assert 600 <= picture.width <= 1400
            assert len(picture.getcolors(picture.width * picture.height)) > 50
    (C1, C2), shown = drawn[0]
    call = model.seen[0]["one"]
    values, ids = standardized(call[0])
    whole = vocabulary_graph(values[0], ids[0], call[2][0])
    largest = whole.graph.mean(1).argsort(descending=True)[:9]
    torch.testing.assert_close(C1, whole.graph[largest][:, largest], rtol=1e-5, atol=1e-5)
    texts = ["the", "$x_1$", "⏎", "é", "a" * 50]
    assert shown["labels"] == ([texts[i % 5] for i in whole.node_ids[largest]], [str(n + 1) for n in range(len(C2))])
    bound, exact = callback._pairs["one"][0]
    assert shown["title"].startswith(f"step 0: sorted bound {bound:.4g}, best matching found {exact:.4g}, ")
    assert shown["name"] == "one"


@pytest.mark.parametrize("sign", [1, -1])
def test_heat_maps_show_both_graphs_on_one_scale(sign):
    C1, C2 = torch.tensor([[3.0, sign], [sign, 1]]), torch.tensor([[5.0, 0.5], [0.5, 2]])
    labels, nodes = (["$a", "b" * 30], ["1", "2"]), ("token", "rank")
    figure = graph_figure(C1, C2, labels=labels, node_names=nodes, unit="nats²", name="_s$", title="step 3: $1")
    figure.canvas.draw()
    for panel, graph, texts in zip(figure.axes[:2], (C1, C2), (["$a", "bbbbbbbbbbb…"], labels[1]), strict=True):
        (image,) = panel.images
        assert image.get_array().tolist() == graph.tolist()
        assert image.get_clim() == ((0.5, 5) if sign > 0 else (-5, 5))
        assert [tick.get_text() for tick in panel.get_xticklabels()] == texts
        assert [tick.get_text() for tick in panel.get_yticklabels()] == texts
    assert [panel.get_title() for panel in figure.axes[:2]] == ["student", "_s$"]
    assert [panel.get_xlabel() for panel in figure.axes[:2]] == list(nodes)
    assert "nats²" in figure.axes[2].get_ylabel()


def test_scatter_shows_every_pair_the_newest_boldest():
    pairs = {"a": [(1.0, 2.0), (2.0, 2.5), (3.0, 3.0)], "_b$": [(0.5, 4.0)]}
    figure = scatter_figure(pairs, unit="nats²", title="step 3")
    figure.canvas.draw()
    (axes,) = figure.axes
    points = [found for found in axes.collections if len(found.get_offsets())]
    for found, expected in zip(points, pairs.values(), strict=True):
        assert found.get_offsets().tolist() == [list(pair) for pair in expected]
        alpha = found.get_facecolor()[:, 3].tolist()
        assert alpha == sorted(alpha)
        assert alpha[-1] == pytest.approx(0.9)
    assert points[0].get_facecolor()[0, :3].tolist() != points[1].get_facecolor()[0, :3].tolist()
    assert axes.get_xlim() == axes.get_ylim() == (pytest.approx(0.5 - 0.175), pytest.approx(4 + 0.175))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "y = x",
        "3 pairs of a",
        "1 pair of _b$",
    ]
    assert "nats²" in axes.get_xlabel()
    assert "nats²" in axes.get_ylabel()
    scatter_figure({"a": [(0.0, 0.0)]}, unit="", title="").canvas.draw()
    scatter_figure({"a": [(2.0, 2.0)]}, unit="", title="").canvas.draw()

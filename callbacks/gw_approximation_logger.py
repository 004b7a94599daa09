"""`GWApproximationLogger`: how close the bound that a model is trained with comes to the Gromov–Wasserstein distance.

Letters: B batch, T positions, k `top_k`, n nodes.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.utils.hooks import RemovableHandle

from lit_logits.callbacks.loggers import picture_writers
from lit_logits.callbacks.parts import check_at_least, data_tokenizer, find_part, find_parts
from lit_logits.callbacks.pictures.gw import graph_figure, scatter_figure
from lit_logits.callbacks.pictures.tokens import token_texts
from lit_logits.callbacks.scalars import log_scalars
from lit_logits.functional.gld_fusion import co_activation_graph
from lit_logits.functional.gw_search import GWComparison, NodeValues, compare_graphs, load_pot, node_values
from lit_logits.functional.top_k_logits import TopKLogits, top_k_values
from lit_logits.modules.gld_fusion.criterion import GraphAlignment, GraphPair

__all__ = ["GWApproximationLogger"]

_UNITS = {
    "softmax": "products of probabilities",
    "standardize": "products of standardized logits",
    "logits": "nats²",
}


class GWApproximationLogger(Callback):
    """Log how close the sorted bound of a `GraphAlignment` comes to the Gromov–Wasserstein distance of explicit graphs.

    At the first and every n-th optimizer step it takes what the part compares in the first micro-batch, so that no
    model runs twice. It builds both graphs of the first samples of rank zero, on at most `max_nodes` nodes each: the
    first ranks, or the ids of largest strength of each (for `matched` nodes, too). Scalars are means over the samples,
    in units of the graphs:

    - `gw/sorted`: GW~/n of these graphs, comparable to a distance. (The loss is GW~, without 1/n and over all nodes.)
    - `gw/exact`: the value of the best matching that a local search finds. It is an upper bound of the distance, and
      *not* certified to equal it; see `gw_upper_bound`. Certain is `gw/sorted` ≤ GW ≤ `gw/exact`, and
      `gw/edges` ≤ GW.
    - `gw/edges`: a lower bound from all edges, which also tells apart graphs of equal strengths; see `edge_gw_bound`.
    - `gw/ratio`: sorted / exact, in [0, 1]; 1 where both are 0, as the bound is tight there.
    - `gw/rank_correlation`: Spearman's, of sorted and exact over the last `window` pairs of graphs, at least three.

    TensorBoard also gets `gw/scatter`, exact over sorted of those pairs, and `gw/graph`, both graphs of the first
    sample. With several sources, all but `gw/scatter` carry their names: `gw/sorted/NAME`. If the part is called
    several times for one source, the last call counts. Needs POT: `pip install -e ".[ot]"` in a checkout.

    Args:
        every_n_steps: optimizer steps between looks.
        max_samples: samples of each source to compare at a look, those with positions that count.
        max_nodes: nodes of a graph.
        num_starts: starts of the search for the distance; more come closer and take longer.
        window: pairs of graphs to remember of each source, within one fit.
        seed: of the random starts; the random numbers of training stay as they are.

    Raises:
        ValueError: If an argument is out of range; at the start of fit, if POT is missing or the model has no
            `GraphAlignment`.

    Example:
        >>> GWApproximationLogger(every_n_steps=500).max_nodes
        32
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        max_samples: int = 4,
        max_nodes: int = 32,
        num_starts: int = 5,
        window: int = 256,
        seed: int = 0,
    ) -> None:
        check_at_least(1, every_n_steps=every_n_steps, max_samples=max_samples, num_starts=num_starts)
        check_at_least(2, max_nodes=max_nodes)
        check_at_least(3, window=window)
        load_pot()  # before any model is loaded
        self.every_n_steps, self.max_samples, self.max_nodes = every_n_steps, max_samples, max_nodes
        self.num_starts, self.window, self.seed = num_starts, window, seed
        self._pairs: dict[str, deque[tuple[float, float]]] = {}
        self._seen: dict[str, GraphPair] = {}
        self._hook: RemovableHandle | None = None
        self._next_step = self._step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is a part to watch; not in `setup`, as `configure_model` may make it afterwards."""
        if find_part(pl_module, GraphAlignment) is None:
            raise ValueError(
                "Expected a GraphAlignment among the modules of the model, whose graphs GWApproximationLogger compares,"
                f" but {type(pl_module).__name__} has none. Leave the callback out, or use a model that has one."
            )
        self._pairs = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the next step that is due: a resumed fit goes on with the multiples of `every_n_steps`."""
        done = trainer.global_step
        self._next_step = (done // self.every_n_steps + 1) * self.every_n_steps if done else 1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Hook the part if this is the first micro-batch of an optimizer step that is due."""
        self._remove_hook()
        step = trainer.global_step + 1
        if step < self._next_step or not trainer.is_global_zero:
            return
        self._next_step = (step // self.every_n_steps + 1) * self.every_n_steps
        self._step = trainer.global_step  # Lightning's first step is 0
        self._hook = find_parts(pl_module, GraphAlignment)[0].register_graph_hook(self._remember)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Compare the graphs that the hook has seen."""
        if self._hook is None:
            return
        part, seen = find_parts(pl_module, GraphAlignment)[0], self._seen
        self._remove_hook()
        with torch.no_grad():
            self._compare(trainer, part, seen)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hook."""
        self._remove_hook()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hook, which is still there if training stopped within a batch."""
        self._remove_hook()

    # ------------------------------------------------------------------ the hook

    def _remember(self, graphs: GraphPair) -> None:
        self._seen[graphs.name] = graphs

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._seen = None, {}

    # ------------------------------------------------------------------ comparison

    def _compare(self, trainer: Trainer, part: GraphAlignment, seen: dict[str, GraphPair]) -> None:
        found: dict[str, list[GWComparison]] = {}
        firsts: dict[str, list[NodeValues]] = {}
        for name, pair in seen.items():
            pairs = self._pairs.setdefault(name, deque(maxlen=self.window))
            for nodes in self._samples(part, pair):
                firsts.setdefault(name, nodes)
                graphs = (co_activation_graph(of_one.values) for of_one in nodes)
                generator = torch.Generator().manual_seed(self.seed)
                comparison = compare_graphs(*graphs, num_starts=self.num_starts, generator=generator)
                found.setdefault(name, []).append(comparison)
                pairs.append((comparison.sorted_bound, comparison.exact))
        values: dict[str, float] = {}
        for name, comparisons in found.items():
            values |= self._scalars(name, comparisons)
        if values:
            log_scalars(trainer, values, step=self._step)
        for writer in picture_writers(trainer) if found else ():
            self._draw(trainer, writer, part, {name: (firsts[name], found[name][0]) for name in found})

    def _samples(self, part: GraphAlignment, pair: GraphPair) -> Iterator[list[NodeValues]]:
        """Yield the nodes of student and source, for the first samples with positions that count and finite values."""
        rows = (pair.student_mask.any(-1) & pair.source_mask.any(-1)).nonzero().squeeze(1)[: self.max_samples]
        tops = [TopKLogits(*(tensor[rows].cpu() for tensor in top)) for top in (pair.student, pair.source)]
        masks = [mask[rows].cpu() for mask in (pair.student_mask, pair.source_mask)]
        size = min(top.log_probs.shape[-1] for top in tops)
        for index in range(len(rows)):
            nodes = []
            for top, mask in zip(tops, masks, strict=True):
                of_one = TopKLogits(*(tensor[index][mask[index]] for tensor in top))
                values = top_k_values(of_one, part.values)[:, :size].double()
                if values.isfinite().all():
                    ids = of_one.token_ids[:, :size] if part.nodes != "rank" else None
                    nodes.append(node_values(values, ids, max_nodes=self.max_nodes))
            if len(nodes) == 2:
                num_nodes = min(len(of_one.node_ids) for of_one in nodes)
                yield [NodeValues(values[:, :num_nodes], ids[:num_nodes]) for values, ids in nodes]

    def _tag(self, tag: str, name: str) -> str:
        """Return the log name, with the name of the source if there are several."""
        return f"{tag}/{name}" if len(self._pairs) > 1 else tag

    def _scalars(self, name: str, comparisons: list[GWComparison]) -> dict[str, float]:
        from scipy.stats import spearmanr  # POT needs SciPy

        columns = {
            "gw/sorted": [comparison.sorted_bound for comparison in comparisons],
            "gw/exact": [comparison.exact for comparison in comparisons],
            "gw/edges": [comparison.edge_bound for comparison in comparisons],
            "gw/ratio": [comparison.ratio for comparison in comparisons],
        }
        values = {self._tag(tag, name): sum(column) / len(column) for tag, column in columns.items()}
        bounds, distances = zip(*self._pairs[name], strict=True)
        if len(bounds) > 2 and len(set(bounds)) > 1 and len(set(distances)) > 1:
            values[self._tag("gw/rank_correlation", name)] = float(spearmanr(bounds, distances).statistic)
        return values

    def _draw(
        self,
        trainer: Trainer,
        writer: Any,
        part: GraphAlignment,
        firsts: dict[str, tuple[list[NodeValues], GWComparison]],
    ) -> None:
        unit, by_id = _UNITS[part.values], part.nodes != "rank"
        pairs = {name: list(of_source) for name, of_source in self._pairs.items() if of_source}
        writer.add_figure("gw/scatter", scatter_figure(pairs, unit=unit, title=f"step {self._step}"), self._step)
        tokenizer = data_tokenizer(trainer)
        for name, (nodes, comparison) in firsts.items():
            ranks = [str(number + 1) for number in range(len(nodes[0].node_ids))]
            # The ids of a source may be those of another tokenizer.
            texts = [token_texts([token], tokenizer)[0] for token in nodes[0].node_ids.tolist()] if by_id else ranks
            node = "number of the token, by strength" if by_id else "rank of the logit"
            bound, exact, edges = comparison
            figure = graph_figure(
                *(co_activation_graph(of_one.values) for of_one in nodes),
                labels=([text.strip() or "␣" for text in texts], ranks),
                node_names=("token" if by_id else node, node),
                unit=unit,
                name=name,
                title=f"step {self._step}: sorted bound {bound:.4g}, best matching found {exact:.4g}, bound from edges"
                f" {edges:.4g}",
            )
            writer.add_figure(self._tag("gw/graph", name), figure, self._step)

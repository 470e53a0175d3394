"""Graphs of PyTorch Geometric, of any sizes: batches of them, and what is trained on them."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import assert_close, assert_same_run, rows, train, write_recipe
from torch_geometric.data import Data as Graph

from distrain.config.yaml import parse_recipe
from distrain.data import build_data
from distrain.datasets.nested import map_tensors, rows_of, tensors_in

CODE = """
    import torch
    from torch import nn
    from torch.utils.data import Dataset
    from torch_geometric.data import Data as Graph

    import distrain


    class Rings(Dataset):
        '''Rings of 3 to 8 nodes: is the sum of their numbers above 0?'''

        classes = ("no", "yes")

        def __init__(self, pairs: bool = False):
            self.pairs = pairs

        def __len__(self):
            return 43

        def __getitem__(self, index):
            random = torch.Generator().manual_seed(index)
            nodes = 3 + index % 6
            x = torch.randn(nodes, 2, generator=random)
            here = torch.arange(nodes)
            y = (x.sum() > 0).long().reshape(1)
            graph = Graph(x=x, edge_index=torch.stack((here, (here + 1) % nodes)))
            if self.pairs:
                return graph, y[0]
            graph.y = y
            return graph


    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.other, self.head = nn.Linear(2, 8), nn.Linear(2, 8), nn.Linear(8, 2)

        def forward(self, graphs):
            source, target = graphs.edge_index
            x = self.own(graphs.x).index_add(0, target, self.other(graphs.x)[source]).relu()
            return self.head(x.new_zeros(graphs.num_graphs, 8).index_add(0, graphs.batch, x))


    class Nodes(distrain.Task):
        '''The network's outputs of whole graphs, with what each node of them says.'''

        def losses(self, model, batch):
            graphs = batch["inputs"]
            found = model(graphs).log_softmax(1)
            nodes = model.own(graphs.x).square().mean(1)
            return {
                "entropy": -found.gather(1, batch["targets"][:, None])[:, 0],
                "nodes": distrain.LossSum(nodes.sum(), len(nodes)),
            }

        def count(self, batch):
            return {"nodes": batch["inputs"].num_nodes}
"""
RECIPE = """
name: rings
task: {task}
data: {{name: "rings.py:Rings", split: [0.8, 0.2]}}
model: "rings.py:Network"
optim: {{lr: 1.0e-2}}
batch: {{global: 8}}
train: {{steps: 6, precision: fp64}}
eval: {{every: 3 steps, batch: 4}}
checkpoint: {{every: 3 steps, keep: 9, async: false}}
log: {{every: 1 steps}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rings.py").write_text(textwrap.dedent(CODE))
    return tmp_path


@pytest.mark.parametrize("pairs", [False, True])
def test_graphs_of_any_size_become_a_batch(folder: Path, pairs: bool) -> None:
    text = RECIPE.format(task="classification").replace("split:", f"pairs: {str(pairs).lower()}, split:")
    data = build_data(parse_recipe(text.replace("rings.py", str(folder / "rings.py")), "rings"))
    source: Any = data.splits["train"]
    batch = source.fetch(np.array([0, 5, 3]))
    graphs = batch["inputs"]
    assert graphs.num_graphs == 3
    assert graphs.x.shape == (graphs.num_nodes, 2)
    assert batch["targets"].shape == (3,)
    alone = [source.fetch(np.array([row])) for row in (0, 5, 3)]
    assert torch.equal(graphs.x, torch.cat([each["inputs"].x for each in alone]))
    assert torch.equal(batch["targets"], torch.cat([each["targets"] for each in alone]))
    ends = torch.bincount(graphs.batch).cumsum(0)
    assert (graphs.edge_index < ends[graphs.batch[graphs.edge_index[0]]]).all()


def test_a_batch_of_graphs_is_a_value_of_a_batch() -> None:
    from torch_geometric.data import Batch

    graphs = [Graph(x=torch.full((size, 1), float(size)), edge_index=torch.zeros(2, 1).long()) for size in (2, 3, 4)]
    batch = {"inputs": Batch.from_data_list(graphs), "ids": torch.tensor([4, 5, -1])}
    kept = rows_of(batch, [True, False, True])
    assert kept["inputs"].num_graphs == 2
    assert kept["inputs"].x.flatten().tolist() == [2, 2, 4, 4, 4, 4]
    assert kept["ids"].tolist() == [4, -1]
    doubled = map_tensors(lambda each: each.double() if each.is_floating_point() else each, batch)
    assert doubled["inputs"].x.dtype == torch.float64
    assert batch["inputs"].x.dtype == torch.float32
    assert sum(each.is_floating_point() for each in tensors_in(batch)) == 1


@pytest.mark.parametrize("task", [pytest.param("classification", marks=pytest.mark.more), "rings.py:Nodes"])
def test_a_network_of_graphs_is_the_same_in_any_world_and_after_a_resume(folder: Path, task: str) -> None:
    recipe = write_recipe(folder, RECIPE.format(task=task))
    train(1, recipe, folder / "one")
    train(2, recipe, folder / "two", "batch.micro=2")
    assert_close(folder / "one", folder / "two", 1e-9)
    found = [[row for row in rows(folder / run) if row["event"] in ("train", "eval")] for run in ("one", "two")]
    for a, b in zip(*found, strict=True):
        for key in a.keys() & {"loss", "entropy", "nodes", "accuracy"}:
            assert a[key] == pytest.approx(b[key], rel=1e-9), key
    train(1, recipe, folder / "cut", stop_after=2)
    train(1, recipe, folder / "cut")
    assert_same_run(folder / "one", folder / "cut")

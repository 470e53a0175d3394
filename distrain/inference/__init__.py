"""Using trained models: metrics on a split, predictions, and text.

trained.py      `Trained`: a model, its data set and its world, from a run or a checkpoint
evaluating.py   `evaluate_checkpoint`, what `distrain evaluate` does
predicting.py   `predict_file`, what `distrain predict` does, and `predict_table`
examining.py    `examine`, what `distrain report --split` shows of a model; class_tables.py, sample_contents.py
graphs.py       `export_graph`: the model as ONNX or `.pt2`, which run without its code
embeddings.py   what a layer computes for its samples
files.py        files of predictions, written row by row
generation.py   text after prompts, for every kind of model; how it ends, and what can be shown of it already
generating.py   `generate_texts`, what `distrain generate` does
"""

from distrain.inference.evaluating import evaluate_checkpoint
from distrain.inference.examining import examine
from distrain.inference.predicting import PredictionSummary, predict_file, predict_table
from distrain.inference.trained import Trained, trained_model

__all__ = [
    "PredictionSummary",
    "Trained",
    "evaluate_checkpoint",
    "examine",
    "predict_file",
    "predict_table",
    "trained_model",
]

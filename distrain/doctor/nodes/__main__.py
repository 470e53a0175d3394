"""What srun starts once on each node of a job for `distrain doctor`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distrain.doctor.nodes.node import run_node
from distrain.system.output import prepare_streams

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", default="", help="names of all nodes, with commas between")
    parser.add_argument("--processes", default="1", help="ranks on each node; auto: one for each GPU, else one")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that were asked for on each node")
    parser.add_argument("--cpus", type=int, default=0, help="CPUs that were asked for on each node; 0: unknown")
    parser.add_argument("--folder", type=Path, required=True, help="the folder that nodes are to share")
    parser.add_argument("--address", default="127.0.0.1", help="where the first node is reached")
    parser.add_argument("--port", type=int, default=0, help="where rank 0 listens")
    parser.add_argument("--interface", default="", help="the network interface between nodes")
    parser.add_argument("--scratch", default="", help="a folder of the node's own")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that ranks wait for the next one to come")
    parser.add_argument("--run-dir", help="the folder of the run that is meant")
    parser.add_argument("looked_at", nargs="*", help="a recipe or a run, with values that replace the recipe's")
    a = parser.parse_args()
    prepare_streams()
    sys.exit(run_node(a))

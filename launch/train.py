"""What a launcher starts, once for each process: train a recipe, or resume a run.

accelerate launch --config_file accelerate_configs/multi_cpu.yaml launch/train.py recipes/digits.yaml
accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes 2 launch/train.py recipes/digits.yaml
torchrun --nproc-per-node 2 launch/train.py recipes/digits.yaml optim.lr=3e-4 --strategy fsdp2
python launch/train.py recipes/digits.yaml
"""

import argparse
import os
import sys

from distrain.launchers import work
from distrain.system.output import prepare_streams

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", metavar="RECIPE|RUN", help="a recipe file, or the folder of a run to resume")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the recipe's")
    parser.add_argument("--run-dir", help="the run's folder (default: runs/NAME)")
    parser.add_argument("--processes", type=int, help="fail unless there are this many processes")
    parser.add_argument("--update", action="store_true", help="resume an existing run under a changed recipe")
    parser.add_argument("--strategy", default="auto", help="single, ddp, zero1, zero2, zero3, fsdp2, or auto")
    parser.add_argument("--offload", help="what to keep in the memory of the CPU: none, optimizer, or all")
    parser.add_argument("--request", help="what distrain has resolved and written into RUN; all else is then in it")
    parser.add_argument("--replicate", help="replicas that fsdp2 makes: a number, or auto, one for each machine")
    a = parser.parse_args()
    prepare_streams()
    more = []
    if "DISTRAIN_PRUNES" in os.environ:  # a run of a search, which slurm/train.sbatch has started
        from distrain.sweep.tasks import callbacks_of_task

        more = callbacks_of_task()
    sys.exit(work(**vars(a), callbacks=more))

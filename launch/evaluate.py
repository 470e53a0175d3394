"""What a launcher starts, once for each process: score the model of a run or a checkpoint.

accelerate launch --config_file accelerate_configs/multi_cpu.yaml launch/evaluate.py runs/digits --split test
"""

import argparse
import sys

from distrain.launchers import work_evaluation
from distrain.system.output import prepare_streams

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", metavar="RUN|CHECKPOINT", help="a run's folder, or one of its checkpoints")
    parser.add_argument("--split", default="test", help="train, valid or test")
    parser.add_argument("--processes", type=int, help="fail unless there are this many processes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--changed-data", action="store_true", help="score also data that changed since the training")
    a = parser.parse_args()
    prepare_streams()
    sys.exit(work_evaluation(a.target, a.split, processes=a.processes, as_json=a.json, changed_data=a.changed_data))

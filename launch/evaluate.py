"""What a launcher starts, once for each process: evaluate the model of a run or a checkpoint.

accelerate launch --config_file accelerate_configs/multi_cpu.yaml launch/evaluate.py runs/digits --split test
"""

import argparse
import sys

from distrain.launchers import work_evaluation
from distrain.system.output import prepare_streams

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", metavar="RUN|CHECKPOINT", help="a run's folder, or one of its checkpoints")
    parser.add_argument("--split", default="test", help="train, valid or test; or a file or folder with targets")
    parser.add_argument("--processes", type=int, help="fail unless there are this many processes")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    parser.add_argument("--changed-data", action="store_true", help="evaluate also data that changed")
    parser.add_argument("--request", help="what `distrain evaluate` has resolved, in place of all else")
    a = parser.parse_args()
    if (a.target is None) == (a.request is None):
        parser.error("name a run or a checkpoint")
    prepare_streams()
    sys.exit(work_evaluation(**vars(a)))

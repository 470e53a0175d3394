"""What a launcher starts, once for each process of `distrain predict --processes N`."""

import argparse
import sys

from distrain.launchers.predicting import work_prediction
from distrain.system.output import prepare_streams

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--request", required=True, help="what `distrain predict` has resolved")
    arguments = parser.parse_args()
    prepare_streams()
    sys.exit(work_prediction(arguments.request))

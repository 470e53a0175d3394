"""Where things are, and what fresh interpreters need to find them."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "train.py"
SUPPORT = Path(__file__).parent
USER_CODE = SUPPORT / "user_code"
"""What users write: models, data sets, optimizers, losses; recipes of the tests name them as `module:name`."""
IMPORTABLE = os.pathsep.join(map(str, (ROOT, SUPPORT, USER_CODE)))
"""A PYTHONPATH with which a fresh interpreter finds the package, what tests share, and users' code."""

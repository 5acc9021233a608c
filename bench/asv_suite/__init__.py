"""The asv suite: our own operations over commits, on the cases of `fastlocal bench`."""

import importlib.util
import sys
from pathlib import Path

# asv empties PYTHONPATH: an environment in which nobody installed fastlocal measures this checkout.
if importlib.util.find_spec("fastlocal") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

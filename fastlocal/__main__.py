"""`fastlocal` and `python -m fastlocal`."""

import os
import sys


def main() -> int:
    """Run the command line; it needs the extra `train`."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's is one of its own environment, which may lack it
    try:
        from fastlocal.train.cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fastlocal"):
            raise
        print(f"error: the command line needs {error.name}: pip install 'fastlocal[train]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())

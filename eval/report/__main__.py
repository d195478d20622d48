"""`python -m eval.report NAME.json`: a recorded result as a page of one screen and a plot, beside its JSON."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.report.record import record
from training.config import run_command


def main(arguments: Sequence[str]) -> None:
    """Render the pages of recorded results."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.report", description="Render NAME.md and NAME.svg from the results.json of an eval.run."
    )
    parser.add_argument("results", metavar="NAME.json", nargs="+", help="the run's results.json under its new name")
    for name in parser.parse_args(arguments).results:
        for path in record(Path(name)):
            sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    run_command(main, failure=2)

"""`python -m eval.report NAME.json`: a recorded result as a page of one screen and a plot, beside its JSON.

With `--decisions PAGE.md` all results become one page: what each set decides, and what a reader should use.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.report.decisions import record_decisions
from eval.report.record import record
from training.config import run_command


def main(arguments: Sequence[str]) -> None:
    """Render the pages of recorded results."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.report", description="Render NAME.md and NAME.svg from the results.json of an eval.run."
    )
    parser.add_argument("results", metavar="NAME.json", nargs="+", help="the run's results.json under its new name")
    parser.add_argument("--decisions", metavar="PAGE.md", help="render one page over all of them in place of one each")
    options = parser.parse_args(arguments)
    names = [Path(name) for name in options.results]
    if options.decisions:
        written = record_decisions(names, Path(options.decisions))
    else:
        written = [path for name in names for path in record(name)]
    sys.stdout.write("".join(f"{path}\n" for path in written))


if __name__ == "__main__":
    run_command(main, failure=2)

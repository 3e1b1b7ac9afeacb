"""Parity with published programs: python -m tests.published.run FOLDER...

Each folder holds a published program's weights, inputs and outputs at some configuration. The weights go through the
converter that a released file takes; every array gets a line with its error; the exit status is 1 past the tolerance.
"""

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
from tests.published.parity import Oracle, check
from tests.published.table import converted, insert, row, summary, write


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--quiet", action="store_true", help="only what fails, and a line for each folder")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="also write what works as a table, docs/results/parity.md"
    )
    parser.add_argument(
        "--summary",
        type=Path,
        metavar="FILE",
        help="with --table, also a line a program between the marks of README.md",
    )
    arguments = parser.parse_args()
    failed, compared = 0, {}
    for folder in arguments.folders:
        print(folder, flush=True)
        start = time.perf_counter()
        try:
            oracle = Oracle(folder)
            with converted() as seen:
                lines = list(check(oracle))
            before = compared.get(
                oracle.meta["system"], (oracle, [], [])
            )  # several folders of one system make one line
            compared[oracle.meta["system"]] = (oracle, before[1] + lines, before[2] + seen)
        except Exception:
            traceback.print_exc()
            print(f"  FAIL {folder.name}: stopped", flush=True)
            failed += 1
            continue
        for line in lines:
            if not (arguments.quiet and line.passed):
                print(" ", line)
        bad = sum(not line.passed for line in lines)
        worst = max((line.error for line in lines if line.passed), default=0.0)
        took = time.perf_counter() - start
        print(
            f"  {folder.name}: {len(lines) - bad} of {len(lines)} arrays, worst {worst:.1e}, {took:.0f} s", flush=True
        )
        failed += bool(bad or not lines)
    if arguments.table:
        rows = write(arguments.table, {name: row(*found) for name, found in compared.items()})
        if arguments.summary:
            insert(arguments.summary, summary(rows))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

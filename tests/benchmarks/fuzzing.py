"""The long form of the suite's fuzzers: damaged run folders, mutated recipes, argument lists, soups of YAML and JSON.

    python tests/benchmarks/fuzzing.py            20 times as many cases as `make test`
    python tests/benchmarks/fuzzing.py --times 200

Each case must end in a result or in one line that says what is wrong: no traceback, no hang, no accepted nonsense.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FUZZERS = "cases("
"""Call by which a test asks how many cases to make; see `kits/fuzzing.py`."""


def main() -> None:
    """Run the tests that make random cases, with more of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="cases, as a multiple of the suite's (default: 20)")
    times = parser.parse_args().times
    files = sorted(path for path in (ROOT / "tests/unit").rglob("test_*.py") if FUZZERS in path.read_text("utf-8"))
    environment = {**os.environ, "KARMMA_DIST_FUZZING": str(times)}
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "--durations=10", *map(str, files)]
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    print(f"{len(files)} files with {times} times as many cases: {time.monotonic() - began:.0f} s, exit code {code}")
    sys.exit(code)


if __name__ == "__main__":
    main()

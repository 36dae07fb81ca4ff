"""A third party's crash tester, on this library and on its peers, side by side.

    python -m tests.chaos --points 12 [LIBRARY ...]

`ckpt-chaos run` kills the job at its file events: before one, with a file cut in half, and with all unsynced bytes lost
(`unsynced`); it resumes the job and compares. Prints one line of JSON a library.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from ckpt_chaos.runner import rejudge

from tests.chaos_job import LIBRARIES
from tests.spawn import ROOT

GLOBS = {
    "longrail": "step-*", "torch.save": "ckpt-*.pt", "safetensors": "ckpt-*.st", "dcp": "ckpt-*",
    "torch_checkpointing": "ckpt-*", "torchsnapshot": "ckpt-*", "deepspeed": "ckpt-*",
}  # fmt: skip
VERDICTS = ("PASS", "HARD_FAIL", "SILENT_DIVERGENCE", "LOST_WORK")


def examine(library: str, points: int, folder: Path) -> dict[str, object]:
    """Run ckpt-chaos on one library; return how many points had which verdict, by the mode of the crash."""
    command = [
        Path(sys.executable).with_name("ckpt-chaos"), "run", "--max-points", str(points), "--work", folder / "work",
        "--modes", "before,torn,unsynced", "--step-regex", r"resumed from step (\d+)", "--timeout", "120",
        "--checkpoint-glob", f"{{out}}/{GLOBS[library]}", "--result-file", "{out}/final.bin",
        "--", sys.executable, "-m", "tests.chaos_job", library, "{out}",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([str(one) for one in command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    rows = [row for row in rejudge(folder / "work") if not row.label.startswith("no crash")]
    found = Counter(row.verdict for row in rows)
    if not found:
        return {"library": library, "error": (done.stdout + done.stderr)[-1500:]}
    return {"library": library, "points": sum(found.values()), **{verdict: found[verdict] for verdict in VERDICTS}}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("libraries", nargs="*", help=f"of {', '.join(LIBRARIES)}; all of them by default")
    given = parser.parse_args()
    for library in given.libraries or LIBRARIES:
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            print(json.dumps(examine(library, given.points, Path(folder))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

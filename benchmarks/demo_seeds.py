"""
Does the main command learn? It is run with several seeds, and the table of held-out success before and after is
printed; of the runs in `demo_seeds.json` it is also written to the README and to docs/bfcl.md.

    python benchmarks/demo_seeds.py [--seeds 1 2 3 4 5] [--output runs.json]

The warm-up is the same for all seeds (it is made once and kept in the cache): what differs is the order of the tasks,
and what is sampled. Each run is a process of its own. Runs that `--output` has already are not repeated.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).parents[1]
RUNS = Path(__file__).with_suffix(".json")
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "bfcl.md")
BEGIN, END = "<!-- demo seeds -->\n", "<!-- end of demo seeds -->\n"
NUMBER = r"([+-]?\d+\.\d+)"
RESULT = re.compile(
    rf"success on (\d+) test-split tasks: {NUMBER}.*? before, {NUMBER}.*? after; "
    rf"difference {NUMBER}, standard error {NUMBER}"
)
NAMES = ("tasks", "before", "after", "difference", "standard_error")


def run(seed: int, directory: Path, options: list[str]) -> dict[str, float]:
    """One run of the main command with its result, minutes and peak memory (GB, of the process that trains)."""
    script = [str(ROOT / "examples" / "train_bfcl.py"), "--seed", str(seed), "--output_dir", str(directory), *options]
    command = [sys.executable, "-m", "accelerate.commands.launch", *script]
    begin = time.monotonic()
    with open(directory / "log.txt", "w+b") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        # the usage of this child alone, with those it has waited for
        _, status, usage = os.wait4(process.pid, 0)
        log.seek(0)
        text = log.read().decode(errors="replace")
    if status:
        raise RuntimeError(f"seed {seed} ended with status {os.waitstatus_to_exitcode(status)}:\n{text[-3000:]}")
    result = dict(zip(NAMES, map(float, RESULT.search(text).groups()), strict=True))
    minutes = (time.monotonic() - begin) / 60
    return {"seed": seed, **result, "minutes": minutes, "peak_gb": usage.ru_maxrss * 1024 / 1e9}


def table(runs: list[dict[str, float]]) -> str:
    """The runs as a Markdown table, with what they say together below it."""
    head = "| seed | before | after | difference (standard error) | minutes | peak memory |"
    lines = [head, "|---|---|---|---|---|---|"]
    better = 0
    for r in sorted(runs, key=lambda r: r["seed"]):
        is_better = r["difference"] > 2 * r["standard_error"]
        better += is_better
        mark = "**" if is_better else ""
        lines.append(
            f"| {r['seed']:.0f} | {r['before']:.3f} | {r['after']:.3f} | {mark}{r['difference']:+.3f}{mark} "
            f"({r['standard_error']:.3f}) | {r['minutes']:.1f} | {r['peak_gb']:.1f} GB |"
        )
    lines += ["", f"{better} of {len(runs)} seeds above by more than two standard errors (bold)."]
    return "\n".join(lines)


def write_table(document: Path, text: str) -> None:
    """Put the table between its marks in a document."""
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    document.write_text(f"{before}{BEGIN}\n{text}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--output", type=Path, default=RUNS, help="where runs are kept (default: %(default)s)")
    args, options = parser.parse_known_args()
    runs = json.loads(args.output.read_text()) if args.output.is_file() else []
    for seed in args.seeds:
        if any(r["seed"] == seed for r in runs):
            continue
        directory = Path("outputs", "demo_seeds", f"seed-{seed}").resolve()
        directory.mkdir(parents=True, exist_ok=True)
        runs.append(run(seed, directory, options))
        args.output.write_text(json.dumps(runs, indent=1))
        print(json.dumps(runs[-1]), flush=True)
    machine = platform.processor() or platform.machine()
    print(f"\n{os.cpu_count()} cores, {machine}, Python {platform.python_version()}\n")
    print(table(runs))
    if args.output == RUNS:
        for document in DOCUMENTS:
            write_table(document, table(runs))


if __name__ == "__main__":
    main()

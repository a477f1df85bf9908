"""
A folder that takes this project to a machine with a card and without network.

    python benchmarks/gpu_pack.py                          # outputs/gpu_pack.tar.xz, for Python 3.12 on x86-64 Linux
    python benchmarks/gpu_pack.py --python 3.11

Run it where there is a network and this project is installed: the versions are those of this environment. The machine
brings Python, PyTorch and a C compiler; the archive holds the wheels of everything else, the project with its tests,
and a script. There:

    tar xf gpu_pack.tar.xz && bash gpu_pack/run.sh

which installs without network into a virtual environment of its own on top of the machine's PyTorch, runs
`pytest -m cuda` and `benchmarks/gpu.py`, and leaves `cuda.xml`, `gpu.json` and `gpu.md` in `gpu_pack/results` (or the
folder given to it). `bash gpu_pack/run.sh RESULTS --dry-run` does the same on a CPU with tiny shapes.

Without: DeepSpeed, bitsandbytes and vLLM, which are built for a machine or too large (their tests are skipped where
they are not installed), and hf-xet, which only downloads.
"""

import argparse
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("seeupo-trl", "peft", "pytest", "hypothesis")
# PyTorch, and what it brings along
BROUGHT = {
    "torch",
    "triton",
    "setuptools",
    "filelock",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "markupsafe",
    "fsspec",
}
LEFT_OUT = {"hf-xet"}
# libraries in machine code, and a window as large as what resembles one another is apart; read by any xz
COMPRESSION = [
    {"id": lzma.FILTER_X86},
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**27},
]
MOST_BYTES = 60_000_000

RUN = """\
#!/usr/bin/env bash
# Installs without network beside the machine's PyTorch, tests the card and measures it.
# Usage: bash run.sh [RESULTS] [--dry-run]
set -euo pipefail
cd "$(dirname "$0")"
results=$(mkdir -p "${1:-results}" && cd "${1:-results}" && pwd)
python=${PYTHON:-python3}
"$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)' ||
    { echo "This machine's $python has no PyTorch; name one that has: PYTHON=/path/to/python bash run.sh"; exit 1; }
torch=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])')
"$python" -m venv --system-site-packages environment
. environment/bin/activate
# where PyTorch lies, which may be a virtual environment itself
site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$torch" > "$site/machine.pth"
pip install --quiet --no-index --find-links wheels --no-deps --requirement requirements.txt
export HF_HUB_OFFLINE=1
cd project
export PYTHONPATH=$PWD
status=0
if [ "${2:-}" = --dry-run ]; then
    python -m pytest -q -m "not slow" -p no:cacheprovider --junitxml "$results/cuda.xml" tests/cuda || status=1
    python benchmarks/gpu.py --dry-run --output "$results" || status=1
else
    python -m pytest -q -m cuda -p no:cacheprovider --junitxml "$results/cuda.xml" tests/cuda || status=1
    python benchmarks/gpu.py --output "$results" || status=1
fi
exit $status
"""


def requirements(python: str) -> Iterator[str]:
    """Everything that the project needs beside PyTorch, pinned to what is installed here."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    environment |= {"platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython"}
    waiting, seen = [Requirement(name) for name in NEEDED], BROUGHT | LEFT_OUT
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            if name not in seen:
                raise SystemExit(f"{requirement} is not installed here, so there is no version to take.") from None
            continue
        for line in found.requires or ():
            one = Requirement(line)
            extras = [{"extra": extra} for extra in requirement.extras] or [{"extra": ""}]
            if canonicalize_name(one.name) not in seen and (
                one.marker is None or any(one.marker.evaluate(environment | extra) for extra in extras)
            ):
                waiting.append(one)
        if name not in seen and name != "seeupo-trl":
            yield f"{name}=={found.version}"
        seen.add(name)


def download(pins: list[str], python: str, folder: Path) -> None:
    """The wheels of pinned requirements for a version of Python."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    for platform in ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"):
        command += ["--platform", platform]
    subprocess.run([*command, *pins], check=True)


def store(wheel: Path) -> None:
    """
    Write a wheel without what nothing here imports, and without compression of its own: one over the whole archive is
    smaller.

    Raises:
        `SystemExit`:
            Where a library that is left out is one that another file of the wheel is linked with.
    """
    with tempfile.NamedTemporaryFile(dir=wheel.parent, delete=False) as file:
        with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as new:
            libraries = {Path(name).name for name in old.namelist() if ".so" in name and is_left_out(name)}
            for entry in old.infolist():
                if is_left_out(entry.filename):
                    continue
                content = old.read(entry)
                missing = [name for name in libraries if ".so" in entry.filename and name.encode() in content]
                if missing:
                    raise SystemExit(f"{entry.filename} needs {', '.join(missing)}, which `is_left_out` leaves out.")
                if entry.filename.endswith(".dist-info/RECORD"):
                    lines = content.decode().splitlines(keepends=True)
                    content = "".join(line for line in lines if not is_left_out(line.split(",")[0])).encode()
                entry.compress_type = zipfile.ZIP_STORED
                new.writestr(entry, content)
    Path(file.name).replace(wheel)


def is_left_out(name: str) -> bool:
    """Whether a file of a wheel is a package's own tests, or of a part of Arrow that is loaded when it is used."""
    parts = ("include/", "libarrow_flight", "libarrow_python_flight", "_flight", "libarrow_s3", "_s3fs")
    return "/tests/" in name or name.startswith(tuple(f"pyarrow/{part}" for part in parts))


def copy_project(folder: Path) -> None:
    """What the repository has under version control, of what the card needs."""
    names = (
        "seeupo_trl",
        "tests",
        "benchmarks",
        "examples/accelerate_configs",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    )
    listed = subprocess.run(["git", "ls-files", *names], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listed.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="version of the machine's Python")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder of the archive")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    archive = options.output / "gpu_pack.tar.xz"
    with tempfile.TemporaryDirectory() as directory:
        pack = Path(directory, "gpu_pack")
        (pack / "wheels").mkdir(parents=True)
        pins = sorted(requirements(options.python))
        (pack / "requirements.txt").write_text("\n".join(pins) + "\n")
        (pack / "run.sh").write_text(RUN)
        download(pins, options.python, pack / "wheels")
        for wheel in (pack / "wheels").glob("*.whl"):
            store(wheel)
        copy_project(pack / "project")
        with lzma.open(archive, "w", filters=COMPRESSION) as file, tarfile.open(fileobj=file, mode="w") as tar:
            tar.add(pack, "gpu_pack")
    size = archive.stat().st_size
    print(f"{archive}: {size / 1e6:.1f} MB, {len(pins)} wheels for Python {options.python}")
    if size > MOST_BYTES:
        raise SystemExit(f"That is more than {MOST_BYTES / 1e6:.0f} MB.")


if __name__ == "__main__":
    main()

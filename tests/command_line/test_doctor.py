"""The doctor says what is installed, what works and what is missing, whatever the state of the installation."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from command import ROOT, seeupo_trl
from packaging.requirements import Requirement

from seeupo_trl.command_line.doctor import OPTIONAL, probe


NOT_FOR_USERS = ("docs", "test", "dev")

TORCH_WITH_A_GPU = """
class version:
    cuda = "12.8"
class cuda:
    device_count = staticmethod(lambda: 1)
    class get_device_properties:
        def __init__(self, index):
            self.name, self.total_memory, self.major, self.minor = "NVIDIA H100", 80 * 2**30, 9, 0
"""


class Installation:
    """A directory of packages that stands in for an installation: this package, and what the test puts beside it."""

    def __init__(self, directory: Path):
        self.directory = directory
        (directory / "seeupo_trl").symlink_to(ROOT / "seeupo_trl")
        import packaging

        (directory / "packaging").symlink_to(Path(packaging.__file__).parent)
        needs = ["torch>=2.6", "trl>=1.15,<1.17", 'peft>=0.18; extra == "peft"']
        self.add("seeupo-trl", "0.1.0", None, needs)

    def add(self, name: str, version: str, code: str | None = "", needs: list[str] | None = None) -> None:
        metadata = self.directory / f"{name.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (metadata / "METADATA").write_text("\n".join(lines + [f"Requires-Dist: {need}" for need in needs or []]))
        if code is not None:
            (self.directory / f"{name}.py").write_text(code)

    def examine(self, **variables: str) -> tuple[int, dict, str]:
        """Exit code and report as JSON and as text. `-S`: none of the real environment's packages are there."""
        env = {**os.environ, "PYTHONPATH": str(self.directory), **variables}
        env.pop("SEEUPO_APPWORLD_PYTHON", None)
        command = [sys.executable, "-S", "-m", "seeupo_trl", "doctor"]
        options = {"capture_output": True, "text": True, "timeout": 120, "env": env, "cwd": self.directory}
        text = subprocess.run(command, **options)
        done = subprocess.run([*command, "--json"], **options)
        assert done.stdout, done.stderr
        assert text.returncode == done.returncode
        return done.returncode, json.loads(done.stdout), text.stdout


@pytest.fixture
def installation(tmp_path) -> Installation:
    return Installation(tmp_path)


def found(report: dict, name: str) -> dict:
    (one,) = [package for package in report["packages"] if package["name"] == name]
    return one


def test_a_whole_installation_can_train(installation):
    installation.add("torch", "2.9.0+cu128", TORCH_WITH_A_GPU)
    installation.add("trl", "1.16.0")
    code, report, text = installation.examine(HF_HUB_OFFLINE="1", HF_HOME="/models")
    assert (code, report["training_can_start"]) == (0, True)
    assert found(report, "torch")["version"] == "2.9.0+cu128"
    assert found(report, "trl")["bounds"] == "<1.17,>=1.15"
    assert "GPU 0: NVIDIA H100, 80.0 GiB, compute capability 9.0" in text
    assert report["hub"] == {"offline": True, "home": "/models"}
    assert text.rstrip().endswith("Training can start.")


def test_what_is_missing_comes_with_a_command(installation):
    installation.add("torch", "2.9.0", TORCH_WITH_A_GPU)
    code, report, text = installation.examine()
    assert (code, report["training_can_start"]) == (1, False)
    assert (found(report, "trl")["status"], found(report, "trl")["command"]) == (
        "missing",
        "pip install 'trl<1.17,>=1.15'",
    )
    assert found(report, "peft")["command"] == "pip install 'peft>=0.18'"
    assert found(report, "bfcl-eval")["command"] == "pip install --no-deps bfcl-eval"
    appworld = found(report, "appworld")
    assert appworld["status"] == "missing"
    assert "SEEUPO_APPWORLD_PYTHON is not set" in appworld["detail"]
    assert "appworld download data" in text
    assert text.rstrip().endswith("Training cannot start: see trl above.")


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("raise RuntimeError('no kernel image')", "RuntimeError: no kernel image"),
        ("import missing_part", "ModuleNotFoundError: No module named 'missing_part'"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "its import ends with SIGSEGV"),
        ("1 +", "SyntaxError: invalid syntax"),
        ("raise ValueError('line one\\nline two')", "ValueError: line one"),
    ],
)
def test_a_package_that_cannot_be_imported_is_named(installation, code, detail):
    installation.add("torch", "2.9.0", TORCH_WITH_A_GPU)
    installation.add("trl", "1.16.0", code)
    status, report, text = installation.examine()
    assert (status, found(report, "trl")["status"], found(report, "trl")["detail"]) == (1, "broken", detail)
    assert found(report, "torch")["status"] == "ok"
    assert detail in text


def test_a_broken_torch_leaves_the_rest_of_the_report(installation):
    installation.add("torch", "2.9.0", "raise OSError('libcudart.so.12: cannot open shared object file')")
    installation.add("trl", "1.16.0")
    code, report, text = installation.examine()
    assert code == 1
    assert "libcudart.so.12" in found(report, "torch")["detail"]
    assert report["devices"]["gpus"] == []
    assert found(report, "trl")["status"] == "ok"
    assert "no GPU that PyTorch can use" in text


def test_a_broken_optional_package_does_not_stop_training(installation):
    installation.add("torch", "2.9.0", TORCH_WITH_A_GPU)
    installation.add("trl", "1.16.0")
    installation.add("peft", "0.19.0", "raise ImportError('cannot import name')")
    code, report, _ = installation.examine()
    assert (code, found(report, "peft")["status"]) == (0, "broken")


@pytest.mark.parametrize("version", ["1.14.0", "1.17.0"])
def test_a_version_outside_the_bounds_is_named(installation, version):
    installation.add("torch", "2.9.0", TORCH_WITH_A_GPU)
    installation.add("trl", version)
    code, report, _ = installation.examine()
    trl = found(report, "trl")
    assert (code, trl["status"], trl["detail"]) == (1, "outside", f"{version} is not in <1.17,>=1.15")
    assert trl["command"] == "pip install 'trl<1.17,>=1.15'"


def test_the_doctor_looks_at_all_that_an_extra_brings():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    brought = {Requirement(one).name for name, needs in extras.items() for one in needs if name not in NOT_FOR_USERS}
    assert brought - {"trl"} <= {one.name for one in OPTIONAL}


def test_an_import_that_never_ends_is_given_up():
    assert probe("import time; time.sleep(60)", seconds=0.5).error == "its import does not end within 0 seconds"


@pytest.mark.slow
def test_this_installation_can_train():
    done = seeupo_trl("doctor", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["training_can_start"]) == (0, True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {one.name: str(one.specifier) for one in map(Requirement, project["dependencies"])}
    assert {one["name"]: one["bounds"] for one in report["packages"] if one["required"]} == bounds
    assert report["devices"]["cpus"] >= 1
    for one in report["packages"]:
        assert one["status"] == "ok" or re.match("pip install|python", one["command"])

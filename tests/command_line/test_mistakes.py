"""A user's mistake is a line with exit code 2; a bug keeps its traceback."""

import io
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from command import ROOT, seeupo_trl

from seeupo_trl import SeeUPOConfig
from seeupo_trl.command_line.main import main as command
from seeupo_trl.recipes.learning_curve import print_learning_curve
from seeupo_trl.recipes.mistakes import UsageError, is_mistake, nearest, reported
from seeupo_trl.recipes.parsing import parse, run


CONFIGS = ROOT / "examples" / "configs"


@dataclass
class Options:
    learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate."})
    max_turns: int = field(default=10, metadata={"help": "Turns."})
    category: str = field(default="base", metadata={"help": "Category."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Model."})

    def __post_init__(self):
        if self.max_turns < 1:
            raise ValueError(f"`max_turns` must be at least 1; got {self.max_turns}.")


def parsed(*arguments: str, demonstration: str | None = None, configs: Path = CONFIGS) -> Options:
    (options,) = parse([Options], configs, demonstration, arguments)
    return options


@pytest.fixture
def configs(tmp_path):
    (tmp_path / "small.yaml").write_text("learning_rate: 1.0e-4\nmax_turns: 3\n")
    return tmp_path


def test_a_file_gives_values_and_the_command_line_wins(configs):
    for arguments in (["--config", str(configs / "small.yaml")], [f"--config={configs / 'small.yaml'}"]):
        options = parsed(*arguments, "--max_turns", "5")
        assert (options.learning_rate, options.max_turns) == (1e-4, 5)


def test_a_configuration_is_found_by_its_name(configs):
    assert parsed("--config", "small", configs=configs).max_turns == 3


def test_the_demonstration_stands_in_for_neither_model_nor_configuration(configs):
    assert parsed(demonstration="small", configs=configs).max_turns == 3
    assert parsed("--model_name_or_path", "x", demonstration="small", configs=configs).max_turns == 10
    assert parsed("--model_name_or_path=x", demonstration="small", configs=configs).max_turns == 10
    assert parsed(configs=configs).max_turns == 10


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        (["--learning_rats", "3"], "", "unknown option: --learning_rats. Did you mean '--learning_rate'?"),
        (["--max_turns", "six"], "", "--max_turns/--max-turns: invalid int value: 'six'"),
        (["--max_turns", "0"], "", "`max_turns` must be at least 1; got 0."),
        (["--max_turns"], "", "--max_turns/--max-turns: expected one argument"),
        (["--config"], "", "--config needs a file"),
        (["--config", "smal"], "a: 1", "no file 'smal', nor a configuration of that name. Did you mean 'small'?"),
        (["--config", "small"], "max_turn: 3", "unknown key in .*small.yaml: max_turn. Did you mean 'max_turns'?"),
        (["--config", "small"], "max_turns: many", "invalid int value: 'many'"),
        (["--config", "small"], "max_turns: [1", "small.yaml is not YAML: .* line 1, .*expected"),
        (["--config", "small"], "just text", "must contain a YAML mapping"),
        (["--config", "small"], "1: 2", "small.yaml has the key 1, which is no name of a setting"),
        (["--config", "small"], b"\xff\xfe\x00", "small.yaml is no text"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_with_a_command_line_is_said(arguments, content, message, tmp_path):
    (tmp_path / "small.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message):
        parsed(*arguments, configs=tmp_path)


@dataclass
class Typed:
    count: int = field(default=1, metadata={"help": "A whole number."})
    limit: int | None = field(default=None, metadata={"help": "A whole number, or none."})
    rate: float = field(default=1.0, metadata={"help": "A number."})
    top_k: int = field(default=0, metadata={"help": "A whole number, or none, which its type does not say."})
    flag: bool = field(default=False, metadata={"help": "A flag."})
    name: str = field(default="x", metadata={"help": "Text."})
    names: list[str] | None = field(default=None, metadata={"help": "Texts."})
    numbers: list[int] | None = field(default=None, metadata={"help": "Numbers."})
    keywords: dict | str | None = field(default=None, metadata={"help": "A mapping, or one as JSON."})
    fsdp: str | None = field(default=None, metadata={"help": "What transformers takes in more forms than it says."})


def read(content: str, tmp_path: Path) -> Typed:
    (tmp_path / "typed.yaml").write_text(content)
    (options,) = parse([Typed], tmp_path, None, ["--config", "typed"])
    return options


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("count:", "--count is null in .*typed.yaml; give a whole number.$"),
        ("count: 2.5", "--count is 2.5 in .*typed.yaml; give a whole number.$"),
        ("count: true", "--count is true in"),
        ("count: [1]", r"--count is \[1\] in"),
        ("limit: true", "--limit is true in .*typed.yaml; give a whole number or null.$"),
        ("rate:", "--rate is null in .*typed.yaml; give a number.$"),
        ("rate: .nan", "--rate is NaN in"),
        ("rate: false", "--rate is false in"),
        ("flag: 2", "--flag is 2 in .*typed.yaml; give true or false.$"),
        ("name: 5", r"--name is 5 in .*typed.yaml; give text \(in quotes\).$"),
        ("name: 2026-01-01", '--name is "2026-01-01" in'),
        ("name: [a]", r'--name is \["a"\] in'),
        ("names: 5", "--names is 5 in .*typed.yaml; give a list, each of it text"),
        ("numbers: [1, 2.5]", r"--numbers is \[1, 2.5\] in"),
        ("keywords: [a]", r'--keywords is \["a"\] in .*typed.yaml; give a mapping or text \(in quotes\) or null.$'),
    ],
)
def test_a_value_of_a_file_has_the_type_of_its_field(content, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        read(content, tmp_path)


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ("count: 3", 3),
        ("count: '3'", 3),
        ("count: 8.0", 8),
        ("count: 4.0e+3", 4000),
        ("limit: 16.0", 16),
        ("limit:", None),
        ("limit: .inf", float("inf")),
        ("rate: 2", 2),
        ("rate: 2.0", 2.0),
        ("top_k:", None),
        ("rate: 1e-6", 1e-6),
        ("flag: 1", 1),
        ("flag: 'no'", False),
        ("flag: no", False),
        ("name: no", False),
        ("names: [a, b]", ["a", "b"]),
        ("names: a", "a"),
        ("numbers: []", []),
        ("numbers: [1.0, 2]", [1, 2]),
        ("numbers:", None),
        ("keywords: {a: 1}", {"a": 1}),
        ("keywords: '{\"a\": 1}'", '{"a": 1}'),
        ("fsdp: [full_shard]", ["full_shard"]),
    ],
)
def test_what_the_parser_makes_of_a_file_is_taken(content, value, tmp_path):
    given = getattr(read(content, tmp_path), content.split(":")[0])
    assert (given, repr(given)) == (value, repr(value))


def test_names_that_resemble_nothing_are_not_guessed():
    assert nearest("zzz", ["max_turns"]) == ""


@pytest.mark.parametrize("kind", ["a bug", "a wrong conversion", "a bug of an environment"])
def test_bugs_pass(kind, configs):
    def main(options):
        if kind == "a bug":
            raise KeyError("x")
        if kind == "a wrong conversion":
            int("x")
        raise RuntimeError("x")

    with pytest.raises((KeyError, ValueError, RuntimeError)):
        run(main, [Options], configs, arguments=[])


def test_a_value_that_the_package_refuses_is_a_mistake(configs, tmp_path, capsys):
    def main(options):
        SeeUPOConfig(output_dir=str(tmp_path), max_turns=-1, use_cpu=True, bf16=False)

    with pytest.raises(SystemExit) as end:
        run(main, [Options], configs, arguments=[])
    assert end.value.code == 2
    assert "error: `max_turns` must be at least 1" in capsys.readouterr().err


@pytest.fixture
def print_in(monkeypatch):
    """Gives the process a standard output in an encoding that cannot hold all text."""

    def print_in(encoding: str) -> io.BytesIO:
        output = io.TextIOWrapper(io.BytesIO(), encoding, write_through=True)
        monkeypatch.setattr(sys, "stdout", output)
        return output.buffer

    return print_in


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_the_terminal_cannot_show_does_not_end_a_run(encoding, print_in, configs):
    def main(options):
        print_learning_curve([{"step": 1, "rewards/success/mean": 0.5, "reward": 0.5}], {})
        print("\N{SNOWMAN} of the policy, half of \ud83d")

    printed = print_in(encoding)
    run(main, [Options], configs, arguments=[])
    assert b"iteration 1" in printed.getvalue()
    assert printed.getvalue().endswith(b"of the policy, half of ?\n")


def test_what_the_terminal_cannot_show_does_not_end_a_command(print_in):
    printed = print_in("ascii")
    command(["--version"])
    print("\N{SNOWMAN} in a path")
    assert printed.getvalue().endswith(b"? in a path\n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("file", "{there} is a file; give a directory."),
        ("file/x", "{there} is a file; give a directory."),
        pytest.param(
            "/proc/nope",
            "nothing can be written to /proc",
            marks=pytest.mark.skipif(not Path("/proc").is_dir(), reason="a directory that nobody can write to"),
        ),
        ("", "--output_dir is empty"),
    ],
)
def test_an_output_directory_that_cannot_be_used_is_said_before_anything_is_computed(
    given, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    arguments = ["--output_dir", given, "--use_cpu", "true", "--bf16", "false"]
    with pytest.raises(SystemExit) as end:
        run(lambda args: pytest.fail("started"), [SeeUPOConfig], CONFIGS, arguments=arguments)
    assert end.value.code == 2
    assert message.format(there=tmp_path / "file") in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_python_refuses_inside_the_package_is_a_bug():
    statement = compile("int('x')", ROOT / "seeupo_trl" / "trajectory.py", "exec")
    with pytest.raises(ValueError, match="invalid literal") as caught:
        exec(statement)
    assert not is_mistake(caught.value)


def test_a_missing_package_is_a_mistake_and_a_missing_module_of_ours_a_bug():
    assert is_mistake(ModuleNotFoundError("No module named 'wandb'", name="wandb"))
    assert not is_mistake(ModuleNotFoundError("No module named 'x'", name="seeupo_trl.x"))


def test_the_environment_variable_asks_for_tracebacks(monkeypatch, capsys):
    monkeypatch.setenv("SEEUPO_TRACEBACK", "1")
    with pytest.raises(UsageError, match="no"), reported():
        raise UsageError("no")
    monkeypatch.setenv("SEEUPO_TRACEBACK", "0")
    with pytest.raises(SystemExit), reported():
        raise UsageError("no")
    assert capsys.readouterr().err.count("\n") == 1


def test_a_process_among_several_says_which_one_it_is(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit), reported():
        raise UsageError("no")
    assert capsys.readouterr().err.startswith("[process 2] ")


@pytest.mark.slow
def test_a_refused_value_has_a_traceback_only_when_asked_for(tmp_path):
    pytest.importorskip("bfcl_eval", reason="bfcl-eval is installed without its dependencies, see the README")
    arguments = ["train", "bfcl", "--model_name_or_path", "x", "--output_dir", str(tmp_path), "--max_turns", "-1"]
    done = seeupo_trl(*arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("seeupo-trl train bfcl: error: `max_turns` must be at least 1")
    assert "Traceback" not in done.stderr
    done = seeupo_trl(*arguments, "--traceback")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "seeupo_config.py" in done.stderr


@pytest.mark.slow
def test_a_model_that_is_nowhere_is_a_mistake(tmp_path):
    pytest.importorskip("bfcl_eval", reason="bfcl-eval is installed without its dependencies, see the README")
    done = seeupo_trl(
        "train", "bfcl", "--model_name_or_path", "nobody/nothing", "--output_dir", tmp_path, "--bf16", "false"
    )
    assert done.returncode == 2
    assert "seeupo-trl train bfcl: error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.rstrip().endswith("(SEEUPO_TRACEBACK=1 shows where this was raised.)")

"""The table of the main command's runs is that of the runs which are kept."""

import importlib.util
import json
from pathlib import Path


ROOT = Path(__file__).parents[2]


def demo_seeds():
    spec = importlib.util.spec_from_file_location("demo_seeds", ROOT / "benchmarks" / "demo_seeds.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_in_the_documents_is_made_of_the_runs_that_are_kept():
    benchmark = demo_seeds()
    table = benchmark.table(json.loads(benchmark.RUNS.read_text()))
    for document in benchmark.DOCUMENTS:
        assert f"{benchmark.BEGIN}\n{table}\n\n{benchmark.END}" in document.read_text(encoding="utf-8"), document


def test_a_table_takes_the_place_of_the_one_before(tmp_path):
    benchmark = demo_seeds()
    document = tmp_path / "page.md"
    document.write_text(f"above\n{benchmark.BEGIN}old\n{benchmark.END}below\n")
    for text in ("| new |", "| newer |"):
        benchmark.write_table(document, text)
        assert document.read_text() == f"above\n{benchmark.BEGIN}\n{text}\n\n{benchmark.END}below\n"


def test_seeds_count_as_better_beyond_two_standard_errors():
    run = {
        "seed": 1,
        "before": 0.2,
        "after": 0.5,
        "difference": 0.3,
        "standard_error": 0.1,
        "minutes": 9,
        "peak_gb": 3.0,
    }
    text = demo_seeds().table([run, {**run, "seed": 2, "difference": 0.15}])
    assert "**+0.300** (0.100)" in text and " +0.150 (0.100)" in text
    assert text.endswith("1 of 2 seeds above by more than two standard errors (bold).")


def test_the_result_line_of_the_main_command_is_read():
    from seeupo_trl.evaluation.comparison import Change
    from seeupo_trl.recipes.learning_curve import describe_change

    change = Change(0.2, 0.544, standard_error=0.061, tasks=45)
    line = describe_change("test-split", change, "0.200 [0.111, 0.300]", "0.544 [0.400, 0.678]")
    found = map(float, demo_seeds().RESULT.search(line).groups())
    assert list(found) == [45, 0.2, 0.544, 0.344, 0.061]

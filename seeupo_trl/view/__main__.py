"""`python -m seeupo_trl.view RUN_DIR`: a run and its saved trajectories as one page."""

import argparse

from .command import add_arguments, run


def main(arguments: list[str] | None = None) -> None:
    """The command line, see `python -m seeupo_trl.view --help`."""
    parser = argparse.ArgumentParser(
        prog="python -m seeupo_trl.view",
        description="Show a run that saved its trajectories (save_trajectories=True): curves over its iterations, and "
        "every episode, as one HTML page.",
    )
    add_arguments(parser)
    run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()

"""`python -m seeupo_trl.view RUN_DIR`: a run and its saved trajectories as one page."""

import argparse
from collections.abc import Sequence

from .command import add_arguments, run


DESCRIPTION = """\
Show a run that saved its trajectories (save_trajectories=True): curves over its iterations, and every episode, as
one HTML page."""

EXAMPLES = """\
examples:
  %(prog)s outputs/my-run --open
  %(prog)s outputs/my-run --split eval --iteration 30 --output page.html
  %(prog)s outputs/my-run --watch"""


def main(arguments: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None) -> None:
    """
    The command line, see `python -m seeupo_trl.view --help`.

    Args:
        arguments (`Sequence[str]`, *optional*):
            Its words. Defaults to those of the process.
        parser (`argparse.ArgumentParser`, *optional*):
            An empty parser, which knows what the program is called and how to report errors.
    """
    parser = parser or argparse.ArgumentParser(prog="python -m seeupo_trl.view")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    add_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        run(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

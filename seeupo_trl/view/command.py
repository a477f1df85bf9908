"""The command line of the page, for `python -m seeupo_trl.view` and for programs that offer it among others."""

import argparse
import webbrowser
from pathlib import Path

from .page import render
from .run import DEFAULT_MAX_TRAJECTORIES, read_run
from .watch import watch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of [`run`] to a parser."""
    parser.add_argument("run_dir", help="output_dir of the run, a directory inside its trajectories, or one file")
    parser.add_argument("--output", help="page to write; RUN_DIR/trajectories.html by default")
    parser.add_argument("--split", action="append", help="train, eval, eval_<dataset>; may be repeated")
    parser.add_argument(
        "--iteration", action="append", type=int, help="list episodes of this one only; may be repeated"
    )
    parser.add_argument(
        "--max-trajectories",
        type=_positive,
        default=DEFAULT_MAX_TRAJECTORIES,
        help="largest number of episodes in the list; the latest iterations are kept, and the curves show all "
        "(default: %(default)s)",
    )
    parser.add_argument("--open", action="store_true", help="open the page in the default browser")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="follow a run that is going on: serve the page to this machine alone, and reload it when files change",
    )
    parser.add_argument("--port", type=_port, help="port of --watch on 127.0.0.1; a free one by default")


def run(args: argparse.Namespace) -> None:
    """
    Write the page, or serve it.

    Args:
        args (`argparse.Namespace`):
            Options of [`add_arguments`].

    Raises:
        `OSError`, `ValueError`:
            When there is nothing to show, or the page cannot be written; the message is for who asked for it.
    """
    selection = {"splits": args.split, "iterations": args.iteration, "max_trajectories": args.max_trajectories}
    if args.watch:
        if args.output is not None:
            raise ValueError("--watch writes no page: give either --watch or --output.")
        watch(Path(args.run_dir), port=args.port or 0, open_browser=args.open, **selection)
    elif args.port is not None:
        raise ValueError("--port is the port of --watch: add --watch, or leave it out.")
    else:
        output = write_page(args.run_dir, args.output, **selection)
        if args.open:
            webbrowser.open(output.resolve().as_uri())


def write_page(run_dir: str | Path, output: str | Path | None = None, **selection) -> Path:
    """
    Write the page of a run, and say where it is.

    Args:
        run_dir (`str` or `Path`):
            As in [`~seeupo_trl.view.run.read_run`].
        output (`str` or `Path`, *optional*):
            The file; a pipe or a device gets the page and nothing else. By default `trajectories.html` in `run_dir`.
        **selection:
            `splits`, `iterations` and `max_trajectories` of [`~seeupo_trl.view.run.read_run`].

    Raises:
        `OSError`, `ValueError`:
            When there is nothing to show, or the file cannot be written.
    """
    run_dir = Path(run_dir)
    path = Path(output or (run_dir if run_dir.is_dir() else run_dir.parent) / "trajectories.html")
    if path.is_dir():
        raise IsADirectoryError(f"--output {path} is a directory; give the file of the page.")
    shown = read_run(run_dir, **selection)
    page = render(shown.rows.to_pylist(), shown.title, shown.note, shown.charts, shown.notices)
    try:
        if output is not None and path.exists() and not path.is_file():
            path.write_text(page, encoding="utf-8")
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        # a link that lies in somebody's run is not followed
        _replace(path if output is None else path.resolve(), page)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}. Give another file by --output.") from error
    print(f"{path}: {len(page) / 1e6:.1f} MB" + (f"; {shown.note}" if shown.note else ""))
    return path


def _replace(path: Path, text: str) -> None:
    """Write a file of which nobody ever sees a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
        raise


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"must be between 0 and 65535; got {value}")
    return value

"""``python -m fastprompt.demo zero-shot``: files, questions and the table of the zero-shot runs."""

import argparse
from pathlib import Path

DESCRIPTION = """Is a prompt-tuned model right where it was not trained? The runs between
`prepare` and `ask` are those of `fastprompt train` and `fastprompt sweep`: docs/zero-shot.md."""


def main(arguments: list[str]) -> None:
    """The three commands; see docs/zero-shot.md."""
    given = _parser().parse_args(arguments)
    if given.command == "prepare":
        from fastprompt.demo.zero_shot.prepare import prepare

        prepare(given.folder, given.cache)
    elif given.command == "ask":
        from fastprompt.demo.zero_shot.asking import ask

        for run in given.runs:
            ask(given.folder, run)
    else:
        from fastprompt.demo.zero_shot.table import markdown

        named: dict[str, list[Path]] = {}
        for run in given.runs:
            named.setdefault(run.parent.name, []).append(run)
        print(markdown(named), end="")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastprompt.demo zero-shot", description=DESCRIPTION
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="write model, pictures, data and questions")
    prepare.add_argument("folder", type=Path)
    prepare.add_argument("--cache", help="where wheels are kept (~/.cache/fastprompt)")
    ask = commands.add_parser("ask", help="ask runs what they did not train on")
    ask.add_argument("folder", type=Path, help="that was prepared")
    table = commands.add_parser("table", help="runs that were asked, as Markdown")
    for one in (ask, table):
        one.add_argument("runs", type=_folder, nargs="+", help="folders, NAME/seed-S")
    return parser


def _folder(text: str) -> Path:
    """``m2pt/seed-*`` also finds the logs beside the runs."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"want a run's folder, got {text}")
    return Path(text)

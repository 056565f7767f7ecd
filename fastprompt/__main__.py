"""``fastprompt doctor`` and ``fastprompt eval``: the command line."""

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """0; 1 if something that was looked at is wrong. A command that is not known exits with 2."""
    parser = argparse.ArgumentParser(prog="fastprompt", description="Prompt tuning, fused.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what is active on this machine, and does it work")
    commands.add_parser("eval", help="a model's scores on benchmarks", add_help=False)
    options, rest = parser.parse_known_args(arguments)

    if options.command == "eval":
        from fastprompt.eval import run

        return run.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")

    from fastprompt import doctor

    text, well = doctor.examine()
    print(text)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())

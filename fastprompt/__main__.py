"""``fastprompt doctor``: the command line."""

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """0; 1 if something that was looked at is wrong. A command that is not known exits with 2."""
    parser = argparse.ArgumentParser(prog="fastprompt", description="Prompt tuning, fused.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what is active on this machine, and does it work")
    parser.parse_args(arguments)

    from fastprompt import doctor

    text, well = doctor.examine()
    print(text)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())

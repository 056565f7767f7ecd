"""``fastprompt COMMAND``: the command line. A command's module is imported when it is called."""

import argparse
import importlib
import sys

# command -> where its function of the remaining arguments is, and what it does
COMMANDS = {
    "doctor": ("fastprompt.doctor:command", "what is active on this machine, and does it work"),
    "assemble": ("fastprompt.assembly:command", "a LLaVA of separate parts"),
    "train": ("fastprompt.train.commands:train", "train prompts on conversations about images"),
    "rerun": ("fastprompt.train.commands:rerun", "run a run again: are the losses the same"),
    "eval": ("fastprompt.eval.run:main", "a model's scores on benchmarks"),
    "inspect-data": (
        "fastprompt.train.commands:inspect_data",
        "show rows, what trains marked",
    ),
    "inspect": ("fastprompt.inspecting:command", "what a checkpoint's prompts are like"),
    "sweep": ("fastprompt.sweep.commands:sweep", "train and compare what a plan names"),
    "results": ("fastprompt.sweep.commands:results", "one table of finished runs"),
}


def main(arguments: list[str] | None = None) -> int:
    """0; 1 if something that was looked at is wrong. A command that is not known exits with 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="fastprompt",
        description="Prompt tuning, fused.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<14}{help}" for name, (_, help) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    command = parser.parse_args(arguments[:1]).command
    module, _, name = COMMANDS[command][0].partition(":")
    return getattr(importlib.import_module(module), name)(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())

"""Where a run took place, its table, and its JSON."""

import datetime
import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path

import torch

try:
    import rich
    from rich.console import Console
    from rich.table import Table
except ImportError:  # the table is as true in plain text
    rich = None

PACKAGES = ("torch", "triton", "transformers", "xformers", "bitsandbytes", "liger-kernel", "peft")
COLUMNS = ("provider", "ms", "p20-p80", "peak MiB", "speed-up", "check")
STEPS = {  # more columns, where any row has them
    "tokens_per_s": ("tokens/s", "{:.0f}"),
    "kernels": ("kernels", "{}"),
    "over_floor": ("over floor", "{:.2f}x"),
}


def environment(device: str, commit: str | None, command: str) -> dict:
    return dict(
        device=torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        threads=torch.get_num_threads(),
        versions=_versions(device),
        commit=commit or _commit(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command,
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions(device: str) -> dict[str, str]:
    versions = dict(python=platform.python_version())
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    versions["torch"] = torch.__version__  # with its build (+cu130)
    if device == "cuda":
        versions |= dict(cuda=torch.version.cuda, cudnn=str(torch.backends.cudnn.version()))
    return versions


def _commit() -> str:
    """The commit of this checkout, "+dirty" if files differ from it; "unknown" in a bare copy."""
    here = Path(__file__).parent

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True)

    try:
        head, changes = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain")
    except FileNotFoundError:
        return "unknown (no git)"
    if head.returncode:
        return "unknown (not a git checkout)"
    return head.stdout.strip() + "+dirty" * bool(changes.stdout.strip())


def header(env: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items())
    return (
        f"{env['device']}, {env['threads']} CPU threads | {versions}\n"
        f"commit {env['commit']} | {env['date']} | {env['command']}"
    )


def write_json(path: str, env: dict, rows: list[dict]) -> None:
    Path(path).write_text(json.dumps({**env, "rows": rows}, indent=1, allow_nan=False) + "\n")


def print_rows(rows: list[dict], baseline: str) -> None:
    """A table for each mode of one shape."""
    for mode, group in groupby(rows, key=lambda row: row["mode"]):
        group = list(group)
        first = group[0]
        title = f"{first['model']} {first['shape']}, {first['dtype']}: {mode}"
        if first.get("floor_ms"):
            title += f" (predicted floor {first['floor_ms']:.3f} ms)"
        title += f"; speed-up over {baseline}"
        shown = [row for row in group if row["status"] != "not measured"]
        more = [key for key in STEPS if any(row.get(key) for row in shown)]
        columns = (*COLUMNS[:-1], *(STEPS[key][0] for key in more), COLUMNS[-1])
        _print_table(title, columns, [_cells(row, more) for row in shown])
        absent = {}
        for row in group:
            if row["status"] == "not measured":
                absent.setdefault(row["reason"], []).append(row["provider"])
        for reason, names in absent.items():
            print(f"not measured: {', '.join(names)}: {reason}")


def _cells(row: dict, more: list[str]) -> tuple[str, ...]:
    name = row["provider"]
    if row["status"] != "measured":
        return name, "", "", "", "", *[""] * len(more), f"{row['status'].upper()}: {row['reason']}"
    checked = row.get("unchecked") or f"{row['error_over_limit']:.2f} of limit"
    speedup = f"{row['speedup']:.2f}x" if "speedup" in row else ""
    spread = f"{row['p20_ms']:.3f}-{row['p80_ms']:.3f}"
    peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}"
    extra = [STEPS[key][1].format(row[key]) if row.get(key) else "" for key in more]
    return name, f"{row['median_ms']:.3f}", spread, peak, speedup, *extra, checked


def _print_table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    print(f"\n{title}")
    last = len(columns) - 1
    if rich:
        table = Table()
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if 0 < i < last else "left", no_wrap=i < last)
        for row in rows:
            table.add_row(*row)
        # into a file or a pipe rich would squeeze the table into 80 columns
        Console(width=None if sys.stdout.isatty() else 120, markup=False).print(table)
        return
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(last)]
    for row in [columns, *rows]:
        middle = (row[i].rjust(widths[i]) for i in range(1, last))
        cells = [row[0].ljust(widths[0]), *middle, row[last]]
        print("  ".join(cells))

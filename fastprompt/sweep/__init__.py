"""``fastprompt sweep`` and ``fastprompt results``: comparisons and ablations as one command."""

from fastprompt.sweep.plan import Plan, Run, read_plan
from fastprompt.sweep.records import MixedRuns, Record, check_mixed, read_records
from fastprompt.sweep.running import run_plan
from fastprompt.sweep.table import Row, pick, summarise, write_results

__all__ = [
    "MixedRuns",
    "Plan",
    "Record",
    "Row",
    "Run",
    "check_mixed",
    "pick",
    "read_plan",
    "read_records",
    "run_plan",
    "summarise",
    "write_results",
]

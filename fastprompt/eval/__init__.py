"""Evaluation: benchmarks from their own files on disk, greedy or ranked answers, scores."""

from fastprompt.eval.benchmarks import BENCHMARKS, Benchmark, vqa
from fastprompt.eval.evaluation import Run, evaluate
from fastprompt.eval.questions import InputError, Question
from fastprompt.eval.results import Result, mm_avg, radar

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "InputError",
    "Question",
    "Result",
    "Run",
    "evaluate",
    "mm_avg",
    "radar",
    "vqa",
]

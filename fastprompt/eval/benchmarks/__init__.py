"""The benchmarks, by name."""

from fastprompt.eval.benchmarks.base import Benchmark
from fastprompt.eval.benchmarks.cifar import CIFAR10, CIFAR100
from fastprompt.eval.benchmarks.mme import MME
from fastprompt.eval.benchmarks.mnist import MNIST
from fastprompt.eval.benchmarks.pope import POPE
from fastprompt.eval.benchmarks.snli_ve import SNLI_VE
from fastprompt.eval.benchmarks.textvqa import TEXTVQA
from fastprompt.eval.benchmarks.vqa import vqa
from fastprompt.eval.benchmarks.vsr import VSR

BENCHMARKS: dict[str, Benchmark] = {
    b.name: b for b in (MME, VSR, SNLI_VE, POPE, CIFAR10, CIFAR100, MNIST, TEXTVQA)
}
# M2PT's MMAvg (its released evaluation): the mean of these; MME's points are not among them
MM_AVG = ("vsr", "snli_ve", "pope", "cifar10", "cifar100", "mnist", "textvqa")

__all__ = ["BENCHMARKS", "MM_AVG", "Benchmark", "vqa"]

"""Builds `fastprompt._native` from csrc/ with ninja: parallel, incremental, in seconds.

Everything else is in pyproject.toml. No torch is needed: the sources see raw pointers alone.
Without a working C++ compiler the package still installs, and its torch path serves the CPU.
Where there is nvcc, csrc/cuda/ becomes cubins inside of the module, which the CUDA driver loads: no
CUDA library is linked. FASTPROMPT_NATIVE=0 skips the native part, FASTPROMPT_CUDA=0 its cubins (at
run time the same names leave what was built unused); CXX and CUDA_HOME choose the compilers.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CUDA_SOURCE = CSRC / "cuda" / "nf4_linear.cu"
# Contraction would turn a multiply and an add into one rounding where bitsandbytes has two.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]
# Flags of single files. Never -march=native: the variant is chosen at run time, on the user's CPU.
FUSED = "-ffp-contract=fast"  # these have no other's bits to match
# GCC's own AVX-512 header warns of what it leaves undefined on purpose.
QUIET = "-Wno-uninitialized -Wno-maybe-uninitialized"
FLOAT_FILES = ("attention", "elementwise", "product", "select")
FILE_FLAGS = {f"{name}_{isa}.cpp": FUSED for name in FLOAT_FILES for isa in ("neon", "portable")}
if platform.machine().lower() in ("x86_64", "amd64"):
    FILE_FLAGS |= {
        "decode_avx2.cpp": "-mavx2 -mf16c",
        "decode_avx512.cpp": f"-mavx512f -mavx512bw {QUIET}",
    }
    for name in FLOAT_FILES:
        FILE_FLAGS[f"{name}_avx2.cpp"] = f"-mavx2 -mfma {FUSED}"
        FILE_FLAGS[f"{name}_avx512.cpp"] = f"-mavx512f -mavx512bw -mfma {FUSED} {QUIET}"
CUDA_ARCHS = (80, 86, 89, 90, 100, 120)
CUDA_MAJOR = 13  # of nvcc: the one that the kernels are compiled with here
NVCC_FLAGS = ["-std=c++17", "-O3", "-fatbin", "--compress-mode=size"]


def find_compiler() -> tuple[list[str] | None, str]:
    """The C++ compiler as a command, or None; and why there is none."""
    if os.environ.get("FASTPROMPT_NATIVE") == "0":
        return None, "FASTPROMPT_NATIVE=0"
    named = os.environ.get("CXX")
    commands = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    command = next((c for c in commands if shutil.which(c[0])), None)
    if command is None:
        return None, f"no C++ compiler: {named or 'c++, g++ or clang++'} is not on PATH"
    # A compiler without Python's headers, or not of GCC's manner, is as good as none.
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("#include <Python.h>\n#include <dlfcn.h>\n#include <thread>\n")
        include = "-I" + sysconfig.get_path("include")
        check = [*command, *CXX_FLAGS, include, "-c", str(probe), "-o", str(probe) + ".o"]
        done = subprocess.run(check, capture_output=True, text=True)
    if done.returncode:
        return None, f"{shlex.join(command)} does not work here:\n{done.stderr.strip()}"
    return command, ""


def tile_flags(compiler: list[str], own: str, instruction: str) -> str:
    """Those of a product by tiles; none, and it is empty, for a compiler, or an assembler behind
    it, that does not know the ``instruction``."""
    flags = f"-mavx512f -mavx512bw {own} {QUIET}"
    code = f"#include <immintrin.h>\nvoid f() {{ {instruction}; }}\n"
    with tempfile.TemporaryDirectory() as folder:
        made = str(Path(folder, "tile.o"))
        check = [*compiler, *CXX_FLAGS, *flags.split(), "-c", "-x", "c++", "-", "-o", made]
        known = subprocess.run(check, input=code, capture_output=True, text=True).returncode == 0
    if not known:
        print(f"fastprompt: no 4-bit products by {own}: {shlex.join(compiler)} does not know it")
    return flags if known else ""


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR, "ninja"))
    except ImportError:
        return shutil.which("ninja") or sys.exit(
            "fastprompt needs ninja to build: pip install ninja"
        )


def find_nvcc() -> tuple[str | None, str]:
    """nvcc, or None; and why there is none."""
    if os.environ.get("FASTPROMPT_CUDA") == "0":
        return None, "FASTPROMPT_CUDA=0"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    if nvcc is None:
        return None, f"no nvcc in {home}/bin, CUDA_HOME" if home else "no nvcc on PATH"
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    version = re.search(r"release (\d+)\.(\d+)", done.stdout)
    if version is None or int(version[1]) != CUDA_MAJOR:
        got = f"release {version[1]}.{version[2]}" if version else "no version"
        return None, f"{nvcc}: want release {CUDA_MAJOR}, got {got}"
    # One without CUDA's headers, or that refuses this host's compiler, is as good as none.
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cu")
        probe.write_text("#include <cuda_bf16.h>\n")
        check = [
            nvcc,
            *NVCC_FLAGS,
            f"-arch=sm_{CUDA_ARCHS[-1]}",
            str(probe),
            "-o",
            f"{probe}.fatbin",
        ]
        done = subprocess.run(check, capture_output=True, text=True)
    if done.returncode:
        return None, f"{nvcc} does not work here:\n{(done.stdout + done.stderr).strip()}"
    return nvcc, ""


def escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(compiler: list[str], nvcc: str | None, objects: Path, target: Path) -> str:
    """What build.ninja says: one object a source, each with its dependencies, and one link."""
    import pybind11

    folders = [CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    includes = shlex.join(f"-I{folder}" for folder in folders)
    mac = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    link = [*compiler, "-shared", *mac, "$in", "-o", "$out", "-pthread", "-ldl"]
    lines = [
        "rule cxx",
        f"  command = {shlex.join([*compiler, *CXX_FLAGS])} {includes} $flags "
        "-MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $in",
    ]
    fatbin = objects / "cuda.fatbin"
    if nvcc:
        archs = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS)
        lines += [
            "rule cuda",
            f"  command = {shlex.join([nvcc, *NVCC_FLAGS])} {archs} -MMD -MF $out.d $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $in",
            f"build {escape(fatbin)}: cuda {escape(CUDA_SOURCE)}",
        ]
    outputs, file_flags = [], dict(FILE_FLAGS)
    file_flags["product_amx.cpp"] = tile_flags(
        compiler, "-mamx-tile -mamx-bf16", "_tile_zero(0); _tile_dpbf16ps(0, 1, 2)"
    )
    file_flags["product_bf16.cpp"] = tile_flags(
        compiler,
        "-mavx512bf16",
        "volatile __m512 x = _mm512_dpbf16_ps(__m512(), __m512bh(), __m512bh()); (void)x",
    )
    for source in sorted(CSRC.glob("*.cpp")):
        outputs.append(escape(objects / (source.name + ".o")))
        flags, also = file_flags.get(source.name, ""), ""
        if nvcc and source.name == "cuda_driver.cpp":  # the cubins are part of it
            archs = " ".join(map(str, CUDA_ARCHS))
            defined = [f'-DFASTPROMPT_FATBIN="{fatbin}"', f'-DFASTPROMPT_ARCHS="{archs}"']
            flags, also = shlex.join(defined).replace("$", "$$"), f" | {escape(fatbin)}"
        lines.append(f"build {outputs[-1]}: cxx {escape(source)}{also}")
        lines.append(f"  flags = {flags}")
    # "$in" must reach ninja unquoted
    command = " ".join(part if part.startswith("$") else shlex.quote(part) for part in link)
    lines += ["rule link", f"  command = {command}", "  description = link $out"]
    lines += [f"build {escape(target)}: link {' '.join(outputs)}", ""]
    return "\n".join(lines)


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        compiler, why = find_compiler()
        if compiler is None:
            target.unlink(missing_ok=True)  # an earlier build's, which a wheel would take along
            print(
                f"\nfastprompt: installing WITHOUT its native part ({why}).\n"
                "fastprompt: everything works; on the CPU torch decodes 4-bit weights, several "
                "times slower, and computes attention, norms and activations.\n",
                file=sys.stderr,
            )
            return
        nvcc, why = find_nvcc()
        if nvcc is None:
            print(
                f"\nfastprompt: building without CUDA kernels ({why}).\n"
                "fastprompt: everything works; on GPUs Triton decodes 4-bit weights for torch's "
                "products, slower for few tokens.\n",
                file=sys.stderr,
            )
        objects = Path(self.build_temp).resolve()
        for folder in (objects, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(ninja_file(compiler, nvcc, objects, target))
        # The compiler works, so a failure from here on is a bug of ours and must be seen.
        done = subprocess.run([find_ninja(), "-C", str(objects)])
        if done.returncode:
            sys.exit(
                "fastprompt: csrc/ did not build (FASTPROMPT_NATIVE=0 installs without it, "
                "FASTPROMPT_CUDA=0 without its CUDA kernels)"
            )


def listed(*patterns: str) -> list[str]:
    files = [f for pattern in patterns for f in CSRC.glob(pattern)]
    return sorted(str(f.relative_to(ROOT)) for f in files)


native = Extension(
    "fastprompt._native",
    sources=listed("*.cpp"),
    depends=listed("*.h", "cuda/*"),  # so that a source distribution has them
    optional=True,  # setuptools then accepts that it was not built
)

setup(
    ext_modules=[native],
    cmdclass={"build_ext": NinjaBuild},
)

"""Run the benchmarks.  python -m benchmarks --list says what there is.

``python -m benchmarks cards`` is a command of its own: see `benchmarks.cards`.
"""

import argparse
import os
import shlex
import sys

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each look at CPU memory writes to stderr

import torch

from benchmarks import floor, harness, isolated, registry, report

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(arguments: list[str] | None = None) -> int:
    """0; 1 if a provider was wrong or ours failed. A name that is not known exits with 2."""
    parser = _parser()
    args = parser.parse_args(arguments)
    device = args.device or ("cuda" if args.predict or torch.cuda.is_available() else "cpu")
    if not args.predict and device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    known = registry.WHERE
    _refuse_unknown(parser, "benchmark", args.names, known)
    chosen = [registry.load(name) for name in args.names or known]
    shapes = {b.name: b.shapes(device, args.quick) for b in chosen}
    _refuse_unknown(parser, "shape", args.shapes, [s for b in chosen for s in shapes[b.name]])
    _refuse_unknown(parser, "provider", args.providers, [p for b in chosen for p in b.providers])
    for benchmark in chosen:
        served = benchmark.dtypes.get(device, ())
        if args.dtype and shapes[benchmark.name] and args.dtype not in served:
            wanted = ", ".join(served)
            parser.error(f"--dtype for {benchmark.name} on {device}: want {wanted}")
    if args.list:
        _list(chosen, shapes)
        return 0

    words = sys.argv[1:] if arguments is None else arguments
    command = "python -m benchmarks " + shlex.join(words)
    if args.predict:
        env = report.environment("cpu", args.commit, command)
        _predict(chosen, shapes, args, env | dict(device=f"predicted for {args.predict}"))
        return 0

    env, rows = report.environment(device, args.commit, command), []
    print(report.header(env))
    for benchmark in chosen:
        if not shapes[benchmark.name]:
            print(f"\n{benchmark.name}: not measured: it has no shapes for {device}")
            continue
        dtype = DTYPES[args.dtype or benchmark.dtypes[device][0]]
        providers = {
            name: p
            for name, p in benchmark.providers.items()
            if not args.providers or name in args.providers
        }
        skipped = _skipped(providers, args)
        effort = harness.QUICK if args.quick else harness.Effort()
        for model, shape in shapes[benchmark.name].items():
            if args.shapes and model not in args.shapes:
                continue
            run_shape = isolated.run_shape if benchmark.truth else harness.run_shape
            new = run_shape(benchmark, model, shape, dtype, device, providers, skipped, effort)
            report.print_rows(new, benchmark.baseline)
            rows += new
            if args.json:  # after each shape: a run that is cut off keeps what it had
                report.write_json(args.json, env, rows)
    bad = [row for row in rows if row["status"] in ("wrong", "failed")]
    for row in bad:
        print(
            f"{row['status'].upper()}: {row['benchmark']}, {row['model']} {row['shape']}, "
            f"{row['mode']}, {row['provider']}: {row['reason']}",
            file=sys.stderr,
        )
    return 1 if bad else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("names", nargs="*", help="benchmarks; all unless named")
    add("--list", action="store_true", help="say what there is, and run nothing")
    add("--shapes", nargs="+", metavar="MODEL", help="only these")
    add("--providers", nargs="+", metavar="NAME", help="only these")
    add("--dtype", choices=DTYPES, help="bf16 on CUDA and fp32 on the CPU unless given")
    add("--quick", action="store_true", help="small shapes, few samples, no compilers: seconds")
    add("--predict", choices=floor.RATES, help="run nothing: bytes, FLOPs and floor on this card")
    add("--json", metavar="FILE", help="write every row, and where they were measured, to FILE")
    add("--device", choices=("cpu", "cuda"), help="cuda where there is one, else cpu")
    add("--commit", help="what to report as the commit where git does not know")
    return parser


def _refuse_unknown(parser, kind, names, known) -> None:
    unknown = [name for name in names or () if name not in known]
    if unknown:
        known = ", ".join(dict.fromkeys(known))
        parser.error(f"no {kind} {', '.join(unknown)}; there are: {known}")


def _predict(benchmarks, shapes, args, env) -> None:
    """Bytes, FLOPs and the floor they give on a card that need not be here; 16-bit."""
    rows = []
    for b in benchmarks:
        for model, shape in shapes[b.name].items() if b.cost else ():
            if args.shapes and model not in args.shapes:
                continue
            for mode in b.modes:
                moved, flops = b.cost(shape, mode, 2)
                ms = floor.predicted_ms(moved, flops, args.predict, b.in_turn)
                rows.append(
                    dict(
                        benchmark=b.name,
                        model=model,
                        shape=str(shape),
                        mode=mode,
                        bytes=moved,
                        flops=flops,
                        floor_ms=round(ms, 4),
                    )
                )
                print(
                    f"{model:<20}{shape!s:<44}{mode:<28}{moved / 1e6:>9.1f} MB"
                    f"{flops / 1e9:>9.1f} GFLOP{ms:>9.4f} ms"
                )
    if args.json:
        report.write_json(args.json, env | dict(rates=floor.RATES[args.predict]), rows)


def _skipped(providers, args) -> dict[str, str]:
    if not args.quick or args.providers:
        return {}
    reason = "--quick waits for no compiler (unless named in --providers)"
    return {name: reason for name, provider in providers.items() if provider.compiles}


def _list(benchmarks, shapes) -> None:
    for benchmark in benchmarks:
        print(f"{benchmark.name}: {benchmark.about}\n  modes: {', '.join(benchmark.modes)}")
        print("  shapes:")
        for model, shape in shapes[benchmark.name].items():
            print(f"    {model:<14}{shape}")
        print(f"  providers (speed-ups are over {benchmark.baseline}):")
        for name, provider in benchmark.providers.items():
            print(f"    {name:<14}{provider.about}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["cards"]:  # no times, and a command line of its own
        from benchmarks import cards

        sys.exit(cards.main(sys.argv[2:]))
    sys.exit(main())

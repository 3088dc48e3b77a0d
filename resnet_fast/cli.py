"""The ``resnet-fast`` command: info, verify, bench, demo, explain, traffic.

Exit codes: 0 done, 1 the answer is no (a mismatch, a failure), 2 the question was wrong.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from resnet_fast.fuse import Explanation
    from resnet_fast.traffic_step import StepTraffic

EPILOG = "Add --debug to any command for a traceback."

app = typer.Typer(
    name="resnet-fast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _dtype(name: str) -> str:
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    return short.get(name.removeprefix("torch."), name)


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Network, e.g. resnet50.")]
Dtype = Annotated[
    str, typer.Option(help="fp32, bf16 or fp16, or torch's name for it.", callback=_dtype)
]
Size = Annotated[int | None, typer.Option(help="Side of the square image; default: the network's.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _examples(*lines: str) -> str:
    # \b keeps the lines as they are.
    return "\b\nExamples:\n" + "\n".join(f"  $ resnet-fast {line}" for line in lines)


def _console() -> Any:
    from rich.console import Console

    # A pipe has no width: rich would fold tables at 80 columns and break a reader's grep.
    return Console() if sys.stdout.isatty() else Console(width=160)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, default=str))


def _check_device(device: str) -> None:
    import torch

    from resnet_fast.errors import ArgumentError

    if device not in ("cpu", "cuda"):
        raise ArgumentError("device", "cpu or cuda", repr(device))
    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device", "cpu, since torch finds no CUDA device", "'cuda'")


def _batches(text: str) -> list[int]:
    from resnet_fast.errors import ArgumentError

    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = []
    if not batches:
        raise ArgumentError("batch", "positive numbers such as 1,8", repr(text))
    return batches


def _check_images(batch: int, size: int | None) -> None:
    """What the commands take, before any of them starts to work."""
    from resnet_fast.errors import ArgumentError

    if batch < 1:
        raise ArgumentError("batch", "at least 1", str(batch))
    if size is not None and size < 16:
        raise ArgumentError("size", "at least 16", str(size))


def _check_files(*paths: Path | None) -> None:
    from resnet_fast.errors import ArgumentError

    for path in paths:
        if path is not None and not path.resolve().parent.is_dir():
            raise ArgumentError("file", "a path in an existing folder", str(path))


def _version(wanted: bool) -> None:
    if wanted:
        from resnet_fast._version import __version__

        print(f"resnet-fast {__version__}")
        raise typer.Exit


@app.callback(epilog=EPILOG)
def start(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Fused residual networks: the same numbers in less time, accounted for."""


def collect_info() -> dict[str, Any]:
    """Gather versions, libraries with reasons, CPU features, GPU, kernel variants and cache."""
    import torch

    import resnet_fast
    from resnet_fast import _library
    from resnet_fast.bench.report import environment
    from resnet_fast.bench.runner import default_threads
    from resnet_fast.plan.cache import path as cache_path

    facts = environment(default_threads())
    cache = cache_path()
    libraries = {
        name: {"loaded": status.loaded, "path": status.path, "reason": status.reason}
        for name, status in _library.status().items()
    }
    native = _library.native()
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
        }
    return {
        "versions": {
            "resnet_fast": resnet_fast.__version__,
            "python": platform.python_version(),
            **{key: facts[key] for key in ("torch", "torchvision", "triton")},
            "onnxruntime": facts["onnxruntime"],
            "openvino": facts["openvino"],
            "torch_cuda": torch.version.cuda,
        },
        "commit": facts["commit"],
        "libraries": libraries,
        "cpu": {
            "model": facts["cpu"],
            "cpus": facts["cpus"],
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "features": native.cpu_features() if native else None,
        },
        "gpu": gpu,
        "build": native.build_info() if native else None,
        "kernels": native.kernel_variants() if native else None,
        "cache": None if cache is None else str(cache),
    }


@app.command(epilog=_examples("info", "info --variants", "info --json | jq .libraries"))
def info(
    variants: Annotated[
        bool, typer.Option("--variants", help="A row a CUDA kernel and architecture instead.")
    ] = False,
    json_: Json = False,
) -> None:
    """Show versions, libraries (or why one is absent), CPU, GPU.

    Also the build, the compiled kernels and the cache. What is absent is no error.
    """
    facts = collect_info()
    if json_:
        _print_json(facts)
        return
    from rich.table import Table

    from resnet_fast.kernel_report import summary, table_of_variants

    if variants:
        _console().print(table_of_variants(facts["kernels"], facts["build"]), highlight=False)
        return
    table = Table.grid(padding=(0, 2))

    for name, version in facts["versions"].items():
        table.add_row(name.replace("torch_cuda", "CUDA of torch"), version or "none")
    table.add_row("commit", facts["commit"] or "not a checkout")
    for name, status in facts["libraries"].items():
        state = f"loaded: {status['path']}" if status["loaded"] else f"absent: {status['reason']}"
        table.add_row(f"library {name}", state)
    table.add_row("CPU", f"{facts['cpu']['model']}, {facts['cpu']['cpus']} usable")
    table.add_row("torch CPU capability", facts["cpu"]["torch_capability"])
    features = facts["cpu"]["features"] or {}
    present = ", ".join(name for name, there in features.items() if there)
    table.add_row("CPU features", present or "unknown")
    gpu = facts["gpu"]
    shown = f"{gpu['name']}, sm {gpu['capability']}, {gpu['memory_gb']} GB" if gpu else "none"
    table.add_row("GPU", shown)
    for name, text in _build_rows(facts["build"]):
        table.add_row(name, text)
    for text in summary(facts["kernels"] or ()):
        table.add_row("kernel", text)
    table.add_row("verdict cache", facts["cache"] or "none: there is no home folder to keep it in")
    _console().print(table)


def _build_rows(build: dict[str, Any] | None) -> list[tuple[str, str]]:
    if build is None:
        return [("build", "unknown: the native library is absent")]
    cuda = f"none: {build['cuda_absence']}"
    if build["cuda_version"]:
        cuda = f"{build['cuda_version']} for {build['cuda_arch_list']}"
        if build["cuda_resources_absence"]:
            cuda += f"; kernels unknown: {build['cuda_resources_absence']}"
    made = f"{build['compiler']}, torch {build['torch_version']}"
    return [
        ("build", f"{made}; loads in torch {build['stable_abi_target']} and later"),
        ("build CUDA", cuda),
        ("build flags", build["cxx_flags"]),
    ]


@app.command(
    epilog=_examples(
        "verify resnet50", "verify resnet18 --dtype bf16 --batch 8", "verify resnet50 --json"
    )
)
def verify(
    model: Model,
    dtype: Dtype = "fp32",
    batch: Annotated[int, typer.Option(help="Images in the batch.")] = 2,
    size: Size = None,
    device: Device = "cpu",
    json_: Json = False,
) -> None:
    """Compare a network and each of its sites with fp64.

    Exits 1 on a mismatch. Weights are random with randomised BatchNorm statistics. The
    reference is torchvision's network, or this package's plain one where torchvision is not
    installed.
    """
    from resnet_fast.verify import verify_model

    _check_device(device)
    _check_images(batch, size)
    with _status(f"{model} {dtype} in fp64, then site by site"):
        result = verify_model(model, dtype, batch, size, device=device)
    if json_:
        _print_json(result.to_dict())
    else:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for heading in ("site", "candidate", "error", "limit", "verdict"):
            table.add_column(heading, justify="right" if heading in ("error", "limit") else "left")
        for check in (*result.sites, result.network):
            verdict = "ok" if check.ok else "MISMATCH"
            table.add_row(
                check.name, check.detail, f"{check.error:.2e}", f"{check.limit:.2e}", verdict
            )
        console = _console()
        console.print(table)
        wrong = sum(not check.ok for check in (*result.sites, result.network))
        console.print(
            f"{model} {dtype} batch {batch} at {result.size}x{result.size} on {device}: "
            f"{len(result.sites)} sites and the output against fp64 of {result.reference}: "
            + ("all within budget" if result.ok else f"{wrong} outside the budget"),
            highlight=False,
        )
    if not result.ok:
        raise typer.Exit(1)


@app.command(
    epilog=_examples(
        "bench resnet50 --batch 1,16",
        "bench resnet18 --peers eager,compile --threads 2 --json out.json",
        "bench resnet50 --dtype bf16 --csv out.csv",
        "bench resnet50 --dtype int8",
    )
)
def bench(
    model: Model,
    batch: Annotated[str, typer.Option(help="Batch sizes, comma separated.")] = "1,8",
    dtype: Annotated[
        str, typer.Option(help="fp32, bf16 or fp16; int8 on the CPU.", callback=_dtype)
    ] = "fp32",
    size: Size = None,
    threads: Annotated[int | None, typer.Option(help="Default: all usable CPUs.")] = None,
    device: Device = "cpu",
    peers: Annotated[
        str, typer.Option(help="Comma separated; on CUDA also eager_graph,compile_max,cudnn_fused.")
    ] = "eager,eager_nhwc,compile,onnxruntime,openvino",
    tuned: Annotated[bool, typer.Option("--tuned", help="Add a row with a tuned plan.")] = False,
    reps: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 10,
    json_: Annotated[Path | None, typer.Option("--json", help="Write rows and machine.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write rows, one line each.")] = None,
) -> None:
    """Time a network against its peers, in turns.

    torchvision's other classification networks (densenet121), and timm's (timm/regnety_004), run
    through accelerate().
    With int8, torchvision's network is quantised after training, by each engine in its own way on
    the same images, and compared with eager in fp32; the error is then the output's distance from
    fp64.
    Each runs in a process of its own. Reports nothing and exits 1 when this package's output
    misses its error budget. A ratio above 1 means that the row is faster than what it is
    compared with.
    """
    from resnet_fast.bench import bench as run_bench
    from resnet_fast.bench.report import notes, save_csv, save_json, table
    from resnet_fast.errors import ArgumentError

    _check_device(device)
    batches = _batches(batch)
    _check_images(min(batches), size)
    if threads is not None and threads < 1:
        raise ArgumentError("threads", "at least 1", str(threads))
    _check_files(json_, csv)
    ours = ("resnet_fast", "resnet_fast_tuned") if tuned else ("resnet_fast",)
    names = [name.strip() for name in peers.split(",") if name.strip()]
    console = _console()
    with _status("starting") as progress:
        result = run_bench(
            model,
            batches=batches,
            dtype=dtype,
            size=size,
            threads=threads,
            device=device,
            engines=tuple(dict.fromkeys((*ours, *names))),
            reps=reps,
            progress=progress,
        )
    result["command"] = "resnet-fast " + " ".join(sys.argv[1:])
    if json_ is not None:
        save_json(result, json_)
    if csv is not None:
        save_csv(result, csv)
    console.print(table(result["rows"]))
    for note in notes(result["rows"]):
        console.print(note, highlight=False, markup=False)
    if any(row.get("within_budget") is False for row in result["rows"]):
        console.print("! this peer's output is outside the error budget", highlight=False)
    facts = result["environment"]
    commit = f" at {facts['commit']}" if facts["commit"] else ""
    console.print(
        f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, "
        f"resnet_fast {facts['resnet_fast']}{commit}, {facts['date']}",
        highlight=False,
    )


class _status:
    """A line on stderr that says what is going on; silent when stderr is not a terminal."""

    def __init__(self, text: str) -> None:
        from rich.console import Console

        self.status = Console(stderr=True).status(text)

    def __enter__(self) -> Any:
        self.status.start()
        return self.status.update

    def __exit__(self, *_: object) -> None:
        self.status.stop()


@app.command(epilog=_examples("demo", "demo --quick"))
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Small inputs, under a minute.")] = False,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one.")] = None,
) -> None:
    """Take the tour: digits, networks against eager, what was fused.

    Handwritten digits through a trained network, ResNet-18 and -50 against eager, and a row for
    each fused site: in under five minutes.
    """
    from resnet_fast.demo import run_demo

    if device is not None:
        _check_device(device)
    if not run_demo(quick=quick, device=device, console=_console()):
        raise typer.Exit(1)


@app.command(epilog=_examples("explain resnet18", "explain resnet50 --batch 8 --json"))
def explain(
    model: Model,
    batch: Annotated[int, typer.Option(help="Images in the batch.")] = 1,
    dtype: Dtype = "fp32",
    size: Size = None,
    device: Device = "cpu",
    json_: Json = False,
) -> None:
    """Show one row a site: what runs there, or why nothing is fused."""
    _check_device(device)
    _check_images(batch, size)
    with _status(f"verifying the sites of {model}"):
        told = explanation(model, batch, dtype, size, device)
    if json_:
        _print_json(told.rows)
    else:
        print_explanation(told, _console())


def explanation(model: str, batch: int, dtype: str, size: int | None, device: str) -> Explanation:
    """Run a network in eval mode, as often as it takes to decide all, and explain it."""
    import torch

    from resnet_fast import verify as verification
    from resnet_fast.fuse.explain import explain as explained

    torch_dtype = verification.dtype_from_name(dtype)
    network = verification.build_model(model).to(device=device, dtype=torch_dtype)
    side = verification.default_size(model) if size is None else size
    x = torch.randn(batch, 3, side, side, device=device).to(torch_dtype)
    with torch.inference_mode():
        for _ in range(2):  # every site is decided, then the layers are recorded
            network(x)
    return explained(network)


def print_explanation(told: Explanation, console: Any) -> None:
    """Print the sites as a table, what their reasons mean, how many are fused, and the calls."""
    rows = told.rows
    table = _rows_table(rows, ("op", "input", "weight", "act"))
    unbounded = console.options.update(max_width=1000)
    narrow = console.measure(table, options=unbounded).maximum > console.width
    console.print(_rows_table(rows, ()) if narrow else table)
    if narrow:
        console.print("op, input, weight and act: in a wider terminal, or by --json")
    for code, meaning in told.meanings.items():
        console.print(f"{code}: {meaning}", highlight=False, markup=False)
    for line in (*told.calls, told.summary):
        console.print(line, highlight=False)


def _rows_table(rows: list[dict[str, Any]], described: tuple[str, ...]) -> Any:
    from rich.table import Table

    timed = any(row.get("microseconds") is not None for row in rows)
    figures = ("error", "limit", *(("us",) if timed else ()), "MB")
    headings = ("site", *described, "candidate", "reason", *figures)
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        justify: Any = "right" if heading in figures else "left"
        table.add_column(heading, justify=justify, no_wrap=True)

    def shape(value: Any) -> str:
        return "x".join(map(str, value)) if value else "-"

    def number(value: Any, form: str) -> str:
        return format(value, form) if isinstance(value, int | float) else "-"

    for row in rows:
        size = row.get("bytes")
        cells = {
            "site": str(row["name"]),
            "op": str(row["op"]),
            "input": shape(row.get("x_shape")),
            "weight": shape(row.get("weight_shape")),
            "act": f"{row['act']}" + (" + residual" if row.get("residual") else ""),
            "candidate": str(row["candidate"]),
            "reason": str(row.get("reason") or "-"),
            "error": number(row.get("error"), ".1e"),
            "limit": number(row.get("limit"), ".1e"),
            "us": number(row.get("microseconds"), ".0f"),
            "MB": number(size / 1e6 if size else None, ".2f"),
        }
        table.add_row(*(cells[heading] for heading in headings))
    return table


@app.command(
    epilog=_examples(
        "traffic resnet50 --batch 128 --dtype fp16",
        "traffic resnet50 --batch 128 --device L4 --plan layers",
        "traffic resnet50 --batch 128 --json - | jq .mb_per_image",
        "traffic resnet50 --batch 128 --plot roofline.svg",
        "traffic resnet50 --batch 128 --train",
    )
)
def traffic(
    model: Model,
    batch: Annotated[int, typer.Option(help="Images in the batch.")] = 1,
    dtype: Dtype = "fp16",
    size: Size = None,
    device: Annotated[str, typer.Option(help="H100, H200, A100, L4 or RTX4090.")] = "H100",
    plan: Annotated[str, typer.Option(help="default, or layers: each site one kernel.")] = (
        "default"
    ),
    json_: Annotated[
        Path | None, typer.Option("--json", help="Write every launch; - prints it instead.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the roofline, .svg or .png; needs matplotlib.")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Count one training step, not an inference.")
    ] = False,
) -> None:
    """Count bytes, FLOPs and launches on a GPU, without one.

    By stage, with the time at the roofline: the larger of bytes over bandwidth and FLOPs over
    peak, launch by launch. Beside it torchvision's eager network, every site as one kernel, and
    the minimum: each residual block as one. MB are 10^6 bytes.

    With --train one step: forward, loss and gradients, without the optimizer, beside torchvision's
    eager network and this package's layer by layer, with what the forward keeps for the backward.
    """
    from resnet_fast import traffic_report as report
    from resnet_fast.bench.report import save_json
    from resnet_fast.errors import ArgumentError
    from resnet_fast.traffic import count
    from resnet_fast.traffic_step import count_step

    _check_images(batch, size)
    printed = json_ == Path("-")
    _check_files(None if printed else json_, plot)
    if train:
        if plot is not None:
            raise ArgumentError("plot", "no plot beside --train", str(plot))
        with _status(f"counting a training step of {model}"):
            step = count_step(model, dtype, batch, size, device, plan)
        _tell_step(step, json_)
        return
    if plot is not None:
        report.check_plot(plot)
    with _status(f"counting the launches of {model}"):
        told = count(model, dtype, batch, size, device, plan)
    if plot is not None:
        report.plot(told, plot)
    if printed:
        _print_json(told.to_dict())
        return
    if json_ is not None:
        save_json(told.to_dict(), json_)
    console = _console()
    console.print(report.heading(told), highlight=False)
    console.print(report.stage_table(told))
    console.print()
    console.print(report.yardstick_table(told))
    for note in report.notes(told):
        console.print(note, highlight=False, markup=False)


def _tell_step(told: StepTraffic, json_: Path | None) -> None:
    from resnet_fast import traffic_step_report as report
    from resnet_fast.bench.report import save_json

    if json_ == Path("-"):
        _print_json(told.to_dict())
        return
    if json_ is not None:
        save_json(told.to_dict(), json_)
    console = _console()
    console.print(report.heading(told), highlight=False)
    for table in (report.stage_table(told), report.op_table(told), report.yardstick_table(told)):
        console.print(table)
        console.print()
    for note in report.notes(told):
        console.print(note, highlight=False, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; errors are one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = typer.main.get_command(app).main(
            args=arguments, prog_name="resnet-fast", standalone_mode=False
        )
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        print("resnet-fast: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        return _report(error)


def _report(error: Exception) -> int:
    from resnet_fast.errors import ArgumentError

    usage = hasattr(error, "format_message")
    message = error.format_message() if usage else str(error)  # type: ignore[attr-defined]
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message, file=sys.stderr)
        return 2
    if type(error).__name__ == "Abort":
        return 130
    line = " ".join(message.split()) or type(error).__name__
    if not usage and not isinstance(error, _expected()):
        line = f"{type(error).__name__}: {line}"
    print(f"resnet-fast: error: {line}", file=sys.stderr)
    return 2 if usage or isinstance(error, ArgumentError) else 1


def _expected() -> tuple[type[Exception], ...]:
    from resnet_fast.errors import ResNetFastError

    return (ResNetFastError,)


if __name__ == "__main__":
    sys.exit(main())

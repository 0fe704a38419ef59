"""`qwen3 doctor`: describes this machine and its MLX build, measures its speed, gives advice."""

import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qwen3_mlx import backend
from qwen3_mlx.checkpoint.hub import unreachable
from qwen3_mlx.checkpoint.local import local_models
from qwen3_mlx.cli.console import note, print_facts, print_table
from qwen3_mlx.cli.option_groups import option
from qwen3_mlx.cli.options import alias_meant, complete_model
from qwen3_mlx.cli.user_files import CHAT_HISTORY, CONVERSATIONS, config_file, data_folder
from qwen3_mlx.cluster.hosts import ClusterOptions
from qwen3_mlx.engine.memory import in_gb
from qwen3_mlx.engine.worker import Worker
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.extras import installed_version
from qwen3_mlx.interrupt import interruptible
from qwen3_mlx.version import __version__

_PACKAGES = ("mlx", "mlx-lm", "huggingface-hub", "tokenizers", "numpy")
_SLOW_CPU = 20e9  # float32 operations per second; MLX's own BLAS does 1.4 to 3 GFLOP/s


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="With --verify or --hosts: a checkpoint to check as well (size, folder or hub "
            "name).",
            callback=alias_meant,
            autocompletion=complete_model,
            show_default=False,
        ),
    ] = None,
    verify: Annotated[
        bool, option("--verify", text="Check whether this machine computes right.")
    ] = False,
    hosts: Annotated[
        str | None,
        option(text="Examine these machines instead: names for ssh, this one first, or local:2."),
    ] = None,
    hostfile: Annotated[
        Path | None, option(text="Take the hosts from a file in the format of mlx.launch.")
    ] = None,
) -> None:
    """Show the device, MLX build, speed, memory limits, versions and all folders, with advice.

    [bold]qwen3 doctor --verify[/bold]   check every operation against the CPU, in a minute.
    [bold]qwen3 doctor --verify 8B[/bold]   check a checkpoint on this machine, too.
    [bold]qwen3 doctor --hosts mac1,mac2 32B[/bold]   see whether both can run a model.

    --verify ends with a block for a report, which tells nothing about you, and
    with exit code 1 if a check failed; --hosts does if a host lacks the model.
    """
    if verify and (hosts or hostfile):
        raise ValueError("--verify checks this machine, and --hosts several; run one at a time")
    if hosts or hostfile:
        _examine(ClusterOptions(hosts, hostfile=hostfile), model)
    elif verify:
        _verify(model)
    elif model:
        raise ValueError(f"--verify or --hosts go with MODEL: qwen3 doctor --verify {model}")
    else:
        _describe()


def _verify(model: str | None) -> None:
    run = import_module("qwen3_mlx.verify.run")  # the whole package, which --help does not need
    with interruptible():  # so that the reference's files are removed
        report = run.verify(model, on_row=lambda row: print(run.line_of(row), flush=True))
    print(f"\nFor a report:\n\n{report}")
    if report.failed:
        raise typer.Exit(1)


def _describe() -> None:
    available = backend.available_memory()
    facts = {"qwen3-mlx": __version__, **backend.describe()}
    if backend.emulates_bfloat16():
        facts["dtype"] += (
            "; this chip has no arithmetic in it, and --dtype auto takes float16 for models whose "
            "layers stay within its range"
        )
    facts |= {name: installed_version(name) or "not installed" for name in _PACKAGES}
    worker = Worker()
    speed, bandwidth = worker.call(lambda: (backend.matmul_speed(), backend.memory_bandwidth()))
    worker.stop()
    facts["matmul"] = f"{speed / 1e9:,.0f} GFLOP/s in {facts['dtype'].partition(';')[0]}"
    facts["bandwidth"] = f"{bandwidth / 1e9:,.1f} GB/s, measured by a matrix-vector product"
    advice = []
    if sys.platform == "darwin":
        facts["wired limit"], wired_advice = _wired_limit()
        advice += wired_advice
    if not backend.on_gpu() and speed < _SLOW_CPU and backend.BLAS.startswith("MLX's own"):
        advice.append(
            "MLX's CPU build is slow without a BLAS: apt install libopenblas0-pthread "
            "(or pip install mkl) makes it many times faster"
        )
    stated = " (QWEN3_MEMORY)" if backend.memory_from_environment() else ""
    facts["memory limit"] = f"{in_gb(backend.memory_limit())}{stated}, {in_gb(available)} now"
    if backend.on_metal():
        facts["free"] = (
            f"{in_gb(backend.free_memory())}; macOS compresses unused memory of programs"
        )
    if not backend.on_gpu():
        largest = backend.memory_limit() // 2 // 4
        facts["dequantize"] = (
            f"quantized models of up to {largest / 1e9:.1f} billion weights run as float32"
        )
    facts |= _storage()
    print_facts(facts)
    Console().print("\n".join(["", *(advice or ["No problems found."])]))


def _examine(options: ClusterOptions, model: str | None) -> None:
    """Print what is known of several machines, which have the same versions, or it fails."""
    examining = import_module("qwen3_mlx.api.preflight")  # MLX, which --help does not need
    reports, link = examining.preflight(options, model)
    print_table(
        ("host", "address", "memory", "round trip", "model"),
        [
            (
                report.name,
                report.address,
                in_gb(report.memory),
                f"{report.round_trip * 1e3:.2f} ms" if report.round_trip else "leads",
                report.checkpoint or "-",
            )
            for report in reports
        ],
    )
    mlx = installed_version("mlx")
    note(f"All have qwen3-mlx {__version__} and MLX {mlx}; the link here is {link}.")
    if any(report.differs for report in reports):
        raise typer.Exit(1)


def _storage() -> dict[str, str]:
    """Return where everything is stored, the room that is left, and whether the hub answers."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).expanduser()
    disk = cache
    while not disk.exists():
        disk = disk.parent
    reason = unreachable()
    files = {
        "settings": config_file(),
        "conversations": data_folder() / CONVERSATIONS,
        "chat history": data_folder() / CHAT_HISTORY,
    }
    return {
        **{name: f"{file}{'' if file.exists() else ' (none yet)'}" for name, file in files.items()},
        "models": _models(),
        "hub's cache": f"{cache}, {in_gb(shutil.disk_usage(disk).free)} free on its disk",
        "hub": constants.ENDPOINT
        + (f" cannot be reached ({reason}): only what is here can be used" if reason else ""),
    }


def _models() -> str:
    try:
        models = local_models()[0]
    except CheckpointError as error:
        return str(error)
    held = in_gb(sum(model.nbytes for model in models))
    return (
        f"{len(models)} here, {held}: qwen3 list" if models else "none here: qwen3 plan, then pull"
    )


def _wired_limit() -> tuple[str, list[str]]:
    """Read macOS's limit on wired GPU memory, in MB; return it as text, with advice.

    0 stands for the default of macOS.
    """
    command = ["/usr/sbin/sysctl", "-n", "iogpu.wired_limit_mb"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if not answer.isdigit():
        return "unknown", []
    if answer == "0":
        return "macOS's default", [
            "A model close to the working set fits better with a higher limit, until the next "
            "restart: sudo sysctl iogpu.wired_limit_mb=N (leave the system 8 GB)"
        ]
    return f"{answer} MB", []

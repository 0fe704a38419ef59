"""The machine: device, dtype, BLAS and memory limits. Only this module asks for them.

Two things happen at import, and no other import has side effects. On Linux a fast BLAS
is loaded, because MLX binds its BLAS symbols when `mlx.core` is first imported. And an exit
handler is registered that waits for what MLX still computes.
"""

import atexit
import ctypes
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import RLock

from qwen3_mlx.errors import Qwen3Error

# MLX's CPU build links to plain `cblas_*` symbols. The private OpenBLAS of numpy and scipy cannot
# be used: its symbols are renamed. The order is by measured speed on x86-64.
_BLAS_LIBRARIES = ("libopenblas.so.0", "libmkl_rt.so.2", "libmkl_rt.so.3", "libblis.so.4")
_OWN_BLAS = "MLX's own"


def _preload_blas() -> str:
    """Load a fast BLAS for MLX's Linux CPU build; return its name, or why MLX's own is used."""
    requested = os.environ.get("QWEN3_BLAS", "")
    if sys.platform != "linux" or requested == "off":
        return _OWN_BLAS if requested != "off" else f"{_OWN_BLAS} (QWEN3_BLAS=off)"
    if "mlx.core" in sys.modules:
        return f"{_OWN_BLAS} (mlx was imported before qwen3_mlx)"
    in_prefix = [str(Path(sys.prefix) / "lib" / name) for name in _BLAS_LIBRARIES]
    for name in [requested] if requested else [*_BLAS_LIBRARIES, *in_prefix]:
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if hasattr(library, "cblas_sgemm"):
            return name
    return f"{_OWN_BLAS} (QWEN3_BLAS={requested} cannot be loaded)" if requested else _OWN_BLAS


BLAS = _preload_blas()

try:
    import mlx.core as mx  # must come after the BLAS is loaded
except ImportError as error:
    raise ImportError(
        f"MLX cannot be loaded ({error}); on Linux it needs a backend: pip install 'mlx[cpu]', or "
        "'mlx[cuda12]' or 'mlx[cuda13]' for an NVIDIA GPU"
    ) from error

_GIB = 1 << 30
_WIRING_ROOM = 64 << 20  # bytes
_CACHE_LIMIT = 2 * _GIB  # freed buffers kept for reuse; MLX's own limit is most of the memory
_SMALL_MAC = 36 * _GIB  # up to this size macOS gives the GPU a smaller share of the memory
_NARROW_COLUMNS = 512  # the smallest published model has 1,024
_spare_streams: deque[mx.Stream] = deque()
_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


def on_gpu() -> bool:
    """Return whether MLX computes on a GPU."""
    return mx.default_device().type == mx.DeviceType.gpu


def on_metal() -> bool:
    """Return whether MLX computes on a Mac's GPU, which shares the memory of all programs."""
    return on_gpu() and mx.metal.is_available()


def on_cuda() -> bool:
    """Return whether MLX computes on an NVIDIA GPU, which has memory of its own."""
    return on_gpu() and not mx.metal.is_available()


def wait_for_work(*streams: "mx.Stream | mx.ThreadLocalStream") -> None:
    """Wait for this thread's work in flight on `streams`, by default on its default stream.

    Does nothing on a GPU. OpenBLAS joins its threads when the process ends; a thread in the middle
    of a product then never returns, and the process hangs.
    """
    if not on_gpu():
        for stream in streams or (None,):
            mx.synchronize(stream)


def acquire_stream() -> mx.Stream:
    """Return a CPU stream for exclusive use until `release_stream`.

    Streams are reused because each has a thread that MLX never ends. With new streams, a process
    that loads and closes models would accumulate threads, and all its computation would slow down.
    """
    try:
        return _spare_streams.pop()
    except IndexError:
        return mx.new_thread_unsafe_stream(mx.cpu)


def release_stream(stream: mx.Stream) -> None:
    """Wait for the work in flight on an acquired stream, and keep the stream for reuse."""
    mx.synchronize(stream)
    _spare_streams.append(stream)


@atexit.register
def _wait_at_exit(process: int = os.getpid()) -> None:
    if os.getpid() == process:  # a forked process lacks MLX's threads: the wait would never end
        wait_for_work()


def compute_dtype(name: str | None = None) -> mx.Dtype:
    """Return the dtype to compute in: `name`, or by default the best of the machine.

    On a GPU the default is bfloat16, in which the checkpoints were trained; Qwen3's feed-forward
    activations can overflow float16. MLX's CPU build emulates both, so there it is float32.

    Raises:
        ValueError: `name` is not bfloat16, float16 or float32.
    """
    if name is None:
        return mx.bfloat16 if on_gpu() else mx.float32
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {name!r}")
    return _DTYPES[name]


def emulates_bfloat16() -> bool:
    """Return whether this is the GPU of an M1 or M2, which has no arithmetic in bfloat16.

    There users measured prefill 20 to 34 % faster in float16, and decoding up to 14 %.
    """
    return on_metal() and re.match("applegpu_g1[34]", architecture()) is not None


def dtype_name(dtype: mx.Dtype) -> str:
    """Return the name of a dtype as config.json has it, such as bfloat16."""
    return str(dtype).removeprefix("mlx.core.")


@cache
def prefers_columns() -> bool:
    """Return whether a matrix times a few columns is faster than rows times the transposed matrix.

    It is with a fast BLAS on a CPU, up to twice on an AMD EPYC, but not with OpenBLAS's routines
    for AVX-512 (0.7 times on a Xeon) and not with MLX's own. On a GPU it makes no difference.
    """
    return not on_gpu() and not BLAS.startswith(_OWN_BLAS) and _blas_core() != b"SkylakeX"


def _blas_core() -> bytes:
    """Return the processor whose routines OpenBLAS has chosen; of other libraries nothing."""
    name_of = getattr(ctypes.CDLL(BLAS), "openblas_get_corename", None)
    if not name_of:
        return b""
    name_of.restype = ctypes.c_char_p
    core: bytes = name_of()
    return core


def total_memory() -> int:
    """Return the bytes of memory of the machine, or of the container if its limit is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def memory_limit() -> int:
    """Return the most bytes that MLX should hold here, regardless of other programs.

    This is QWEN3_MEMORY if it is set, else the working set of a GPU, or all memory.
    """
    return memory_from_environment() or (working_set() if on_gpu() else total_memory())


def memory_from_environment() -> int | None:
    """Return the bytes that QWEN3_MEMORY (in GB) allows this process; None if it is unset.

    Raises:
        ValueError: the variable is not a number of GB.
    """
    value = os.environ.get("QWEN3_MEMORY", "")
    if not value:
        return None
    try:
        size = float(value)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise ValueError(f"QWEN3_MEMORY must be GB, more than 0, not {value!r}")
    return int(size * 1e9)


def working_set() -> int:
    """Return the working set that Metal recommends for this GPU, or all memory of another GPU."""
    info = mx.device_info()
    return int(info.get("max_recommended_working_set_size") or info["total_memory"])


def available_memory() -> int:
    """Return the bytes that MLX can allocate now, beyond the arrays that it holds.

    This is at most the free memory. On a Mac's GPU it follows from the working set alone, because
    macOS compresses the memory that other programs hold and do not use. Free memory does not count
    either where QWEN3_MEMORY sets the limit.
    """
    within_limit = memory_limit() - mx.get_active_memory()
    if on_metal() or memory_from_environment():
        return max(0, within_limit)
    return max(0, min(within_limit, free_memory()))


def working_set_of(memory: int) -> int:
    """Return an estimate of the working set that Metal recommends on a Mac with `memory` bytes.

    macOS decides it by machine and version. Logs that users of llama.cpp published show two thirds
    of 16 and of 32 GB, three quarters of 64 and of 96 GB; on newer systems more: 0.74 of 16 GB,
    0.75 to 0.78 of 36 GB, 0.84 of 128 GB. This function uses the cautious figures.
    """
    return memory * 2 // 3 if memory <= _SMALL_MAC else memory * 3 // 4


def free_memory() -> int:
    """Return the bytes that MLX can allocate without displacing other programs."""
    return _free_memory() + mx.get_cache_memory()


def _free_memory() -> int:
    """Return the bytes that no program uses, or that the system only keeps for reuse."""
    if on_cuda():
        return int(mx.device_info()["free_memory"])
    try:
        if sys.platform == "darwin":
            command = ["/usr/bin/vm_stat"]
            return _free_on_mac(subprocess.run(command, capture_output=True, text=True).stdout)
        free = _number_after("MemAvailable:", Path("/proc/meminfo").read_text()) * 1024
    except (OSError, ValueError):
        return total_memory()
    return min(free, _free_in_container())


def _free_on_mac(vm_stat: str) -> int:
    """Compute the free bytes, including what Activity Monitor calls cached files."""
    pages = ("Pages free:", "Pages purgeable:", "File-backed pages:")
    page_size = _number_after("page size of", vm_stat)
    return page_size * sum(_number_after(name, vm_stat) for name in pages)


def _free_in_container(group: Path = Path("/sys/fs/cgroup")) -> int:
    try:
        used = int((group / "memory.current").read_text())
        kept = _number_after("inactive_file", (group / "memory.stat").read_text())
    except (OSError, ValueError):
        return total_memory()
    return total_memory() - used + kept


def _number_after(name: str, text: str) -> int:
    """Return the number that follows `name` in `text`.

    Raises:
        ValueError: there is none.
    """
    match = re.search(rf"{re.escape(name)}\s*(\d+)", text)
    if not match:
        raise ValueError(f"no {name!r}")
    return int(match[1])


def worth_dequantizing(float32_bytes: int) -> bool:
    """Return whether quantized weights should be held as float32 on this machine.

    True on a CPU if they take at most half of the memory limit: MLX's CPU build multiplies float32
    matrices many times faster than quantized ones.
    """
    return not on_gpu() and float32_bytes <= memory_limit() // 2


def has_fused_attention(itemsize: int) -> bool:
    """Return whether attention over many queries has a fused kernel, for numbers of so many bytes.

    Without one the whole score matrix is held. MLX's CPU build has none, and its CUDA build only
    for bfloat16 and float16.
    """
    return on_metal() or (on_cuda() and itemsize == mx.bfloat16.size)


def prefill_chunk() -> int:
    """Return the number of tokens of a prefill chunk.

    The CPU has no fused attention: its score matrix grows with the chunk.
    """
    return 2048 if on_gpu() else 512


def tune_blas_threads(width: int, processes: int = 1) -> None:
    """Set the number of OpenBLAS threads for matrices of `width` columns: all cores, or one.

    Of all cores, each of `processes` that compute together has its part.

    The threads wait for work by spinning, and with small matrices that costs more than it gains:
    32 streams of the demo run a third faster with one thread. OPENBLAS_NUM_THREADS takes
    precedence.
    """
    if BLAS.startswith(_OWN_BLAS) or "OPENBLAS_NUM_THREADS" in os.environ:
        return
    set_threads = getattr(ctypes.CDLL(BLAS), "openblas_set_num_threads", None)
    if set_threads:
        cores = len(os.sched_getaffinity(0))
        set_threads(1 if width < _NARROW_COLUMNS else max(1, cores // processes))


def limit_buffer_cache() -> None:
    """Limit the freed buffers that MLX keeps for reuse; a growing KV cache frees many."""
    if on_gpu():
        mx.set_cache_limit(min(_CACHE_LIMIT, working_set() // 8))


_wired = 0  # bytes: the weights of all loaded models
_wiring = RLock()  # reentrant: a garbage collection may unwire a model while this thread wires one


def wire(weights: int) -> None:
    """Add `weights` bytes, the weights of one model, to the memory that is not paged out.

    Called once for each model, after its weights are evaluated: wiring more than the models need
    has been tied to kernel panics (ml-explore/mlx#3186). The limit is a little more than the
    weights: MLX fills it with buffers by their allocated size, and leaves out those for which no
    room is left.
    """
    global _wired
    mx.clear_cache()
    with _wiring:
        _wired += weights
        if on_metal():
            mx.set_wired_limit(min(_wired + _WIRING_ROOM, working_set()) if _wired else 0)


def unwire(weights: int) -> None:
    """Remove the bytes that `wire` added for one model, and nothing else."""
    wire(-weights)


def peak_memory() -> int:
    """Return the most bytes that MLX has held at once."""
    return mx.get_peak_memory()


def refuse_fork() -> None:
    """Check that MLX can compute in this process; must be called before its first computation.

    Raises:
        Qwen3Error: the process was forked from one that computes with MLX; a fork lacks MLX's
            threads.
    """
    if _first_process() != os.getpid():
        raise Qwen3Error(
            "this process was forked from one that computes with MLX, whose threads stayed behind; "
            "start it with multiprocessing's spawn method"
        )


@cache
def _first_process() -> int:
    """Return the id of the process that called this first; its forks inherit the cached value."""
    return os.getpid()


def matmul_speed(size: int = 1024) -> float:
    """Compute the float operations a second of a [size, size] product, in the compute dtype."""
    a, b = (mx.random.normal((size, size)).astype(compute_dtype()) for _ in range(2))
    mx.eval(a, b)
    return 2 * size**3 / _min_seconds(lambda: a @ b)


def memory_bandwidth(rows: int = 16384, columns: int = 4096) -> float:
    """Compute the bytes a second that are read in a product of a matrix and one row or column.

    Decoding does such products: its tokens a second times the bytes read for a token are at most
    this.
    """
    matrix = mx.ones((rows, columns), compute_dtype())
    row, column = mx.ones((1, rows), matrix.dtype), mx.ones((columns, 1), matrix.dtype)
    mx.eval(matrix, row, column)
    products = (lambda: row @ matrix, lambda: matrix @ column, lambda: column.T @ matrix.T)
    return matrix.nbytes / min(map(_min_seconds, products))


def _min_seconds(compute: Callable[[], mx.array]) -> float:
    mx.eval(compute())  # warm-up: the first run also sets up the device
    times = []
    for _ in range(3):
        started = time.perf_counter()
        mx.eval(compute())
        times.append(time.perf_counter() - started)
    return min(times)


def device_name() -> str:
    """Return the device's own name, such as Apple M4 Max."""
    return str(mx.device_info().get("device_name", "unknown"))


def architecture() -> str:
    """Return MLX's name for the device, such as applegpu_g16s (an M4 Pro or Max)."""
    return str(mx.device_info().get("architecture", "unknown"))


def describe() -> dict[str, str]:
    """Return a description of the machine: system, device, BLAS, memory and others, by name."""
    facts = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "device": f"{mx.default_device().type.name}: {device_name()}",
        "architecture": architecture(),
        "blas": "Metal" if on_metal() else "CUDA" if on_gpu() else BLAS,
        "memory": f"{total_memory() / 1e9:,.1f} GB",
        "dtype": dtype_name(compute_dtype()),
    }
    if on_metal():
        facts["working set"] = f"{working_set() / 1e9:,.1f} GB recommended by Metal"
    elif on_cuda():
        facts["GPU memory"] = f"{working_set() / 1e9:,.1f} GB, {_free_memory() / 1e9:,.1f} GB free"
    return facts

"""Start-up time: from the start of a process to its first token, with the embedded demo."""

import subprocess
import sys
import time
from importlib.resources import files
from statistics import median

_OURS = """
from qwen3_mlx import load
next(load().stream("What is 1 + 2?"))
print("first", flush=True)
"""
_PEER = """
import sys
from mlx_lm import load, stream_generate
model, tokenizer = load(sys.argv[1])
messages = [{"role": "user", "content": "What is 1 + 2?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
next(stream_generate(model, tokenizer, prompt))
print("first", flush=True)
"""


def startup_times(repeats: int = 5) -> dict[str, float]:
    """Return the seconds from starting Python to the first token: ours and mlx-lm's."""
    scripts = {"ours": _OURS, "peer": _PEER}
    times: dict[str, list[float]] = {side: [] for side in scripts}
    for _ in range(repeats):
        for side, script in scripts.items():
            times[side].append(_to_first_line(script))
    return {side: median(values) for side, values in times.items()}


def _to_first_line(script: str) -> float:
    command = [sys.executable, "-c", script, str(files("qwen3_mlx") / "demo")]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        line = process.stdout.readline()
        elapsed = time.perf_counter() - started
    if line != b"first\n":
        sys.exit("measuring the start failed; is the demo checkpoint there?")
    return elapsed

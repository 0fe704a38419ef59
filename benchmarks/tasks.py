"""Scores of lm-eval's tasks: python -m benchmarks.tasks

The tasks of tests/data/eval by `qwen3 eval tasks`, and by `local-completions` of lm-eval at a
server, beside the scores of its `hf`. Needs a Python with this project's `[server,eval]`, with
`lm-eval[api]` and transformers. The exit status is 1 if scores differ.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.served import serve
from qwen3_mlx.model.sizes import DEMO

_ROOT = Path(__file__).parent.parent
_DATA = _ROOT / "tests" / "data" / "eval"
_TASKS = ("demo_choices", "demo_lines", "demo_raw")
_SHARED = "demo_choices"  # has five examples before each question
_TOLERANCE = 1e-5  # relative

Metrics = dict[str, dict[str, Any]]


def main() -> None:
    """Run all tasks both ways and print the table."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    expected = json.loads((_DATA / "expected.json").read_text("utf-8"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in _DATA.glob("*.yaml"):
            text = file.read_text("utf-8").replace("DATA", str(_DATA))
            (folder / file.name).write_text(text)
        ours, _ = _evaluate(folder, ",".join(_TASKS))
        chat, _ = _evaluate(folder, "demo_chat", "--thinking")
        _, read = _evaluate(folder, _SHARED)
        with serve() as served:
            completions = _completions(folder, f"http://127.0.0.1:{served.port}/v1/completions")
    differ = _print_table(expected, ours | chat, completions)
    print(f"\n{_SHARED}: {read}")
    sys.exit(differ)


def _evaluate(folder: Path, tasks: str, *options: str) -> tuple[Metrics, str]:
    """Return what `qwen3 eval tasks` prints, and the last line of its notes."""
    command = [sys.executable, "-m", "qwen3_mlx", "eval", "tasks", DEMO, "--tasks", tasks]
    command += ["--include", str(folder), "--context", "512", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    metrics: Metrics = json.loads(done.stdout)
    return metrics, done.stderr.splitlines()[-1]


def _completions(folder: Path, url: str) -> Metrics:
    """Return the metrics that lm-eval computes from a server's completions."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model = {"model": "default", "base_url": url, "tokenizer": str(_ROOT / "qwen3_mlx" / "demo")}
    # It takes two tokens off for texts as a whole: this is the window of 512 of the others.
    found = simple_evaluate(
        "local-completions",
        model_args=model | {"max_length": 514},
        tasks=list(_TASKS),
        batch_size=4,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    metrics: Metrics = found["results"]
    return metrics


def _print_table(expected: Any, ours: Metrics, completions: Metrics) -> bool:
    """Print the metrics and return whether one differs from the expected one."""
    differ = False
    print(f"{'':32}{'hf':>16}{'eval tasks':>16}{'completions':>18}")
    for task, found in expected.items():
        for metric, value in found["metrics"].items():
            if "_stderr" in metric:
                continue
            values = [ours[task][metric], completions.get(task, {}).get(metric)]
            cells = ["-" if one is None else f"{one:.6f}" for one in (value, *values)]
            name = f"{task} {metric.partition(',')[0]}"
            print(f"{name:32}{cells[0]:>16}{cells[1]:>16}{cells[2]:>18}")
            stated = [one for one in values if one is not None]
            differ |= any(abs(one - value) > _TOLERANCE * abs(value) for one in stated)
    return differ


if __name__ == "__main__":
    main()

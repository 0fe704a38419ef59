"""Write what lm-eval's own model `hf` answers to the tasks of tests/data/eval.

By hand: `python tests/golden/make_eval.py`, with lm-eval 0.4.13, transformers 5.24.0 and torch
2.13.0 (CPU, float32), after each training of the demo.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "eval"
CLOSE = json.loads((ROOT / "qwen3_mlx/demo/tokenizer.json").read_text())["added_tokens"]


def evaluate(folder: str, tasks: list[str], chat: bool, **options: Any) -> dict[str, Any]:
    """Return the metrics and the answers of each task."""
    model = {"pretrained": str(ROOT / "qwen3_mlx" / "demo"), "dtype": "float32", "device": "cpu"}
    found = simple_evaluate(
        "hf",
        model_args=model | options,
        tasks=tasks,
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        apply_chat_template=chat,
    )
    return {
        task: {
            "metrics": {name: value for name, value in metrics.items() if "," in name},
            "answers": [
                [answer[0] for answer in document["resps"]]
                for document in sorted(found["samples"][task], key=lambda one: one["doc_id"])
            ],
        }
        for task, metrics in found["results"].items()
    }


def main() -> None:
    """Write expected.json."""
    (close,) = (token["id"] for token in CLOSE if token["content"] == "</think>")
    with tempfile.TemporaryDirectory() as folder:
        for file in DATA.glob("*.yaml"):
            (Path(folder) / file.name).write_text(file.read_text().replace("DATA", str(DATA)))
        plain = ["demo_choices", "demo_lines", "demo_raw"]
        expected = evaluate(folder, plain, chat=False, max_length=512)
        thinking = {"enable_thinking": True, "think_end_token": close}
        expected |= evaluate(folder, ["demo_chat"], chat=True, **thinking)
    (DATA / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

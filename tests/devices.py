"""The device of the tests: its dtype, and a GPU that is simulated on the CPU.

Tests compute in float32 on every device, unless they are about the compute dtype.

`QWEN3_TEST_GPU=simulated pytest` has the package take this machine for a Mac with a GPU, in
bfloat16. The arrays are still computed on the CPU, so this shows what the package decides there,
not what kernels do. Tests that cannot pass in bfloat16 are skipped, by name and with the reason.
`QWEN3_TEST_DTYPE=float32` beside it runs those, too.
"""

import os

import mlx.core as mx
import pytest

from qwen3_mlx import backend
from qwen3_mlx.model import compiled

SIMULATED = os.environ.get("QWEN3_TEST_GPU") == "simulated"
_DTYPE = os.environ.get("QWEN3_TEST_DTYPE", "bfloat16" if SIMULATED else "float32")
# Tests that assume float32, by the reason; the names of functions.
_FLOAT32 = {
    "it compares numbers more closely than bfloat16 has digits": (
        "test_logprobs_are_those_of_the_model",
        "test_dequantizing_back",
        "test_held_as_it_is_on_disk_and_dequantized_agree",
        "test_a_document_too_long_is_cut_and_a_query_too_long_refused",
        "test_quantized_weights_without_the_prefix_load",
        "test_scores_are_the_references",
        "test_vectors_and_ids_are_the_references",
        "test_what_is_forced_works_on_any_qwen3",
        "test_a_config_that_leaves_out_what_transformers_has_defaults_for",
        "test_agrees_with_mlx_lm",
        "test_overrides_by_module_and_the_old_spelling",
        "test_quantized_checkpoints_load",
        "test_quantizing_while_loading_is_quantizing_before",
        "test_logits_in_chunks_are_those_at_once",
        "test_choices_are_scored_as_by_the_reference_and_shared_examples_read_once",
        "test_texts_are_cut_into_windows_as_by_the_reference",
        "test_mlx_lm_loads_the_adapter",
        "test_each_line_has_a_vector",
        "test_lines_of_json_from_a_pipe",
        "test_documents_come_in_their_order",
        "test_the_files_of_its_kind_are_fetched_from_the_hub",
        "test_a_chat_model_and_models_of_vectors_and_scores_answer_beside_each_other",
        "test_openais_client_gets_the_references_vectors",
        "test_token_ids_stand_for_the_text_that_they_encode",
        "test_a_query_has_its_prompt",
        "test_ollamas_client",
        "test_documents_are_ranked_the_best_first",
        "test_teis_form_is_told_by_its_texts",
        "test_accumulated_batches_are_one_large_batch_in_less_memory",
    ),
    "it expects what a random network says in float32": (
        "test_calls_in_the_tags_of_qwen3_coder_stream_or_are_cut_off",
    ),
    "MLX's CPU build multiplies experts in float32 only": (
        "test_published_experts_are_stacked",
        "test_experts_are_trained_and_the_router_is_not",
        "test_the_plan_counts_what_is_trained",
    ),
    "it counts bytes of float32, or names that dtype": (
        "test_the_first_logits_are_checked",
        "test_a_new_process_need_not_read_it_again",
        "test_a_damaged_prompt_is_read_anew",
        "test_memory_bounds_the_context",
        "test_logits_keep_to_the_context_and_the_memory",
        "test_the_estimated_memory_is_near_the_peak",
        "test_a_step_that_does_not_fit_is_refused_with_what_would",
    ),
}
_compute_dtype = backend.compute_dtype


def prepare() -> None:
    """Have tests compute in float32 by default, on a GPU as well, and simulate one if asked to."""
    backend.compute_dtype = lambda name=None: _compute_dtype(name or _DTYPE)
    if SIMULATED:
        info: dict[str, str | int] = {
            "device_name": "Apple M4 (simulated)",
            "architecture": "applegpu_g16g",
            "max_recommended_working_set_size": backend.working_set_of(backend.total_memory()),
        }
        mx.device_info = lambda d=None: info
        mx.metal.is_available = lambda: True
        backend.on_gpu = lambda: True
        # On a CPU, MLX starts a C++ compiler for each function that it compiles.
        compiled._MAX_ROWS = 0


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare the device for tests that are about the compute dtype, or about a CPU."""
    if _DTYPE != "float32":
        for reason, names in _FLOAT32.items():
            if request.node.originalname in names:
                pytest.skip(reason)
    if request.node.get_closest_marker("compute_dtype"):
        monkeypatch.setattr(backend, "compute_dtype", _compute_dtype)
    if request.node.get_closest_marker("as_cpu"):
        monkeypatch.setattr(backend, "on_gpu", lambda: False)

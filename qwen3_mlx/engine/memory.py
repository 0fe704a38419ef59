"""Memory planning: computes what a model takes from its config, before weights are downloaded.

    weights + KV cache + prefill activations + reserve

- Weights are exact: every tensor as it is loaded. n weights of b bits in groups of g take
  n·b/8 bytes, and each group a scale and a bias in the compute dtype (mxfp4, mxfp8 and nvfp4: a
  scale of one byte). A tied head is the embedding.
- The KV cache is exact: 2 · layers · key/value heads · head size · bytes, for every token it has
  room for. A byte count of 2 (bfloat16) becomes 1.0625 at 8 bits and 0.5625 at 4; for
  the values beside keys of 4 bits it is 0.625.
- Activations are an estimate of what one chunk of a prompt holds at once. On a GPU: the arrays of
  one layer, times the three layers that its command buffers keep alive (Qwen3-4B, 2,048 tokens:
  0.69 GB by this formula; 0.77 GB is what mlx-lm's published peak of 3.35 GB leaves). On a CPU one
  layer is alive, but attention is unfused: the float32 scores of every head count, and the keys
  repeated for each query head (measured on Qwen3-0.6B: within 5 %).
- The reserve covers what no formula counts: the process, kernels, buffers not yet freed.

While loading, one module's source weights are held beside the finished ones; no cache exists yet.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qwen3_mlx.cache.kv import next_capacity
from qwen3_mlx.cache.quantized import PLAIN, CacheFormat
from qwen3_mlx.model.config import LOGITS, SCORE, ModelConfig
from qwen3_mlx.model.quantization import Format, FormatOf

RESERVE = 500_000_000  # bytes
_LAYERS_IN_FLIGHT = 3  # layers whose activations a GPU's command buffers keep alive
_SCORE_BYTES = 4  # the softmax is float32 in any dtype
MIN_CHUNK = 64  # tokens of a prompt; fewer are not worth reading all weights


@dataclass(frozen=True, slots=True)
class Workload:
    """The work to plan for: one sequence of `context` tokens, prompt and reply together.

    `itemsize` is the bytes of the compute dtype; `chunk` the prompt tokens of one prefill step;
    `fused` is True if attention has a fused kernel, as on a GPU; `bounded` is True if the length of
    the reply is known beforehand (max_tokens), so that the cache is allocated at once and does not
    grow; `draft_token_bytes` is the bytes a token in the draft model's KV cache.
    """

    context: int
    itemsize: int = 2
    cache: CacheFormat = PLAIN
    chunk: int = 2048
    fused: bool = True
    bounded: bool = True
    draft_token_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """The bytes that a workload takes, term by term."""

    weights: int
    cache: int
    activations: int
    reserve: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.cache + self.activations + self.reserve

    @property
    def held(self) -> int:
        """The bytes that stay allocated: weights and cache."""
        return self.weights + self.cache

    def __str__(self) -> str:
        terms = {
            "weights": self.weights,
            "cache": self.cache,
            "activations": self.activations,
            "reserve": self.reserve,
        }
        added = " + ".join(f"{name} {in_gb(size)}" for name, size in terms.items())
        return f"{added} = {in_gb(self.total)}"


def in_gb(size: int) -> str:
    """Return bytes as text in GB (10^9 bytes)."""
    return f"{size / 1e9:,.1f} GB"


def make_plan(config: ModelConfig, weights: int, work: Workload) -> Plan:
    """Create the plan for a model whose weights take `weights` bytes (see `weight_bytes`)."""
    return Plan(weights, cache_bytes(config, work), activation_bytes(config, work), RESERVE)


def largest_context(
    config: ModelConfig, weights: int, work: Workload, available: int, limit: int
) -> int:
    """Return the longest context, up to `limit` tokens, that fits `available` bytes; 0 if none."""

    def fits(context: int) -> bool:
        return make_plan(config, weights, replace(work, context=context)).total <= available

    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True, slots=True)
class Budget:
    """The bytes that caches and activations may take together while the engine runs.

    Tokens are counted as room in caches, used or not: that of all sequences and kept prefixes.
    """

    config: ModelConfig
    work: Workload
    available: int  # bytes, without weights and reserve

    @property
    def context(self) -> int:
        """The longest context, prompt and reply together, that is sure to fit, in tokens."""
        window = self.config.context_window
        work = self._in_min_chunks(window)
        return largest_context(self.config, 0, work, self.available + RESERVE, window)

    @property
    def tokens(self) -> int:
        """The tokens that all caches together may have room for."""
        work = self._in_min_chunks(self.context)
        return max(0, self.available - activation_bytes(self.config, work)) // self.bytes_of(1)

    def __str__(self) -> str:
        work = self._in_min_chunks(self.context)
        cache, activations = cache_bytes(self.config, work), activation_bytes(self.config, work)
        return f"cache {in_gb(cache)} + activations {in_gb(activations)}"

    def min_bytes(self, context: int) -> int:
        """Return the bytes of one request of `context` tokens, read in the smallest chunks."""
        work = self._in_min_chunks(context)
        needed = cache_bytes(self.config, work) + activation_bytes(self.config, work)
        return min(self.available, needed)

    def _in_min_chunks(self, context: int) -> Workload:
        return replace(self.work, chunk=MIN_CHUNK, context=context)

    def bytes_of(self, tokens: int) -> int:
        """Return the bytes of caches with room for so many tokens."""
        return _cache_bytes(self.config, tokens, self.work)

    def chunk(self, position: int, held: int) -> int:
        """Return the chunk size, in tokens, for a prompt of which `position` tokens are computed.

        Caches have room for `held` tokens. The chunk is halved until its activations fit.
        """
        free, chunk = self.available - self.bytes_of(held), self.work.chunk
        while chunk > MIN_CHUNK:
            work = replace(self.work, chunk=chunk, context=position + chunk)
            if activation_bytes(self.config, work) <= free:
                break
            chunk //= 2
        return chunk


@dataclass(frozen=True, slots=True)
class Module:
    """A module with weights: `count` matrices [rows, columns], or a norm, which has no columns."""

    path: str
    rows: int
    columns: int = 0
    count: int = 1
    bias: bool = False

    @property
    def size(self) -> int:
        return self.count * self.rows * (self.columns or 1) + (self.rows if self.bias else 0)

    def nbytes(self, fmt: Format | None, itemsize: int) -> int:
        shape = self.count, self.rows, self.columns
        if fmt is None or not self.columns or not fmt.fits(shape):
            return self.size * itemsize
        return fmt.nbytes(shape, itemsize) + (self.rows * itemsize if self.bias else 0)


def modules(config: ModelConfig) -> Iterator[Module]:
    """Yield the modules that have weights, as model/qwen3.py builds them."""
    hidden, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    yield Module("model.embed_tokens", config.vocab_size, hidden)
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        attention, bias = f"{layer}.self_attn", config.attention_bias
        yield Module(f"{attention}.q_proj", queries, hidden, bias=bias)
        yield Module(f"{attention}.k_proj", keys, hidden, bias=bias)
        yield Module(f"{attention}.v_proj", keys, hidden, bias=bias)
        yield Module(f"{attention}.o_proj", hidden, queries, bias=bias)
        yield Module(f"{attention}.q_norm", head)
        yield Module(f"{attention}.k_norm", head)
        yield Module(f"{layer}.input_layernorm", hidden)
        yield Module(f"{layer}.post_attention_layernorm", hidden)
        experts, block, width, count = config.experts, f"{layer}.mlp", config.intermediate_size, 1
        if experts and experts.in_layer(index):
            yield Module(f"{block}.gate", experts.num_experts, hidden)
            block, width = f"{block}.switch_mlp", experts.moe_intermediate_size
            count = experts.num_experts
        yield Module(f"{block}.gate_proj", width, hidden, count)
        yield Module(f"{block}.up_proj", width, hidden, count)
        yield Module(f"{block}.down_proj", hidden, width, count)
    yield Module("model.norm", hidden)
    if config.has_lm_head:
        yield Module("lm_head", config.vocab_size, hidden)
    if config.output == SCORE:
        yield Module("score", hidden)


def count_weights(config: ModelConfig) -> int:
    """Count the weights of the network."""
    return sum(module.size for module in modules(config))


def weight_bytes(config: ModelConfig, format_of: FormatOf, itemsize: int = 2) -> int:
    """Return the bytes of all tensors; `itemsize` is that of the compute dtype.

    A matrix whose row length is not a multiple of its format's group size stays unquantized.
    """
    return sum(module.nbytes(format_of(module.path), itemsize) for module in modules(config))


def bytes_read_per_token(config: ModelConfig, format_of: FormatOf, work: Workload) -> int:
    """Return the bytes read to decode one token with `work.context` tokens in the cache.

    A mixture of experts counts with the experts of one token; an embedding that is not tied to the
    head counts with one row. The memory bandwidth divided by this is an upper bound of tokens a
    second.
    """
    read = _cache_bytes(config, work.context, work)
    for module in modules(config):
        size = module.nbytes(format_of(module.path), work.itemsize)
        if config.experts and module.count > 1:
            size = size * config.experts.num_experts_per_tok // module.count
        tied_head = config.output == LOGITS and config.tie_word_embeddings
        if module.path == "model.embed_tokens" and not tied_head:
            size //= module.rows
        read += size
    return read


def cache_bytes(config: ModelConfig, work: Workload) -> int:
    """Return the bytes of the KV cache at the end of the workload.

    Where the length of the reply is not known, the cache grows by a quarter at a time, and one
    buffer, of keys or of values in one layer, exists twice while it is copied.
    """
    if work.bounded:
        return _cache_bytes(config, work.context, work)
    grown = _cache_bytes(config, next_capacity(work.context), work)
    return grown + _cache_bytes(config, work.context, work) // (2 * config.num_hidden_layers)


def _cache_bytes(config: ModelConfig, tokens: int, work: Workload) -> int:
    return tokens * (kv_token_bytes(config, work.cache, work.itemsize) + work.draft_token_bytes)


def kv_token_bytes(config: ModelConfig, cache: CacheFormat, itemsize: int) -> int:
    """Return the bytes of a token in the KV cache; `itemsize` is that of the compute dtype."""
    heads = config.num_hidden_layers * config.num_key_value_heads
    return heads * cache.nbytes(config.head_dim, itemsize)


def activation_bytes(config: ModelConfig, work: Workload) -> int:
    """Estimate the most bytes that a chunk of the prompt holds beside weights and cache."""
    tokens = min(work.chunk, work.context)
    layer = tokens * _elements_a_token(config) * work.itemsize
    if work.cache != PLAIN:  # the keys and values of one layer, dequantized
        layer += 2 * config.num_key_value_heads * config.head_dim * work.context * work.itemsize
    if work.fused:
        return _LAYERS_IN_FLIGHT * layer
    heads = config.num_attention_heads
    return layer + heads * work.context * (tokens * _SCORE_BYTES + config.head_dim * work.itemsize)


def with_fitting_chunk(
    config: ModelConfig, work: Workload, fixed: int, free: int
) -> tuple[Workload, int]:
    """Return `work` with its chunk halved until it fits `free` bytes, and the bytes that it takes.

    They are cache, activations and `fixed`; with the smallest chunk they may be more than `free`.
    """
    while True:
        total = fixed + cache_bytes(config, work) + activation_bytes(config, work)
        if total <= free or work.chunk <= MIN_CHUNK:
            return work, total
        work = replace(work, chunk=max(MIN_CHUNK, work.chunk // 2))


def _elements_a_token(config: ModelConfig) -> int:
    """Count the elements that one layer computes for a token: all live until its output."""
    attention = (3 * config.num_attention_heads + 4 * config.num_key_value_heads) * config.head_dim
    if config.experts:  # rows in, gate, up, their product, rows out, for each expert of a token
        experts = config.experts
        row = 3 * config.hidden_size + 3 * experts.moe_intermediate_size
        return 4 * config.hidden_size + attention + experts.num_experts_per_tok * row
    return 4 * config.hidden_size + attention + 3 * config.intermediate_size

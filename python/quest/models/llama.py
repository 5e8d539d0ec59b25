"""A compact Llama: RMSNorm, rotary positions, SwiGLU, untied head, no biases.

    x = embed(tokens)
    x = x + attention(norm(x));  x = x + mlp(norm(x))       once per block
    logits = lm_head(norm(x))

The model is plain torch and knows nothing of quantization: `quest.prepare` swaps its `nn.Linear`s from outside. The
projections that read the same input are fused (`qkv`, `gate_up`), so that a quantizer meets each activation once.
Sizes follow the QuEST paper (arXiv 2502.05003): hidden width = 8/3 of the model width, rounded up to 256.

Shape suffixes: B batch, S new positions, T positions attended to (cached and new), D model width, H query heads,
G key/value heads, E width of a head, F hidden width of the MLP, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama.

    Args:
        vocab_size: rows of the embedding and of the head.
        n_layers: blocks.
        n_heads: query heads; divides `d_model` into heads of even width (rotary turns pairs).
        d_model: width of the residual stream.
        n_kv_heads: key/value heads, a divisor of `n_heads`; None means one per query head.
        d_hidden: width of the MLP; None means 8/3 of `d_model`, rounded up to a multiple of 256.
        norm_eps: added to the mean square in RMSNorm.
        rope_theta: base of the rotary frequencies.
        max_seq_len: the most positions that one forward pass or one cache may hold.

    Raises:
        ValueError: naming the field that does not fit.
    """

    vocab_size: int
    n_layers: int
    n_heads: int
    d_model: int
    n_kv_heads: int | None = None
    d_hidden: int | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 1e4
    max_seq_len: int = 512

    def __post_init__(self) -> None:
        for field in ("vocab_size", "n_layers", "n_heads", "d_model", "n_kv_heads", "d_hidden", "max_seq_len"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"LlamaConfig: {field} must be at least 1, got {value}")
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise ValueError(
                f"LlamaConfig: n_heads must divide d_model into heads of even width, got n_heads={self.n_heads} and "
                f"d_model={self.d_model}; choose n_heads from the divisors of d_model/2"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(f"LlamaConfig: n_kv_heads must divide n_heads={self.n_heads}, got {self.n_kv_heads}")

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        return self.d_model // self.n_heads

    @property
    def hidden_width(self) -> int:
        return math.ceil(8 * self.d_model / 3 / 256) * 256 if self.d_hidden is None else self.d_hidden

    @property
    def non_embedding_parameters(self) -> int:
        """Weights of the blocks and norms: the N of the paper's tables and scaling law (no embedding, no head)."""
        attention = self.d_model * self.head_width * (2 * self.n_heads + 2 * self.kv_heads)
        mlp = 3 * self.d_model * self.hidden_width
        return self.n_layers * (attention + mlp + 2 * self.d_model) + self.d_model


class KVCache:
    """Keys and values of the positions seen so far.

    Args:
        config: the model's shape.
        batch: sequences.
        max_len: positions that fit.

    `keys` and `values` are [n_layers, B, G, max_len, E]; `length` positions of them are filled.
    """

    def __init__(self, config: LlamaConfig, batch: int, max_len: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layers, batch, config.kv_heads, max_len, config.head_width)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def max_len(self) -> int:
        return self.keys.shape[3]

    def extend(self, layer: int, k_BGSE: Tensor, v_BGSE: Tensor) -> tuple[Tensor, Tensor]:
        """Writes new positions behind the filled ones; returns all keys and values up to them, [B, G, T, E] each.

        `length` itself moves on only when every layer has written: see `Llama.forward`.
        """
        end = self.length + k_BGSE.shape[2]
        self.keys[layer, :, :, self.length : end] = k_BGSE
        self.values[layer, :, :, self.length : end] = v_BGSE
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def rotary_table(first: int, count: int, width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine, [count, width/2] float32 each, of positions first … first + count − 1.

    Made anew in each forward pass (it is tiny) instead of kept as a buffer, so that a model built on the meta device
    has nothing to fill but its weights.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    positions = torch.arange(first, first + count, device=device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    return angles.cos(), angles.sin()


def rotate_pairs(x_BHSE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns neighbouring pairs (x₀, x₁), (x₂, x₃), … by the angles of their positions, in float32."""
    even, odd = x_BHSE[..., 0::2].float(), x_BHSE[..., 1::2].float()
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x_BHSE.dtype)


class Attention(nn.Module):
    """Causal self-attention; query heads share key/value heads when there are fewer of the latter."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads = (config.n_heads, config.kv_heads, config.kv_heads)
        self.head_width = config.head_width
        self.qkv = nn.Linear(config.d_model, sum(self.heads) * config.head_width, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        batch, count, _ = x_BSD.shape
        heads = self.qkv(x_BSD).view(batch, count, -1, self.head_width).transpose(1, 2)
        q_BHSE, k_BGSE, v_BGSE = heads.split(self.heads, dim=1)
        q_BHSE = rotate_pairs(q_BHSE, cos, sin)
        k_BGTE, v_BGTE = rotate_pairs(k_BGSE, cos, sin), v_BGSE
        mask_ST = None
        if cache is not None:
            k_BGTE, v_BGTE = cache.extend(self.layer, k_BGTE, v_BGTE)
            k_BGTE, v_BGTE = k_BGTE.to(q_BHSE.dtype), v_BGTE.to(q_BHSE.dtype)
        new, total = q_BHSE.shape[2], k_BGTE.shape[2]
        # is_causal aligns the triangle with the first key: right only when nothing was cached. One new position sees
        # every key. Only a later chunk of a prompt needs a mask of its own.
        if 1 < new < total:
            mask_ST = torch.ones(new, total, dtype=torch.bool, device=x_BSD.device).tril(total - new)
        y_BHSE = F.scaled_dot_product_attention(
            q_BHSE,
            k_BGTE,
            v_BGTE,
            attn_mask=mask_ST,
            is_causal=new == total,
            enable_gqa=self.heads[0] != self.heads[1],
        )
        output: Tensor = self.out(y_BHSE.transpose(1, 2).flatten(2))
        return output


class SiluMul(nn.Module):
    """silu(gate) · up of the two halves of the last dimension. A module, so that inference can put it elsewhere."""

    def forward(self, gate_up_BSF: Tensor) -> Tensor:
        gate_BSF, up_BSF = gate_up_BSF.chunk(2, dim=-1)
        return F.silu(gate_BSF) * up_BSF


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.hidden_width, bias=False)
        self.product = SiluMul()
        self.down = nn.Linear(config.hidden_width, config.d_model, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        output: Tensor = self.down(self.product(self.gate_up(x_BSD)))
        return output


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos, sin, cache)
        output: Tensor = x_BSD + self.mlp(self.mlp_norm(x_BSD))
        return output


class Llama(nn.Module):
    """Llama with logits for every position.

    Args:
        config: the shape.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of deviation 0.02 as in the paper's code; unit norms.

        Projections that add to the residual stream are smaller by √(2·n_layers), so that its variance does not grow
        with depth (GPT-2's rule).
        """
        std = 0.02
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            elif name.endswith(("attention.out.weight", "mlp.down.weight")):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layers))
            else:
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens_BS: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens_BS: int64 token ids.
            cache: positions seen before, which the new ones follow; it is extended in place. Prompts may come in
                chunks of any size.

        Returns:
            [B, S, V] logits, in the dtype of the head's product.

        Raises:
            ValueError: when the positions do not fit `max_seq_len` or the cache.
        """
        first, count = 0 if cache is None else cache.length, tokens_BS.shape[1]
        limit = self.config.max_seq_len if cache is None else cache.max_len
        if first + count > limit:
            raise ValueError(
                f"Llama: {first} cached and {count} new positions exceed the {limit} that "
                f"{'max_seq_len allows' if cache is None else 'the cache holds'}; shorten the input"
            )
        cos, sin = rotary_table(first, count, self.config.head_width, self.config.rope_theta, tokens_BS.device)
        x_BSD = self.embed(tokens_BS)
        for block in self.blocks:
            x_BSD = block(x_BSD, cos, sin, cache)
        if cache is not None:
            cache.length += count
        logits_BSV: Tensor = self.lm_head(self.norm(x_BSD))
        return logits_BSV

    def new_cache(self, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache for `batch` sequences of up to `max_len` positions.

        Raises:
            ValueError: when `max_len` exceeds the model's `max_seq_len`.
        """
        if max_len > self.config.max_seq_len:
            raise ValueError(
                f"Llama.new_cache: max_len must be at most max_seq_len={self.config.max_seq_len}, got {max_len}"
            )
        return KVCache(self.config, batch, max_len, device, dtype)


@dataclass(frozen=True)
class Preset:
    """A model size with the learning rate and the number of training tokens that go with it."""

    n_layers: int
    n_heads: int
    d_model: int
    learning_rate: float
    tokens: int

    def config(self, vocab_size: int, max_seq_len: int = 512) -> LlamaConfig:
        return LlamaConfig(vocab_size, self.n_layers, self.n_heads, self.d_model, max_seq_len=max_seq_len)


# The paper's sizes: learning rates from its code, 100 tokens per non-embedding parameter. `tiny` (1.8 million
# parameters) is ours, for two CPU cores and five minutes; its learning rate continues the table's trend.
PRESETS: dict[str, Preset] = {
    "tiny": Preset(4, 6, 192, 3e-3, 180_000_000),
    "30M": Preset(6, 5, 640, 1.2e-3, 3_000_000_000),
    "50M": Preset(7, 6, 768, 1.2e-3, 5_000_000_000),
    "100M": Preset(8, 8, 1024, 6e-4, 10_000_000_000),
    "200M": Preset(10, 10, 1280, 3e-4, 20_000_000_000),
    "430M": Preset(13, 13, 1664, 1.5e-4, 43_000_000_000),
    "800M": Preset(16, 16, 2048, 7.5e-5, 80_000_000_000),
    "1.6B": Preset(20, 20, 2560, 3.75e-5, 160_000_000_000),
}

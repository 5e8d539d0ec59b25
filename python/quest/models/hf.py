"""Llama models in the Hugging Face layout (config.json + safetensors), read and written without transformers.

Three things differ from `quest.models.llama`:
- q, k, v and gate, up are separate matrices there and stacked here, which quantizes no differently, row by row;
- their rotary turns the pairs (i, i + E/2) of a head of width E, ours neighbours (2i, 2i + 1): the rows of q and k are
  reordered within each head, which changes no logit;
- the head may be tied to the embedding there; here it is always a matrix of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quest import ops
from quest.functional import fake_quantize
from quest.linear import PackedLinear, QuestLinear
from quest.models.files import new_directory, read_json
from quest.models.llama import Llama, LlamaConfig
from quest.models.tokenizer import Tokenizer


def load_hf(directory: str | Path) -> Llama:
    """The Llama of a Hugging Face model directory: one or several safetensors files, tied or untied.

    Returns:
        A float32 `Llama` (what training keeps as master weights) in evaluation mode on the CPU.

    Raises:
        FileNotFoundError: naming the file that is not there.
        ValueError: for a damaged file, an architecture that is not this Llama, missing, extra or misshapen tensors.
    """
    directory = Path(directory)
    config = _config_from_hf(read_json(directory / "config.json"), directory / "config.json")
    tensors = _Tensors(directory)
    with torch.device("meta"):
        model = Llama(config)
    state = {}
    for ours, expected in model.state_dict().items():
        tied = ours == "lm_head.weight" and ours not in tensors.files
        parts = []
        for name, rows in _parts("embed.weight" if tied else ours, expected.shape[0], config).items():
            tensor = tensors.take(name, [rows, *expected.shape[1:]]).float()
            parts.append(_to_pairs(tensor, config.head_width) if name.endswith(_TURNED_BY_ROTARY) else tensor)
        state[ours] = torch.cat(parts)
    tensors.check_all_taken()
    model.load_state_dict(state, assign=True)
    return model.eval()


def save_hf(model: Llama, directory: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes a model as a Llama directory that `transformers` opens; an earlier one is replaced when all is written.

    Quantized layers are written as the real numbers their codes stand for, in the original space. What their inputs are
    rounded to has no place in that format: a model with quantized activations gives other logits there.

    Raises:
        ValueError: when the directory holds something that is not a model.
    """
    config, state = model.config, {}
    for ours, weight in _real_weights(model):
        parts = _parts(ours, weight.shape[0], config)
        for name, part in zip(parts, torch.split(weight, list(parts.values())), strict=True):
            part = _to_halves(part, config.head_width) if name.endswith(_TURNED_BY_ROTARY) else part
            state[name] = part.contiguous().cpu()
    with new_directory(directory) as work:
        save_file(state, work / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(work)
        entries: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "intermediate_size": config.hidden_width,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_width,
            "max_position_embeddings": config.max_seq_len,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
            "bos_token_id": None,
            "eos_token_id": None if tokenizer is None else tokenizer.eos_id,
        }
        (work / "config.json").write_text(json.dumps(entries, indent=2) + "\n")


# ---- names and orders ----

_OUTSIDE = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attention_norm.weight": ["input_layernorm.weight"],
    "attention.qkv.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "attention.out.weight": ["self_attn.o_proj.weight"],
    "mlp_norm.weight": ["post_attention_layernorm.weight"],
    "mlp.gate_up.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.down.weight": ["mlp.down_proj.weight"],
}
_TURNED_BY_ROTARY = ("q_proj.weight", "k_proj.weight")


def _parts(ours: str, rows: int, config: LlamaConfig) -> dict[str, int]:
    """Their tensors that make up our tensor of so many rows, from the top, each with its rows."""
    if ours in _OUTSIDE:
        return {_OUTSIDE[ours]: rows}
    _, layer, name = ours.split(".", 2)
    heads = (config.n_heads, config.kv_heads, config.kv_heads)
    counts = {
        "attention.qkv.weight": [count * config.head_width for count in heads],
        "mlp.gate_up.weight": [config.hidden_width] * 2,
    }.get(name, [rows])
    theirs = (f"model.layers.{layer}.{part}" for part in _IN_BLOCK[name])
    return dict(zip(theirs, counts, strict=True))


def _to_pairs(weight: Tensor, head_width: int) -> Tensor:
    """Rows of each head from the order 0, 1, … of halves to ours, 0, E/2, 1, E/2 + 1, …"""
    return weight.view(-1, 2, head_width // 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _to_halves(weight: Tensor, head_width: int) -> Tensor:
    return weight.view(-1, head_width // 2, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _real_weights(model: Llama) -> Iterator[tuple[str, Tensor]]:
    """Our tensors, quantized ones as the real numbers that they stand for, in the original space."""
    for path, module in model.named_modules():
        if isinstance(module, QuestLinear) and module.weight_quantizer is not None:
            quantizer = replace(module.weight_quantizer, output="original")
            yield f"{path}.weight", fake_quantize(module.weight.detach(), quantizer)
        elif isinstance(module, PackedLinear):
            quantizer, layout = replace(module.weight_quantizer, output="original"), module.plan.w_layout
            codes = (module.weight_codes, module.weight_scale, module.weight_index)
            yield f"{path}.weight", ops.dequantize(*codes, quantizer, layout, module.in_features, torch.float32)
        else:
            for name, parameter in module.named_parameters(path, recurse=False):
                yield name, parameter.detach()


# ---- reading ----


class _Tensors:
    """The tensors of a directory's safetensors files, read one at a time; remembers which were never asked for."""

    def __init__(self, directory: Path):
        single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
        self.directory = directory
        self.files: dict[str, Path]
        if single.is_file():  # before an index, as transformers does
            self.files = dict.fromkeys(self._open(single).keys(), single)
        elif index.is_file():
            self.files = {name: directory / file for name, file in read_json(index).get("weight_map", {}).items()}
        else:
            raise FileNotFoundError(
                f"load_hf: neither {single} nor {index.name} beside it; pickled weights (pytorch_model.bin) must be "
                "saved as safetensors first (model.save_pretrained does)"
            )
        self.untaken = {name for name in self.files if not name.endswith("rotary_emb.inv_freq")}  # old files' constants

    @staticmethod
    def _open(file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except FileNotFoundError:
            raise FileNotFoundError(f"load_hf: {file}, named in the index, is missing") from None
        except SafetensorError as error:
            raise ValueError(f"load_hf: {file} is truncated or not a safetensors file: {error}") from None

    def take(self, name: str, shape: list[int]) -> Tensor:
        if name not in self.files:
            raise ValueError(f"load_hf: {self.directory} lacks the tensor {name!r}")
        self.untaken.discard(name)
        tensor: Tensor = self._open(self.files[name]).get_tensor(name)
        if list(tensor.shape) != shape:
            raise ValueError(
                f"load_hf: {self.files[name]}: {name}: expected {shape} by config.json, got {list(tensor.shape)}"
            )
        return tensor

    def check_all_taken(self) -> None:
        if self.untaken:
            raise ValueError(
                f"load_hf: {self.directory} has a tensor {min(self.untaken)!r} that this Llama has no place for; "
                "only plain Llama models without biases can be imported"
            )


def _config_from_hf(entries: dict[str, Any], file: Path) -> LlamaConfig:
    rope = entries.get("rope_parameters") or entries.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    heads, width = entries.get("num_attention_heads", 0), entries.get("hidden_size", 0)
    must_be = {  # what this Llama does and cannot do otherwise
        "model_type": (entries.get("model_type"), "llama"),
        "hidden_act": (entries.get("hidden_act", "silu"), "silu"),
        "attention_bias": (entries.get("attention_bias", False), False),
        "mlp_bias": (entries.get("mlp_bias", False), False),
        "rope_type": (scaling, "default"),
        "head_dim": ((entries.get("head_dim") or width // max(heads, 1)) * heads, width),
    }
    for key, (got, expected) in must_be.items():
        if got != expected:
            what = "head_dim * num_attention_heads" if key == "head_dim" else key
            raise ValueError(
                f"load_hf: {file}: expected {what} = {expected!r}, got {got!r}; this model cannot be imported"
            )
    try:
        return LlamaConfig(
            vocab_size=entries["vocab_size"],
            n_layers=entries["num_hidden_layers"],
            n_heads=heads,
            d_model=width,
            n_kv_heads=entries.get("num_key_value_heads", heads),
            d_hidden=entries["intermediate_size"],
            norm_eps=entries["rms_norm_eps"],
            rope_theta=rope.get("rope_theta", entries.get("rope_theta", 1e4)),
            max_seq_len=entries["max_position_embeddings"],
        )
    except KeyError as error:
        raise ValueError(f"load_hf: {file} lacks {error}") from None

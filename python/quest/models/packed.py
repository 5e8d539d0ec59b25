"""Packed models: a Llama with low-bit weights as a directory that holds no code and no pickle.

    model.safetensors   <module>.weight_codes, .weight_scale, .weight_code_sum, .weight_index (4:8 only) of every
                        quantized layer, in canonical order; every other parameter by its name. Metadata:
                        format_version and, for each quantized layer, its quantizers and K.
    config.json         the architecture, and a quantization_config block with the same quantizers and the sha256
                        of the weights
    tokenizer.json, …   when the model has a tokenizer

The hash makes a damaged or exchanged file an error instead of a model that talks nonsense.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quest.linear import PackedLinear, QuestLinear
from quest.models.files import new_directory, read_json
from quest.models.llama import Llama, LlamaConfig
from quest.models.tokenizer import Tokenizer
from quest.quantizer import LinearQuantizers, as_quantizer
from quest.surgery import convert

FORMAT_VERSION = 1
_METHOD = "quest"
_MODEL_TYPE = "quest_llama"


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's weights: all in float32, and as they are stored."""

    float32: int
    packed: int

    def __str__(self) -> str:
        ratio = self.float32 / self.packed
        return f"{self.float32 / 1e6:.1f} MB in float32, {self.packed / 1e6:.1f} MB packed ({ratio:.1f} times smaller)"


def model_sizes(model: Llama) -> Sizes:
    """Sizes of a model, converted or not."""
    weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear))
    weights += sum(parameter.numel() for parameter in model.parameters())
    return Sizes(4 * weights, sum(tensor.nbytes for tensor in model.state_dict().values()))


def save_packed(
    model: Llama, directory: str | Path, tokenizer: Tokenizer | None = None, metadata: Mapping[str, str] | None = None
) -> Sizes:
    """Writes a converted model; an earlier one of that name is replaced only when all is written.

    Args:
        model: a `Llama` after `quest.convert`. Layers that were never quantized are stored as they are.
        directory: the model directory to create.
        tokenizer: saved beside the weights.
        metadata: anything worth keeping, such as where the model comes from; stored in config.json under "metadata".

    Raises:
        ValueError: when a layer is not packed yet (`quest.convert`), when the model is fused
            (`quest.infer.fuse_prologues`), or when the directory is something else.
    """
    layers = _quantized_layers(model)
    for name, layer in layers.items():
        if isinstance(layer, QuestLinear) and layer.weight_quantizer is not None:
            raise ValueError(f"save_packed: {name} is not packed yet; call quest.convert(model) first")
        if isinstance(layer, PackedLinear) and layer.prologue is not None:
            raise ValueError(
                f"save_packed: {name}: expected a layer without a prologue, got one with {layer.prologue}, whose names "
                "no file has; save the model before quest.infer.fuse_prologues, or load it anew"
            )
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with new_directory(directory) as work:
        save_file(state, work / "model.safetensors", metadata=_file_metadata(layers))
        if tokenizer is not None:
            tokenizer.save(work)
        config = {
            "model_type": _MODEL_TYPE,
            **asdict(model.config),
            "quantization_config": {
                "quant_method": _METHOD,
                "format_version": FORMAT_VERSION,
                "weights_sha256": _sha256(work / "model.safetensors"),
                "modules": {name: _quantizers(layer) for name, layer in layers.items()},
            },
            "metadata": dict(metadata or {}),
        }
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return model_sizes(model)


def is_packed(directory: str | Path) -> bool:
    """Whether this is a directory that `save_packed` wrote, judged by its config.json alone."""
    file = Path(directory) / "config.json"
    return file.is_file() and read_json(file).get("model_type") == _MODEL_TYPE


def load_packed(directory: str | Path, device: torch.device | str = "cpu") -> Llama:
    """The model of a packed directory, in evaluation mode.

    Raises:
        FileNotFoundError: naming the file that is not there.
        ValueError: for a truncated, damaged or exchanged file, an unknown format_version or quantizer, or tensors that
            do not fit the architecture; the message names the file.
    """
    directory = Path(directory)
    config_file, weights_file = directory / "config.json", directory / "model.safetensors"
    entries = read_json(config_file)
    if entries.get("model_type") != _MODEL_TYPE:
        raise ValueError(
            f"load_packed: {config_file}: expected model_type {_MODEL_TYPE!r}, got {entries.get('model_type')!r}; "
            "a Hugging Face model is brought in by `quest import hf:DIR OUT`"
        )
    block = entries.get("quantization_config")
    version = block.get("format_version") if isinstance(block, dict) else None
    if not isinstance(block, dict) or version != FORMAT_VERSION:
        raise ValueError(
            f"load_packed: {config_file}: expected format_version {FORMAT_VERSION}, got {version!r}; "
            "use the quest that wrote it"
        )
    try:
        names = LlamaConfig.__dataclass_fields__
        with torch.device("meta"):
            model = Llama(LlamaConfig(**{name: entries[name] for name in names}))
        for name, quantizers in block["modules"].items():
            linear = model.get_submodule(name)
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"{name} is a {type(linear).__name__}, not a linear layer")
            chosen = LinearQuantizers(as_quantizer(quantizers["weight"]), as_quantizer(quantizers["activation"]))
            model.set_submodule(name, QuestLinear.from_linear(linear, chosen))
        convert(model)  # on meta: the packed layers wait for their tensors
        expected_hash = block["weights_sha256"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"load_packed: {config_file} does not describe a model: {error}") from None

    state, metadata = _read_weights(weights_file, expected_hash, device)
    expected_metadata = _file_metadata(_quantized_layers(model))
    if metadata != expected_metadata:
        differing = min(key for key, _ in metadata.items() ^ expected_metadata.items())
        raise ValueError(f"load_packed: {weights_file}: its metadata {differing!r} and config.json disagree")
    _check_tensors(state, model.state_dict(), weights_file)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _quantized_layers(model: nn.Module) -> dict[str, QuestLinear | PackedLinear]:
    """By name; a QuestLinear among them after `quest.convert` quantizes its input alone and has a real weight."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuestLinear | PackedLinear)}


def _quantizers(layer: QuestLinear | PackedLinear) -> dict[str, str]:
    return {"weight": str(layer.weight_quantizer or "none"), "activation": str(layer.activation_quantizer or "none")}


def _file_metadata(layers: Mapping[str, QuestLinear | PackedLinear]) -> dict[str, str]:
    """safetensors metadata is a flat dictionary of strings."""
    metadata = {"format_version": str(FORMAT_VERSION)}
    for name, layer in layers.items():
        quantizers = _quantizers(layer)
        metadata[f"{name}.weight_quantizer"] = quantizers["weight"]
        metadata[f"{name}.activation_quantizer"] = quantizers["activation"]
        metadata[f"{name}.k"] = str(layer.in_features)
    return metadata


def _read_weights(
    file: Path, expected_hash: str, device: torch.device | str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not file.is_file():
        raise FileNotFoundError(f"load_packed: no {file}")
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dictionary)
            metadata = tensors.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"load_packed: {file} is truncated or not a safetensors file: {error}") from None
    if _sha256(file) != expected_hash:
        raise ValueError(f"load_packed: {file} is not the file that config.json was written with: damaged or exchanged")
    return state, metadata


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, Any], file: Path) -> None:
    for name in sorted(expected.keys() ^ state.keys()):
        what = "lacks the tensor" if name in expected else "has a tensor that config.json has no place for:"
        raise ValueError(f"load_packed: {file} {what} {name}")
    for name, tensor in state.items():
        want = expected[name]
        real = want.is_floating_point() and tensor.is_floating_point()  # the model's own dtype may be any real one
        if tensor.shape != want.shape or (tensor.dtype != want.dtype and not real):
            raise ValueError(
                f"load_packed: {file}: {name}: expected {want.dtype} {list(want.shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )

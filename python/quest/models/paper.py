"""Reads checkpoints of the QuEST paper's own code (arXiv 2502.05003): `main.pt` and `summary.json` side by side.

`main.pt` is a state dict with the prefix `_orig_mod.module.` that torch.compile and DDP leave; checkpoints written
during training nest the same dict under "model". `summary.json` holds the arguments of the run, the quantizers among
them as class names. Those names spell out the four choices that a `quest.Quantizer` is made of:

    [[Half]Hadamard] [FourEight] [Gaussian | FP4] (STE | Clip | Trust) Quantizer

with Hadamard = rotated and back again, HalfHadamard = left rotated. Learned quantizers (LSQ, PACT) do not compose and
are refused by name. The model has w1 and w2 where we have one `gate_up`: rows of a weight are quantized independently,
so stacking the two changes nothing.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quest.models.llama import Llama, LlamaConfig
from quest.quantizer import QuantConfig, Quantizer
from quest.surgery import prepare

_CLASS_NAME = re.compile(
    r"(?P<rotation>(?:Half)?Hadamard)?(?P<sparsity>FourEight)?(?P<grid>Gaussian|FP4)?(?P<estimator>STE|Clip|Trust)Quantizer"
)
_KEYWORDS = {"bits", "centered", "clip_scale", "trust"}  # what those classes take


def paper_quantizer(name: str, kwargs: Mapping[str, Any] | None = None) -> Quantizer | None:
    """The `Quantizer` that a quantizer class of the paper's code stands for; None for its `NoQuantizer`.

    Args:
        name: the class, such as "HalfHadamardTrustQuantizer".
        kwargs: its arguments: bits (default 4), centered, clip_scale, trust.

    Raises:
        ValueError: naming a class or an argument that has no counterpart.
    """
    if name == "NoQuantizer":
        return None
    match = _CLASS_NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"paper_quantizer: {name!r} is not a rotation, grid, sparsity and estimator composed, so quest has no "
            "counterpart; supported are names such as HalfHadamardTrustQuantizer, FP4ClipQuantizer and NoQuantizer"
        )
    arguments = {"bits": 4, "centered": True, "clip_scale": 1.0, "trust": None} | dict(kwargs or {})
    if unknown := sorted(set(arguments) - _KEYWORDS):
        raise ValueError(f"paper_quantizer: {name} has an argument {unknown[0]!r} that quest has no counterpart for")

    estimator = {"STE": "ste", "Clip": "clip", "Trust": "trust"}[match["estimator"]]
    bits = arguments["bits"]
    if match["grid"]:
        grid = {"Gaussian": "gauss", "FP4": "fp4"}[match["grid"]]
    elif bits == 1.585:  # log2(3): that code's name for three levels
        grid, bits = "ternary", 2
    else:
        grid = "int" if arguments["centered"] else "int_zero"
    # Stated even where it equals our default: their 1-bit clip stops at 1 unless told otherwise, ours at 1.30.
    bound = {"ste": None, "clip": arguments["clip_scale"], "trust": arguments["trust"]}[estimator]
    return Quantizer(
        grid=grid,  # type: ignore[arg-type]
        bits=bits,
        rotation="hadamard" if match["rotation"] else "none",
        sparsity="4:8" if match["sparsity"] else "none",
        estimator=estimator,  # type: ignore[arg-type]
        bound=bound,
        output="original" if match["rotation"] == "Hadamard" else "rotated",
    )


def load_paper_checkpoint(path: str | Path) -> Llama:
    """The model of a checkpoint of the paper's code, with its quantizers in place (`quest.prepare` has been applied).

    Args:
        path: a directory with `main.pt` and `summary.json`, or the `main.pt` itself.

    Returns:
        A float32 `Llama` in evaluation mode on the CPU; `quest.convert` packs it.

    Raises:
        FileNotFoundError: naming the file that is not there.
        ValueError: for a damaged file, a model that is not this Llama, or a quantizer without counterpart.
    """
    path = Path(path)
    weights_file = path / "main.pt" if path.is_dir() else path
    summary_file = weights_file.with_name("summary.json")
    for file in (weights_file, summary_file):
        if not file.is_file():
            raise FileNotFoundError(f"load_paper_checkpoint: no {file}; expected main.pt and summary.json side by side")
    try:
        arguments = json.loads(summary_file.read_text())["args"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"load_paper_checkpoint: {summary_file} is not a JSON object with 'args': {error}") from None
    try:
        state = torch.load(weights_file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"load_paper_checkpoint: {weights_file} is truncated or not a torch checkpoint of plain tensors: {error}"
        ) from None

    config = _llama_config(arguments, summary_file)
    model = Llama(config).eval()
    model.load_state_dict(_rename(state.get("model", state), config, weights_file))
    prepare(model, _quant_config(arguments))
    return model


def _llama_config(arguments: Mapping[str, Any], file: Path) -> LlamaConfig:
    try:
        if arguments["model"] != "llama":
            raise ValueError(f"load_paper_checkpoint: {file}: expected model 'llama', got {arguments['model']!r}")
        width, factor, multiple = arguments["n_embd"], arguments["mlp_dim_exp_factor"], arguments["multiple_of"]
        hidden = int(int(8 * width / 3) * factor)
        return LlamaConfig(
            vocab_size=arguments["vocab_size"],
            n_layers=arguments["n_layer"],
            n_heads=arguments["n_head"],
            d_model=width,
            d_hidden=-(-hidden // multiple) * multiple,
            norm_eps=arguments["rmsnorm_eps"],
            max_seq_len=arguments["sequence_length"],
        )
    except KeyError as error:
        raise ValueError(f"load_paper_checkpoint: {file}: 'args' lacks {error}") from None


def _quant_config(arguments: Mapping[str, Any]) -> QuantConfig:
    weight, activation = (
        paper_quantizer(arguments[f"{side}_quant"], arguments.get(f"{side}_quant_kwargs")) for side in ("w", "a")
    )
    rotated = [q is not None and q.rotation == "hadamard" and q.output == "rotated" for q in (weight, activation)]
    if rotated[0] != rotated[1]:
        raise ValueError(
            f"load_paper_checkpoint: w_quant {arguments['w_quant']} and a_quant {arguments['a_quant']} leave one "
            "operand rotated and the other not, whose product means nothing; expected HalfHadamard… for both or neither"
        )
    return QuantConfig(weight, activation)


def _rename(state: Mapping[str, Tensor], config: LlamaConfig, file: Path) -> dict[str, Tensor]:
    """Our names and fused matrices for theirs; says which tensor is missing, left over or of the wrong shape."""
    theirs = {name.removeprefix("_orig_mod.").removeprefix("module."): tensor for name, tensor in state.items()}
    sources = {"embed": ["transformer.wte"], "norm": ["transformer.ln_f"], "lm_head": ["lm_head"]}
    for i in range(config.n_layers):
        for ours, names in {
            "attention_norm": ["ln_1"],
            "attention.qkv": ["attn.c_attn"],
            "attention.out": ["attn.c_proj"],
            "mlp_norm": ["ln_2"],
            "mlp.gate_up": ["mlp.w1", "mlp.w2"],
            "mlp.down": ["mlp.c_proj"],
        }.items():
            sources[f"blocks.{i}.{ours}"] = [f"transformer.h.{i}.{name}" for name in names]

    try:
        result = {
            f"{ours}.weight": torch.cat([theirs.pop(f"{name}.weight").float() for name in names])
            for ours, names in sources.items()
        }
    except KeyError as error:
        raise ValueError(f"load_paper_checkpoint: {file} lacks the tensor {error}; is it of another model?") from None
    if theirs:
        raise ValueError(f"load_paper_checkpoint: {file} has a tensor {min(theirs)!r} that this Llama has no place for")
    with torch.device("meta"):
        expected = Llama(config).state_dict()
    for name, tensor in result.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"load_paper_checkpoint: {file}: {', '.join(sources[name.removesuffix('.weight')])}: expected shape "
                f"{list(expected[name].shape)} by summary.json, got {list(tensor.shape)}"
            )
    return result

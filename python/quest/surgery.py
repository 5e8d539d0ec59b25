"""prepare and convert: quantized linear layers for a torch model that knows nothing of them, packed when it is trained.

What is quantized is decided from outside, by module name: a model's code is the same with and without quantization.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from quest.linear import PackedLinear, QuestLinear
from quest.quantizer import QuantConfig

Model = TypeVar("Model", bound=nn.Module)


def prepare(model: Model, config: QuantConfig) -> Model:
    """Replaces the nn.Linear layers that `config` chooses by QuestLinear, in place; returns the model.

    Parameters stay the same objects, so an optimizer or a state_dict made before is still right. A module that
    occurs in several places is replaced once, by its first name, in all of them. Subclasses of nn.Linear are left
    alone: their forward may be another. Hooks on a replaced layer do not carry over.
    A model that is itself an nn.Linear cannot be replaced in place: use the returned one.
    Raises ValueError when the config quantizes something but no layer matched, or an override matches no layer.
    Warns when the weight of a replaced layer also serves elsewhere (tied weights): there it stays real.
    """
    layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for pattern in config.overrides:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(f"prepare: override {pattern!r} matches no linear layer{_nearest(pattern, layers)}")
    chosen = {
        id(layers[name]): quantizers for name in layers if (quantizers := config.quantizers_for(name)) is not None
    }
    wanted = config.weight is not None or config.activation is not None
    if wanted and not chosen:
        raise ValueError(
            f"prepare: no nn.Linear matches include={config.include} and not exclude={config.exclude}; "
            f"the model has: {', '.join(layers) or 'none (is it prepared already?)'}"
        )
    _warn_of_tied_weights(model, chosen.keys())
    return _replace(
        model,
        lambda m: QuestLinear.from_linear(m, chosen[id(m)]) if isinstance(m, nn.Linear) and id(m) in chosen else None,
    )


def convert(model: Model) -> Model:
    """Replaces every QuestLinear with a quantized weight by PackedLinear, in place; returns the model, which is then
    for inference.

    Layers that quantize their input alone stay. Works on "meta" too: the packed layers then wait for
    load_state_dict(assign=True).
    A model that is itself a QuestLinear cannot be replaced in place: use the returned one.
    """

    def packed(module: nn.Module) -> nn.Module | None:
        if isinstance(module, QuestLinear) and module.weight_quantizer is not None:
            return PackedLinear.from_linear(module)
        return None

    return _replace(model, packed)


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """Within the block every weight is quantized once, however many forward passes use it: for gradient accumulation.

        with quest.frozen_weights(model):
            for batch in micro_batches:
                loss(model(batch)).backward()
        optimizer.step()                              # outside of the block

    Sharded parameters (DTensor), which are whole only within their layer's forward pass, are still quantized at each
    use.
    Raises RuntimeError at the end of the block if a weight was changed within it.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, QuestLinear)
        and module.weight_quantizer is not None
        and module.frozen_codes is None
        and not hasattr(module.weight, "device_mesh")  # a DTensor, without importing torch.distributed for it
    ]
    versions = [layer.weight._version for layer in layers]
    for layer in layers:
        layer.frozen_codes = layer.weight_codes()
    try:
        yield
    finally:
        for layer in layers:
            layer.frozen_codes = None
    if versions != [layer.weight._version for layer in layers]:
        raise RuntimeError("frozen_weights: a weight changed within the block; step the optimizer after it")


def _replace(model: Model, replacement: Callable[[nn.Module], nn.Module | None]) -> Model:
    """The model with every module that has a replacement replaced, once however often it occurs."""
    if (whole := replacement(model)) is not None:
        return whole  # type: ignore[return-value]
    done: dict[nn.Module, nn.Module | None] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is None:
                continue
            if child not in done:
                done[child] = replacement(child)
            if (new := done[child]) is not None:
                parent._modules[name] = new
    return model


def _warn_of_tied_weights(model: nn.Module, chosen: Collection[int]) -> None:
    owners: dict[int, list[str]] = {}
    quantized: dict[int, str] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}")
            if id(module) in chosen and key == "weight":
                quantized[id(parameter)] = f"{name}.{key}"
    for parameter_id, name in quantized.items():
        others = [other for other in owners[parameter_id] if other != name]
        if others:
            warnings.warn(
                f"prepare: {name} is tied to {', '.join(others)}; each quantized layer quantizes it for itself, and "
                "after convert the packed copy no longer follows the others",
                stacklevel=3,
            )


def _nearest(pattern: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(pattern, list(names), n=1, cutoff=0.0)
    return f"; the nearest is {near[0]!r}" if near else ""

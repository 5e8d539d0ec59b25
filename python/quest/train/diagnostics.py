"""What quantization does to each layer while a model trains (the quantities that arXiv 2502.05003 reports).

Per quantized layer, of its weight:

    masked              share of the weights whose gradient the estimator holds back
    still_masked        of those masked at the last diagnosis, the share that is masked now: near 1, weights are stuck
    quantizer_rmse      ‖ŵ − w‖ / ‖w‖
    gradient_cosine     cosine between the gradient of the quantized model and that of the same model, with the same
                        weights on the same tokens, computed in full precision
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

import quest
from quest import ops
from quest.linear import QuestLinear
from quest.quantizer import Quantizer


class Diagnostics:
    """Measures the quantized layers of `model`; `masks` are those of the last measurement, to compare with: by layer,
    as `quest.ops.quantize` packs them. Whoever resumes a run sets them again."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuestLinear)}
        self.masks: dict[str, Tensor] = {}

    def measure(self, loss: Callable[[], Tensor]) -> dict[str, dict[str, float | None]]:
        """A row for each quantized layer.

        Args:
            loss: computes the model's loss on some tokens, the same at each call.

        Returns:
            layer -> quantity -> value; `still_masked` is None at the first measurement (or where nothing was masked),
            and the three quantities of a quantizer are None for a layer whose weight is not quantized.
        """
        if not self.layers:
            return {}
        quantized = self._gradients(loss)
        with full_precision(self.model):
            exact = self._gradients(loss)
        return {
            name: {
                **self._weight_quantities(name, layer),
                "gradient_cosine": torch.cosine_similarity(quantized[name], exact[name], dim=0).item(),
            }
            for name, layer in self.layers.items()
        }

    def _gradients(self, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
        weights = [layer.weight for layer in self.layers.values()]
        gradients = torch.autograd.grad(loss(), weights)
        return {name: gradient.flatten().float() for name, gradient in zip(self.layers, gradients, strict=True)}

    def _weight_quantities(self, name: str, layer: QuestLinear) -> dict[str, float | None]:
        quantizer = layer.weight_quantizer
        if quantizer is None:
            return {"masked": None, "still_masked": None, "quantizer_rmse": None}
        mask, last = layer.weight_codes().mask, self.masks.get(name)
        self.masks[name] = mask
        masked = _masked(mask, layer)
        before = None if last is None else _masked(last, layer)
        return {
            "masked": masked.float().mean().item(),
            "still_masked": None if before is None else _share(masked & before, before),
            "quantizer_rmse": _relative_error(layer.weight.detach().float(), quantizer),
        }


def _masked(mask: Tensor, layer: QuestLinear) -> Tensor:
    """Bool [out, in]: where the packed mask, whose bits are set where the gradient passes, holds it back."""
    return ops.unpack(mask.unsqueeze(0), "int1", "planes", layer.in_features) == 0


def _share(part: Tensor, whole: Tensor) -> float | None:
    count = whole.sum().item()
    return part.sum().item() / count if count else None


def _relative_error(weight: Tensor, quantizer: Quantizer) -> float:
    difference = quest.fake_quantize(weight, replace(quantizer, output="original")) - weight
    return float(difference.norm() / weight.norm())


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Within the block every QuestLinear of `model` is an nn.Linear with the same parameters."""
    swapped: list[tuple[nn.Module, str, QuestLinear]] = []
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, QuestLinear):
                linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
                linear.weight, linear.bias = layer.weight, layer.bias
                swapped.append((parent, name, layer))
                setattr(parent, name, linear)
    try:
        yield
    finally:
        for parent, name, layer in swapped:
            setattr(parent, name, layer)

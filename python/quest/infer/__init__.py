"""Inference on a trained model, packed or not: text generation, evaluation, and the adapter for lm-eval's tasks."""

from quest.infer.evaluate import Evaluation, evaluate, token_losses
from quest.infer.generate import generate

__all__ = ["Evaluation", "evaluate", "generate", "token_losses"]

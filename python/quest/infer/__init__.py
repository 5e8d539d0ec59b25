"""Inference on a trained model, packed or not: text generation, evaluation, and the adapter for lm-eval's tasks."""

from quest.infer.evaluate import Evaluation, evaluate, evaluate_tokens
from quest.infer.generate import generate
from quest.infer.load import open_model

__all__ = ["Evaluation", "evaluate", "evaluate_tokens", "generate", "open_model"]

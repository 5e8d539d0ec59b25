"""Inference on a trained model, packed or not: text generation, evaluation, and the adapter for lm-eval's tasks."""

from quest.infer.evaluate import Evaluation, evaluate, evaluate_tokens
from quest.infer.fuse import fuse_prologues
from quest.infer.generate import generate
from quest.infer.load import open_model

__all__ = ["Evaluation", "evaluate", "evaluate_tokens", "fuse_prologues", "generate", "open_model"]

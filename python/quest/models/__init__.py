"""Models and the formats they come and go in: our Llama, packed directories, Hugging Face directories, the paper's
checkpoints, tokenizers."""

from quest.models.hf import load_hf, save_hf
from quest.models.llama import PRESETS, KVCache, Llama, LlamaConfig
from quest.models.packed import load_packed, model_sizes, save_packed
from quest.models.paper import load_paper_checkpoint
from quest.models.tokenizer import Tokenizer, train_bpe

__all__ = [
    "PRESETS",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "Tokenizer",
    "load_hf",
    "load_packed",
    "load_paper_checkpoint",
    "model_sizes",
    "save_hf",
    "save_packed",
    "train_bpe",
]

"""Data of a training run: text sources, tokenizer, token cache, split, and batches that resume to the exact sample."""

from quest.train.data.config import DataConfig, DataError
from quest.train.data.module import DataModule, build_data, prepare_tokenizer
from quest.train.data.sources import Corpus

__all__ = ["Corpus", "DataConfig", "DataError", "DataModule", "build_data", "prepare_tokenizer"]

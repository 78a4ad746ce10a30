"""Tokenizers: text to the ids that a model was trained on, ids back to bytes, bytes to text as it streams in.

A token is a string of bytes, which may end inside a UTF-8 character; hence `Tokenizer.token_bytes` and `TextStream`.
"""

from rwkv_edge.tokenizers.base import Tokenizer
from rwkv_edge.tokenizers.bytes import ByteTokenizer
from rwkv_edge.tokenizers.choice import load_tokenizer, save_tokenizer, tokenizer_for_vocabulary
from rwkv_edge.tokenizers.huggingface import HuggingFaceTokenizer
from rwkv_edge.tokenizers.stream import StopText, TextStream
from rwkv_edge.tokenizers.world import WorldTokenizer

__all__ = [
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "StopText",
    "TextStream",
    "Tokenizer",
    "WorldTokenizer",
    "load_tokenizer",
    "save_tokenizer",
    "tokenizer_for_vocabulary",
]

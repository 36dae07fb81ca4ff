"""A tiny real tokenizer: byte-level BPE trained on a few lines."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "def chunk(tokens):",
    "    return tokens[:512]",
    "the quick brown fox jumps over the lazy dog",
    "grüße, 東京",
] * 4


@cache
def tiny_tokenizer(vocab_size: int = 300, eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)

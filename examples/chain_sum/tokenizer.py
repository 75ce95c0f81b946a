"""The base model's tokenizer: one token per printable ASCII character.

Ids: 0 padding, 1 begin of sequence (put before every prompt), 2 end of sequence, 3..97 the characters from space to
tilde, 98 anything else, 99..127 unused but decodable, so that no id the model can emit is nameless.
"""

import json
import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, processors

PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 98
SIZE = 128

CHARACTERS = "".join(chr(code) for code in range(ord(" "), ord("~") + 1))
SPECIAL = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}


def encode(text: str) -> list[int]:
    """Return the ids of printable ASCII text, with nothing before or after."""
    return [3 + CHARACTERS.index(character) for character in text]


def decode(ids: list[int]) -> str:
    """Return the characters of ids; special tokens vanish and unused ids show as U+FFFD."""
    return "".join(CHARACTERS[i - 3] if 3 <= i < UNKNOWN else "\ufffd" for i in ids if i > EOS)


def write_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, as transformers' AutoTokenizer and vLLM read them offline."""
    assert set(CHARACTERS) == set(string.printable) - set("\t\n\r\x0b\x0c")
    vocabulary = SPECIAL | {character: 3 + i for i, character in enumerate(CHARACTERS)} | {"<unk>": UNKNOWN}
    vocabulary |= {f"<unused{i}>": i for i in range(UNKNOWN + 1, SIZE)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 128,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

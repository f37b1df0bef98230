"""Prompts for emoji: what people call a subject, and a style in words; tokenizers that know these words.

A prompt is a subject ("rocket", "a bunny") and perhaps a style ("pizza, 3d"). Words come from `emoji_prompts.txt`, styles
from `STYLE_WORDS`. Of every fifth subject one style is held out, a different one each time: nobody ever trains on it.
Both tokenizers are those of FLUX, byte-pair encoding for CLIP and unigrams for T5, but every word of ours is one token.
"""

import collections
import itertools
import random
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from emoji_images import STYLE_NAMES
from torch import Tensor
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, T5Tokenizer

STYLE_WORDS = {
    "fluent-flat": ("flat style", "flat"),
    "fluent": ("soft style", "soft"),
    "fluent-3d": ("3d style", "3d"),
    "noto": ("noto style", "noto"),
    "noto-v1": ("blob style", "blob"),
    "fxemoji": ("firefox style", "firefox"),
}
CHARACTERS = string.ascii_lowercase + string.digits + ",.-'!?"
CLIP_LENGTH, T5_LENGTH = 16, 12  # tokens
DRAWS = 48  # prompts of a subject in a style that a training knows


def subject_words() -> dict[str, list[str]]:
    """Normalised emoji name -> what people call it, the usual word first."""
    lines = (Path(__file__).parent / "emoji_prompts.txt").read_text().splitlines()
    pairs = (line.split(" = ") for line in lines if line and not line.startswith("#"))
    return {name: words.split(" | ") for name, words in pairs}


def held_out_pairs(subjects: np.ndarray, styles: np.ndarray) -> np.ndarray:
    """Which (subject, style) pairs are never trained on: indices (n,) and (n,) -> (n,) bool."""
    return (subjects % 5 == 0) & (styles == (subjects // 5) % len(STYLE_NAMES))


def random_prompt(words: list[str], style: str | None, draw: random.Random) -> str:
    """One way to ask for a subject, in a style or in any: mostly by its usual word, sometimes with an article."""
    word = words[0] if draw.random() < 0.6 else draw.choice(words)
    if draw.random() < 0.25 and not word.endswith("s"):
        word = f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
    if draw.random() < 0.1:
        word = word[0].upper() + word[1:]
    return word if style is None else f"{word}, {draw.choice(STYLE_WORDS[style])}"


def drawn_prompts(words: Iterable[list[str]], styles: Sequence[str | None], seed: int) -> list[str]:
    """`DRAWS` prompts for every subject in every style (None: in any), one after the other; the same ones for the same seed."""
    draw = random.Random(seed)
    return [random_prompt(names, style, draw) for names in words for style in styles for _ in range(DRAWS)]


def tokens(tokenizer: PreTrainedTokenizerBase, prompts: list[str], length: int) -> Tensor:
    """Token numbers (n, length), as pipelines make them."""
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def phrases() -> list[str]:
    """Everything that prompts for images are put together from."""
    return [phrase for words in [*subject_words().values(), *STYLE_WORDS.values()] for phrase in words]


def vocabulary(phrases: Iterable[str]) -> list[str]:
    """Every word of the phrases and a few small ones, sorted."""
    return sorted({word for phrase in phrases for word in phrase.split()} | {"a", "an", "the", "of", "in", "and", "emoji"})


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding: merge the most frequent neighbours until each word is one piece. Ties go by the alphabet."""
    spelled = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := collections.Counter(pair for pieces in spelled for pair in itertools.pairwise(pieces)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for pieces in spelled:
            for i in reversed([i for i, pair in enumerate(itertools.pairwise(pieces)) if pair == best]):
                if tuple(pieces[i : i + 2]) == best:  # "aaa" holds the pair twice, but only one of them
                    pieces[i : i + 2] = ["".join(best)]
    return merges


def clip_tokenizer(phrases: Iterable[str]) -> CLIPTokenizer:
    """Byte-pair encoding; of words with a hyphen each part is a token, since CLIP splits there."""
    split = CLIPTokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str
    merges = learn_merges(sorted({part for word in vocabulary(phrases) for part, _ in split(word)}))
    pieces = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(f"{c}</w>" for c in CHARACTERS), *map("".join, merges)]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def t5_tokenizer(phrases: Iterable[str]) -> T5Tokenizer:
    """Unigrams: our words, small and capitalised (T5 tells them apart), and single characters for all others."""
    words = vocabulary(phrases)
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    pieces += [(f"▁{word}", -5.0) for word in dict.fromkeys(words + [word[0].upper() + word[1:] for word in words])]
    pieces += [(piece, -10.0) for piece in ("▁", *CHARACTERS, *string.ascii_uppercase)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)

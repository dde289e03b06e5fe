"""Text as word indices: Penn Treebank, any other plain text, or the documentation that comes with Python.

    corpus = load_corpus("data/ptb")              # or another folder; None: Python's language topics
    rows = text_columns(corpus.train, batch=64)   # (rows, 64): 64 parts of the text, one in each column; NumPy
    for start, words in windows(len(rows), bptt=35, seed=0, epoch=3):
        inputs, targets = window(rows, start, words)

The windows of an epoch depend on (seed, epoch) only: a resumed run continues with its next window.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..space.amounts import grouped

Window = tuple[Any, Any]  # inputs and targets, the words that follow them: arrays (T, batch) of any library
PARTS = ("train", "valid", "test")
END, RARE = "<eos>", "<unk>"
# Penn Treebank as prepared by Mikolov (the text belongs to the Linguistic Data Consortium and is not downloaded).
PTB_MD5 = {
    "ptb.train.txt": "f26c4b92c5fdc7b3f8c7cdcb991d8420",
    "ptb.valid.txt": "aa0affc06ff7c36e977d7cd49e3839bf",
    "ptb.test.txt": "8b80168b89c18661a38ef683c0dc3721",
}
SHARES = (0.9, 0.95)  # where a text in one file is split into its three parts


@dataclass(frozen=True)
class Corpus:
    """A text. train, valid, test: indices into `vocabulary`, int64 (words,). fingerprint: a hash of all of it."""

    name: str
    vocabulary: tuple[str, ...]
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    fingerprint: str


def load_corpus(data_dir: str | Path | None = None) -> Corpus:
    """Read a corpus.

    data_dir: a folder (or one with a subfolder `ptb`) with three .txt files that have train, valid and test in their names, or
    with one .txt file, whose last tenth of lines is for validation and test. None: the documentation of Python's language
    topics, with rare words replaced.

    Words are separated by white space; the end of a line is a word of its own, <eos>. The vocabulary contains the words of all
    three parts. Files are UTF-8, with or without a byte order mark, whatever the locale. As in the published loaders a line
    ends at \\n or \\r\\n only: a form feed, U+2028 or a single \\r inside a line is white space. Files of Penn Treebank are
    checked against their published md5 sums.

    Raises:
      FileNotFoundError: the folder is missing, or contains no text.
      ValueError: a damaged file of Penn Treebank; text that is not UTF-8, whose lines end at \\r, or that is too short for
        three parts.
    """
    if data_dir is None:
        return _corpus("python topics", _three(_topics()))
    folder = Path(data_dir)
    if not any(folder.glob("*.txt")) and (folder / "ptb").is_dir():
        folder = folder / "ptb"
    files = [folder] if folder.is_file() else sorted(folder.glob("*.txt"))
    if not files:
        raise FileNotFoundError(
            f"no text in {folder}: --data-dir names a folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt, or with one or"
            " three other .txt files; without --data-dir Python's own documentation is the text"
        )
    if len(files) == 1:
        return _corpus(files[0].name, _three(_lines(files[0])))
    found = {part: [file for file in files if part in file.name] for part in PARTS}
    for part, named in found.items():
        if len(named) != 1:
            there = ", ".join(file.name for file in files)
            raise FileNotFoundError(
                f"{folder} must contain one .txt file with {part!r} in its name, got {len(named)} among {there}"
            )
    name = "ptb" if all(file[0].name in PTB_MD5 for file in found.values()) else folder.name
    return _corpus(name, [_lines(found[part][0]) for part in PARTS])


def _lines(file: Path) -> list[str]:
    content = file.read_bytes()
    md5 = PTB_MD5.get(file.name)
    if md5 and hashlib.md5(content).hexdigest() != md5:
        raise ValueError(
            f"{file} must have the md5 {md5} of Penn Treebank, got {hashlib.md5(content).hexdigest()}: it is damaged"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8 text, but {error}") from None
    if "\r" in text.rstrip() and "\n" not in text:
        raise ValueError(f"{file} must have lines that end at \\n or \\r\\n, got one line with {text.count(chr(13))} \\r in it")
    return _split(text)


def _split(text: str) -> list[str]:
    """The lines of a text; a \\r before the \\n is white space at the end of its line."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def _topics() -> list[str]:
    """The documentation of Python's language topics as lines: lower case, punctuation apart, <unk> for words that occur once."""
    from pydoc_data import topics

    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    lines = [re.findall(r"[a-z_]+|[0-9]+|[^\sa-z0-9_]", line.lower()) for line in _split(text)]
    seen = Counter(word for line in lines for word in line)
    return [" ".join(word if seen[word] > 1 else RARE for word in line) for line in lines if line]


def _three(lines: Sequence[str]) -> list[Sequence[str]]:
    first, second = (int(share * len(lines)) for share in SHARES)
    return [lines[:first], lines[first:second], lines[second:]]


def _corpus(name: str, parts: Sequence[Iterable[str]]) -> Corpus:
    numbers: dict[str, int] = {}
    made = []
    for part, lines in zip(PARTS, parts):
        words = [word for line in lines for word in (*line.split(), END)]
        if len(words) < 2:
            raise ValueError(f"the {part} part of {name} must have at least two words, got {len(words)}")
        made.append(np.array([numbers.setdefault(word, len(numbers)) for word in words], np.int64))
    digest = hashlib.md5("\n".join(numbers).encode())
    for indices in made:
        digest.update(indices.tobytes())
    return Corpus(name, tuple(numbers), *made, fingerprint=digest.hexdigest())


def describe(corpus: Corpus, tokens: int = 0) -> str:
    """The sizes of a text, to be printed. tokens: the number of words of the training text in use; 0: all."""
    words = min(tokens or len(corpus.train), len(corpus.train))
    parts = f"{grouped(words)} words to train on, {grouped(len(corpus.valid))} to validate on"
    return f"{corpus.name}: {parts}, a vocabulary of {grouped(len(corpus.vocabulary))}"


def text_columns(words: np.ndarray, batch: int, name: str = "batch") -> np.ndarray:
    """Cut the text into `batch` parts of equal length, the columns of the result (rows, batch); the remainder is dropped."""
    rows = len(words) // batch
    if batch < 1 or rows < 3:
        raise ValueError(f"{name} must lie in [1, {len(words) // 3}], a third of the {len(words)} words, got {batch}")
    return np.ascontiguousarray(words[: rows * batch].reshape(batch, rows).T)


def windows(rows: int, bptt: int, seed: int, epoch: int, spread: float = 0.0) -> list[tuple[int, int]]:
    """Draw the windows of an epoch, (first row, number of rows) each. Each has at least two rows, and a row that follows.

    A window has `bptt` rows, and with probability 0.05 half as many. spread: where it is not 0, the number of rows is normally
    distributed around that with this standard deviation, and clipped to [5, bptt + 20], as published for trainings.
    """
    draw = np.random.default_rng((seed, epoch))
    found, start = [], 0
    while start < rows - 2:
        usual = bptt if draw.random() < 0.95 else bptt / 2
        words = min(max(5, int(draw.normal(usual, spread))), bptt + 20) if spread else max(2, int(usual))
        found.append((start, min(words, rows - 1 - start)))
        start += words
    return found


def window(rows: Any, start: int, words: int) -> Window:
    """The inputs and targets of a window."""
    return rows[start : start + words], rows[start + 1 : start + 1 + words]


def perplexity(loss: float) -> float:
    """exp(loss); infinite if that overflows."""
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan

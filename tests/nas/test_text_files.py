"""Text files: which bytes are words and line ends, in any locale."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nas.data import text

ROOT = Path(__file__).parents[2]
WORDS = "café naïve 你好 \U0001f600 don\u2019t"
LOAD = "import sys; from nas.data import text; c = text.load_corpus(sys.argv[1]); print(ascii(c.vocabulary), c.fingerprint)"


def written(folder, raw):
    (folder / "mine.txt").write_bytes(raw)
    return text.load_corpus(folder)


def parts(corpus):
    return [getattr(corpus, part).tolist() for part in text.PARTS]


def test_a_byte_order_mark_is_no_part_of_the_first_word(tmp_path):
    plain = written(tmp_path, b"the cat\n" * 40)
    assert written(tmp_path, b"\xef\xbb\xbf" + b"the cat\n" * 40).fingerprint == plain.fingerprint
    for part in text.PARTS:
        (tmp_path / f"{part}.txt").write_bytes(b"\xef\xbb\xbfthe cat\n")
    (tmp_path / "mine.txt").unlink()
    assert text.load_corpus(tmp_path).vocabulary == ("the", "cat", "<eos>")


@pytest.mark.parametrize("separator", ["\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\r"], ids=ascii)
def test_only_a_newline_ends_a_line(tmp_path, separator):
    found = written(tmp_path, f"a b{separator} c\n".encode() * 40)
    assert found.vocabulary == ("a", "b", "c", "<eos>")
    assert parts(found) == parts(written(tmp_path, b"a b c\n" * 40))


def test_line_ends_of_windows_and_a_missing_last_one_change_nothing(tmp_path):
    lines = ["the cat", "", "sat"] * 20
    plain = written(tmp_path, "\n".join(lines).encode())
    assert plain.train.tolist()[:6] == [0, 1, 2, 2, 3, 2]  # an empty line is an <eos>
    for end in ("\n", "\r\n"):
        assert written(tmp_path, "".join(line + end for line in lines).encode()).fingerprint == plain.fingerprint
    with pytest.raises(ValueError, match=r"mine.txt must have lines that end at \\n or \\r\\n, got one line with 60 \\r in it"):
        written(tmp_path, "".join(line + "\r" for line in lines).encode())


@pytest.mark.parametrize("raw", [b"don\x92t stop\n" * 40, "the cat\n".encode("utf-16"), b"\xef\xbb\xbfdon\x92t\n"], ids=ascii)
def test_text_in_another_encoding_is_refused_by_name(tmp_path, raw):
    with pytest.raises(ValueError, match=r"mine.txt must be UTF-8 text, but .* can't decode byte"):
        written(tmp_path, raw)


def test_text_is_the_same_in_the_c_locale(tmp_path):
    found = written(tmp_path, f"{WORDS}\n".encode() * 40)
    assert found.vocabulary == (*WORDS.split(), "<eos>")
    there = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": f"{ROOT / 'examples'}:{ROOT}",
    }
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], env=there, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == found.fingerprint


def test_every_text_file_is_opened_with_an_encoding():
    """The locale's encoding would make a run depend on the machine."""
    places = [ROOT / name for name in ("examples", "benchmarks", "proxopt", "proxopt_torch", "proxopt_jax")]
    for file in (f for place in places for f in place.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and opens_text(node):
                assert any(k.arg == "encoding" for k in node.keywords), f"{file}:{node.lineno}"


def opens_text(call):
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    modes = [a.value for a in (*call.args, *(k.value for k in call.keywords)) if isinstance(a, ast.Constant)]
    owner = getattr(getattr(call.func, "value", None), "id", "")
    if (owner, name) == ("os", "open"):  # a descriptor
        return False
    if name in ("open", "fdopen", "NamedTemporaryFile"):
        return owner not in ("Image", "tarfile", "zipfile") and not any("b" in str(m) for m in modes)
    return name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute)  # not nas.space.files.write_text

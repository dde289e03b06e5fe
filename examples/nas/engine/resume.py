"""settings.json of a run, and the options that stand for one: --resume, --config, --start and --evaluate.

A run writes its settings at its start: all options by name, and what it was started as. The options above name such a file, or
its folder, and are replaced by the options in it before the command line is parsed; options that are given win. So
``nas_cifar10.py --resume --out runs/x`` continues the run in runs/x whatever its method and settings.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..space.files import write_text

NAME = "settings.json"
# what a file has besides options: it describes the run, and follows from the options or from the data
DESCRIPTION = (
    *("command", "seed", "processes", "devices", "architecture", "text", "images_md5", "statistics", "sparse", "out", "resume"),
)
SELECTION = ("framework", "method", "one_stage", "imagenet")  # options that select the settings
DEFAULTS = ("preset", "rule")  # options that set all others
EXECUTION = ("data_dir", "genotype", "device", "threads", "checkpoint_minutes", "workers", "seeds")  # change no result
PRUNING = ("prune_convnet", "prune_transformer")  # commands whose --evaluate takes all settings of its folder
NETWORK = ("genotype", "channels", "layers", "form", "imagenet", "hidden")
EVALUATION = (
    *(*NETWORK, "data", "data_dir", "images", "valid_images", "hold_out", "pixels", "workers", "batch"),
    *("valid_batch", "test_batch", "bptt", "amp", "auxiliary", "device", "threads"),
)


def write_settings(out: Path, settings: Any, **description: Any) -> None:
    """Write settings.json. description: what the settings do not have, such as the command, the method and the seed."""
    options = {name: value for name, value in asdict(settings).items() if name not in ("out", "resume")}
    content = json.dumps({**description, **options}, indent=1, default=str)  # a path is a string
    write_text(out / NAME, content + "\n")


def read_settings(file: Path) -> dict[str, Any]:
    """The content of a settings.json. Raises ValueError if it is something else, FileNotFoundError if it is missing."""
    if file.is_dir():
        file = file / NAME
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {file} of settings") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} must be the settings of a run as JSON, but could not be read: {error}") from None
    if not isinstance(found, dict) or not {"seed", "seeds"} & found.keys():
        raise ValueError(f"{file} must be the settings of a run: an object with the options by name, seeds among them")
    return found


def find_settings(out: Path) -> Path | None:
    """The settings.json of the run in `out`, or of one of its seeds; None if there is none."""
    return next((file for file in (out / NAME, *sorted(out.glob(f"seed-*/{NAME}"))) if file.is_file()), None)


def expand(argv: Sequence[str] | None, command: str, out: str) -> list[str]:
    """The words of a command line, with the options in the files that it names in front.

    Args:
      argv: without the name of the program; None takes ``sys.argv``.
      command: the script, without .py.
      out: its default for --out.

    Raises SystemExit for a file that is no settings.json, is missing, is of another command, or contradicts a given option.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    given = {_name(word) for word in words if word.startswith("--")}
    if "help" in given:
        return words
    try:
        return [*_from_files(words, given, command, Path(_value(words, "out") or out)), *words]
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def resume_command(out: Path, argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command that continues the run in `out`, for a program that was started with these words and environment."""
    several = environment.get("WORLD_SIZE", "1") != "1"
    start = ["torchrun", "--nproc-per-node", environment.get("LOCAL_WORLD_SIZE", "1")] if several else ["python"]
    hosts = [f"--{name}={_value(argv, name)}" for name in ("coordinator", "processes", "process") if _value(argv, name)]
    return shlex.join([*start, argv[0], "--resume", "--out", str(out), *hosts])


def _from_files(words: list[str], given: set[str], command: str, out: Path) -> list[str]:
    """The options that are not given, from the file that one of the options names. Removes --config from the words."""
    if (file := _value(words, "config")) is not None:
        for name in DEFAULTS:
            if name in given:
                raise ValueError(f"--config and --{name} exclude each other: the file has the value of every setting")
        words[:] = _without(words, "config")
        return _options(words, given, _read_options(Path(file), command))
    elsewhere = "out" not in given and {"method", "one_stage"} & given  # whose default folder may be another
    there = find_settings(out) if "resume" in given and not elsewhere else None
    for option, names in (("evaluate", EVALUATION), ("start", NETWORK)):
        # a training that is resumed has its settings already, its start among them
        file = None if option == "start" and there is not None else _value(words, option)
        if file is not None and (Path(file) / NAME).is_file():  # --start may name a file of weights, too
            if command in PRUNING:
                return _options(words, given, _read_options(Path(file), command))
            found = _read_options(Path(file), None)
            if found.get("command") in PRUNING:
                raise ValueError(f"{file} must be the folder of a training for {command}.py, got one of {found['command']}.py")
            if ("text" in found) != command.endswith("ptb"):
                wanted = "text" if command.endswith("ptb") else "images"
                raise ValueError(f"{file} must be the folder of a training on {wanted}, for which {command}.py is")
            found.pop("method", None)
            if found.pop("one_stage", False):  # a search that ends in a training
                found["form"] = "one_stage"
            return _options(words, given, found, names)
    if there is not None:
        found = _read_options(there, command)
        if there.parent == out and "seed" in found:
            found["seeds"] = [found["seed"]]
        return _options(words, given, found, (*EXECUTION, *SELECTION) if given & {*DEFAULTS} else None)
    if "resume" in given and given <= {"resume", "out"} and not _has_checkpoint(out):
        raise FileNotFoundError(f"{out} contains no run to resume: neither {NAME} nor a checkpoint")
    return []


def _has_checkpoint(out: Path) -> bool:
    """Whether a run, or one of several seeds, has written a checkpoint here; earlier releases wrote no settings.json."""
    return any(any(out.glob(f"{seed}{name}")) for seed in ("", "seed-*/") for name in ("checkpoint.pt", "checkpoint"))


def _read_options(file: Path, command: str | None) -> dict[str, Any]:
    """The options in a settings.json, and its seed. command: of which the file must be; None: of any."""
    found = read_settings(file)
    folder = file if file.is_dir() else file.parent
    if command is not None and found.get("command", command) != command:
        raise ValueError(f"{folder / NAME} must be of a run of {command}.py, but is of one of {found['command']}.py")
    method, _, form = str(found.get("method", "")).partition(" ")
    if method:
        found |= {"method": method, "one_stage": form == "one_stage"}
    else:
        found.pop("framework", None)  # trainings have one only
    if "text" in found:
        found.pop("data", None)  # the name of the text
    if found.get("architecture") == "LSTM":
        found["genotype"] = "LSTM"
    elif (folder / "genotype.json").is_file() and ("genotype" in found or command is None):
        found["genotype"] = str(folder / "genotype.json")  # the file that a training was given may be gone
    return found


def _options(
    words: Sequence[str], given: Collection[str], found: dict[str, Any], only: Collection[str] | None = None
) -> list[str]:
    """The options as words, without those that are given. only: the names of the options to take; None: all.

    Raises ValueError if a given option selects other settings.
    """
    for name in SELECTION:
        value = _value(words, name) if name in ("framework", "method") else None
        if value is not None and value != found.get(name, value):
            raise ValueError(f"{name} must be that of the settings to continue with, {found[name]!r}, got {value!r}")
    taken = {name: value for name, value in found.items() if name not in (*DESCRIPTION, *given)}
    return [word for name, value in taken.items() if only is None or name in only for word in _words(name, value)]


def _words(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if name in ("one_stage", "imagenet"):  # they have no opposite
        return [option] if value else []
    if isinstance(value, bool):
        return [option if value else f"--no-{option[2:]}"]
    return [option, *map(str, value)] if isinstance(value, list) else [option, str(value)]


def _name(word: str) -> str:
    """The name of the setting of an option such as --no-amp or --data-dir=data."""
    name = word.partition("=")[0][2:].replace("-", "_")
    return name.removeprefix("no_")


def _value(words: Sequence[str], name: str) -> str | None:
    """The value of an option in ``--name VALUE`` or ``--name=VALUE``; None if it is not there."""
    for i, word in enumerate(words):
        if word.startswith("--") and word.partition("=")[0][2:].replace("-", "_") == name:
            return word.partition("=")[2] if "=" in word else words[i + 1] if i + 1 < len(words) else None
    return None


def _without(words: Sequence[str], name: str) -> list[str]:
    """The words without an option and its value."""
    at = next(i for i, word in enumerate(words) if _name(word) == name and word.startswith("--"))
    return [*words[:at], *words[at + (1 if "=" in words[at] else 2) :]]

"""docs/guides/trainers.md: each example is a complete script, which runs."""

from __future__ import annotations

import functools
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import declare_operators_of_torchvision

# pytest-xdist imports the classes of warnings in its main process, where the libraries of others may not be importable.
pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]

PAGE = Path(__file__).parents[3] / "docs" / "guides" / "trainers.md"
FENCE = re.compile(r"^```\{code-block\} python\n:caption: (\w+)\.py.*?\n\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
EXAMPLES = dict(FENCE.findall(PAGE.read_text(encoding="utf-8")))
DISTRIBUTED = ("train_ddp", "train_fsdp2")


def test_every_block_of_code_is_found():
    assert len(EXAMPLES) == PAGE.read_text(encoding="utf-8").count("```{code-block}") == 6
    assert "```python" not in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in DISTRIBUTED])
def test_an_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    declare_operators_of_torchvision()
    # no compiler is needed to see that the parts fit
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    names = {"__name__": "__main__"}
    exec(compile(EXAMPLES[name], f"{name}.py", "exec"), names)
    small = names["callback"].compacted if "callback" in names else names["small"]
    assert small.parameters[1] < small.parameters[0]


def test_the_examples_for_several_processes_run_on_two(tmp_path):
    """As torchrun starts them, but one after the other in the same processes, whose start takes longer than the examples."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this build of torch has no gloo backend")
    for name in DISTRIBUTED:
        (tmp_path / f"{name}.py").write_text(EXAMPLES[name], encoding="utf-8")
    ports = [free_port() for _ in DISTRIBUTED]  # a group that is made anew must not find the keys of an earlier one
    code = "import os, runpy\n" + "\n".join(
        f"os.environ['MASTER_PORT'] = '{port}'; runpy.run_path('{name}.py', run_name='__main__')"
        for name, port in zip(DISTRIBUTED, ports)
    )
    world = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in ("0", "1"):
        environment = {**os.environ, **world, "RANK": rank, "LOCAL_RANK": rank}
        start = functools.partial(subprocess.Popen, cwd=tmp_path, env=environment, text=True)
        ranks.append(start([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    try:
        printed, errors = zip(*[rank.communicate(timeout=600) for rank in ranks])
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert printed[1] == "" and (tmp_path / "small.pt").exists()
    changes = re.findall(r"parameters: ([\d,]+) -> ([\d,]+)", printed[0])
    assert len(changes) == 2
    assert all(int(after.replace(",", "")) < int(before.replace(",", "")) for before, after in changes)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

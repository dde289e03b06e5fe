"""Smaller networks as ONNX graphs, run by onnxruntime."""

import pytest
import torch
from compact_cases import REMOVED, built

from proxopt_torch import compact

pytestmark = pytest.mark.zoo


@pytest.mark.parametrize("kind", ["encoder", "fused attention", "grouped convolution", "norm without weight"])
def test_a_smaller_network_runs_in_onnxruntime(kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net, example = built(kind)
    small = compact(net, example)
    assert small.removed == REMOVED[kind]
    torch.onnx.export(small.model, (example,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), small.model(example).detach(), rtol=1e-4, atol=1e-5)

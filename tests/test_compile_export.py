"""torch.export and AOTInductor of a decode step with a quantised cache."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

from tests.hf_helpers import prompt, tiny_model  # noqa: E402
from torch_kvq.hf import CACHE_ARGUMENT, KVQCache  # noqa: E402
from torch_kvq.hf_export import DecodeStep, package  # noqa: E402

TOKENS = 24


def make_step(name: str, device: str, **extra) -> DecodeStep:
    model = tiny_model(name, device, **extra)
    cache = KVQCache(model.config, "int8", "int4-rot", max_cache_len=40, rollback_tokens=8)
    return DecodeStep(model, cache)


def decode(step, device: str, prompted: bool = False) -> torch.Tensor:
    """Greedy tokens, the prompt token by token unless the cache has it but for the last one."""
    ids = prompt(length=6)["input_ids"].to(device)
    out = []
    with torch.no_grad():
        for i in range(0 if prompted else 5):
            step(ids[:, i : i + 1].clone())
        last = ids[:, 5:].clone()
        for _ in range(TOKENS):
            last = step(last).argmax(-1, keepdim=True)
            out.append(last)
    return torch.cat(out, dim=1)


def export(step: DecodeStep, device: str, strict: bool) -> torch.export.ExportedProgram:
    with torch.no_grad():
        example = torch.tensor([[1]], device=device)
        return torch.export.export(step, (example,), strict=strict)


@pytest.mark.parametrize(
    "name,strict",
    [
        pytest.param("llama", True, id="llama-strict"),
        pytest.param("gemma3", False, id="gemma3-not_strict"),
        pytest.param("llama", False, id="llama-not_strict", marks=pytest.mark.slow),
        pytest.param("gemma3", True, id="gemma3-strict", marks=pytest.mark.slow),
    ],
)
def test_export_and_load(name, strict, device, tmp_path):
    expected = decode(make_step(name, device), device)
    program = export(make_step(name, device), device, strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("kvq.append_.default") == targets.count("kvq.attention.default") == 2
    torch.export.save(program, tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2")
    assert torch.equal(decode(loaded.module(), device), expected)


def test_an_exported_cache_brings_its_prompt(device, tmp_path):
    results = []
    for exported in (False, True):
        step = make_step("llama", device)
        ids = prompt(length=6)["input_ids"].to(device)
        with torch.no_grad():
            step.model(ids[:, :5], **{CACHE_ARGUMENT: step.kvq_cache}, use_cache=True)
        if exported:
            torch.export.save(export(step, device, strict=False), tmp_path / "step.pt2")
            step = torch.export.load(tmp_path / "step.pt2").module()
        results.append(decode(step, device, prompted=True))
    assert torch.equal(*results)


def test_a_growing_cache_is_refused(device):
    model = tiny_model("llama", device)
    with pytest.raises(ValueError, match=r"\[kvq.hf\] export needs a static cache"):
        DecodeStep(model, KVQCache(model.config))


def test_aot_inductor_package(device, tmp_path):
    """Compiled ahead of time, loaded from Python: its tokens are eager's, its ops are ours."""
    if device != "cpu":
        pytest.skip("inductor generates code for the CPU here")
    extra = {"num_hidden_layers": 1}
    expected = decode(make_step("llama", device, **extra), device)
    program = export(make_step("llama", device, **extra), device, strict=False)
    path = package(program, tmp_path / "step.pt2")
    compiled = torch._inductor.aoti_load_package(path)
    with torch.profiler.profile() as profile:
        assert torch.equal(decode(compiled, device), expected)
    names = {event.key for event in profile.key_averages()}
    assert {"kvq::append_", "kvq::attention"} <= names

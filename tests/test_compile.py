"""torch.compile of a model's forward with a quantised cache: graphs, tokens, no copies."""

from __future__ import annotations

import re

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch._inductor.utils import run_and_get_code  # noqa: E402

from tests.hf_helpers import attention, generate, prompt, tiny_model  # noqa: E402
from torch_kvq.hf import CACHE_ARGUMENT, KVQCache  # noqa: E402

CACHE_OPS = ("kvq.append_", "kvq.attention")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def decode(model, step, cache, count: int, **given) -> torch.Tensor:
    """Greedy tokens after an eager prefill, [1, count]."""
    inputs = prompt(device=model.device)
    given |= {CACHE_ARGUMENT: cache, "use_cache": True}
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], **given).logits
        out = [logits[:, -1:].argmax(-1)]
        while len(out) < count:
            logits = step(input_ids=out[-1], **given).logits
            out.append(logits[:, -1:].argmax(-1))
    return torch.cat(out, dim=1)


def make_cache(model, **options) -> KVQCache:
    return KVQCache(model.config, "int8", "int4-rot", rollback_tokens=8, **options)


def check_graph(graph: torch.fx.Graph, layers: int) -> list[str]:
    """The ops write to the graph's own inputs, which nothing else reads; returns their names."""
    assert not [node for node in graph.nodes if "auto_functionalized" in str(node.target)]
    appends = [node for node in graph.nodes if str(node.target).startswith("kvq.append_")]
    assert len(appends) == layers
    names = []
    for append in appends:
        for packed in append.args[:6]:
            assert packed.op == "placeholder", f"{packed} is a copy of the cache"
            for user in packed.users:
                to_itself = user.args == (packed, packed)  # no code is made for it
                assert str(user.target).startswith(CACHE_OPS) or to_itself, user.format_node()
            names.append(packed.name)
    return names


def check_code(source: str, packed: list[str]) -> None:
    """In the generated code, too, a packed cache goes into the two ops and nowhere else."""
    unpacked = ("= args", "assert_size_stride", "del ")
    source = re.split(r"\ndef (?:get_args|benchmark_compiled_module)", source)[0]
    for name in packed:
        lines = [line for line in source.splitlines() if re.search(rf"\b{name}\b", line)]
        assert any("kvq.append_" in line for line in lines)
        for line in lines:
            assert any(word in line for word in (*unpacked, *CACHE_OPS)), line


def test_static_inductor(device):
    """One graph over 256 steps and across a reset, eager's tokens, no copy of the cache."""
    if device != "cpu":
        pytest.skip("inductor generates code for the CPU here")
    model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=512)
    graphs: list[torch.fx.Graph] = []
    counter = CompileCounterWithBackend("inductor")
    step = torch.compile(model.forward, fullgraph=True, backend=counter)
    with (
        attention(model, "kvq"),
        torch._inductor.config.patch(post_grad_custom_post_pass=graphs.append),
    ):
        expected = decode(model, model.forward, make_cache(model), 258)
        cache = make_cache(model, max_cache_len=300)
        out, sources = run_and_get_code(decode, model, step, cache, 258)
        assert torch.equal(out, expected)
        cache.reset()
        assert torch.equal(decode(model, step, cache, 258), expected)
    assert counter.frame_count == 1
    (graph,) = graphs
    packed = check_graph(graph, layers=1)
    check_code(sources[-1], packed)


@pytest.mark.parametrize("implementation", ["kvq", "sdpa"])
@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "gemma3"])
def test_static_aot_eager(name, implementation, device):
    """Rings and both carriers: one graph from before the ring is full until long after."""
    model = tiny_model(name, device)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model.forward, fullgraph=True, backend=counter)
    with attention(model, implementation):
        expected = decode(model, model.forward, make_cache(model), 40)
        cache = make_cache(model, max_cache_len=64)
        for _ in range(2):
            assert torch.equal(decode(model, step, cache, 40), expected)
            cache.reset()
    assert counter.frame_count == 1


def test_static_left_padding(device):
    """The 2D mask of a padded batch, its length the cache's, compiles to one graph too."""
    model = tiny_model("mistral", device)
    inputs = prompt(rows=3, padded=True, device=device)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 52), value=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.forward, fullgraph=True, backend=counter)
    results = []
    for step in (model.forward, compiled):
        cache = make_cache(model, max_cache_len=64)
        given = {CACHE_ARGUMENT: cache, "use_cache": True, "attention_mask": mask}
        with attention(model, "kvq"), torch.no_grad():
            logits = model(input_ids=inputs["input_ids"], **given).logits
            out = [logits[:, -1:].argmax(-1)]
            while len(out) < 30:
                out.append(step(input_ids=out[-1], **given).logits[:, -1:].argmax(-1))
        results.append(torch.cat(out, dim=1))
    assert torch.equal(*results)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name,most", [("llama", 5), ("mistral", 3)])
def test_growing_cache_has_a_bounded_number_of_graphs(name, most, device):
    """By length and capacity, constant or not, and growing or not; however many tokens follow."""
    model = tiny_model(name, device, num_hidden_layers=1, max_position_embeddings=512)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model.forward, fullgraph=True, backend=counter)
    with attention(model, "kvq"):
        expected = decode(model, model.forward, make_cache(model), 330)
        cache = make_cache(model)
        assert torch.equal(decode(model, step, cache, 330), expected)
        assert counter.frame_count <= most
        cache.reset()
        before = counter.frame_count
        assert torch.equal(decode(model, step, cache, 120), expected[:, :120])
        assert counter.frame_count == before


def test_generate_with_a_compiled_forward(device):
    """As README has it: generate() drives the compiled forward and its tokens do not change."""
    model = tiny_model("llama", device, num_hidden_layers=1)
    inputs = prompt(device=device)
    expected = generate(model, inputs, make_cache(model), "kvq", max_new_tokens=24)
    counter = CompileCounterWithBackend("aot_eager")
    model.forward = torch.compile(model.forward, fullgraph=True, backend=counter)
    cache = make_cache(model, max_cache_len=64)
    assert torch.equal(generate(model, inputs, cache, "kvq", max_new_tokens=24), expected)
    assert counter.frame_count <= 3  # a prefill, and steps with a mask of the first and any length


def test_compiled_steps_past_the_capacity(device):
    """Of a hybrid model: its ring, which comes first, does not run ahead of the full layer."""
    model = tiny_model("gemma3", device)
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with attention(model, "kvq"):
        cache, full = (make_cache(model, max_cache_len=20) for _ in range(2))
        decode(model, model.forward, full, 9)
        decode(model, step, cache, 9)
        given = {CACHE_ARGUMENT: cache, "use_cache": True}
        token = torch.tensor([[5]], device=device)
        with torch.no_grad():
            if device == "cpu":
                with pytest.raises(IndexError, match=r"\[kvq.append_\] position"):
                    step(input_ids=token, **given)
            else:
                step(input_ids=token, **given)
                with pytest.raises(IndexError, match="compiled steps went on to 21 tokens"):
                    model(input_ids=token, **given)
                cache.crop(-1)
    for ours, other in zip(cache.layers, full.layers, strict=True):
        assert ours.cache.length == other.cache.length == 20
        for side in "kv":
            held = [layer.cache.dense(side, 12, 8) for layer in (ours, other)]
            assert torch.equal(*held)

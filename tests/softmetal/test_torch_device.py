"""Torch on the software mps device behaves as torch on a Mac's does."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional

from . import python_environment

pytestmark = pytest.mark.usefixtures("soft")

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
]


def same(on_device: torch.Tensor, on_host: torch.Tensor) -> bool:
    assert on_device.device.type == "mps"
    return torch.equal(on_device.cpu(), on_host)


def test_is_available_and_named() -> None:
    assert torch.backends.mps.is_available()
    assert torch.backends.mps.is_built()
    assert torch.backends.mps.get_name() == "Software Metal"
    assert torch.backends.mps.is_macos_or_newer(14, 0)
    assert torch.mps.device_count() == 1
    assert torch.device("mps") == torch.zeros(1, device="mps").device.__class__("mps")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(dtype: torch.dtype) -> None:
    host = torch.arange(-6, 6).to(dtype).view(3, 4)
    device = host.to("mps")
    assert same(device, host)
    assert same(torch.zeros(3, dtype=dtype, device="mps"), torch.zeros(3, dtype=dtype))
    assert same(device.to(torch.float32), host.to(torch.float32))


def test_install_after_torch_was_asked_for_mps() -> None:
    script = (
        "import torch\nassert not torch.backends.mps.is_available()\n"
        f"from {__package__} import install\ninstall(product=False)\n"
        "assert torch.backends.mps.is_available()\n"
        "assert torch.ones(2, device='mps').sum().item() == 2\n"
    )
    subprocess.run([sys.executable, "-c", script], env=python_environment(), check=True)


def test_a_fault_nobody_waits_for_fails_the_process(demo: ModuleType) -> None:
    script = (
        f"import torch\nfrom {__package__} import demo, install\ninstall(product=False)\n"
        "ops = demo.load()\nx = torch.ones(4, device='mps')\n"
        "ops.launch(x, 'sum', 'demo_partial_sum', [16384, 1, 1], [256, 1, 1], [1024], 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=python_environment(), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "[softmetal] kernel demo_partial_sum: " in done.stderr


def test_factories() -> None:
    assert torch.empty(3, device="mps").shape == (3,)
    assert torch.empty(0, 5, device="mps").numel() == 0
    assert same(torch.arange(5, device="mps"), torch.arange(5))
    assert same(torch.full((2,), 3.5, device="mps"), torch.full((2,), 3.5))
    assert same(torch.tensor([[1, 2]], device="mps"), torch.tensor([[1, 2]]))


def test_views_share_memory() -> None:
    host = torch.randn(2, 3, 4)
    device = host.to("mps")
    for view in (
        lambda t: t[:, 1:],
        lambda t: t.transpose(1, 2),
        lambda t: t.view(6, 4),
        lambda t: t.select(1, 2),
        lambda t: t[:, None].expand(2, 5, 3, 4),
        lambda t: t.unfold(2, 2, 1),
        lambda t: t.view(torch.int32),
        lambda t: t.permute(2, 0, 1),
        lambda t: t.chunk(2, -1)[1],
    ):
        assert same(view(device).contiguous(), view(host).contiguous())
    device[0, 1:].mul_(2)
    host[0, 1:].mul_(2)
    device[:, :, 0] = 7
    host[:, :, 0] = 7
    assert same(device, host)


def test_aten_ops_match_the_cpu() -> None:
    a, b = torch.randn(4, 5), torch.randn(5, 6)
    x, y = a.to("mps"), b.to("mps")
    torch.testing.assert_close((x @ y).cpu(), a @ b)
    torch.testing.assert_close(torch.softmax(x, -1).cpu(), torch.softmax(a, -1))
    assert same(torch.cat([x, x]), torch.cat([a, a]))
    assert same(x[:, [0, 2]], a[:, [0, 2]])
    assert same(torch.where(x > 0, x, 0), torch.where(a > 0, a, 0))
    assert x.sum().item() == a.sum().item()
    index = torch.tensor([3, 1])
    assert same(x.index_select(0, index.to("mps")), a.index_select(0, index))
    assert same(
        x.index_copy(0, index.to("mps"), x[:2]),
        a.index_copy(0, index, a[:2]),
    )
    grown = torch.empty(0, device="mps")
    torch.add(x, 1, out=grown)
    assert same(grown, a + 1)


def test_autograd_and_modules() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.LayerNorm(8))
    x = torch.randn(3, 4)
    module(x).square().sum().backward()
    expected = module[0].weight.grad.clone()
    module.zero_grad()
    module.to("mps")
    module(x.to("mps")).square().sum().backward()
    torch.testing.assert_close(module[0].weight.grad.cpu(), expected)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float", "hidden row"])
def test_scaled_dot_product_attention(mask: str, gradient: bool) -> None:
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    given = None
    if mask in ("bool", "hidden row"):
        given = torch.rand(2, 1, 5, 7) > 0.4
        given[..., 0] = True
        if mask == "hidden row":
            given[0, 0, 2] = False
    elif mask == "float":
        given = torch.randn(5, 7)

    def attend(query: torch.Tensor, key: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            query, key, key, given, is_causal=mask == "causal", enable_gqa=True, scale=0.3
        )

    x = query.to("mps").requires_grad_(gradient)
    found = attend(x, key.to("mps"), None if given is None else given.to("mps"))
    torch.testing.assert_close(found.cpu(), attend(query, key, given))
    if gradient:
        found.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape


def test_refusals() -> None:
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(3, dtype=torch.float64).to("mps")
    with pytest.raises(TypeError, match="numpy"):
        torch.zeros(3, device="mps").numpy()
    with pytest.raises(RuntimeError, match="same device"):
        torch.zeros(2, device="mps") + torch.zeros(2)


def test_save_load_and_copy() -> None:
    host = torch.randn(5)
    device = host.to("mps")[1:4]
    assert same(copy.deepcopy(device), host[1:4])
    file = io.BytesIO()
    torch.save(device, file)
    file.seek(0)
    assert same(torch.load(file), host[1:4])


def test_torch_mps_module() -> None:
    torch.mps.synchronize()
    torch.mps.empty_cache()
    before = torch.mps.current_allocated_memory()
    held = torch.empty(1000, device="mps")
    assert torch.mps.current_allocated_memory() - before == 4000
    assert torch.mps.driver_allocated_memory() >= 4000
    assert torch.mps.recommended_max_memory() > 0
    del held
    assert torch.mps.current_allocated_memory() == before
    torch.mps.manual_seed(3)
    first = torch.randn(3, device="mps").cpu()
    torch.mps.manual_seed(3)
    assert same(torch.randn(3, device="mps"), first)
    generator = torch.Generator(device="mps").manual_seed(1)
    assert torch.randn(2, device="mps", generator=generator).shape == (2,)
    start, end = torch.mps.Event(enable_timing=True), torch.mps.Event(enable_timing=True)
    start.record()
    end.record()
    assert start.elapsed_time(end) >= 0 and end.query()


def test_torch_event() -> None:
    start, end = (torch.Event(device="mps", enable_timing=True) for _ in range(2))
    start.record()
    torch.ones(3, device="mps").mul_(2)
    end.record()
    end.synchronize()
    assert end.query() and start.elapsed_time(end) >= 0


def test_memory_limit() -> None:
    torch.mps.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(RuntimeError, match="MPS backend out of memory"):
            torch.empty(1 << 20, device="mps")
    finally:
        torch.mps.set_per_process_memory_fraction(0.0)


def test_more_than_two_gigabytes_are_virtual() -> None:
    held = torch.empty((5 << 30) // 2, dtype=torch.uint8, device="mps")
    held[-1] = 7
    assert held[-1].item() == 7


def test_an_op_of_ours_never_falls_back(demo: ModuleType) -> None:
    library = torch.library.Library("kvq_demo", "IMPL")
    library.impl("only_schema", lambda x: x.clone(), "CPU")
    assert demo.only_schema(torch.ones(2)).sum() == 2
    with pytest.raises(NotImplementedError, match=r"kvq_demo::only_schema.*MPS"):
        demo.only_schema(torch.ones(2, device="mps"))


def test_op_is_not_run_for_a_cpu_tensor(demo: ModuleType) -> None:
    with pytest.raises(NotImplementedError, match="CPU"):
        demo.scale(torch.ones(2), 1.0)


def test_opcheck(demo: ModuleType) -> None:
    x = torch.randn(8, device="mps")
    torch.library.opcheck(demo.scale.default, (x, 2.0))
    torch.library.opcheck(demo.scale.default, (x[::2], 2.0), {"bias": x[:4], "negate": True})
    torch.library.opcheck(demo.sum.default, (x,))


@pytest.mark.parametrize("inference", [False, True])
def test_compile_with_aot_eager(demo: ModuleType, inference: bool) -> None:
    def model(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        attended = functional.scaled_dot_product_attention(query, query, query)
        return demo.scale(torch.relu(x) + 1, 2.0) * 3 + attended.sum()

    torch._dynamo.reset()
    x, query = torch.randn(5), torch.randn(1, 2, 3, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.inference_mode(inference):
        found = compiled(x.to("mps"), query.to("mps"))
    expected = (torch.relu(x) + 1) * 6
    expected = expected + functional.scaled_dot_product_attention(query, query, query).sum()
    torch.testing.assert_close(found.cpu(), expected)

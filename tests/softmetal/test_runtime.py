"""The product's host runtime (csrc/mps/runtime.mm), through the demo ops."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import ModuleType

import pytest
import torch

from . import configure, python_environment, reset_stats, stats

POISON = torch.full((4,), 0xCD, dtype=torch.uint8).view(torch.float32).item()
TOLERANCE = {torch.float32: 0.0, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_values(demo: ModuleType, dtype: torch.dtype, count: int) -> None:
    x = torch.randn(count).to(dtype)
    y = demo.scale(x.to("mps"), 3.0)
    torch.testing.assert_close(y.cpu(), x * 3, rtol=TOLERANCE[dtype], atol=0)


def test_views_and_offsets(demo: ModuleType) -> None:
    x = torch.arange(24.0).view(4, 6)
    device = x.to("mps")
    assert torch.equal(demo.scale(device[1:, 2], 2.0).cpu(), x[1:, 2] * 2)
    assert torch.equal(demo.scale(device.view(-1)[5:], 2.0).cpu(), x.view(-1)[5:] * 2)
    assert torch.equal(
        demo.scale(device[2, 4:], 2.0, bias=device[0, 1:3]).cpu(), x[2, 4:] * 2 + x[0, 1:3]
    )


def test_function_constants(demo: ModuleType) -> None:
    x = torch.arange(4.0)
    for negate, rounds in ((False, 0), (True, 0), (False, 2), (True, 1)):
        y = demo.scale(x.to("mps"), 2.0, negate=negate, extra_rounds=rounds)
        assert torch.equal(y.cpu(), x * 2 ** (rounds + 1) * (-1 if negate else 1))


def test_empty_input_launches_nothing(demo: ModuleType) -> None:
    x = torch.empty(0, device="mps")
    reset_stats()
    assert demo.scale(x, 2.0).shape == (0,)
    assert stats()["encoders"] == 0


def test_right_after_a_torch_op(demo: ModuleType) -> None:
    x = torch.arange(6.0, device="mps")
    y = demo.scale(x + 1, 2.0) + 1
    assert torch.equal(demo.scale(y, 1.0).cpu(), (torch.arange(6.0) + 1) * 2 + 1)


def test_two_passes_share_one_encoder(demo: ModuleType) -> None:
    x = torch.arange(1000.0)
    device = x.to("mps")
    demo.sum(device)
    reset_stats()
    total = demo.sum(device)
    counted = stats()
    assert (counted["encoders"], counted["dispatches"]) == (1, 2)
    assert total.item() == x.sum().item()


def test_a_call_neither_commits_nor_waits_nor_leaks(demo: ModuleType) -> None:
    x = torch.ones(10, device="mps")
    demo.scale(x, 2.0)
    torch.mps.synchronize()
    before = stats()
    reset_stats()
    for _ in range(50):
        y = demo.scale(x, 2.0)
    after = stats()
    assert (after["encoders"], after["dispatches"]) == (50, 50)
    assert (after["explicit_commits"], after["waits"]) == (0, 0)
    assert (after["libraries"], after["pipelines"], after["fallbacks"]) == (0, 0, 0)
    del y
    torch.mps.synchronize()
    assert stats()["live_objects"] == before["live_objects"]
    assert stats()["buffer_bytes"] == before["buffer_bytes"]


def test_lazy_mode_runs_nothing_until_somebody_waits(demo: ModuleType, misuse: ModuleType) -> None:
    x = torch.ones(8, device="mps")
    configure(lazy=True)
    try:
        assert misuse.peek(x) == POISON  # read without waiting
        y = demo.scale(x, 2.0)
        assert torch.equal(y.cpu(), torch.full((8,), 2.0))
    finally:
        configure(lazy=False)


def test_threads_share_the_runtime(demo: ModuleType) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            x = torch.arange(300.0) + seed
            device = x.to("mps")
            for i in range(20):
                y = demo.scale(device, float(seed), extra_rounds=seed % 3, negate=bool(i % 2))
                factor = float(seed) ** (seed % 3 + 1) * (-1 if i % 2 else 1)
                torch.testing.assert_close(y.cpu(), x * factor)
                assert demo.sum(device).item() == x.sum().item()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_kernel_names(demo: ModuleType) -> None:
    scales = [f"demo_scale_{name}" for name in ("bfloat", "float", "half")]
    assert demo.kernels("demo") == scales
    assert demo.kernels("sum") == ["demo_merge_sum", "demo_partial_sum"]
    with pytest.raises(RuntimeError, match="no embedded Metal library is named nothing"):
        demo.kernels("nothing")


def test_instantiation_per_launch(demo: ModuleType) -> None:
    x = torch.arange(5.0)
    for number in (1, 2, 1):
        assert torch.equal(demo.add(x.to("mps"), number).cpu(), x + number)
    reset_stats()
    demo.add(x.to("mps"), 2)
    demo.add(x.to("mps"), 3)
    assert (stats()["libraries"], stats()["pipelines"]) == (1, 1)


def test_compile_error_names_kernel_compiler_and_system(demo: ModuleType) -> None:
    with pytest.raises(RuntimeError) as raised:
        demo.broken()
    message = str(raised.value)
    assert "[kvq.metal] kernel demo_broken: Metal library broken does not compile" in message
    assert "no_such_function" in message
    assert "broken.metal:6" in message
    assert "software Metal on Linux" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("sum", "no_such_kernel", [1, 1, 1], [1, 1, 1], [], 0),
            "no function named no_such_kernel",
        ),
        (("demo", "demo_scale_float", [1, 1, 1], [1, 1, 1], [], 0), "negate"),
        (
            ("sum", "demo_merge_sum", [1, 1, 1], [2048, 1, 1], [], 0),
            "must be in 1..1024 on this GPU",
        ),
        (("sum", "demo_merge_sum", [1, 1, 1], [0, 1, 1], [], 0), "must be in 1..1024 on this GPU"),
        (("sum", "demo_merge_sum", [1, 1, 1], [], [], 0), "threads_per_threadgroup is missing"),
        (("sum", "demo_merge_sum", [], [1, 1, 1], [], 0), "give either threads or threadgroups"),
        (("sum", "demo_merge_sum", [2**32, 1, 1], [1, 1, 1], [], 0), "in 0..2^32-1 per dimension"),
        (("sum", "demo_merge_sum", [1, 1, 1], [1, 1, 1], [24], 0), "multiples of 16 bytes, got 24"),
        (("sum", "demo_merge_sum", [1, 1, 1], [1, 1, 1], [65536], 0), "this GPU has 32768"),
        (("sum", "demo_merge_sum", [1, 1, 1], [1, 1, 1], [], 400), "starts at byte 400"),
    ],
)
def test_refused_launches(demo: ModuleType, arguments: tuple, message: str) -> None:
    x = torch.ones(4, device="mps")
    torch.mps.synchronize()
    reset_stats()
    with pytest.raises(RuntimeError, match=r"\[kvq.metal\]") as raised:
        demo.launch(x, *arguments)
    assert message in str(raised.value)
    assert stats()["encoders"] == 0


def test_limits_are_asked_of_the_pipeline(demo: ModuleType) -> None:
    x = torch.ones(300, device="mps")
    demo.sum(x)
    configure(max_threads=128)
    try:
        with pytest.raises(RuntimeError, match=r"must be in 1\.\.128 on this GPU, got 256"):
            demo.scale(x, 1.0, extra_rounds=7)  # a pipeline nobody has made yet
    finally:
        configure(max_threads=1024)


SCRIPT = """
import sys, torch
from {package} import demo, install
install(product=False)
ops = demo.load(metallib={metallib})
x = torch.arange(300.0)
assert torch.equal(ops.scale(x.to("mps"), 2.0).cpu(), x * 2)
assert ops.sum(x.to("mps")).item() == x.sum().item()
assert torch.equal(ops.add(x.to("mps"), 1).cpu(), x + 1)
"""


def run_elsewhere(metallib: bool = False, **environment: str) -> None:
    """The demo in a process of its own."""
    script = SCRIPT.format(package=__package__, metallib=metallib)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=python_environment(**environment),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", ["race", "fastmath", "asan"])
def test_modes(demo: ModuleType, mode: str) -> None:
    run_elsewhere(KVQ_SOFTMETAL_MODE=mode)


def test_threads_in_another_order_and_lazily(demo: ModuleType) -> None:
    run_elsewhere(KVQ_SOFTMETAL_SEED="7", KVQ_SOFTMETAL_LAZY="1")


def test_embedded_metallib(demo: ModuleType) -> None:
    run_elsewhere(metallib=True)

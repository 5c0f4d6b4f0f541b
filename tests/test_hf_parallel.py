"""A quantised cache under transformers' tensor parallelism, and on two threads at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

from tests.hf_helpers import generate, prompt, tiny_model  # noqa: E402
from torch_kvq.hf import KVQCache  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def run_rank(folder: str, name: str) -> None:
    """What each process of a tensor-parallel run does; rank 0 writes the tokens."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).eval()
    results = []
    for options in ({}, {"max_cache_len": 64}):
        cache = KVQCache(model.config, "int8", "int4-rot", **options)
        results.append(generate(model, prompt(rows=2, padded=True), cache, "kvq"))
        for layer in cache.layers:  # two KV heads over two processes
            assert layer.cache.kv_heads == 1
    if int(os.environ["RANK"]) == 0:
        torch.save(results, Path(folder) / f"{name}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_tensor_parallel(name, device, tmp_path):
    """KV heads sharded over two gloo processes: the tokens of one process."""
    if device != "cpu":
        pytest.skip("gloo on the CPU")
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    expected = generate(
        model, prompt(rows=2, padded=True), KVQCache(model.config, "int8", "int4-rot"), "kvq"
    )
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    code = f"from tests.test_hf_parallel import run_rank; run_rank({str(tmp_path)!r}, {name!r})"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": "2",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    for result in torch.load(tmp_path / f"{name}.pt"):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("carrier", ["handle", "tensor"])
def test_two_threads(carrier, device):
    """Each with a model and caches of its own, at the same time: the tokens of one thread."""
    names = ("llama", "gemma3")
    models = [tiny_model(name, device) for name in names]
    implementation = "kvq" if carrier == "handle" else "sdpa"
    together = Barrier(len(models))

    def work(model, barrier: Barrier | None) -> list[torch.Tensor]:
        results = []
        for step in range(3):
            inputs = prompt(length=10 + step, device=device)
            cache = KVQCache(model.config, "int8", "tq4", carrier=carrier, rollback_tokens=8)
            if barrier is not None:
                barrier.wait()
            with torch.no_grad():
                results.append(generate(model, inputs, cache, implementation))
        return results

    expected = [work(model, None) for model in models]
    with ThreadPoolExecutor(len(models)) as pool:
        got = list(pool.map(work, models, [together] * len(models)))
    for mine, alone in zip(got, expected, strict=True):
        assert all(map(torch.equal, mine, alone))

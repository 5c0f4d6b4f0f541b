"""ggml as llama-cpp-python ships it, by ctypes: products with Q4_K weights on the CPU."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch

F32, Q4_K = 0, 12  # ggml_type


class _InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool),
    ]  # fmt: skip


def _library(name: str) -> ctypes.CDLL:
    spec = importlib.util.find_spec("llama_cpp")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else Path()
    suffix = "dylib" if sys.platform == "darwin" else "so"
    path = folder / f"lib{name}.{suffix}"
    if not path.is_file():
        raise SystemExit("--peer ggml needs llama-cpp-python (pip install llama-cpp-python)")
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _function(library: ctypes.CDLL, name: str, result: object, *arguments: object) -> Callable:
    function = getattr(library, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


def products(
    x: torch.Tensor, weights: list[torch.Tensor], threads: int
) -> Callable[[int], torch.Tensor]:
    """ggml_mul_mat of x [M, K], float32, and the Q4_K weights [N, K / 256 * 144] of each turn."""
    base, cpu = _library("ggml-base"), _library("ggml-cpu")
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    init = _function(base, "ggml_init", pointer, _InitParams)
    new_tensor = _function(base, "ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, size, size)
    data_of = _function(base, "ggml_get_data", pointer, pointer)
    mul_mat = _function(base, "ggml_mul_mat", pointer, pointer, pointer, pointer)
    new_graph = _function(base, "ggml_new_graph", pointer, pointer)
    expand = _function(base, "ggml_build_forward_expand", None, pointer, pointer)
    compute = _function(base, "ggml_backend_graph_compute", ctypes.c_int, pointer, pointer)
    backend = _function(cpu, "ggml_backend_cpu_init", pointer)()
    _function(cpu, "ggml_backend_cpu_set_n_threads", None, pointer, ctypes.c_int)(backend, threads)

    (m, k), n = x.shape, weights[0].shape[0]
    total = sum(w.numel() for w in weights) + len(weights) * (4 * m * (k + n) + (1 << 20))
    context = init(_InitParams(total, None, False))
    values = x.float().contiguous()
    vector = new_tensor(context, F32, k, m)
    ctypes.memmove(data_of(vector), values.data_ptr(), 4 * values.numel())
    turns = []
    for blocks in weights:
        matrix = new_tensor(context, Q4_K, k, n)
        ctypes.memmove(data_of(matrix), blocks.data_ptr(), blocks.numel())
        out, graph = mul_mat(context, matrix, vector), new_graph(context)
        expand(graph, out)
        turns.append((graph, data_of(out)))

    def run(turn: int) -> torch.Tensor:
        graph, out = turns[turn % len(turns)]
        if compute(backend, graph) != 0:
            raise RuntimeError("ggml_backend_graph_compute failed")
        return torch.frombuffer((ctypes.c_float * (m * n)).from_address(out), dtype=torch.float32)

    return run

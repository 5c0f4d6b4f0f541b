"""benchmarks/run.py: every op and peer runs at a tiny size, checks its results and says the fields.

Nothing here asserts on time.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
TINY = ["--tokens", "96", "--heads", "4", "--kv-heads", "2", "--head-dim", "64", "--budget", "0"]
#: op and peer, with a format other than int4-g64 where the peer needs one.
ROWS = {
    "attention": ("torch-folded", "torch-gqa", "torch-fp32", "mlx", "one-query"),
    "append": ("index-copy",),
    "kv_cache_update": ("index-copy",),
    "quantize": ("memcpy", "mlx", "gguf"),
    "dequantize": ("memcpy", "mlx", "gguf"),
    "qdq": ("memcpy",),
    "hadamard": ("memcpy",),
    "mlx_native_dequantize": ("memcpy",),
    "step": ("torch-cat",),
}
FIELDS = {"op", "format", "v_format", "peer", "threads", "tokens", "queries"}
NUMBERS = {"ours_ms", "peer_ms", "ratio", "spread"}


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """benchmarks/run.py as a module."""
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("run")
    sys.path.remove(str(BENCHMARKS))
    for name in ("run", "cases", "steps", "table", "timing"):
        sys.modules.pop(name, None)
    torch.set_num_threads(threads)


def check_row(row: dict) -> None:
    assert row.keys() >= FIELDS | NUMBERS
    assert all(row[name] > 0 for name in NUMBERS)
    assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ours_ms"], rel=0.02, abs=0.002)
    json.dumps(row)


@pytest.mark.parametrize(("op", "peer"), [(op, peer) for op in ROWS for peer in ROWS[op]])
def test_every_op_and_peer(bench: ModuleType, op: str, peer: str) -> None:
    if peer in ("mlx", "gguf"):
        pytest.importorskip("mlx.core" if peer == "mlx" else "gguf")
    fmt = "q4_0" if peer == "gguf" else "int4-g64"
    queries = ["--queries", "3"] if peer == "one-query" else []
    args = ["--op", op, "--peer", peer, "--format", fmt, *TINY, *queries]
    row = bench.run_row(bench.parser().parse_args(args))
    check_row(row)
    assert (row["op"], row["peer"], row["format"]) == (op, peer, fmt)


@pytest.mark.parametrize(
    "extra",
    [
        ["--format", "int8-g32", "--v-format", "int4-g64-rot"],
        ["--format", "tq4", "--batch", "3", "--ragged"],
        ["--format", "fp8_e4m3", "--queries", "5", "--peer", "torch-gqa"],
        ["--format", "q8_0", "--queries", "96", "--peer", "torch-fp32", "--dtype", "float32"],
    ],
)
def test_attention_variants(bench: ModuleType, extra: list[str]) -> None:
    check_row(bench.run_row(bench.parser().parse_args([*TINY, *extra])))


@pytest.mark.parametrize("op", ["quantize", "dequantize", "append"])
def test_every_format(bench: ModuleType, op: str) -> None:
    for fmt in importlib.import_module("table").FORMATS:
        check_row(bench.run_row(bench.parser().parse_args(["--op", op, "--format", fmt, *TINY])))


def test_linear(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LENGTHS", (64, 128, 256))
    row = bench.run_row(bench.parser().parse_args(["--op", "linear", *TINY, "--tokens", "256"]))
    assert row.keys() >= FIELDS | NUMBERS
    assert set(row["steps_ms"]) == {"64", "128", "256"}


def test_wrong_results_are_noticed(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark must not time garbage."""
    ops = importlib.import_module("torch_kvq.ops")
    real = ops.attention

    def broken(*args, **kwargs):  # type: ignore[no-untyped-def]
        out, lse = real(*args, **kwargs)
        return out * 1.2, lse

    monkeypatch.setattr(ops, "attention", broken)
    with pytest.raises(AssertionError, match="attention is wrong"):
        bench.run_row(bench.parser().parse_args(TINY))


def test_unknown_peer(bench: ModuleType) -> None:
    with pytest.raises(SystemExit, match="has peers index-copy"):
        bench.run_row(bench.parser().parse_args(["--op", "append", "--peer", "mlx"]))


def test_table_is_made_of_rows(bench: ModuleType) -> None:
    """Every row of --all parses as a command of its own, and every op and peer is in it."""
    seen = set()
    for _, changes in bench.rows_of(list(bench.TABLE)):
        words = bench.command(changes).split()[2:]
        args = bench.parser().parse_args(words)
        peer = args.peer or bench.PEERS[args.op][0]
        assert peer in bench.PEERS[args.op]
        seen.add((args.op, peer))
    assert seen == {(op, peer) for op, peers in bench.PEERS.items() for peer in peers}


def test_results_file_and_plot(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--all keeps one result per command and draws the plot."""
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    tiny = {"heads": 4, "kv_heads": 2, "head_dim": 64, "threads": 1}
    rows = [
        ("lengths", {"format": f, "tokens": t, **tiny}) for f in ("int4-g64", "q4_0")
        for t in (1024, 2048)
    ]  # fmt: skip
    monkeypatch.setattr(bench, "rows_of", lambda sections: rows)
    for _ in range(2):
        bench.run_all(bench.parser().parse_args(["--all", "lengths", "--budget", "0"]))
    saved = json.loads((tmp_path / "cpu.json").read_text())
    assert len(saved["rows"]) == 4 and saved["machine"]["capability"]
    for row in saved["rows"]:
        check_row(row)
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_command_line() -> None:
    """One JSON object on a line of its own."""
    out = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), "--op", "append", *TINY, "--json"],
        capture_output=True, text=True, timeout=300, check=True,
    ).stdout  # fmt: skip
    check_row(json.loads(out))


Q4_K_ROWS = [("q4_k_gemv", p) for p in ("torch-bf16", "torch-fp32", "ggml")]
Q4_K_ROWS += [("q4_k_matmul", "ggml"), ("q4_k_quantize", "memcpy"), ("q4_k_dequantize", "memcpy")]


@pytest.mark.parametrize(("op", "peer"), Q4_K_ROWS)
def test_q4_k_rows(bench: ModuleType, op: str, peer: str) -> None:
    """Shapes of weights, the share of the read bandwidth, and a result within 1 % of float64's."""
    if peer == "ggml" and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python, whose ggml is the peer, is not installed")
    size = ["--rows", "40", "--columns", "512", "--queries", "3", "--budget", "0"]
    row = bench.run_row(bench.parser().parse_args(["--op", op, "--peer", peer, *size]))
    assert (row["op"], row["peer"], row["rows"], row["columns"]) == (op, peer, 40, 512)
    assert row["queries"] == (1 if op == "q4_k_gemv" else 3)
    assert all(row[name] > 0 for name in NUMBERS | {"packed_gb_s", "read_gb_s", "of_read"})
    json.dumps(row)


def test_model_with_q4_k_weights(bench: ModuleType, code_model: Path) -> None:
    """Q4_K weights and an int4 cache: less memory, a small loss, each of its own."""
    module = importlib.import_module("q4_k_model")
    args = module.argparse.Namespace(
        model=code_model, cache="int4", dtype="float32", window=48, windows=1, prompt=120, tokens=2,
        rounds=1,
    )  # fmt: skip
    with torch.inference_mode():
        rows = {(row["weights"], row["cache"]): row for row in module.measure(args)}
    dense, both = rows["dense", "dense"], rows["Q4_K", "int4"]
    assert dense["kld"] == 0 and 0 < rows["dense", "int4"]["kld"] < 0.05
    assert 0 < rows["Q4_K", "dense"]["kld"] < 0.05 and 0 < both["kld"] < 0.1
    assert both["linear_mib"] < 0.15 * dense["linear_mib"]
    assert both["cache_mib"] < 0.25 * dense["cache_mib"]
    assert all(row["tokens_per_s"] > 0 for row in rows.values())

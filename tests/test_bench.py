"""python -m torch_kvq bench, and the table of attention's launches that it tunes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from torch_kvq import ops, reference
from torch_kvq.cli import bench, main
from torch_kvq.codebooks import hadamard_signs
from torch_kvq.formats import KVFormat

SMALL = (
    "--heads 4 --kv-heads 2 --head-dim 64 --tokens 96 --repeats 1 --formats int8/int4-rot --json"
).split()


def test_bench(device, capsys):
    assert main(["bench", "--device", device, *SMALL]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert found["device"] == device
    assert (row["format"], row["tokens"]) == ("int8/int4-rot", 96)
    assert row["ratio"] == pytest.approx(row["dense_ms"] / row["ms"]) and row["ms"] > 0


def test_bench_for_people(device, capsys):
    assert main(["bench", "--device", device, *SMALL[:-1]]) == 0
    assert "int8/int4-rot" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tune"], "--tune is for Apple GPUs"),
        (["--heads", "3", "--kv-heads", "2"], "no multiple"),
        (["--formats", "int4", "--head-dim", "80"], "multiple of 64, got 80"),
        (["--formats", "int5"], "unknown format 'int5'"),
    ],
)
def test_bench_refuses(options, words, capsys):
    assert main(["bench", "--device", "cpu", *options]) == 1
    assert words in capsys.readouterr().err


def test_tables_as_text():
    text = "1:1,256,256,0\n1073741824:0,256,128,16\n"
    assert bench.format_table(bench.parse_table(text)) == text
    assert list(bench.parse_table(text)) == [1, bench.ALL_ROWS]


@pytest.fixture
def tuning_file(device, tmp_path, monkeypatch) -> Path:
    """A place for the saved table; the table of before is back afterwards."""
    if device != "mps":
        pytest.skip("only attention on MPS has something to choose")
    path = tmp_path / "cache" / "tuning.txt"
    monkeypatch.setenv("KVQ_TUNING_FILE", str(path))
    monkeypatch.delenv("KVQ_TUNING", raising=False)
    torch.ops.kvq_metal.set_tuning("")
    yield path
    monkeypatch.undo()
    torch.ops.kvq_metal.set_tuning("")


def entries() -> bench.Table:
    return bench.parse_table(torch.ops.kvq_metal.tuning())


def test_precedence(tuning_file, monkeypatch):
    metal = torch.ops.kvq_metal
    built_in = entries()
    assert built_in[1][0] == 1 and built_in[bench.ALL_ROWS][0] == 0
    assert metal.tuning_file() == str(tuning_file)
    tuning_file.parent.mkdir()
    tuning_file.write_text(f"# {metal.device_name()}\n4:2,64,32,8\n8:4,64,32,0 # a remark\n")
    metal.set_tuning("")
    assert entries() == {**built_in, 4: (2, 64, 32, 8), 8: (4, 64, 32, 0)}
    monkeypatch.setenv("KVQ_TUNING", "4:1,128,512,0")
    metal.set_tuning("")
    assert entries() == {**built_in, 4: (1, 128, 512, 0), 8: (4, 64, 32, 0)}
    metal.set_tuning("8:8,1,1,16")
    assert entries() == {**built_in, 4: (1, 128, 512, 0), 8: (8, 1, 1, 16)}
    tuning_file.write_text("# another GPU\n4:8,64,32,0\n")
    monkeypatch.delenv("KVQ_TUNING")
    metal.set_tuning("")
    assert entries() == built_in


@pytest.mark.parametrize(
    "text",
    [
        "4",
        "4:4,256,256",
        "3:4,256,256,0",
        "4:3,256,256,0",
        "4:4,0,256,0",
        "4:4,256,256,0x",
        "4:4,1,-1,0",
        "4:4,256,256,4",
    ],
)
def test_bad_tables(tuning_file, monkeypatch, text):
    metal, built_in = torch.ops.kvq_metal, entries()
    with pytest.raises(ValueError, match=r"\[kvq.tuning\] expected ROWS:TILE"):
        metal.set_tuning(text)
    monkeypatch.setenv("KVQ_TUNING", text)
    with pytest.raises(ValueError, match=r"\[kvq.tuning\] KVQ_TUNING: expected"):
        metal.set_tuning("")
    monkeypatch.delenv("KVQ_TUNING")
    tuning_file.parent.mkdir()
    tuning_file.write_text(f"# {metal.device_name()}\n{text}\n")
    metal.set_tuning("")  # a warning, no failure: attention must go on
    assert entries() == built_in


def test_attention_is_the_same_under_every_choice(tuning_file):
    fmt = KVFormat.parse("int4-g64")
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, h, t, 64, generator=generator) for h, t in ((8, 1), (2, 300)))
    packed = ops.quantize(key, fmt)
    arguments = (*packed, *packed, 300, "int4", 64, "int4", 64)
    expected, _ = reference.attention(query.double(), *arguments)
    moved = ops.quantize(key.to("mps"), fmt)
    for text in ("4:1,1,1,0", "4:4,64,16,0", "4:2,1000,1,0", "4:0,8,32,0"):
        torch.ops.kvq_metal.set_tuning(text)
        out, _ = ops.attention(query.to("mps"), moved, moved, 300, fmt, fmt)
        torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_queries_by_matrix(tuning_file, dtype):
    """Rows of 1 to 16 by the matrix kernel; what it cannot serve goes to another."""
    generator = torch.Generator().manual_seed(0)
    for spec, head_dim, heads, queries in (("int8-g64", 64, 8, 3), ("tq4", 80, 4, 1)):
        fmt = KVFormat.parse(spec)
        query, key = (
            torch.randn(1, h, t, head_dim, generator=generator).to(dtype)
            for h, t in ((heads, queries), (2, 300))
        )
        signs = hadamard_signs(head_dim) if fmt.rotate else None
        packed = ops.quantize(key, fmt, signs=signs)
        arguments = (*packed, *packed, 300, fmt.name, fmt.group_size, fmt.name, fmt.group_size)
        expected, _ = reference.attention(query.double(), *arguments, k_signs=signs, v_signs=signs)
        moved = tuple(t.to("mps") for t in packed)
        signs = signs.to("mps") if fmt.rotate else None
        torch.ops.kvq_metal.set_tuning("2:2,8,64,8\n16:8,8,64,16")
        out, _ = ops.attention(
            query.to("mps"), moved, moved, 300, fmt, fmt, k_signs=signs, v_signs=signs
        )
        close = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(out.cpu().double(), expected.double(), rtol=close, atol=close)


def test_tune(tuning_file, monkeypatch, capsys):
    monkeypatch.setattr(bench, "THREADGROUPS", (1, 8))
    monkeypatch.setattr(bench, "SPLIT_TOKENS", (32,))
    assert main(["bench", "--device", "mps", "--tune", *SMALL]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file"] == str(tuning_file)
    assert {try_["rows"] for try_ in found["tried"]} == set(entries())
    torch.ops.kvq_metal.set_tuning("")  # what a new process would read
    assert torch.ops.kvq_metal.tuning() == found["tuning"]
    for rows, (tile, threadgroups, tokens, matrix) in entries().items():
        assert tile <= rows and threadgroups in (1, 8) and tokens == 32
        assert matrix <= max(8, rows)

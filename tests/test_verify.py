"""``python -m torch_kvq verify``: its cases agree here, and a wrong kernel would be reported."""

from __future__ import annotations

import json

import pytest
import torch

from torch_kvq import formats, ops
from torch_kvq.cli import main, verify

OPS = sorted({case.op for case in verify.cases(quick=True)})


@pytest.mark.parametrize("op", OPS)
def test_every_case_agrees(op, device, capsys):
    assert main(["verify", "--device", device, "--quick", "--json", "--op", op]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == device
    assert report["torch"] == torch.__version__
    assert report["cases"]
    for row in report["cases"]:
        assert row["ok"], row
        assert set(row) == {
            "op", "format", "dtype", "head_dim", "variant", "max_error", "ok", "message",
        }  # fmt: skip


@pytest.mark.slow
def test_every_case_of_the_full_check_agrees(device, capsys):
    code = main(["verify", "--device", device])
    assert code == 0, capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [1 + 1e-4, 1.02])
def test_an_error_above_the_dtypes_is_not_allowed(dtype, factor, device, monkeypatch):
    fmt = formats.KVFormat("int8", 64)
    right = torch.ops.kvq.attention

    class Scaled:
        attention = staticmethod(lambda *a, **k: tuple(x * factor for x in right(*a, **k)))

    error, allowed = verify.check_attention(fmt, fmt, dtype, 128, 5, True, device)
    assert error <= allowed
    monkeypatch.setattr(torch.ops, "kvq", Scaled)
    error, allowed = verify.check_attention(fmt, fmt, dtype, 128, 5, True, device)
    assert (error > allowed) == (dtype == torch.float32 or factor > 1.01)


def test_all_ops_and_formats_are_covered():
    full = list(verify.cases(quick=False))
    names = {torch_op.split("::")[1].split(".")[0] for torch_op in _schema_names()}
    assert names == {case.op for case in full}
    for op in ("quantize", "append_", "dequantize", "qdq", "attention"):
        formats = {case.format for case in full if case.op == op}
        for fmt in verify.formats_to_check(quick=False):
            assert str(fmt) in formats
    sizes = {(c.format, c.dtype, c.head_dim) for c in full if c.op == "qdq"}
    plain = {(fmt, dtype, d) for fmt, dtype, d in sizes if not fmt.endswith("-rot")}
    assert {(c.format, c.dtype, c.head_dim) for c in full if c.op == "attention"} >= plain


def _schema_names() -> list[str]:
    return [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("kvq::")]


def test_a_wrong_kernel_fails(device, capsys, monkeypatch):
    right = ops.hadamard
    monkeypatch.setattr(ops, "hadamard", lambda x, signs, back: right(x, signs, not back))
    assert main(["verify", "--device", device, "--quick", "--op", "hadamard"]) == 1
    out = capsys.readouterr().out
    assert "FAILED hadamard dense float32 D=64" in out
    assert "6 cases failed" in out


def test_a_refusal_is_a_failed_case_with_its_message(device, capsys, monkeypatch):
    def refuse(*args: object) -> None:
        raise RuntimeError("[kvq.hadamard] no such kernel")

    monkeypatch.setattr(ops, "hadamard", refuse)
    assert main(["verify", "--device", device, "--quick", "--op", "hadamard"]) == 1
    assert "[kvq.hadamard] no such kernel" in capsys.readouterr().out


def test_unknown_op_is_one_sentence(device, capsys):
    assert main(["verify", "--device", device, "--op", "nothing"]) == 1
    assert "no case checks an op named 'nothing'" in capsys.readouterr().err

"""python -m torch_kvq: what a user reads and what a program gets."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from torch_kvq.cli import COMMANDS, main
from torch_kvq.cli.info import has_kernels
from torch_kvq.cli.quality import QualityMeter
from torch_kvq.cli.terminal import Progress, table
from torch_kvq.formats import FORMATS, KVFormat

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
needs_transformers = pytest.mark.skipif(not HAS_TRANSFORMERS, reason="the hf extra is missing")


def command(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch_kvq", *args],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **env},
    )


@pytest.fixture(scope="module")
def demo_run(device: str) -> dict:
    if not HAS_TRANSFORMERS:
        pytest.skip("the hf extra is missing")
    if device == "mps" and sys.platform != "darwin":
        pytest.skip("a subprocess has no software device")
    options = ("--new-tokens", "12", "--quality-tokens", "384", "--json", "--device", device)
    done = command("demo", *options, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bar where stderr is no terminal, no warnings
    return json.loads(done.stdout)


def test_demo_memory(demo_run):
    """The tiny model has 4 layers, 2 KV heads and head size 64."""
    rows = {row["format"]: row for row in demo_run["rows"]}
    assert list(rows) == ["dense", "int8", "int4-rot", "int8/int4-rot"]
    for name, row in rows.items():
        if name == "dense":
            k_bytes = v_bytes = 2 * 64
        else:
            k_format, _, v_format = name.partition("/")
            k_bytes, v_bytes = (
                KVFormat.parse(side).row_nbytes(64, torch.bfloat16, None)
                for side in (k_format, v_format or k_format)
            )
        per_token = 4 * 2 * (k_bytes + v_bytes)
        assert row["bytes_per_token"] == per_token
        assert row["ratio_to_bf16"] == per_token / 2048
        stored = per_token * row["cache_tokens"]
        # Beyond the rows a layer holds a length and the random signs of each side.
        assert stored <= row["cache_bytes"] <= stored + 4 * (8 + 2 * 64 * 4)
    assert rows["int8"]["ratio_to_bf16"] == 8.5 / 16


def test_demo_quality(demo_run):
    rows = {row["format"]: row for row in demo_run["rows"]}
    assert {row["quality_tokens"] for row in rows.values()} == {384}
    dense, int8, int4 = rows["dense"], rows["int8"], rows["int4-rot"]
    assert dense["kld"] == 0 and dense["same_top"] == 1 and dense["ppl_ratio"] == 1
    assert 0 < int8["kld"] < 3e-3 < rows["int8/int4-rot"]["kld"] < int4["kld"] < 0.2
    assert 1 >= int8["same_top"] > int4["same_top"] > 0.8
    for row in rows.values():
        assert 0.9 < row["ppl_ratio"] < 1.2


def test_demo_text(demo_run):
    dense = demo_run["rows"][0]
    for row in demo_run["rows"]:
        assert len(row["tokens"]) == 12 and row["text"].strip()
        assert row["tokens_per_second"] > 0
        same = row["tokens_as_dense"]
        assert row["tokens"][:same] == dense["tokens"][:same]
        assert same == 12 or row["tokens"][same] != dense["tokens"][same]
    assert demo_run["rows"][1]["tokens_as_dense"] > 0


@needs_transformers
def test_demo_prints_texts_and_a_table(capsys):
    options = "--new-tokens 4 --quality-tokens 40 --device cpu --formats int8 tq4/none".split()
    assert main(["demo", "--prompt", "import os\nimport", *options]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "the embedded model: 2.0 M parameters, bfloat16, on cpu"
    assert "    import os" in lines
    header = next(i for i, line in enumerate(lines) if line.startswith("cache "))
    assert lines[header].split()[1:3] == ["bytes/token", "MiB"]
    body = [line.split() for line in lines[header + 2 : header + 5]]
    assert [row[0] for row in body] == ["dense", "int8", "tq4/none"]
    assert [row[3] for row in body] == ["1.000", "0.531", "0.633"]
    for row in body:
        assert any(line.startswith(row[0]) and line.endswith(":") for line in lines)


@needs_transformers
def test_demo_with_another_model(code_model, capsys):
    options = f"--model {code_model} --new-tokens 4 --quality-tokens 40 --formats int8".split()
    assert main(["demo", "--device", "cpu", "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][0]["bytes_per_token"] == 2 * 8 * 2 * 128 * 2
    assert found["rows"][1]["kld"] < 3e-3


@needs_transformers
def test_a_model_without_held_out_text_gets_the_embedded_one(tmp_path):
    from torch_kvq.cli import models

    for file in models.EMBEDDED.iterdir():
        if file.name != models.HELD_OUT:
            (tmp_path / file.name).symlink_to(file)
    ours = models.load(None, "cpu", "auto").held_out(200)
    theirs = models.load(str(tmp_path), "cpu", "auto").held_out(200)
    assert len(theirs) == 200 and torch.equal(ours[:150], theirs[:150])


REFUSED = {
    "unknown format": (["--formats", "int9"], r"--formats: \[kvq.format\] unknown format 'int9'"),
    "three sides": (["--formats", "int8/int4/int2"], "--formats: 'int8/int4/int2' should be"),
    "group": (["--formats", "int8-g128"], "int8-g128 needs head_dim to be a positive multiple"),
    "no folder": (["--model", "./no/such/model"], "--model: there is no folder ./no/such/model"),
    "no model in it": (["--model", "tests"], "--model: tests holds no config.json"),
    "context": (["--new-tokens", "5000"], "5000 new ones exceed the model's context of 2048"),
    "no prompt": (["--prompt", ""], "--prompt: the text is empty"),
    "no tokens": (["--new-tokens", "0"], "--new-tokens must be at least 2, got 0"),
}


@needs_transformers
@pytest.mark.parametrize("case", REFUSED)
def test_demo_refuses_in_one_sentence(case, capsys, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    options, message = REFUSED[case]
    assert main(["demo", "--device", "cpu", *options]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("torch_kvq: ") and printed.err.count("\n") == 1
    assert re.search(message, printed.err)


@needs_transformers
def test_demo_refuses_a_name_that_hugging_face_does_not_have():
    done = command("demo", "--model", "nobody/no-such-model", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "there is no folder nobody/no-such-model, and Hugging Face does not" in done.stderr


def test_demo_without_transformers(capsys, monkeypatch):
    from torch_kvq.cli import models

    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 1
    expected = "torch_kvq: this command needs transformers: pip install 'torch_kvq[hf]'\n"
    assert capsys.readouterr().err == expected


def test_demo_on_a_device_that_is_not_there(capsys):
    if torch.backends.mps.is_available() and has_kernels("mps"):
        pytest.skip("there is one")
    if HAS_TRANSFORMERS:
        assert main(["demo", "--device", "mps"]) == 1
        assert "torch_kvq: --device mps: " in capsys.readouterr().err


def test_info(capsys):
    assert main(["info", "--json", "--head-dim", "96"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"]["cpu"]["kernels"] is True
    assert found["devices"]["cpu"]["instruction_set"] in (
        "baseline", "avx2", "avx512", "avx512_bf16",
    )  # fmt: skip
    formats = {entry["name"]: entry["bits_per_element"] for entry in found["formats"]}
    assert list(formats) == list(FORMATS)
    assert formats["int8"] == {"32": 9.0}  # 96 takes groups of 32 only
    assert formats["none"] == {"0": 16.0}
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert ["int4-g64", "affine", "4.5", "0.281"] in [line.split() for line in printed.splitlines()]


def test_info_refuses_a_head_size(capsys):
    assert main(["info", "--head-dim", "0"]) == 1
    assert capsys.readouterr().err == "torch_kvq: --head-dim must be positive, got 0\n"


def test_help_names_every_command(capsys):
    for args in ([], ["--help"], ["nonsense"]):
        with pytest.raises(SystemExit):
            main(args)
    printed = capsys.readouterr()
    for name in COMMANDS:
        assert name in printed.out
    assert "invalid choice: 'nonsense'" in printed.err


def test_quality_meter():
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    other = logits + torch.tensor([[0.0, 0.0, 0.0], [-4.0, 0.0, 0.0], [7.0, 7.0, 7.0]])
    meter = QualityMeter()
    meter.add(logits, other, torch.tensor([2, 0]))
    p, q = logits.double().softmax(-1), other.double().softmax(-1)
    quality = meter.result()
    assert quality.quality_tokens == 3
    assert quality.kld == pytest.approx((p * (p / q).log()).sum().item() / 3)
    assert quality.same_top == pytest.approx(2 / 3)
    assert quality.ppl_ratio == pytest.approx((p[1, 0] / q[1, 0]).sqrt().item())


def test_table_aligns():
    text = table(("a", "bb"), [("long name", "1"), ("x", "22")])
    assert text == "a          bb\n---------  --\nlong name   1\nx          22"


def test_progress_bar(capsys, monkeypatch):
    with Progress(4) as progress:
        progress.stage("silent")
        progress.advance()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(4) as progress:
        progress.stage("working")
        progress.advance(2)
        progress.advance(9)
    shown = capsys.readouterr().err
    assert f"[{'#' * 15}{'.' * 15}]  50 %  working" in shown and "100 %" in shown
    assert shown.endswith("\r\x1b[K")

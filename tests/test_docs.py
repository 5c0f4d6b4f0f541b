"""docs/: every Python block runs, commands exist, numbers are the measured ones, links lead on."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_packaging import README_MODEL, code_blocks
from torch_kvq import KVFormat
from torch_kvq.cli.models import EMBEDDED

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
PAGES_WITH_CODE = [page for page in PAGES if code_blocks(DOCS / page, "python")]
#: A block whose last line is this comment raises that.
RAISES = re.compile(r"^# (\w+(?:Error|Exception)): (.*)\n?\Z", re.MULTILINE)
#: What pages name, and what the test gives them.
FOLDER = "path/to/a/llama"
OTHER_PROGRAMS = ("mlx", "gguf")


def run_block(source: str, page: str, namespace: dict) -> None:
    source = source.replace(f'"{README_MODEL}"', repr(str(EMBEDDED)))
    source = source.replace(f'"{FOLDER}"', repr(str(EMBEDDED)))
    code = compile(source, page, "exec")
    expected = RAISES.search(source)
    if expected is None:
        exec(code, namespace)
        return
    with pytest.raises(Exception, match=rf"^{re.escape(expected[2])}") as error:
        exec(code, namespace)
    assert error.type.__name__ == expected[1]


@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_the_code_of_a_page_runs(page, monkeypatch, tmp_path):
    """Its Python blocks in order, in one namespace, in an empty folder."""
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    blocks = code_blocks(DOCS / page, "python")
    for name in OTHER_PROGRAMS:
        if re.search(rf"^import {name}\b", "\n".join(blocks), re.MULTILINE):
            pytest.importorskip(name, reason=f"{page} shows the exchange with it")
    monkeypatch.chdir(tmp_path)
    # The graphs are the same; what Inductor makes of them takes a minute of C++ compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    fixture = ROOT / "tests" / "data" / "mlx_lm" / "prompt-0.32.safetensors"
    shutil.copy(fixture, tmp_path / "prompt.safetensors")
    namespace: dict = {"__name__": "page"}
    for block in blocks:
        run_block(block, page, namespace)


def test_the_decoder_loop_is_the_model():
    """The loop of without-transformers.md generates what transformers does on the same cache."""
    transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
    from torch_kvq.hf import KVQCache

    namespace: dict = {"__name__": "page"}
    block = code_blocks(DOCS / "without-transformers.md", "python")[0]
    run_block(block, "without-transformers.md", namespace)
    lines = [line.strip() for line in block.splitlines()]
    assert len([line for line in lines if line and not line.startswith(('"""', "#"))]) <= 40
    model = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    model.set_attn_implementation("kvq")
    ids = torch.tensor([namespace["tokens"][:10]])
    cache = KVQCache(model.config, "int8", "int4-rot")
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True,
            max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0,
        )  # fmt: skip
    assert namespace["tokens"] == out[0].tolist()


def test_the_reference_is_up_to_date():
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "ops.md").read_text() == module.page(), "run python docs/make_reference.py"


def test_every_op_is_in_the_reference():
    page = (DOCS / "ops.md").read_text()
    ours = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("kvq::")
    }
    assert len(ours) > 8
    missing = {name for name in ours if f"### ops.{name}\n" not in page}
    assert not missing


def test_the_decision_table_is_as_measured():
    """Bits from the formats, loss from benchmarks/results/quality.json."""
    found = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())
    measured = {row["format"]: row for row in found["rows"]}
    text = (DOCS / "choosing-a-format.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| `([\w/-]+)` \|(.*)\|$", text, re.MULTILINE)
    assert len(rows) >= 10
    dense = 36 * 2 * 8 * 128 * 32768 * 2
    assert f"takes {dense / 2**30:.1f} GiB" in " ".join(text.split())
    for name, rest in rows:
        row = measured[name]
        sides = [KVFormat.parse(side) for side in name.split("/")]
        bits = sum(fmt.bits_per_element(128) for fmt in sides) / len(sides)
        assert bits == row["bits_per_element"]
        expected = [f"{bits:.2f}".rstrip("0").rstrip("."), f"{dense * bits / 16 / 2**30:.2f} GiB"]
        expected += [f"{row['kld']:.1e}".replace("e-0", "e-"), f"{100 * row['same_top']:.1f} %"]
        assert [cell.strip() for cell in rest.split("|")] == expected, name
    assert f"{found['tokens']:,} held-out tokens" in " ".join(text.split())


def shell_lines(text: str) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return lines + re.findall(r"`((?:python|make|pip) [^`\n]+)`", text)


def known_flags(command: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def help_of(*command: str) -> str:
    return known_flags(list(command))


@pytest.mark.parametrize("page", [*PAGES, "../README.md"])
def test_commands_exist(page):
    """Programs, make targets, subcommands and flags that a page says to type."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    for line in shell_lines((DOCS / page).read_text()):
        words = line.partition("#")[0].split()
        if words[0] == "make":
            assert words[1] in targets, line
        elif words[0] == "python":
            command = words[1:4] if words[1] == "-m" else words[1:2]
            if words[1] != "-m":
                assert (ROOT / words[1]).is_file(), line
            elif words[2] != "torch_kvq":
                assert importlib.util.find_spec(words[2]), line
            flags = [word for word in words if word.startswith("--")]
            if flags:
                usage = help_of(*command)
                assert all(re.search(rf"(?<![\w-]){flag}\b", usage) for flag in flags), line
        else:
            assert words[0] == "pip" and words[1] == "install", line


@pytest.mark.parametrize("page", [*PAGES, "../README.md"])
def test_links_lead_somewhere(page):
    path = DOCS / page
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target


def test_every_page_is_in_the_index():
    index = (DOCS / "README.md").read_text()
    assert all(f"({page})" in index for page in PAGES if page != "README.md")
    assert "(docs/README.md)" in (ROOT / "README.md").read_text()

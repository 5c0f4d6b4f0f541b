"""Caches of other programs, both ways: MLX's triples, mlx-lm's files, GGUF's blocks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import assert_bytes, normal
from tests.test_mlx import mlx_triple
from torch_kvq import KVFormat, Packed, QuantizedKVCache, interop, ops, tensor_file
from torch_kvq.cli.models import EMBEDDED

FIXTURES = Path(__file__).parent / "data" / "mlx_lm"
VERSIONS = ("0.26", "0.31", "0.32")
B, G, T, D = 1, 2, 21, 128


# Tensors


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_mlx_triples_there_and_back(bits, group, device):
    """MLX's own triples decode as MLX decodes them, and come back byte for byte."""
    x = normal(B, G, T, D, seed=bits)
    x[0, 0, 1] = -x[0, 0, 1].abs() - 3
    (codes, scales, biases), expected = mlx_triple(x, group, bits)
    words = codes.view(torch.uint32)
    packed, fmt = interop.from_mlx(
        words.numpy(), scales.numpy(), biases, bits=bits, group_size=group
    )
    assert fmt == KVFormat(f"int{bits}", group)
    moved = Packed(*(t.to(device) for t in packed))
    decoded = ops.dequantize(moved, fmt).cpu()
    torch.testing.assert_close(decoded, expected, rtol=0, atol=2**-20 * float(expected.abs().max()))
    for mine, theirs in zip(interop.to_mlx(moved, fmt), (words, scales, biases), strict=True):
        assert_bytes(mine, theirs)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_mlx_decodes_ours(bits):
    mx = pytest.importorskip("mlx.core", reason="MLX (extra `mlx`) is the oracle of its triples")
    x = normal(B, G, T, D, seed=9)
    packed = ops.quantize(x, f"int{bits}-g32")
    arrays = [mx.array(t.numpy()) for t in interop.to_mlx(packed, f"int{bits}-g32")]
    with mx.stream(mx.cpu):
        decoded = np.array(mx.dequantize(*arrays, group_size=32, bits=bits))
    expected = ops.dequantize(packed, f"int{bits}-g32")
    torch.testing.assert_close(torch.from_numpy(decoded), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_gguf_blocks_there_and_back(name, device):
    gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle of q8_0 and q4_0")
    kind = getattr(gguf.GGMLQuantizationType, name.upper())
    x = normal(B, G, T, D, seed=3)
    blocks = gguf.quants.quantize(x.numpy(), kind)
    packed, fmt = interop.from_gguf(blocks, name)
    moved = Packed(*(t.to(device) for t in packed))
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    assert torch.equal(ops.dequantize(moved, fmt).cpu(), expected)
    assert np.array_equal(interop.to_gguf(moved, fmt).cpu().numpy(), blocks)
    assert_bytes(interop.to_gguf(ops.quantize(x, name), name), torch.from_numpy(blocks))
    # llama.cpp's rows: one token's heads side by side
    rows = gguf.quants.quantize(x[0].transpose(0, 1).reshape(T, G * D).numpy(), kind)
    assert_bytes(interop.from_gguf(rows, name, kv_heads=G)[0].codes, packed.codes)


def test_a_cache_of_other_bytes_goes_on(device):
    """A cache made from packed tokens is the cache that quantised them."""
    key, value = normal(B, G, T, D), normal(B, G, T, D, seed=1)
    for kind in ({}, {"capacity": 64}, {"window": 8, "rollback_tokens": 4}):
        own = QuantizedKVCache(B, G, D, k_format="q8_0", v_format="int4", device=device, **kind)
        own.append(key.to(device), value.to(device))
        keys, _ = interop.from_gguf(ops.quantize(key, "q8_0").codes, "q8_0")
        words = interop.to_mlx(ops.quantize(value, "int4"), "int4")
        values, _ = interop.from_mlx(*words, bits=4, group_size=64)
        made = interop.cache_from(keys, values, "q8_0", "int4", device=device, **kind)
        assert made.length == T and made.dtype == torch.float32
        for step in range(3):
            query = normal(B, 2 * G, 1, D, seed=10 + step).to(device)
            assert torch.equal(own.attend(query), made.attend(query))
            k, v = (normal(B, G, 1, D, seed=20 + step + i).to(device) for i in range(2))
            own.append(k, v)
            made.append(k, v)


WORDS, SCALES = torch.zeros(1, 2, 3, 8, dtype=torch.uint32), torch.zeros(1, 2, 3, 1)
BLOCKS = torch.zeros(3, 2 * 68, dtype=torch.uint8)
REFUSED = {
    "bits": (lambda: interop.from_mlx(WORDS, SCALES, SCALES, bits=6, group_size=64),
             "[kvq.from_mlx] bits must be 2, 4 or 8, got 6"),
    "group": (lambda: interop.from_mlx(WORDS, SCALES, SCALES, bits=4, group_size=16),
              "[kvq.from_mlx] group_size must be 32, 64 or 128, got 16"),
    "words": (lambda: interop.from_mlx(WORDS.int(), SCALES, SCALES, bits=4, group_size=64),
              "[kvq.from_mlx] words must be uint32, got torch.int32"),
    "dims": (lambda: interop.from_mlx(WORDS[0], SCALES, SCALES, bits=4, group_size=64),
             "[kvq.from_mlx] words must be [B, G, T, row], got [2, 3, 8]"),
    "scales": (lambda: interop.from_mlx(WORDS, SCALES, SCALES[..., :0], bits=4, group_size=64),
               "[kvq.from_mlx] biases must be [1, 2, 3, 1], got [1, 2, 3, 0]"),
    "scale dtype": (lambda: interop.from_mlx(WORDS, SCALES, SCALES.half(), bits=4, group_size=64),
                    "[kvq.from_mlx] biases must have one float dtype, got torch.float16"),
    "head": (lambda: interop.from_mlx(WORDS, SCALES, SCALES, bits=4, group_size=128),
             "[kvq.from_mlx] int4-g128 needs head_dim to be a positive multiple of 128, got 64"),
    "to_mlx": (lambda: interop.to_mlx(ops.quantize(SCALES.expand(1, 2, 3, 64), "int4-rot"),
                                      "int4-rot"),
               "[kvq.to_mlx] MLX decodes int8, int4 and int2 without -rot, not int4-g64-rot"),
    "format": (lambda: interop.from_gguf(BLOCKS, "int4"),
               "[kvq.from_gguf] format must be q8_0 or q4_0, got int4-g64"),
    "blocks": (lambda: interop.from_gguf(BLOCKS.int(), "q8_0"),
               "[kvq.from_gguf] blocks must be uint8, got torch.int32"),
    "rows": (lambda: interop.from_gguf(BLOCKS, "q8_0", kv_heads=3),
             "[kvq.from_gguf] blocks must be [T, 3 * row], got [3, 136]"),
    "odd": (lambda: interop.from_gguf(BLOCKS, "q4_0", kv_heads=2),
            "[kvq.from_gguf] blocks must be [B, G, T, row] with rows of 18-byte blocks, got"),
    "to_gguf": (lambda: interop.to_gguf(ops.quantize(SCALES.expand(1, 2, 3, 64), "tq4"), "tq4"),
                "[kvq.to_gguf] format must be q8_0 or q4_0, got tq4"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    call, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        call()


# mlx-lm's files


@pytest.fixture(scope="module")
def model(device):
    transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
    import torch_kvq.hf  # noqa: F401  (registers "kvq")

    made = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    made.set_attn_implementation("kvq")
    return made.eval().to(device)


def fixture(version: str) -> tuple[Path, dict]:
    path = FIXTURES / f"prompt-{version}.safetensors"
    return path, json.loads(path.with_suffix(".json").read_text())


@pytest.mark.parametrize("version", VERSIONS)
def test_mlx_lm_prompt_caches(version, model, device):
    """A file of each layout: the same bytes, and the model goes on as mlx-lm's did."""
    path, about = fixture(version)
    cache = interop.load_mlx_prompt_cache(path, model.config, device=device)
    _, arrays = tensor_file.read(path)
    fmt = KVFormat(f"int{about['bits']}", about["group_size"])
    for index, layer in enumerate(cache.layers):
        if index in about["dense"]:
            assert layer.cache.k_format.family == layer.cache.v_format.family == "none"
            held = layer.cache.k_codes[:, :, :23].cpu()
            assert torch.equal(held, arrays[f"{index}.0"][:, :, :23])
            continue
        assert layer.cache.k_format == layer.cache.v_format == fmt
        for side, packed in enumerate((layer.cache.keys, layer.cache.values)):
            for part, tensor in enumerate(packed):
                theirs = arrays[f"{index}.{side}.{part}"].view(torch.uint8)[:, :, :23]
                assert torch.equal(tensor[:, :, :23].cpu().view(torch.uint8), theirs)
    tokens = torch.tensor([about["tokens"]], device=device)
    assert cache.get_seq_length() == 23
    with torch.no_grad():
        logits = model(tokens[:, 23:24], past_key_values=cache, use_cache=True).logits[0, -1]
    expected = torch.tensor(about["first_logits"])
    # The prompt is the same; how the new token itself is quantised is not.
    bound = {8: 0.01, 4: 0.5, 2: 0.8}[about["bits"]]
    assert (logits[: len(expected)].cpu() - expected).abs().mean() < bound


def test_mlx_lm_tokens(model, device):
    """At 8 bits the text that mlx-lm generated from its file is generated here, static too."""
    path, about = fixture("0.32")
    expected = torch.tensor([about["tokens"]])
    for options in ({}, {"max_cache_len": 64}):
        cache = interop.load_mlx_prompt_cache(path, model.config, device=device, **options)
        ids = expected[:, :24].to(device)
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True,
                max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0,
            )  # fmt: skip
        assert torch.equal(out.cpu(), expected)


def mlx_lm_load(path: Path):
    """What mlx-lm 0.32's load_prompt_cache does, with mlx alone: states, classes, metadata."""
    mx = pytest.importorskip("mlx.core", reason="MLX (extra `mlx`) is the oracle of its files")
    from mlx.utils import tree_unflatten

    arrays, metadata = mx.load(str(path), return_metadata=True)
    user, classes, scalars = tree_unflatten(list(metadata.items()))
    for place, kind in scalars[1:]:
        assert kind == "scalar"
        arrays[place] = arrays[place].item()
    return tree_unflatten(list(arrays.items())), classes, user


@pytest.mark.parametrize("version", VERSIONS)
def test_export_of_an_imported_file(version, model, tmp_path):
    """What came from mlx-lm goes back in its current layout with the same values."""
    pytest.importorskip("mlx.core", reason="MLX (extra `mlx`) is the oracle of its files")
    path, about = fixture(version)
    cache = interop.load_mlx_prompt_cache(path, model.config)
    interop.save_mlx_prompt_cache(cache, tmp_path / "out.safetensors", {"model": "tiny-2m"})
    states, classes, user = mlx_lm_load(tmp_path / "out.safetensors")
    assert user == {"model": "tiny-2m"}
    _, arrays = tensor_file.read(path)
    for index, (state, kind) in enumerate(zip(states, classes, strict=True)):
        keys, values, offset, *numbers = state
        assert offset == 23
        if kind == "KVCache":
            assert index in about["dense"] and numbers == []
            assert np.array_equal(np.array(keys), arrays[f"{index}.0"][:, :, :23].numpy())
            continue
        assert kind == "QuantizedKVCache" and numbers == [about["group_size"], about["bits"]]
        for side, triple in enumerate((keys, values)):
            for part, array in enumerate(triple):
                theirs = arrays[f"{index}.{side}.{part}"][:, :, :23].numpy()
                assert np.array_equal(np.array(array), theirs)


def test_export_requantizes_only_when_asked(model, device, tmp_path):
    from torch_kvq.hf import KVQCache

    mx = pytest.importorskip("mlx.core", reason="MLX (extra `mlx`) is the oracle of its files")
    tokens = torch.tensor([fixture("0.32")[1]["tokens"]], device=device)
    cache = KVQCache(model.config, "int8-rot", "tq8", skip_layers=[2])
    with torch.no_grad():
        model(tokens, past_key_values=cache, use_cache=True)
    path = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"\[kvq.save_mlx_prompt_cache\] MLX holds K and V in one"):
        interop.save_mlx_prompt_cache(cache, path)
    assert not path.exists()
    interop.save_mlx_prompt_cache(cache, path, requantize="int8-g32")
    states, classes, _ = mlx_lm_load(path)
    assert classes == ["QuantizedKVCache", "QuantizedKVCache", "KVCache", "QuantizedKVCache"]
    for layer, state in zip(cache.layers, states, strict=True):
        for x, side in zip(layer.cache.dequantized(), state[:2], strict=True):
            with mx.stream(mx.cpu):
                y = side if len(state) == 3 else mx.dequantize(*side, group_size=32, bits=8)
                y = torch.from_numpy(np.array(y))
            step = x.abs().max().cpu() / 100
            torch.testing.assert_close(y, x[:, :, : y.shape[2]].cpu(), rtol=0, atol=float(step))


def test_mlx_lm_files_that_do_not_fit(model, tmp_path):
    import transformers

    def refused(path, message, config=model.config, **options):
        match = rf"^\[kvq.load_mlx_prompt_cache\] {re.escape(path.name)} {message}"
        with pytest.raises(ValueError, match=match):
            interop.load_mlx_prompt_cache(path, config, **options)

    path, _ = fixture("0.32")
    refused(path, "holds 4 layers, the model has 3", transformers.LlamaConfig(num_hidden_layers=3))
    refused(path, "holds a layer 0 that cannot be read: 23 tokens exceed", max_cache_len=16)
    metadata, arrays = tensor_file.read(path)
    other = tmp_path / "other.safetensors"
    tensor_file.write(other, arrays, metadata | {"1.2": "RotatingKVCache"})
    refused(other, "holds a RotatingKVCache as layer 2; only QuantizedKVCache and KVCache can")
    tensor_file.write(other, arrays, {"format": "pt"})
    refused(other, "holds no prompt cache of mlx-lm")
    tensor_file.write(other, {k: t for k, t in arrays.items() if k != "2.1.0"}, metadata)
    refused(other, "lacks the state of its layer 2, a QuantizedKVCache")
    tensor_file.write(other, arrays | {"3.4": torch.tensor(5)}, metadata)
    refused(other, "holds a layer 3 that cannot be read: bits must be 2, 4 or 8, got 5")
    other.write_bytes(path.read_bytes()[:-5])
    refused(other, "is truncated")

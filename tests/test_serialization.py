"""Cache files: what comes back, and that nothing but a whole file of the same cache is taken."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests.test_cache import KINDS, H, append, assert_same_state, make, tokens
from torch_kvq import QuantizedKVCache, serialization, tensor_file

#: Tokens appended, then tokens dropped: empty, half full, wrapped around, rolled back.
FILLS = {"empty": (0, 0), "one": (1, 0), "some": (7, 0), "wrapped": (37, 0), "cropped": (37, 4)}
FORMATS = [("int8", "int4-rot"), ("tq3", "fp8_e5m2"), ("q4_0-rot", "none"), ("int2-g32", "q8_0")]

COMPILES = "one case here: on the software device each compiles libraries of its own"


def software(device: str) -> bool:
    return device == "mps" and sys.platform != "darwin"


def filled(device: str, fill: str = "some", **options) -> QuantizedKVCache:
    cache = make(device, **options)
    count, dropped = FILLS[fill]
    if count:
        append(cache, tokens(count), tokens(count, 1))
    cache.crop(dropped)
    return cache


def go_on(cache: QuantizedKVCache, steps: int = 5) -> list[torch.Tensor]:
    """Outputs of a few decode steps and a chunk."""
    outputs = []
    for step, count in enumerate([1] * steps + [6]):
        key, value = tokens(count, 50 + step), tokens(count, 70 + step)
        view = append(cache, key, value)
        query = tokens(count, 90 + step, heads=H).to(cache.device)
        outputs.append(cache.attend(query, view).cpu())
    return outputs


def assert_goes_on_alike(saved: QuantizedKVCache, loaded: QuantizedKVCache) -> None:
    assert_same_state(saved, loaded)
    for a, b in zip(go_on(saved), go_on(loaded), strict=True):
        assert torch.equal(a, b)
    assert_same_state(saved, loaded)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_as_if_never_saved(kind, fill, device, tmp_path):
    cache = filled(device, fill, **KINDS[kind])
    cache.save(tmp_path / "cache.kvq")
    loaded = QuantizedKVCache.load(tmp_path / "cache.kvq", device=device)
    assert repr(loaded).partition("capacity")[0] == repr(cache).partition("capacity")[0]
    for name in ("static", "ring", "limit", "block_size", "rollback_tokens", "scale_dtype"):
        assert getattr(loaded, name) == getattr(cache, name), name
    assert loaded._host.oldest == cache._host.oldest
    assert_goes_on_alike(cache, loaded)


@pytest.mark.parametrize("kind,farthest", [("ring", 7), ("windows", 6)])
def test_rollback_after_load(kind, farthest, device, tmp_path):
    """The loaded cache crops as far as the saved one, and refuses what that refuses."""
    cache = filled(device, "wrapped", **KINDS[kind])
    cache.save(tmp_path / "cache.kvq")
    loaded = QuantizedKVCache.load(tmp_path / "cache.kvq", device=device)
    for c in (cache, loaded):
        with pytest.raises(RuntimeError, match=rf"\[kvq.crop\] cannot drop {farthest + 1} tokens"):
            c.crop(farthest + 1)
        c.crop(farthest)
    assert_goes_on_alike(cache, loaded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k_format,v_format", FORMATS)
def test_every_layout_of_bytes(k_format, v_format, dtype, device, tmp_path):
    if software(device) and (k_format != "int8" or dtype != torch.bfloat16):
        pytest.skip(COMPILES)
    mean = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    options = {"k_format": k_format, "v_format": v_format, "dtype": dtype, "signs_seed": 7}
    cache = make(device, k_mean=mean, **options)
    key, value = tokens(9).to(dtype), tokens(9, 1).to(dtype)
    append(cache, key, value)
    cache.save(tmp_path / "cache.kvq")
    loaded = QuantizedKVCache.load(tmp_path / "cache.kvq", device=device)
    assert_same_state(cache, loaded)
    assert torch.equal(loaded.k_mean.cpu(), mean) and loaded.v_mean is None
    for a, b in zip(cache.dequantized(), loaded.dequantized(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    query = tokens(1, 5, heads=H).to(dtype).to(device)
    assert torch.equal(cache.attend(query), loaded.attend(query))


def test_rows_of_different_lengths(device, tmp_path):
    cache = make(device, capacity=32)
    lengths = torch.tensor([5, 9], device=device)
    cache.append(tokens(9).to(device), tokens(9, 1).to(device), lengths)
    cache.save(tmp_path / "cache.kvq")
    loaded = QuantizedKVCache.load(tmp_path / "cache.kvq", device=device)
    assert loaded.lengths.tolist() == [5, 9] and loaded.capacity == 32
    for a, b in zip(go_on(cache), go_on(loaded), strict=True):
        assert torch.equal(a, b)


def test_between_devices(device, tmp_path):
    """Saved on the CPU and loaded on the device under test, and the other way round."""
    for source, target in (("cpu", device), (device, "cpu")):
        cache = filled(source, "wrapped", **KINDS["ring"])
        cache.save(tmp_path / "cache.kvq")
        loaded = QuantizedKVCache.load(tmp_path / "cache.kvq", device=target)
        assert loaded.device.type == torch.device(target).type
        assert_same_state(cache, loaded)
        for a, b in zip(go_on(cache), go_on(loaded), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    assert QuantizedKVCache.load(tmp_path / "cache.kvq").device.type == torch.device(device).type


def test_the_file_holds_only_the_tokens_held(tmp_path):
    cache = make("cpu", capacity=4096)
    append(cache, tokens(10), tokens(10, 1))
    cache.save(tmp_path / "cache.kvq")
    packed = sum(t[:, :, :10].nbytes for t in (*cache.keys, *cache.values))
    assert packed < (tmp_path / "cache.kvq").stat().st_size < packed + 2500


# The file format


def test_other_readers_of_safetensors(tmp_path):
    """The safetensors library reads our files, and we read its."""
    library = pytest.importorskip("safetensors.torch", reason="the hf extra is not installed")
    cache = filled("cpu", "wrapped", **KINDS["windows"])
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    expected = serialization.tensors(cache)
    found = library.load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], t) for name, t in expected.items())
    odd = {
        "a": torch.arange(5, dtype=torch.uint8), "empty": torch.zeros(2, 0, 3),
        "scalar": torch.tensor(3.5), "half": torch.randn(3, 7).half(),
    }  # fmt: skip
    library.save_file(odd, path, {"x": "y"})
    metadata, ours = tensor_file.read(path)
    assert metadata == {"x": "y"} and ours.keys() == odd.keys()
    assert all(
        torch.equal(ours[name], t) and ours[name].dtype == t.dtype for name, t in odd.items()
    )


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc here")
    return int(re.search(r"RssAnon:\s+(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]


def test_reading_maps_the_file(tmp_path):
    """Tensors cost no memory of their own; what is written to them stays out of the file."""
    path = tmp_path / "big.safetensors"
    tensor_file.write(path, {"x": torch.ones(16 << 20, dtype=torch.uint8)}, {})
    before = anonymous_bytes()
    _, found = tensor_file.read(path)
    assert int(found["x"].sum()) == 16 << 20
    assert anonymous_bytes() - before < 4 << 20
    found["x"][:5] = 7
    assert torch.equal(tensor_file.read(path)[1]["x"][:6], torch.ones(6, dtype=torch.uint8))


class MostAnonymousBytes:
    """The most memory of its own that the process has in a with block, above that at its start."""

    def __enter__(self) -> MostAnonymousBytes:
        self.start = self.most = anonymous_bytes()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.stop.wait(0.0005):
            self.most = max(self.most, anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()
        self.most = max(self.most, anonymous_bytes()) - self.start


def test_no_second_copy_in_memory(tmp_path):
    """Saving takes a few MiB, and loading the cache itself and a few MiB."""
    size, slack = 96 << 20, 24 << 20
    cache = QuantizedKVCache(1, 8, 128, k_format="none", v_format="none", capacity=size >> 13)
    assert cache.nbytes >= size
    key = torch.ones(1, 8, cache.capacity, 128)
    cache.append(key, key)
    del key
    with MostAnonymousBytes() as saving:
        cache.save(tmp_path / "cache.kvq")
    assert saving.most < slack
    cache = None
    with MostAnonymousBytes() as loading:
        cache = QuantizedKVCache.load(tmp_path / "cache.kvq")
    assert cache.capacity == size >> 13 and loading.most < size + slack


def test_strided_tensors_are_written_in_slabs(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "_SLAB_BYTES", 100)
    whole = torch.randn(3, 2, 40, 5)
    parts = {"cut": whole[:, :, 3:31], "turned": whole.permute(2, 0, 3, 1), "one": whole[:1, 1:2]}
    tensor_file.write(tmp_path / "x", parts, {})
    _, found = tensor_file.read(tmp_path / "x")
    assert all(torch.equal(found[name], part) for name, part in parts.items())


# What is refused


def check_refused(path: Path, message: str, load=QuantizedKVCache.load) -> None:
    with pytest.raises(
        ValueError, match=rf"^\[kvq.load\] {re.escape(path.name)} {message}"
    ) as error:
        load(path)
    text = str(error.value)
    assert "\n" not in text and not text.endswith(".") and len(text) < 250


@pytest.fixture
def small(tmp_path) -> Path:
    """A file of a small cache."""
    cache = QuantizedKVCache(1, 1, 32, k_format="int8-g32", v_format="q4_0-rot")
    cache.append(torch.randn(1, 1, 3, 32), torch.randn(1, 1, 3, 32))
    cache.save(tmp_path / "small.kvq")
    return tmp_path / "small.kvq"


def test_any_flipped_bit_is_refused(small):
    whole = small.read_bytes()
    for at in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        small.write_bytes(damaged)
        check_refused(small, "(is|has|holds)")


def test_any_truncation_is_refused(small):
    whole = small.read_bytes()
    for size in range(0, len(whole), 7):
        small.write_bytes(whole[:size])
        check_refused(small, "(is truncated|has . bytes and is no safetensors file)")
    small.write_bytes(whole + b"\0")
    check_refused(small, "is damaged: ")


def rewritten(path: Path, change) -> None:
    """The file with its description changed and signed again."""
    metadata, found = tensor_file.read(path)
    about = json.loads(metadata["torch_kvq"])
    found = {name: t.clone() for name, t in found.items()}
    change(about, found)
    about.pop("fingerprint")
    about["checksum"] = tensor_file.checksum(found)
    about["fingerprint"] = serialization._fingerprint(about, found)
    tensor_file.write(path, found, {"torch_kvq": json.dumps(about)})


REWRITES = {
    "layout": (lambda a, f: a.update(layout=2), "has layout 2, this version of torch_kvq reads"),
    "kind": (lambda a, f: a.update(kind="KVQCache"), "holds a KVQCache; load it with KVQ"),
    "signs": (
        lambda a, f: a["cache"]["signs"].update(v="00000000"),
        "holds a cache with v_signs 00000000, not",
    ),
    "seed": (lambda a, f: a["cache"]["arguments"].update(signs_seed=5), "holds a cache with v_sig"),
    "format": (
        lambda a, f: a["cache"]["arguments"].update(k_format="int4-g32"),
        r"holds k_codes as uint8 \[1, 1, 3, 32\], expected uint8 \[1, 1, 3, 16\]",
    ),
    "group": (
        lambda a, f: a["cache"]["arguments"].update(k_format="int8-g64"),
        "asks for what this version cannot make: .*int8-g64 needs head_dim",
    ),
    "scales": (
        lambda a, f: a["cache"]["arguments"].update(scale_dtype="float16"),
        r"holds k_scales as float32 \[1, 1, 3, 1\], expected float16",
    ),
    "dtype": (
        lambda a, f: a["cache"]["arguments"].update(dtype="load"),
        "names a dtype 'load', which torch does not have",
    ),
    "argument": (
        lambda a, f: a["cache"]["arguments"].pop("window"),
        "holds a cache with window None, not 0",
    ),
    "no head size": (
        lambda a, f: a["cache"]["arguments"].pop("head_dim"),
        "asks for what this version cannot make: .*head_dim",
    ),
    "lengths": (
        lambda a, f: a["cache"].update(lengths=4),
        r"holds k_codes as uint8 \[1, 1, 3, 32\], expected uint8 \[1, 1, 4, 32\]",
    ),
    "missing": (lambda a, f: f.pop("k_scales"), "does not hold the tensors that its description"),
    "more": (lambda a, f: f.update(x=torch.ones(1)), "does not hold the tensors that its descr"),
}  # fmt: skip


@pytest.mark.parametrize("case", REWRITES)
def test_a_mismatch_is_refused(case, small):
    change, message = REWRITES[case]
    rewritten(small, change)
    check_refused(small, message)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    tensor_file.write(path, {"weight": torch.ones(2)}, {"format": "pt"})
    check_refused(path, "holds no cache of torch_kvq")
    path.write_text("a text that is long enough to look like a header and is none")
    check_refused(path, "is truncated or no safetensors file")
    with pytest.raises(FileNotFoundError):
        QuantizedKVCache.load(tmp_path / "nothing.kvq")


def test_a_failed_write_leaves_the_old_file(small, monkeypatch):
    """A write that breaks off, full disk or interrupt: the old file stays, no other is left."""
    before = small.read_bytes()
    other = filled("cpu", "wrapped", **KINDS["growing"])
    for failure in (OSError("No space left on device"), KeyboardInterrupt()):

        def fail(*args, failure=failure):
            raise failure

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(type(failure)):
            other.save(small)
        assert small.read_bytes() == before and os.listdir(small.parent) == [small.name]
    monkeypatch.undo()
    other.save(small)
    assert_same_state(QuantizedKVCache.load(small), other)
    assert os.listdir(small.parent) == [small.name]

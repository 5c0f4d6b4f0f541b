"""Generate text with a dense and with quantised caches, and compare memory, quality and speed.

Each format generates from the prompt. Then held-out text is fed to the model a few tokens at a
time, so that every position reads quantised keys and values, and the predictions are compared
with those of the dense cache: KLD is the divergence in nats per token, same-top the share of
tokens with the same most likely successor.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from torch_kvq.cli import models
from torch_kvq.cli.models import LoadedModel
from torch_kvq.cli.quality import Quality, QualityMeter
from torch_kvq.cli.terminal import CommandError, Progress, table
from torch_kvq.formats import KVFormat

DENSE = "dense"
DEFAULT_FORMATS = ("int8", "int4-rot", "int8/int4-rot")
PROMPT = 'def read_config(path):\n    """Read'
#: Tokens fed at a time when quality is measured, after a first single one.
CHUNK = 32
WINDOW = 1024
_WARM_UP = 3


@dataclass(frozen=True)
class Generated:
    text: str
    tokens: list[int]
    tokens_per_second: float | None


@dataclass(frozen=True)
class Memory:
    bytes_per_token: int
    bf16_bytes_per_token: int
    cache_bytes: int
    cache_tokens: int


def add_parser(commands: Any) -> argparse.ArgumentParser:
    summary, _, details = __doc__.partition("\n\n")
    parser = commands.add_parser("demo", help=summary, description=f"{summary} {details}")
    parser.add_argument(
        "--model",
        metavar="PATH_OR_HF_ID",
        help="model folder or Hugging Face name; without it the embedded 2 M model",
    )
    parser.add_argument("--prompt", default=PROMPT, help="text to continue (default: some Python)")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--device", choices=("auto", "cpu", "mps"), default="auto")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="of the model; auto: as it was saved",
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        default=list(DEFAULT_FORMATS),
        metavar="FORMAT",
        help=f"NAME[-gGROUP][-rot], or two as K/V (default: {' '.join(DEFAULT_FORMATS)})",
    )
    parser.add_argument(
        "--quality-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="held-out tokens that quality is measured on (default: 1024)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace) -> int:
    formats = parse_formats(args.formats)
    for name in ("new_tokens", "quality_tokens"):
        if getattr(args, name) < 2:
            option = "--" + name.replace("_", "-")
            raise CommandError(f"{option} must be at least 2, got {getattr(args, name)}")
    models.require_transformers()
    device = models.choose_device(args.device)
    loaded = models.load(args.model, device, args.dtype)
    _check_model(loaded, formats)
    inputs = _prompt(loaded, args.prompt, args.new_tokens)
    held_out = loaded.held_out(args.quality_tokens)
    windows = held_out.split(min(WINDOW, loaded.context))
    names = [DENSE, *formats]
    steps = len(names) * (_WARM_UP + args.new_tokens + sum(len(_chunks(w)) for w in windows))
    with Progress(steps) as progress, torch.inference_mode():
        texts = {}
        for name in names:
            progress.stage(f"generating with {name}")
            expected = progress.done + _WARM_UP + args.new_tokens
            generate(loaded, inputs, name, _WARM_UP, progress)
            texts[name] = generate(loaded, inputs, name, args.new_tokens, progress)
            progress.advance(expected - progress.done)  # a text may end early
        quality, memory = compare(loaded, windows, names, progress)
    rows = [
        {
            "format": name,
            **asdict(texts[name]),
            "tokens_as_dense": _common(texts[name].tokens, texts[DENSE].tokens),
            **asdict(memory[name]),
            "ratio_to_bf16": memory[name].bytes_per_token / memory[name].bf16_bytes_per_token,
            **asdict(quality[name]),
        }
        for name in names
    ]
    found = {
        "model": args.model or "embedded",
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "device": device,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "prompt": args.prompt,
        "rows": rows,
    }
    print(json.dumps(found, indent=2) if args.json else describe(found))
    return 0


def parse_formats(specs: Sequence[str]) -> list[str]:
    """Check ``K`` or ``K/V`` specs; dense is always measured and may be named."""
    found: list[str] = []
    for spec in (part for arg in specs for part in arg.split(",") if part):
        sides = spec.split("/")
        if len(sides) > 2:
            raise CommandError(f"--formats: {spec!r} should be FORMAT or K_FORMAT/V_FORMAT")
        try:
            for side in sides:
                if spec != DENSE:
                    KVFormat.parse(side)
        except ValueError as error:
            raise CommandError(f"--formats: {error}") from None
        if spec not in (DENSE, *found):
            found.append(spec)
    return found


def make_cache(loaded: LoadedModel, name: str, tokens: int | None = None) -> Any:
    """A cache of a format; dense is transformers' own. With ``tokens``, of just that capacity."""
    from transformers import DynamicCache

    from torch_kvq.hf import KVQCache

    config = loaded.model.config
    if name == DENSE:
        return DynamicCache(config=config)
    k_format, _, v_format = name.partition("/")
    return KVQCache(config, k_format, v_format or None, max_cache_len=tokens)


def _check_model(loaded: LoadedModel, formats: Sequence[str]) -> None:
    """Refuse now what the cache would refuse in the middle of the work."""
    from torch_kvq.hf import fit_group

    config = loaded.model.config.get_text_config(decoder=True)
    size = getattr(config, "head_dim", None)
    size = size or config.hidden_size // config.num_attention_heads
    try:
        for name in formats:
            make_cache(loaded, name)
            for side in name.split("/"):
                fit_group(side, size).check_head_dim(size)
    except ValueError as error:
        raise CommandError(str(error)) from None


def _prompt(loaded: LoadedModel, prompt: str, new_tokens: int) -> dict[str, torch.Tensor]:
    ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise CommandError("--prompt: the text is empty")
    if ids.shape[1] + new_tokens > loaded.context:
        raise CommandError(
            f"a prompt of {ids.shape[1]} tokens and {new_tokens} new ones exceed the model's "
            f"context of {loaded.context}"
        )
    ids = ids.long().to(loaded.model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class _Stopwatch:
    """A transformers streamer that notes when tokens come."""

    def __init__(self, progress: Progress) -> None:
        self.times: list[float] = []
        self._progress, self._prompt_seen = progress, False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self._progress.advance()

    def end(self) -> None:
        pass


def generate(
    loaded: LoadedModel, inputs: dict, name: str, new_tokens: int, progress: Progress
) -> Generated:
    """Greedy text. Speed is that of the median decode step."""
    from torch_kvq.hf import CACHE_ARGUMENT

    model, tokenizer = loaded.model, loaded.tokenizer
    model.set_attn_implementation("sdpa" if name == DENSE else "kvq")
    watch = _Stopwatch(progress)
    pad = tokenizer.pad_token_id
    out = model.generate(
        **inputs,
        **{CACHE_ARGUMENT: make_cache(loaded, name)},
        use_cache=True,  # some checkpoints' generation_config says false
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=watch,
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
    )
    new = out[0, inputs["input_ids"].shape[1] :]
    steps = [after - before for before, after in itertools.pairwise(watch.times)]
    speed = 1 / statistics.median(steps) if steps else None
    return Generated(tokenizer.decode(new, skip_special_tokens=True), new.tolist(), speed)


def _chunks(window: torch.Tensor) -> list[torch.Tensor]:
    """One token, then CHUNK at a time: a longer start would be a prefill, which attends to the
    keys and values before they are quantised."""
    return [window[:1], *window[1:].split(CHUNK)]


def compare(
    loaded: LoadedModel, windows: Sequence[torch.Tensor], names: Sequence[str], progress: Progress
) -> tuple[dict[str, Quality], dict[str, Memory]]:
    """Teacher-forced through every cache at once; the memory is that of the first window."""
    from torch_kvq.hf import CACHE_ARGUMENT

    model = loaded.model
    model.set_attn_implementation("kvq")  # reads a dense cache too, through sdpa
    meters = {name: QualityMeter() for name in names}
    memory: dict[str, Memory] = {}
    progress.stage("measuring quality on held-out text")
    for window in windows:
        caches = {name: make_cache(loaded, name, tokens=len(window)) for name in names}
        first = 0
        for chunk in _chunks(window):
            last = first + len(chunk)
            ids = chunk[None].to(model.device)
            targets = window[first + 1 : last + 1]
            exact = None
            for name, cache in caches.items():
                logits = model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True).logits[0]
                exact = logits if exact is None else exact
                meters[name].add(exact, logits, targets)
                progress.advance()
            first = last
        memory = memory or {name: _memory(cache, len(window)) for name, cache in caches.items()}
    return {name: meter.result() for name, meter in meters.items()}, memory


def _memory(cache: Any, tokens: int) -> Memory:
    """Of a cache that holds ``tokens`` tokens of one sequence."""
    per_token = bf16 = total = 0
    for layer in cache.layers:
        packed = getattr(layer, "cache", None)
        if packed is None:
            sides = (layer.keys, layer.values)
            per_token += sum(t.shape[1] * t.shape[3] * t.itemsize for t in sides)
            bf16 += sum(t.shape[1] * t.shape[3] * 2 for t in sides)
            total += sum(t.nbytes for t in sides)
            continue
        for fmt, size in (
            (packed.k_format, packed.head_dim),
            (packed.v_format, packed.value_dim),
        ):
            row = fmt.row_nbytes(size, packed.dtype, packed.scale_dtype)
            per_token += packed.kv_heads * row
            bf16 += packed.kv_heads * size * 2
        total += packed.nbytes
    return Memory(per_token, bf16, total, tokens)


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def describe(found: dict[str, Any]) -> str:
    """Texts and table for people."""
    dense, rows = found["rows"][0], found["rows"]
    embedded = found["model"] == "embedded"
    name = "the embedded model" if embedded else found["model"]
    lines = [
        f"{name}: {found['parameters'] / 1e6:,.1f} M parameters, {found['dtype']}, "
        f"on {found['device']}",
        "",
        "prompt:",
        _indented(found["prompt"]),
    ]
    for row in rows:
        same, count = row["tokens_as_dense"], len(row["tokens"])
        note = (
            f" (all {count} tokens as dense)"
            if row["tokens"] == dense["tokens"]
            else (f" (the first {same} tokens as dense)")
        )
        lines += ["", f"{row['format']}{'' if row is dense else note}:", _indented(row["text"])]
    cells = [
        (
            row["format"],
            f"{row['bytes_per_token']:,}",
            f"{row['cache_bytes'] / 2**20:.2f}",
            f"{row['ratio_to_bf16']:.3f}",
            "-" if row is dense else f"{row['kld']:.1e}",
            "-" if row is dense else f"{100 * row['same_top']:.1f} %",
            "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.0f}",
        )
        for row in rows
    ]
    header = ("cache", "bytes/token", "MiB", "of bf16", "KLD", "same top", "tokens/s")
    lines += [
        "",
        table(header, cells),
        "",
        f"MiB: of a cache of {dense['cache_tokens']:,} tokens.",
        f"KLD (nats/token), same top: against dense, over {dense['quality_tokens']:,} held-out "
        "tokens that all read",
        "quantised keys and values.",
        "tokens/s: the median decode step of this short text, in which attention hardly counts.",
    ]
    if embedded:
        lines.append("A model this small has many close calls: 4-bit texts part from dense early.")
    return "\n".join(lines)


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())

"""Model x use x carrier x kind of cache: the tokens of a dense cache of the dequantised values.

By default one cell of each model and use, its carrier and kind taken in turn; the full product is
marked slow.
"""

from __future__ import annotations

import copy
import warnings
from itertools import combinations, product

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

from transformers import AutoModelForCausalLM, pipeline  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402

from tests.hf_helpers import (  # noqa: E402
    TINY,
    Tape,
    attention,
    dense_implementation,
    dense_twin,
    generate,
    prompt,
    tiny_model,
    tokens,
)
from torch_kvq.hf import CACHE_ARGUMENT, KVQCache  # noqa: E402

#: {kind of cache: KVQCache's arguments}
KINDS = {
    "growing": {"k_format": "int8", "v_format": "int4-rot"},
    "static": {"k_format": "int8", "v_format": "int4-rot", "max_cache_len": 96},
    "windows": {"k_format": "int4", "sink_tokens": 2, "recent_tokens": 5},
    "mixed": {"k_format": "tq4", "v_format": "q4_0"},
    "skip": {"k_format": "fp8_e4m3", "v_format": "int4-g32", "skip_layers": [0]},
    "layers": {"k_format": "int8", "layer_formats": {-1: ("q8_0", "tq3")}},
}
CARRIERS = ("handle", "tensor")


class Use:
    """One way to call generate(), from a fresh cache."""

    def __init__(self, rows=1, length=12, padded=False, **options):
        self.rows, self.length, self.padded, self.options = rows, length, padded, options

    def inputs(self, model):
        vocabulary = min(96, model.config.vocab_size)
        given = prompt(self.rows, self.length, padded=self.padded, device=model.device)
        assert int(given["input_ids"].max()) < vocabulary
        return given

    def __call__(self, model, cache, implementation):
        return generate(model, self.inputs(model), cache, implementation, **self.options)


class Assisted(Use):
    """A draft model that is often right: the model with noise."""

    def __call__(self, model, cache, implementation):
        draft = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(0)
        for parameter in draft.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.data.add_(noise * parameter.data.std() * 0.02)
        draft.generation_config.num_assistant_tokens = 4
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        options = {"assistant_model": draft, **self.options}
        return generate(model, self.inputs(model), cache, implementation, **options)


class TwoTurns(Use):
    def __call__(self, model, cache, implementation):
        first = generate(model, self.inputs(model), cache, implementation, max_new_tokens=9)
        more = tokens(self.rows, 5, seed=6).to(first.device)
        ids = torch.cat([first, more], dim=1)
        second = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return generate(model, second, cache, implementation)


class Dictionary(Use):
    def __call__(self, model, cache, implementation):
        options = {"return_dict_in_generate": True, "output_logits": True}
        out = generate(model, self.inputs(model), cache, implementation, **options)
        assert getattr(out, CACHE_ARGUMENT) is cache
        assert len(out.logits) == 16
        assert int(cache.get_seq_length()) == out.sequences.shape[1] - 1
        return out.sequences


class _Collect(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


class Streaming(Use):
    def __call__(self, model, cache, implementation):
        streamer = _Collect()
        out = generate(model, self.inputs(model), cache, implementation, streamer=streamer)
        assert streamer.ended and streamer.tokens == out.flatten().tolist()
        return out


class _NoEvent:
    """torch.Event, for a device that has none."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass


class Deferred(Use):
    """Stop checks one step late, as on MPS: the step too many is cropped, then a second turn."""

    def __call__(self, model, cache, implementation):
        from transformers.generation.utils import DeferredStopCheck

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DeferredStopCheck, "is_supported", staticmethod(lambda *a, **k: True))
            if model.device.type == "cpu":
                patch.setattr(torch, "Event", _NoEvent)
            plain = generate(model, self.inputs(model), cache, implementation, max_new_tokens=6)
            end = int(plain[0, -1])  # the next time it comes it ends the answer
            fresh = torch.cat([plain, tokens(1, 4, seed=7).to(plain.device)], dim=1)
            inputs = {"input_ids": fresh, "attention_mask": torch.ones_like(fresh)}
            out = generate(model, inputs, cache, implementation, eos_token_id=[end, *range(2, 40)])
            assert int(cache.get_seq_length()) == out.shape[1] - 1
            more = torch.cat([out, tokens(1, 3, seed=8).to(out.device)], dim=1)
            inputs = {"input_ids": more, "attention_mask": torch.ones_like(more)}
            return generate(model, inputs, cache, implementation, max_new_tokens=6)


class Pipeline(Use):
    def __call__(self, model, cache, implementation):
        with attention(model, implementation):
            pipe = pipeline("text-generation", model=model, tokenizer=word_tokenizer(model))
            out = pipe(
                "t5 t6 t7 t8 t9 t5 t6",
                max_new_tokens=12,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                return_tensors=True,
                **{CACHE_ARGUMENT: cache},
            )
        return torch.tensor(out[0]["generated_token_ids"])


def word_tokenizer(model):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"t{i}": i for i in range(model.config.vocab_size)}
    made = Tokenizer(models.WordLevel(words, unk_token="t0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="t0")


USES = {
    "greedy": Use(),
    "sampling": Use(do_sample=True, temperature=1.5, top_k=20),
    "left_padding": Use(rows=3, padded=True),
    "beams": Use(rows=2, num_beams=4, num_return_sequences=2),
    "assisted": Assisted(),
    "prompt_lookup": Use(prompt_lookup_num_tokens=3, max_new_tokens=20),
    "chunked_prefill": Use(length=31, prefill_chunk_size=7),
    "two_turns": TwoTurns(),
    "return_sequences": Use(do_sample=True, num_return_sequences=3),
    "past_the_window": Use(length=30, max_new_tokens=40),
    "deferred": Deferred(),
    "dictionary": Dictionary(),
    "streaming": Streaming(),
    "pipeline": Pipeline(),
}


@pytest.fixture(scope="module")
def models(device):
    made: dict = {}

    def get(name: str):
        if name not in made:
            made[name] = tiny_model(name, device)
        return made[name]

    return get


def check_cell(model, use: str, carrier: str, kind: str) -> None:
    # Rings of 16 slots: they wrap in every cell.
    ours = KVQCache(model.config, **KINDS[kind], carrier=carrier, rollback_tokens=8)
    tape = Tape(ours)
    dense = dense_implementation(model)
    with warnings.catch_warnings():
        action = "error" if dense == "sdpa" else "ignore"  # only eager may compute on the tensors
        warnings.filterwarnings(action, ".*dequantises the whole cache", UserWarning)
        out = USES[use](model, ours, "kvq" if carrier == "handle" else dense)
    mask = USES[use].inputs(model)["attention_mask"]
    padding = (mask == 0).sum(1) if USES[use].padded else None
    twin = dense_twin(ours, tape, model.config, padding)
    assert torch.equal(out, USES[use](model, twin, dense))
    assert tape.is_played()


CELLS = list(product(TINY, USES, CARRIERS, KINDS))


def _is_default(model: str, use: str, carrier: str, kind: str) -> bool:
    row, column = list(TINY).index(model), list(USES).index(use)
    return kind == list(KINDS)[(row + column) % 6] and carrier == CARRIERS[(row // 2 + column) % 2]


DEFAULT = [cell for cell in CELLS if _is_default(*cell)]


def test_the_default_cells_sample_every_pair():
    for one, two in combinations(range(4), 2):
        pairs = {(cell[one], cell[two]) for cell in CELLS}
        assert pairs == {(cell[one], cell[two]) for cell in DEFAULT}


@pytest.mark.parametrize(
    "model,use,carrier,kind",
    [
        pytest.param(*cell, id="-".join(cell), marks=[] if cell in DEFAULT else pytest.mark.slow)
        for cell in CELLS
    ],
)
def test_cell(models, model, use, carrier, kind):
    check_cell(models(model), use, carrier, kind)


TRAINED = list(product(USES, (("handle", "growing"), ("tensor", "static"))))


@pytest.mark.parametrize(
    "use,cache",
    [
        pytest.param(*cell, marks=[] if number % 5 == 0 else pytest.mark.slow)
        for number, cell in enumerate(TRAINED)
    ],
)
def test_trained_cell(trained, use, cache):
    check_cell(trained, use, *cache)


@pytest.fixture(scope="module")
def trained(code_model, device):
    model = AutoModelForCausalLM.from_pretrained(code_model, dtype=torch.float32)
    return model.eval().to(device)

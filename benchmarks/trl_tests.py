"""
TRL's own tests of `GRPOTrainer`, run twice: with TRL's two names, and with ours in their place.

    git clone https://github.com/huggingface/trl && git -C trl checkout f2cd57710ae345ea6428ae95363267fcf38a3dc8
    pip install -c constraints.txt -e '.[test]' jmespath tiktoken
    pip download --no-deps dashscope==2.0.2
    python benchmarks/trl_tests.py --trl trl --tokenizer dashscope-2.0.2-py3-none-any.whl

The file is `tests/test_grpo_trainer.py` at that commit (24 July 2026), without its classes `TestGRPOTrainerVLM` and
`TestGRPOTrainerSlow`, which need image models and a GPU. A test counts where it passes with the installed TRL. What it
does not cover is skipped by the tests themselves: Liger, vLLM and bitsandbytes where these are not installed.

Nothing is downloaded from the Hub. Its tiny models and its data set are replaced by stand-ins in directories of the
same names under the working directory, where `from_pretrained` and `load_dataset` find them: the architectures and
sizes of TRL's tiny models with random weights, and the data set's sentences. The tests spell out tokens of Qwen's
vocabulary; its ranks are in the wheel of `dashscope`, of which nothing else is used.

The names are swapped by a pytest plugin, this file, before the test module is imported.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
import zipfile
from collections.abc import Iterator
from pathlib import Path


ORGANIZATION = "trl-internal-testing"
TEST_FILE = "test_grpo_trainer.py"
SELECTION = "not TestGRPOTrainerVLM and not TestGRPOTrainerSlow"
RANKS = "dashscope/resources/qwen.tiktoken"
FIRST_SPECIAL_TOKEN = 151643
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
    *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>", "<|finetune_right_pad_id|>"),
]
# not special to the decoder: the text of a tool call has to be read
TEXT_TOKENS = {"<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"}
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SIZES = {
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# name of the stand-in -> model type, further settings, chat template of TRL
CAUSAL_MODELS = {
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", {}, "qwen2_5"),
    "tiny-Qwen3ForCausalLM": ("qwen3", {}, "qwen3"),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", {"num_experts": 4, **EXPERTS}, "qwen3"),
    "tiny-LlamaForCausalLM-3.2": ("llama", {}, "llama3_2"),
    "tiny-MistralForCausalLM-0.2": ("mistral", {}, "qwen2_5"),
    "tiny-Gemma2ForCausalLM": ("gemma2", {"head_dim": 2}, "gemma"),
    "tiny-Cohere2ForCausalLM": ("cohere2", {}, "cohere2"),
    "tiny-Glm4MoeForCausalLM": (
        "glm4_moe",
        {"n_routed_experts": 4, "head_dim": 2, "attention_bias": True, "use_qk_norm": True, **EXPERTS},
        "glm4moe",
    ),
    "tiny-GptOssForCausalLM": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}, "gptoss"),
}
REWARD_MODELS = {
    "tiny-Qwen2ForSequenceClassification-2.5": ("qwen2", "qwen2_5"),
    "tiny-Qwen3ForSequenceClassification": ("qwen3", "qwen3"),
    "tiny-LlamaForSequenceClassification-3.2": ("llama", "llama3_2"),
}
REMOTE_MODEL = {
    "configuration_remote.py": """\
from transformers import LlamaConfig


class RemoteConfig(LlamaConfig):
    model_type = "remote"
""",
    "modeling_remote.py": """\
from transformers import LlamaForCausalLM

from .configuration_remote import RemoteConfig


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
""",
}
# what the tests import of TRL's `testing_utils`: that of the commit asks the installed TRL for more than it has
TESTING_UTILS = """\
import importlib.util

import pytest
import torch


def needs(*names):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


require_bitsandbytes = needs("bitsandbytes")
require_jmespath = needs("jmespath")
require_kernels = needs("kernels")
require_liger_kernel = needs("liger_kernel")
require_peft = needs("peft")
require_vision = needs("PIL")
require_vllm = needs("vllm")
require_torch_accelerator = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def is_ampere_or_newer(device_index=0):
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device_index) >= (8, 0)


class TrlTestCase:
    @pytest.fixture(autouse=True)
    def set_tmp_dir(self, tmp_path):
        self.tmp_dir = str(tmp_path)
"""
SENTENCES = [
    *("Beautiful is better than ugly.", "Explicit is better than implicit.", "Simple is better than complex."),
    *("Complex is better than complicated.", "Flat is better than nested.", "Sparse is better than dense."),
    *("Readability counts.", "Special cases aren't special enough to break the rules.", "Now is better than never."),
    *("Although practicality beats purity.", "Errors should never pass silently.", "Unless explicitly silenced."),
    *("In the face of ambiguity, refuse the temptation to guess.", "Although never is often better than right now."),
    *("There should be one obvious way to do it.", "Although that way may not be obvious at first."),
    *("If it is hard to explain, it's a bad idea.", "If it is easy to explain, it may be a good idea."),
    "Namespaces are one honking great idea.",
]


def pytest_configure() -> None:
    """Put our names in the place of TRL's; pytest calls it where this file is a plugin."""
    import trl

    import seeupo_trl

    trl.GRPOConfig, trl.GRPOTrainer = seeupo_trl.SeeUPOConfig, seeupo_trl.SeeUPOTrainer


def make_tokenizer(wheel: str):
    """Qwen's tokenizer, without a chat template."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(wheel) as archive:
        ranks = archive.extract(RANKS, directory)
        backend = TikTokenConverter(vocab_file=ranks, pattern=SPLIT, extra_special_tokens=[]).converted()
    backend.add_tokens(
        [AddedToken(token, special=token not in TEXT_TOKENS, normalized=False) for token in SPECIAL_TOKENS]
    )
    if backend.token_to_id(SPECIAL_TOKENS[0]) != FIRST_SPECIAL_TOKEN:
        raise ValueError(f"{wheel} has another vocabulary than Qwen's: give the wheel of dashscope 2.0.2.")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )


def save(model, tokenizer, directory: Path) -> None:
    """Save a model whose weights are large enough to be trained by the tests' few steps."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_stand_ins(directory: Path, wheel: str) -> None:
    """Write the stand-ins of the Hub's models and data set to a directory."""
    import importlib.resources

    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = make_tokenizer(wheel)

    def prepare(model_type: str, settings: dict, template: str):
        file = importlib.resources.files("trl").joinpath(f"chat_templates/{template}.jinja")
        tokenizer.chat_template = file.read_text()
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        return AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **SIZES, **ids, **settings)

    for name, (model_type, settings, template) in CAUSAL_MODELS.items():
        config = prepare(model_type, settings, template)
        save(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), tokenizer, directory / name)
    for name, (model_type, template) in REWARD_MODELS.items():
        config = prepare(model_type, {"num_labels": 1}, template)
        save(AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16), tokenizer, directory / name)

    config = prepare("llama", {}, "llama3_2")
    remote = directory / "tiny-RemoteForCausalLM"
    save(LlamaForCausalLM(config).to(torch.bfloat16), tokenizer, remote)
    for name, text in REMOTE_MODEL.items():
        (remote / name).write_text(text)
    settings = json.loads((remote / "config.json").read_text())
    settings |= {
        "model_type": "remote",
        "architectures": ["RemoteForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_remote.RemoteConfig",
            "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
        },
    }
    (remote / "config.json").write_text(json.dumps(settings))

    prompts = [" ".join(sentence.split()[:-1]) for sentence in SENTENCES]
    rows = {
        "standard_prompt_only": prompts,
        "conversational_prompt_only": [[{"role": "user", "content": f"What follows {prompt}?"}] for prompt in prompts],
    }
    configs = []
    for name, prompt in rows.items():
        (directory / "zen" / name).mkdir(parents=True)
        for split, part in (("train", prompt[:4]), ("test", prompt[17:])):
            Dataset.from_dict({"prompt": part}).to_parquet(directory / "zen" / name / f"{split}.parquet")
        files = [{"split": split, "path": f"{name}/{split}.parquet"} for split in ("train", "test")]
        configs.append({"config_name": name, "data_files": files})
    (directory / "zen" / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")


def run_tests(directory: Path, name: str, plugin: list[str], options: list[str]) -> dict[str, tuple[str, str]]:
    """Outcome of each test and the reason that pytest gives."""
    report = directory / f"{name}.xml"
    roots = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "--junit-xml", report]
        + [*plugin, "-k", SELECTION, *options, f"tests/{TEST_FILE}"],
        cwd=directory,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, roots))},
    )
    return dict(_outcomes(report))


def _outcomes(report: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname').rpartition('.')[2]}::{case.get('name')}"
        outcome, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome, reason = child.tag, child.get("message").splitlines()[0]
        yield name, (outcome, reason)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help="a checkout of TRL's repository")
    parser.add_argument("--tokenizer", required=True, help="the wheel of dashscope")
    parser.add_argument("--work", type=Path, help="keep the stand-ins in this directory for the next run")
    parser.add_argument("--json", type=Path, help="write both outcomes of every test to this file")
    args, options = parser.parse_known_args()  # what is left goes to pytest, as `-n 2`
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        if not (work / ORGANIZATION).is_dir():
            write_stand_ins(work / ORGANIZATION, args.tokenizer)
        (work / "tests").mkdir(exist_ok=True)
        for name in ("__init__.py", "conftest.py", TEST_FILE):
            shutil.copy(args.trl / "tests" / name, work / "tests")
        (work / "tests" / "testing_utils.py").write_text(TESTING_UTILS)
        stock = run_tests(work, "stock", [], options)
        ours = run_tests(work, "ours", ["-p", Path(__file__).stem], options)
    if args.json:
        args.json.write_text(json.dumps({"stock": stock, "ours": ours}, indent=1))

    counted = [name for name, (outcome, _) in stock.items() if outcome == "passed"]
    passed = [name for name in counted if ours.get(name, ("missing",))[0] == "passed"]
    print(f"\n{len(stock)} tests; {len(counted)} pass with TRL's trainer, {len(passed)} of these with ours")
    print("\nNot counted")
    for name, (outcome, reason) in stock.items():
        if outcome != "passed":
            print(f"  {name}: {outcome}, {reason[:150]}")
    print("\nNot passed with ours")
    for name in counted:
        if name not in passed:
            print(f"  {name}: {': '.join(ours.get(name, ('missing', '')))[:300]}")


if __name__ == "__main__":
    main()

"""
One full iteration of a Qwen3-14B-shaped model - rollout stub, all turn updates, checkpoint, reload - with its memory.

    accelerate launch --config_file CONFIG benchmarks/dry_run_14b.py                      # what fits the machine
    accelerate launch --config_file CONFIG benchmarks/dry_run_14b.py --shape 8,40,151936  # Qwen3-14B itself
"""

import argparse
import gc
import hashlib
import json
import random
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import torch
from accelerate import PartialState
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer, Trajectory, Turn
from seeupo_trl.live_bytes import LiveBytes


def shaped_config(width: int, layers: int, vocabulary: int) -> Qwen3Config:
    """A config with the proportions of Qwen3-14B, which is width 8 with 40 layers and 151936 tokens."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=640 * width,
        intermediate_size=2176 * width,
        num_hidden_layers=layers,
        num_attention_heads=5 * width,
        num_key_value_heads=width,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        rope_theta=1e6,
    )

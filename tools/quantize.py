"""Quantize a float model to W8A8 with an int8 KV cache: kvc8-quantize.

    kvc8-quantize model_dir -o out --calib-file texts.jsonl

The result has msModelSlim's ascendV1 layout and differs from msModelSlim's in its numbers:

    K and V      symmetric per channel, K measured after RoPE, where the cache stores it
    activations  static per tensor, from the least and greatest value of all texts
    weights      symmetric per output channel, computed in float32
"""

import argparse
import sys
import time
from fnmatch import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvc8.ir.capture import capture, config_dtype
from kvc8.ir.checkpoint import Checkpoint, open_checkpoint
from kvc8.ir.errors import KVC8Error, ModelError
from kvc8.ir.model_files import place
from kvc8.ir.program import Program
from kvc8.ir.recipe import stored_names
from kvc8.ir.w8a8 import Range, kv_scale, part_types, quantize_linear
from kvc8.tools.calibrate import Site, Statistics, calibrate, sites, vocabulary
from kvc8.tools.calibration_data import Text, encode_texts, read_texts
from kvc8.tools.quantize_writer import (
    DESCRIPTION,
    WEIGHTS,
    Entry,
    copy_small_files,
    new_directory,
    write_json,
    write_tensors,
)

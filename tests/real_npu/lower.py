"""Write lowered programs as text, for check.py to read beside the real torch_npu.

    python lower.py OUT

transformers imports torch_npu by itself wherever it finds it, so programs are made here, in kvc8's
own environment, and only their text goes over: OUT/MODEL-DTYPE-PHASE.py.
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import c8
from support.sparse import LLAMA_70B, write_sparse
from support.tiny_models import write_model, write_tokenizer

from kvc8.backends.npu import legality
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import open_checkpoint
from kvc8.ir.program import Program
from kvc8.ir.text import show
from kvc8.passes import pipeline
from kvc8.passes.options import Options

CHECKPOINTS = Path(__file__).resolve().parent.parent / "golden" / "checkpoints"
# Of heads that an NPU takes; all linears in W8A8, so that SwiGLU is fused too.
KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma3")
MIXTURES = ("qwen3_moe", "glm4_moe")
# Of the sizes that ops take of latents; it has no scales, and keeps its latents float.
LATENT = {
    **{"tie_word_embeddings": False, "num_hidden_layers": 2, "num_key_value_heads": 4},
    **{"kv_lora_rank": 512, "q_lora_rank": 64, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128},
    **{"v_head_dim": 128, "n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4},
    **{"topk_group": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
}
SHARDED, RANKS = ("tiny-llama-offsets", "tiny-qwen2-offsets"), 2  # in bfloat16 too; with biases
# Of heads that it takes with NZ pages: both ways to write to them.
NZ_KINDS = ("llama", "qwen3")
NZ = {
    "tie_word_embeddings": False,
    "num_hidden_layers": 2,
    "hidden_size": 80,
    "num_attention_heads": 10,
    "num_key_value_heads": 1,
    "head_dim": 128,
}
TINY = {"tie_word_embeddings": False, "num_hidden_layers": 2, "head_dim": 32}
LAYERS = {"gemma3": {"layer_types": ["sliding_attention", "full_attention"]}}
# Symmetric; with zero points and biases; msModelSlim's newer format.
VENDOR = ("llama_fp16_m3", "qwen2_fp16_none_asym", "v1_qwen2_fp16_w8a8c8")
SMOLLM2 = LLAMA_70B | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 3,  # the others are the same calls again
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
BFLOAT16 = ("llama_fp16_m3", "tiny-llama-offsets", "tiny-qwen3")  # models lowered in it too
BY_TOKEN = ("smollm2-shape", "tiny-qwen3")  # caches with a scale a token too
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SOC, BLOCK_SIZE = "ascend910b", 128


def models(scratch: Path) -> Iterator[tuple[str, Path]]:
    """The directories of models, by name."""
    yield "smollm2-shape", write_sparse(scratch / "smollm2", SMOLLM2)
    for name in VENDOR:
        yield name, CHECKPOINTS / name / "quant"
    write_model(scratch / "latent", "deepseek_v3", 0, LATENT)
    yield "tiny-deepseek_v3", scratch / "latent"
    for kind in (*KINDS, *MIXTURES):
        yield from tiny(scratch, f"tiny-{kind}", kind, TINY | LAYERS.get(kind, {}))


def tiny(scratch: Path, name: str, kind: str, sizes: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """A model with a symmetric cache, and with one of zero points to both ends."""
    model, symmetric, offsets = (scratch / f"{name}-{part}" for part in ("float", "sym", "asym"))
    model.mkdir()
    write_model(model, kind, 0, sizes)
    write_tokenizer(model)
    c8.quantize_model(model, symmetric, "all")
    yield name, symmetric
    c8.with_offsets(symmetric, offsets)
    yield f"{name}-offsets", offsets


def main(out: str) -> None:
    """Lower each model in each dtype."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, directory in models(Path(scratch)):
            for dtype_name, dtype in DTYPES.items():
                if dtype is torch.bfloat16 and name not in BFLOAT16:
                    continue  # the same calls again
                program = capture(open_checkpoint(directory), dtype)
                if name in BY_TOKEN:
                    own, tokens = program.copy(), Options(kv_scales_by="token")
                    pipeline.run(own, pipeline.quantize_passes(tokens))
                    write(folder, f"{name}-by-token-{dtype_name}", own, tokens)
                if name in SHARDED:
                    whole, divided = program.copy(), Options(ranks=RANKS)
                    pipeline.run(whole, pipeline.quantize_passes(divided))
                    write(folder, f"{name}-{RANKS}-ranks-{dtype_name}", whole, divided)
                pipeline.run(program, pipeline.QUANTIZE)
                write(folder, f"{name}-{dtype_name}", program, Options())
        for kind in NZ_KINDS:
            *_, (name, directory) = tiny(Path(scratch), f"nz-{kind}", kind, NZ)
            program = capture(open_checkpoint(directory), torch.bfloat16)
            pipeline.run(program, pipeline.QUANTIZE)
            write(folder, f"{name}-bfloat16", program, Options(kv_format="nz"))


def write(folder: Path, name: str, program: Program, options: Options) -> None:
    """Write the fused and the unfused program of each phase."""
    for fuse, mark in (("on", ""), ("off", "-unfused")):
        phases, _ = pipeline.lower_for_npu(program, replace(options, fuse=fuse))
        for phase, lowered in phases.items():
            legality.check(lowered, SOC, BLOCK_SIZE)
            (folder / f"{name}{mark}-{phase}.py").write_text(show(lowered) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Published C8 checkpoints as directories without data: right names, labels, dtypes and shapes.

Labels are those of the vendor's recipes (msModelSlim lab_practice: qwen3-32b-dense-w8a8c8,
glm4_7_moe-w8a8-v1 with C8, minimax_m27_w8a8c8, qwen3-30b-a3b-w8a8 with C8), and the parts of each
label those of its document (quantization_formats/ascendv1.md); the tool itself was not run.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from support.sparse import Entry, write_shard

BASE = {"max_position_embeddings": 40960, "rms_norm_eps": 1e-06, "tie_word_embeddings": False}
BF16 = {**BASE, "torch_dtype": "bfloat16", "hidden_act": "silu"}
QWEN3_32B = {
    **BF16,
    **{"model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600, "head_dim": 128},
    **{"num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8},
    **{"vocab_size": 151936, "rope_theta": 1000000.0},
}
QWEN3_30B_A3B = {
    **BF16,
    **{"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128},
    **{"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4},
    **{"vocab_size": 151936, "rope_theta": 1000000.0, "num_experts": 128},
    **{"num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
}
GLM_4_7 = {
    **BF16,
    **{"model_type": "glm4_moe", "hidden_size": 5120, "intermediate_size": 12288, "head_dim": 128},
    **{"num_hidden_layers": 92, "num_attention_heads": 96, "num_key_value_heads": 8},
    **{"vocab_size": 151552, "n_routed_experts": 160, "num_experts_per_tok": 8, "n_group": 1},
    **{"topk_group": 1, "moe_intermediate_size": 1536, "n_shared_experts": 1},
    **{"first_k_dense_replace": 3, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
    **{"use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.5},
}
MINIMAX_M2_7 = {
    **BF16,
    **{"model_type": "minimax_m2", "hidden_size": 3072, "intermediate_size": 1536},
    **{"head_dim": 128, "num_hidden_layers": 62, "num_attention_heads": 48},
    **{"num_key_value_heads": 8, "vocab_size": 200064, "num_local_experts": 256},
    **{"num_experts_per_tok": 8, "rotary_dim": 64, "use_qk_norm": True},
}
STATIC, DYNAMIC, MIX, FLOAT = "W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "FLOAT"
Entries = Iterator[tuple[str, Entry]]


def linear(name: str, out: int, width: int, label: str, bias: bool = False) -> Entries:
    """The tensors of a linear, as msModelSlim's newer command line writes them."""
    if label == FLOAT:
        yield f"{name}.weight", ("BF16", (out, width), FLOAT)
    else:
        yield f"{name}.weight", ("I8", (out, width), label)
    if label in (STATIC, MIX):
        yield f"{name}.quant_bias", ("I32", (out,), label)
        yield f"{name}.input_scale", ("F32", (1,), label)
        yield f"{name}.input_offset", ("F32", (1,), label)
        yield f"{name}.deq_scale", ("F32", (out,), label)
    if label in (DYNAMIC, MIX):
        yield f"{name}.weight_scale", ("F32", (out, 1), label)
        yield f"{name}.weight_offset", ("F32", (out, 1), label)
    if bias:
        yield f"{name}.bias", ("F32", (out,), FLOAT)


def attention(config: dict, path: str, label: str) -> Entries:
    """q, k, v and o, the scales of the cache, and the norms of q and k."""
    dim, hidden = config["head_dim"], config["hidden_size"]
    q, kv = (config[f"num_{x}_heads"] * dim for x in ("attention", "key_value"))
    bias = bool(config.get("attention_bias"))
    for name, out in (("q", q), ("k", kv), ("v", kv)):
        if name != "q":
            for part in ("scale", "offset"):
                yield f"{path}.{name}_proj.kv_cache_{part}", ("BF16", (kv,), "C8")
        yield from linear(f"{path}.{name}_proj", out, hidden, label, bias)
    yield from linear(f"{path}.o_proj", hidden, q, label)
    wide = config["model_type"] == "minimax_m2"  # it norms all heads together
    for name, size in (("q", q if wide else dim), ("k", kv if wide else dim)):
        yield f"{path}.{name}_norm.weight", ("BF16", (size,), FLOAT)


def mlp(path: str, hidden: int, inner: int, labels: tuple[str, str], names: str = "") -> Entries:
    """gate, up and down, the labels those of gate and up, and of down."""
    gate, up, down = names.split() if names else ("gate_proj", "up_proj", "down_proj")
    yield from linear(f"{path}.{gate}", inner, hidden, labels[0])
    yield from linear(f"{path}.{up}", inner, hidden, labels[0])
    yield from linear(f"{path}.{down}", hidden, inner, labels[1])


def mixture(config: dict, layer: str) -> Entries:
    """The experts of a layer, its router, and what it shares."""
    hidden, kind = config["hidden_size"], config["model_type"]
    both = (DYNAMIC, DYNAMIC)
    if kind == "minimax_m2":
        path, count = f"{layer}.block_sparse_moe", config["num_local_experts"]
        yield f"{path}.e_score_correction_bias", ("F32", (count,), FLOAT)
        inner, names = config["intermediate_size"], "w1 w3 w2"
    else:
        path, names, inner = f"{layer}.mlp", "", config["moe_intermediate_size"]
        count = config.get("num_experts") or config["n_routed_experts"]
    if kind == "glm4_moe":
        yield f"{path}.gate.e_score_correction_bias", ("F32", (count,), FLOAT)
        yield from mlp(f"{path}.shared_experts", hidden, inner, (FLOAT, FLOAT))
    yield f"{path}.gate.weight", ("BF16", (count, hidden), FLOAT)
    for expert in range(count):
        yield from mlp(f"{path}.experts.{expert}", hidden, inner, both, names)


def entries(config: dict, of_attention: str, of_mlp: tuple[str, str]) -> Entries:
    """All tensors of a model; the label of its attention, and those of a dense layer's linears."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", ("BF16", (vocab, hidden), FLOAT)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield from attention(config, f"{layer}.self_attn", of_attention)
        dense = config["model_type"] == "qwen3" or i < config.get("first_k_dense_replace", 0)
        if dense:
            yield from mlp(f"{layer}.mlp", hidden, config["intermediate_size"], of_mlp)
        else:
            yield from mixture(config, layer)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", ("BF16", (hidden,), FLOAT)
    yield "model.norm.weight", ("BF16", (hidden,), FLOAT)
    yield "lm_head.weight", ("BF16", (vocab, hidden), FLOAT)


FLAGSHIPS = {
    "Qwen3-32B-w8a8c8": (QWEN3_32B, MIX, (MIX, MIX)),
    "Qwen3-30B-A3B": (QWEN3_30B_A3B, STATIC, (STATIC, STATIC)),
    "GLM-4.7-W8A8C8": (GLM_4_7, DYNAMIC, (FLOAT, FLOAT)),
    "MiniMax-M2.7-w8a8c8-QuaRot": (MINIMAX_M2_7, DYNAMIC, (DYNAMIC, DYNAMIC)),
}


def write_flagship(directory: Path, name: str, layers: int = 0) -> Path:
    """Write one, of so many layers only if any are said, in shards of 5,000 tensors."""
    config, *labels = FLAGSHIPS[name]
    config = {**config, **({"num_hidden_layers": layers} if layers else {})}
    made, base = dict(entries(config, *labels)), "quant_model_weights"
    directory.mkdir()
    names, weight_map = list(made), {}
    shards = [names[at : at + 5000] for at in range(0, len(names), 5000)]
    for i, part in enumerate(shards, 1):
        file = f"{base}-{i:05}-of-{len(shards):05}.safetensors"
        write_shard(directory / file, {name: made[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / f"{base}.safetensors.index.json").write_text(json.dumps(index))
    described = {name: label for name, (_, _, label) in made.items()}
    described |= {"version": "1.0.0", "model_quant_type": labels[0], "metadata": {}}
    described |= {"kv_cache_type": "C8", "kv_quant_type": "C8", "group_size": 0}
    described["optional"] = {}
    if name.endswith("QuaRot"):
        rotation = {"rotation_map": {"global_rotation": "optional/quarot.safetensors"}}
        described["optional"] = {"quarot": rotation}
    (directory / "quant_model_description.json").write_text(json.dumps(described))
    (directory / "config.json").write_text(json.dumps(config))
    return directory

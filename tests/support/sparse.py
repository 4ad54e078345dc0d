"""Checkpoints of any size that take no room: right headers, and shards that are holes.

python tests/support/sparse.py 405b DIR
"""

import json
import sys
from pathlib import Path

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "quantize": "w8a8",
    "quantization_config": {"kv_quant_type": "C8"},
}
LLAMA_8B = {
    **LLAMA_70B,
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "num_attention_heads": 32,
}
LLAMA_405B = {
    **LLAMA_70B,
    **{"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126},
    "num_attention_heads": 128,
}
SHAPES = {"8b": LLAMA_8B, "70b": LLAMA_70B, "405b": LLAMA_405B}
BYTES = {"I8": 1, "F16": 2, "BF16": 2, "F32": 4, "I32": 4, "I64": 8}
Entry = tuple[str, tuple[int, ...], str]  # dtype, shape, label


def layer_entries(config: dict, layer: int) -> dict[str, Entry]:
    """The tensors of one W8A8+C8 Llama layer as msModelSlim writes them, down_proj float."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    widths = {"q_proj": hidden, "k_proj": kv, "v_proj": kv, "o_proj": hidden}
    path = f"model.layers.{layer}"
    linears = {f"{path}.self_attn.{n}": (out, hidden) for n, out in widths.items()}
    linears |= {f"{path}.mlp.{n}": (inner, hidden) for n in ("gate_proj", "up_proj")}
    made: dict[str, Entry] = {}
    for name, (out, width) in linears.items():
        if name.endswith(("k_proj", "v_proj")):
            made[f"{name}.kv_cache_scale"] = ("F16", (kv,), "C8")
            made[f"{name}.kv_cache_offset"] = ("F16", (kv,), "C8")
        made[f"{name}.weight"] = ("I8", (out, width), "W8A8")
        made[f"{name}.weight_scale"] = ("F16", (out, 1), "W8A8")
        made[f"{name}.weight_offset"] = ("F16", (out, 1), "W8A8")
        made[f"{name}.input_scale"] = ("F16", (1,), "W8A8")
        made[f"{name}.input_offset"] = ("F16", (1,), "W8A8")
        made[f"{name}.quant_bias"] = ("I32", (out,), "W8A8")
        made[f"{name}.deq_scale"] = ("I64", (out,), "W8A8")
    made[f"{path}.mlp.down_proj.weight"] = ("F16", (hidden, inner), "FLOAT")
    for norm in ("input_layernorm", "post_attention_layernorm"):
        made[f"{path}.{norm}.weight"] = ("F16", (hidden,), "FLOAT")
    return made


def write_sparse(directory: Path, config: dict, shards: int = 15) -> Path:
    """Write a sharded W8A8+C8 directory of a Llama without data; a few hundred KB on disk."""
    directory.mkdir()
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    entries: dict[str, Entry] = {"model.embed_tokens.weight": ("F16", (vocab, hidden), "FLOAT")}
    for layer in range(config["num_hidden_layers"]):
        entries |= layer_entries(config, layer)
    entries["model.norm.weight"] = ("F16", (hidden,), "FLOAT")
    entries["lm_head.weight"] = ("F16", (vocab, hidden), "FLOAT")
    names, base = list(entries), "quant_model_weight_w8a8"
    weight_map, per = {}, -(-len(names) // shards)
    for i in range(shards):
        file = f"{base}-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: entries[name] for name in names[i * per : (i + 1) * per]}
        write_shard(directory / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / f"{base}.safetensors.index.json").write_text(json.dumps(index))
    head = {"version": "1.0.0", "model_quant_type": "W8A8", "kv_cache_type": "C8"}
    labels = {name: label for name, (_, _, label) in entries.items()}
    description = {**head, "kv_quant_type": "C8", **labels}
    (directory / "quant_model_description.json").write_text(json.dumps(description))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_shard(path: Path, entries: dict[str, Entry]) -> None:
    """A safetensors file with a header and a hole where its data would be."""
    header, at = {}, 0
    for name, (dtype, shape, _) in entries.items():
        size = BYTES[dtype]
        for d in shape:
            size *= d
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


if __name__ == "__main__":
    write_sparse(Path(sys.argv[2]), SHAPES[sys.argv[1]])

"""A Llama with GroupQueryAttention, an int8 cache and float weights, as one writes it by hand.

The yardstick of `bench decode`: the ops that ONNX Runtime has for such a model, rotary embedding
inside the attention, norms that add the residual, weights in float32 as they are multiplied, and
nothing of kvc8's compiler.
"""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from kvc8.ir.checkpoint.reader import Checkpoint

F32, I64, I32, I8 = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32, ir.DataType.INT8
MICROSOFT = "com.microsoft"


class Plain:
    """The graph of a float checkpoint, with the KV scales of another of the same model."""

    def __init__(self, weights: Checkpoint, scales: Checkpoint, threads: int) -> None:
        self.config, self.weights, self.scales = weights.config, weights, scales
        self.nodes: list[ir.Node] = []
        self.external: dict[str, ort.OrtValue] = {}
        self.initializers: list[ir.Value] = []
        self.session = self._session(threads)

    def size(self, name: str) -> int:
        """A number of the model's config."""
        found = self.config[name]
        assert isinstance(found, int)
        return found

    def caches(self, context: int) -> list[list[int]]:
        """The shapes of K and V by layer, as `step` takes them."""
        shape = [1, self.size("num_key_value_heads"), context, self._dim()]
        return [shape] * (2 * self.size("num_hidden_layers"))

    def step(self, token: int, codes: Sequence[Tensor]) -> Callable[[], list[ort.OrtValue]]:
        """What decodes one token at the end of caches [1, heads, context, dim], K and V by layer.

        It writes to the caches in place and gives the logits and them.
        """
        context = codes[0].shape[2]
        given = {
            "input_ids": np.array([[token]]),
            "seqlens_k": np.array([context - 1], dtype=np.int32),
            "total": np.array(context, dtype=np.int32),
        }
        binding = self.session.io_binding()
        for name, x in given.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(x))
        binding.bind_output("logits", "cpu")
        for i, cache in enumerate(codes):
            name = f"{'kv'[i % 2]}_{i // 2}"
            value = ort.OrtValue.ortvalue_from_numpy(cache.numpy())
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(f"{name}_new", value)

        def run() -> list[ort.OrtValue]:
            self.session.run_with_iobinding(binding)
            return list(binding.get_outputs())

        return run

    def _dim(self) -> int:
        return self.size("hidden_size") // self.size("num_attention_heads")

    def _session(self, threads: int) -> ort.InferenceSession:
        model = ir.Model(self._graph(), ir_version=11)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_external_initializers([*self.external], [*self.external.values()])
        data = ir.to_proto(model).SerializeToString()
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def _graph(self) -> ir.Graph:
        cache: list[int | str] = ["B", self.size("num_key_value_heads"), "L", self._dim()]
        given = [
            _input("input_ids", I64, ["B", "S"]),
            _input("seqlens_k", I32, ["B"]),
            _input("total", I32, []),
        ]
        caches: list[ir.Value] = []
        table = self._weight("model.embed_tokens.weight", transposed=False)
        x = self._node("Gather", [table, given[0]])[0]
        branch: ir.Value | None = None
        new: list[ir.Value] = []
        for layer in range(self.size("num_hidden_layers")):
            k, v = (_input(f"{name}_{layer}", I8, cache) for name in "kv")
            caches += [k, v]
            x, branch, made = self._layer(layer, x, branch, [k, v, given[1], given[2]])
            new += made
        assert branch is not None
        normed, x = self._add_norm("model.norm.weight", x, branch)
        head = "lm_head.weight" if "lm_head.weight" in self.weights.tensors else table.name
        logits = self._linear(head or "", normed)
        for value, name in zip(
            [logits, *new], ["logits", *(f"{c.name}_new" for c in caches)], strict=True
        ):
            value.name, value.type = name, ir.TensorType(F32 if name == "logits" else I8)
        opsets = {"": 23, MICROSOFT: 1}
        return ir.Graph(
            [*given, *caches],
            [logits, *new],
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports=opsets,
        )

    def _layer(
        self, layer: int, x: ir.Value, branch: ir.Value | None, cache: list[ir.Value]
    ) -> tuple[ir.Value, ir.Value, list[ir.Value]]:
        path = f"model.layers.{layer}"
        name = f"{path}.input_layernorm.weight"
        if branch is None:
            scale = self._weight(name, transposed=False)
            [normed] = self._node(
                "SimplifiedLayerNormalization", [x, scale], epsilon=self._epsilon()
            )
        else:
            normed, x = self._add_norm(name, x, branch)
        q, k, v = (self._linear(f"{path}.self_attn.{n}_proj.weight", normed) for n in "qkv")
        out, *new = self._attention(layer, [q, k, v, *cache])
        out = self._linear(f"{path}.self_attn.o_proj.weight", out)
        normed, x = self._add_norm(f"{path}.post_attention_layernorm.weight", x, out)
        gate, up = (self._linear(f"{path}.mlp.{n}_proj.weight", normed) for n in ("gate", "up"))
        [sigmoid] = self._node("Sigmoid", [gate])
        [silu] = self._node("Mul", [gate, sigmoid])
        [inner] = self._node("Mul", [silu, up])
        return x, self._linear(f"{path}.mlp.down_proj.weight", inner), new

    def _attention(self, layer: int, inputs: list[ir.Value | None]) -> list[ir.Value]:
        heads, dim = self.size("num_key_value_heads"), self._dim()
        tables = [
            self._value("cos", self._angles().cos()),
            self._value("sin", self._angles().sin()),
        ]
        scales = []
        for side, kv in zip("kv", self.scales.kv[layer], strict=True):
            scale = self.scales.read(kv.scale).float().reshape(1, heads, 1, dim)
            scales.append(self._value(f"{side}_scale_{layer}", scale))
        return self._node(
            "GroupQueryAttention",
            [*inputs, *tables, None, None, None, *scales],
            outputs=3,
            num_heads=self.size("num_attention_heads"),
            kv_num_heads=heads,
            do_rotary=1,
            k_quant_type="PER_CHANNEL",
            v_quant_type="PER_CHANNEL",
            kv_cache_bit_width=8,
        )

    def _angles(self) -> Tensor:
        parameters = self.config.get("rope_parameters")
        theta = (
            parameters["rope_theta"] if isinstance(parameters, dict) else self.config["rope_theta"]
        )
        assert isinstance(theta, float | int)
        steps = torch.arange(0, self._dim(), 2) / self._dim()
        return torch.outer(torch.arange(self.size("max_position_embeddings")), theta**-steps)

    def _add_norm(self, name: str, x: ir.Value, y: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The norm of x + y, and x + y."""
        scale = self._weight(name, transposed=False)
        made = self._node(
            "SkipSimplifiedLayerNormalization", [x, y, scale], outputs=4, epsilon=self._epsilon()
        )
        return made[0], made[3]

    def _epsilon(self) -> float:
        epsilon = self.config["rms_norm_eps"]
        assert isinstance(epsilon, float)
        return epsilon

    def _linear(self, name: str, x: ir.Value) -> ir.Value:
        return self._node("MatMul", [x, self._weight(name, transposed=True)])[0]

    def _weight(self, name: str, transposed: bool) -> ir.Value:
        tensor = self.weights.read(name).float()
        return self._value(f"{name}.t", tensor.t()) if transposed else self._value(name, tensor)

    def _value(self, name: str, tensor: Tensor) -> ir.Value:
        found = [value for value in self.initializers if value.name == name]
        if found:
            return found[0]
        array = tensor.contiguous().float().numpy()
        self.external[name] = ort.OrtValue.ortvalue_from_numpy(array)
        data = ir.ExternalTensor(
            "none", 0, array.nbytes, F32, shape=ir.Shape(array.shape), name=name
        )
        value = ir.Value(
            name=name, type=ir.TensorType(F32), shape=ir.Shape(array.shape), const_value=data
        )
        self.initializers.append(value)
        return value

    def _node(
        self,
        kind: str,
        inputs: list[ir.Value | None],
        outputs: int = 1,
        **attributes: int | float | str,
    ) -> list[ir.Value]:
        known = {"GroupQueryAttention", "SkipSimplifiedLayerNormalization"}
        node = ir.node(
            kind,
            inputs,
            attributes,
            domain=MICROSOFT if kind in known else "",
            num_outputs=outputs,
            name=f"{kind}_{len(self.nodes)}",
        )
        for i, value in enumerate(node.outputs):
            value.name = f"{node.name}.{i}"
        self.nodes.append(node)
        return [*node.outputs]


def _input(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

"""ONNX: the QUANTIZED program as a standard model, and a runner."""

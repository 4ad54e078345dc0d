"""Compile, quantize, verify and load from Python; the commands are thin over it."""

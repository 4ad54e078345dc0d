"""Run programs of any stage: inputs, caches, blocks, scheduling, sampling, generation."""

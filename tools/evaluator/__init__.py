"""What kvc8-evaluate does: perplexity and divergence."""

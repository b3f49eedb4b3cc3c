"""Loading, quantising and running a causal language model."""

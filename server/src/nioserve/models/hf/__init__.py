"""Models of any architecture: transformers' modelling code, over the engine's cache and batches."""

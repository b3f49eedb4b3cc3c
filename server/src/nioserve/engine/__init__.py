"""Requests, scheduler, cache of keys and values, sampler, and the engine process."""

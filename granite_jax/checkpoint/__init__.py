"""Checkpoint directories: Orbax weights with a hash of every tensor, configuration, tokenizer, LoRA adapter."""

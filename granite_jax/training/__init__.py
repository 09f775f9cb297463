"""Training of a small Granite Speech: the text grammar, the synthetic speech and the training loop."""

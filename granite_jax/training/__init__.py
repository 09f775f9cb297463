"""Training of a small Granite Speech: corpora, batches, losses and steps; whole trainings are in `recipes`."""

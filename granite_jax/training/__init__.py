"""Training of a small Granite Speech model: corpora, batches, losses and steps; `recipes` has complete trainings."""

"""Text on both sides of the language model: tokenizer, chat template, and the prompts of tasks."""

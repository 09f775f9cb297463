"""Recipes: complete trainings, from data to checkpoint."""

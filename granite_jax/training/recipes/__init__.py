"""Recipes: whole trainings, from data to checkpoint."""

"""Layers as Flax modules, and the pure functions around them; they know no family."""

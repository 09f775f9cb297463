"""The families of models, a folder each; `layers/` has what they are built of."""

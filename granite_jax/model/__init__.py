"""The network as pure functions of `(config, params, inputs)`; a new member of the family is a new file here."""

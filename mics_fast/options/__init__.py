"""Every option of the trainer: typed dataclasses, parsing, checks."""

"""The two stages of MICS: their losses and what advances after a step."""

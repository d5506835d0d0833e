"""The two stages of MICS: their losses, and the state that advances after each step."""

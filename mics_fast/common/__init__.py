"""Shared by all packages: errors that end a command in one sentence, and files written whole."""

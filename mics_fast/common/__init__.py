"""Helpers that all packages share: errors, files, locks, pseudonyms, child processes."""

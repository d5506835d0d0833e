"""What the benchmarks hold this project against, restated here."""

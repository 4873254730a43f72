"""potstill side by side with its peers: `python -m benchmarks --help`, and docs/benchmarks.md for the method."""

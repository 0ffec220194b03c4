"""How fast, how exact and how large: this package beside its peers. Start it with `python -m benchmarks.run`."""

"""Results beside those of other packages, each in an environment of its own: `make test-peers`.

The environments are those of the benchmarks (`python -m benchmarks.peers setup NAME`). Left out of every other run of
the suite; a peer without its environment is skipped. For a comparison with a further package: a module
`computed_by_NAME.py`, which imports nothing of this one, with a function from arrays to arrays for each question, and a
`test_NAME.py` that asks it by :func:`tests.peers.processes.ask`.
"""

"""One file per question: each has `add_arguments(parser)` and `run(arguments)`."""

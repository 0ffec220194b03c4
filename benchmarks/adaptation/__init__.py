"""How well does each way of adapting a trained network do? Tasks, methods, and the table by which the recipe is judged.

`python -m benchmarks.adaptation {friedman,unrelated,real}`: one *cell* is a network trained on a source, n labels from
a target, and test points of that target; every method predicts densities of observations there.

| file | what is in it |
|---|---|
| `tasks.py` | what a cell, a task and an experiment are |
| `synthetic.py`, `real.py` | where source and target come from; sets and splits, with the reasons |
| `training.py` | the networks, trained on the source and kept on disk |
| `predictions.py` | what a method returns, and how it is scored |
| `methods.py` | the table of methods |
| `fine_tuning.py`, `gaussian_processes.py`, `laplace_approximation.py` | what is in it |
| `run.py`, `__main__.py` | cells in processes, appended to a file; what is there is not computed again |
| `report.py` | tables and figure |
"""

"""Beyond one machine: points are sharded over the ranks of a process group, results are the same bits on all of them.

What is here, from bottom to top: the group and what goes between its ranks (:mod:`.group`), which rows are whose and
the way from those to all (:mod:`.shards`), how many bytes that takes (:mod:`.traffic`), what is the same
on all ranks (:mod:`.replicated`), the Jacobian whose rows they share (:mod:`.jacobian`), Cholesky factors in block rows
(:mod:`.cholesky`), what autograd makes of them (:mod:`.graph`), and the solvers on them (:mod:`.solver`,
:mod:`.function_space`, :mod:`.weight_space`). :class:`ntk_gp.settings.distributed` switches it on.
"""

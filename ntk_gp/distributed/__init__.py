"""Beyond one machine: points are sharded over the ranks of a process group, results are the same bits on all of them.

What is here, from bottom to top: the group and what goes between its ranks (:mod:`.group`), how many bytes that is
(:mod:`.traffic`), and the Jacobian whose rows they share (:mod:`.jacobian`). :class:`ntk_gp.settings.distributed`
switches it on.
"""

"""Functions of torch and what is called in their place: the same values, for a purpose that torch's own do not serve.

==================  ==============================================================  ===================================
:mod:`.onednn`      matrix products and tanh at the processor's full rate           no derivatives
:mod:`.full_rate`   linear layers and tanh by it, where nothing is recorded         forward mode
:mod:`.recorded`    layers for the structured engine's recordings                   reverse mode, weights as constants
:mod:`.elementary`  layers of which torch's second derivatives are wrong or absent  any number, in either mode
==================  ==============================================================  ===================================

Each of the last three has a table from function to function; :mod:`.mode` calls what two of them say. Decompositions,
which put functions that have rules in the place of one that has none, are in the table of rules
(:mod:`ntk_gp.jacobian.rules`): users add to it.
"""

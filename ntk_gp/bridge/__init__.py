"""The bridge to GPyTorch: what is replaced in it, and how a matrix with a neural tangent kernel in it is recognised.

Kernels, models and distributions remain GPyTorch's. What it decides outside of the kernel is replaced when this package
is imported (:func:`install`): it asks only the outermost kernel how to predict, multiplies kernel matrices by way of
roots of rank 100, solves roughly and samples from estimates beyond 800 points, and rounds small variances up. The table
in `replaced.py` lists every function and property, with what is called in its place.

Each replacement first looks for a neural tangent kernel (`recognised.py`): a kernel is one by its class, a matrix has
one in it if an operator that it is made of says so. Where there is none, GPyTorch's own function is called, and models
without an :class:`~ntk_gp.NTKKernel` stay bitwise the same. Where there is one, `exactly_solved.py` says, in
one table, how each form of matrix is solved. :func:`uninstall` gives GPyTorch back its own functions.
"""

from .replaced import install, uninstall

__all__ = ["install", "uninstall"]

"""Classification: Laplace's approximation to the posterior of a latent function, as GPyTorch's models are made."""

from .likelihoods import LogisticLikelihood
from .marginal_likelihood import LaplaceMarginalLogLikelihood
from .model import LaplaceGP

__all__ = ["LaplaceGP", "LaplaceMarginalLogLikelihood", "LogisticLikelihood"]

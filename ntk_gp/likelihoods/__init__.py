"""Likelihoods that GPyTorch has not: noise for each point and output together, and noise that a network tells."""

from .multitask import FixedNoiseMultitaskGaussianLikelihood
from .network_noise import NetworkNoiseLikelihood

__all__ = ["FixedNoiseMultitaskGaussianLikelihood", "NetworkNoiseLikelihood"]

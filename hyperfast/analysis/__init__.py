"""Looking at a network: activations, gradients, weights, how it trains. Of a hypernetwork also: embeddings,
the filters it makes, what its generators cost."""

from hyperfast.analysis.activations import ActivationStatistics, LayerActivations, activation_statistics
from hyperfast.analysis.costs import Cost, CostReport, generator_costs
from hyperfast.analysis.distribution import Distribution
from hyperfast.analysis.dynamics import dynamic_scales, weight_changes
from hyperfast.analysis.embeddings import LayerEmbeddings, Similarity, ZReport, z_report
from hyperfast.analysis.gradients import (
    GradientHealth,
    MaxDifference,
    Predictiveness,
    Smoothness,
    gradient_health,
    gradient_predictiveness,
    gradient_smoothness,
    max_gradient_difference,
)
from hyperfast.analysis.pictures import filter_sheet, layer_weight, z_bars
from hyperfast.analysis.preserve import preserved
from hyperfast.analysis.table import table
from hyperfast.analysis.training import LossLandscape, LRRange, loss_landscape, lr_range_test
from hyperfast.analysis.weights import LayerWeights, WeightStatistics, weight_statistics

__all__ = [
    "ActivationStatistics",
    "Cost",
    "CostReport",
    "Distribution",
    "GradientHealth",
    "LRRange",
    "LayerActivations",
    "LayerEmbeddings",
    "LayerWeights",
    "LossLandscape",
    "MaxDifference",
    "Predictiveness",
    "Similarity",
    "Smoothness",
    "WeightStatistics",
    "ZReport",
    "activation_statistics",
    "dynamic_scales",
    "filter_sheet",
    "generator_costs",
    "gradient_health",
    "gradient_predictiveness",
    "gradient_smoothness",
    "layer_weight",
    "loss_landscape",
    "lr_range_test",
    "max_gradient_difference",
    "preserved",
    "table",
    "weight_changes",
    "weight_statistics",
    "z_bars",
    "z_report",
]

"""Looking at a network: activations, weights, how it trains. Of a hypernetwork also: embeddings, the filters
it makes, what its generators cost."""

from hyperfast.analysis.activations import ActivationStatistics, LayerActivations, activation_statistics
from hyperfast.analysis.costs import Cost, CostReport, generator_costs
from hyperfast.analysis.distribution import Distribution
from hyperfast.analysis.dynamics import dynamic_scales, weight_changes
from hyperfast.analysis.embeddings import LayerEmbeddings, Similarity, ZReport, z_report
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
    "LRRange",
    "LayerActivations",
    "LayerEmbeddings",
    "LayerWeights",
    "LossLandscape",
    "Similarity",
    "WeightStatistics",
    "ZReport",
    "activation_statistics",
    "dynamic_scales",
    "filter_sheet",
    "generator_costs",
    "layer_weight",
    "loss_landscape",
    "lr_range_test",
    "preserved",
    "table",
    "weight_changes",
    "weight_statistics",
    "z_bars",
    "z_report",
]

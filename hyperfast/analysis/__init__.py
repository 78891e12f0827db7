"""Looking at a hypernetwork: its embeddings, the filters it makes, what its generators cost."""

from hyperfast.analysis.costs import Cost, CostReport, generator_costs
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

__all__ = [
    "Cost",
    "CostReport",
    "GradientHealth",
    "LayerEmbeddings",
    "MaxDifference",
    "Predictiveness",
    "Similarity",
    "Smoothness",
    "ZReport",
    "dynamic_scales",
    "filter_sheet",
    "generator_costs",
    "gradient_health",
    "gradient_predictiveness",
    "gradient_smoothness",
    "layer_weight",
    "max_gradient_difference",
    "preserved",
    "table",
    "weight_changes",
    "z_bars",
    "z_report",
]

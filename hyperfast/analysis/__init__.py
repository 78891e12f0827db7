"""Looking at a hypernetwork: its embeddings, the filters it makes, what its generators cost."""

from hyperfast.analysis.costs import Cost, CostReport, generator_costs
from hyperfast.analysis.dynamics import dynamic_scales, weight_changes
from hyperfast.analysis.embeddings import LayerEmbeddings, Similarity, ZReport, z_report
from hyperfast.analysis.pictures import filter_sheet, layer_weight, z_bars
from hyperfast.analysis.preserve import preserved
from hyperfast.analysis.table import table

__all__ = [
    "Cost",
    "CostReport",
    "LayerEmbeddings",
    "Similarity",
    "ZReport",
    "dynamic_scales",
    "filter_sheet",
    "generator_costs",
    "layer_weight",
    "preserved",
    "table",
    "weight_changes",
    "z_bars",
    "z_report",
]

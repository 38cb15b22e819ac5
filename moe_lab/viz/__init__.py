"""Pictures: charts, drawings and live explorers. Everything here returns a `Picture` or an `Explorer`."""

from moe_lab.viz.benchmarks import draw_bench
from moe_lab.viz.charts import bars, heatmap, letters, lines, stacked
from moe_lab.viz.diagrams import draw_block, draw_dense_to_moe, draw_ffns, draw_map
from moe_lab.viz.picture import Picture

__all__ = [
    "Picture",
    "bars",
    "draw_bench",
    "draw_block",
    "draw_dense_to_moe",
    "draw_ffns",
    "draw_map",
    "heatmap",
    "letters",
    "lines",
    "stacked",
]

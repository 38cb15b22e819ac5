"""Pictures: charts, drawings and live explorers. Everything here returns a `Picture` or an `Explorer`."""

from moe_lab.viz.benchmarks import draw_bench
from moe_lab.viz.charts import bars, heatmap, letters, lines, stacked
from moe_lab.viz.diagrams import draw_block, draw_dense_to_moe, draw_ffns, draw_map
from moe_lab.viz.dispatching import draw_dispatch, draw_layouts, draw_sort, growth
from moe_lab.viz.picture import Picture
from moe_lab.viz.routing import RouterExplorer, draw_groups, draw_router, draw_token, heatmaps
from moe_lab.viz.tracing import TraceExplorer, draw_routing, draw_visits

__all__ = [
    "Picture",
    "RouterExplorer",
    "TraceExplorer",
    "bars",
    "draw_bench",
    "draw_block",
    "draw_dense_to_moe",
    "draw_dispatch",
    "draw_ffns",
    "draw_groups",
    "draw_layouts",
    "draw_map",
    "draw_router",
    "draw_routing",
    "draw_sort",
    "draw_token",
    "draw_visits",
    "growth",
    "heatmap",
    "heatmaps",
    "letters",
    "lines",
    "stacked",
]

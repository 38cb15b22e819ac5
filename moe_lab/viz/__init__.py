"""Pictures: charts, drawings and live explorers. Everything here returns a `Picture` or an `Explorer`."""

from moe_lab.viz.arithmetic import (
    draw_active_against_total,
    draw_caches,
    draw_decode_reads,
    draw_experts_touched,
    draw_rooflines,
    draw_where_parameters_sit,
    explore_arithmetic,
)
from moe_lab.viz.balancing import Panel, draw_shares, sweep, violation_band
from moe_lab.viz.benchmarks import draw_bench
from moe_lab.viz.charts import bars, heatmap, letters, lines, stacked
from moe_lab.viz.diagrams import draw_block, draw_dense_to_moe, draw_ffns, draw_map
from moe_lab.viz.dispatching import draw_dispatch, draw_layouts, draw_sort, growth
from moe_lab.viz.experiments import CureExplorer, bands, curve_band, draw_load
from moe_lab.viz.kernels import (
    draw_fusion,
    draw_memory,
    draw_padding,
    draw_roofline,
    draw_stages,
    draw_throughput,
    draw_tile_order,
    draw_tiles,
    show_machine_code,
)
from moe_lab.viz.picture import Picture
from moe_lab.viz.placing import draw_rank_loads, draw_traffic
from moe_lab.viz.ranks import draw_collectives, draw_exchange, draw_regroup, draw_timeline
from moe_lab.viz.routing import RouterExplorer, draw_groups, draw_router, draw_token, heatmaps
from moe_lab.viz.scaling import draw_savings, draw_scaling, draw_ways
from moe_lab.viz.sharing import CutExplorer, draw_cut, draw_shared_path
from moe_lab.viz.text import TextExplorer, draw_text
from moe_lab.viz.tracing import TraceExplorer, draw_routing, draw_visits
from moe_lab.viz.training import LiveTraining, draw_curves

__all__ = [
    "CureExplorer",
    "CutExplorer",
    "LiveTraining",
    "Panel",
    "Picture",
    "RouterExplorer",
    "TextExplorer",
    "TraceExplorer",
    "bands",
    "bars",
    "curve_band",
    "draw_active_against_total",
    "draw_bench",
    "draw_block",
    "draw_caches",
    "draw_collectives",
    "draw_curves",
    "draw_cut",
    "draw_decode_reads",
    "draw_dense_to_moe",
    "draw_dispatch",
    "draw_exchange",
    "draw_experts_touched",
    "draw_ffns",
    "draw_fusion",
    "draw_groups",
    "draw_layouts",
    "draw_load",
    "draw_map",
    "draw_memory",
    "draw_padding",
    "draw_rank_loads",
    "draw_regroup",
    "draw_roofline",
    "draw_rooflines",
    "draw_router",
    "draw_routing",
    "draw_savings",
    "draw_scaling",
    "draw_shared_path",
    "draw_shares",
    "draw_sort",
    "draw_stages",
    "draw_text",
    "draw_throughput",
    "draw_tile_order",
    "draw_tiles",
    "draw_timeline",
    "draw_token",
    "draw_traffic",
    "draw_visits",
    "draw_ways",
    "draw_where_parameters_sit",
    "explore_arithmetic",
    "growth",
    "heatmap",
    "heatmaps",
    "letters",
    "lines",
    "show_machine_code",
    "stacked",
    "sweep",
    "violation_band",
]

"""Live pictures: sliders above a chart that is drawn again at every move.

A picture is kept in an `Image` widget, so that a notebook read without a kernel still shows the one it stored.
"""

from collections.abc import Mapping
from html import escape

import ipywidgets as widgets

from moe_lab.accounting import count_flops, count_parameters
from moe_lab.config import LMConfig
from moe_lab.viz.charts import stacked
from moe_lab.viz.picture import Picture


class Explorer:
    """Sliders that redraw a picture. A subclass gives the sliders and `draw`, a pure function of their values."""

    def __init__(self, sliders: Mapping[str, widgets.Widget]) -> None:
        self.sliders = dict(sliders)
        self.image = widgets.Image(format="png")
        self.caption = widgets.HTML()  # the alt text, seen by all: a live image has no place for one
        for slider in self.sliders.values():
            slider.observe(self._redraw, names="value")
        self._redraw()
        self.view = widgets.VBox([*self.sliders.values(), self.image, self.caption])

    def draw(self, **values: float) -> Picture:
        """The picture for these values of the sliders."""
        raise NotImplementedError

    def _redraw(self, _change: object = None) -> None:
        self.picture = self.draw(**{name: slider.value for name, slider in self.sliders.items()})
        self.image.value = self.picture.png
        self.caption.value = f"<p role='status'>{escape(self.picture.alt)}</p>"
        shown_width = self.picture._repr_mimebundle_()[1]["image/png"]["width"]
        self.image.layout.width = f"{shown_width}px"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> tuple[dict, dict]:
        bundle, metadata = self.picture._repr_mimebundle_()
        live = self.view._repr_mimebundle_() or {}
        view = {kind: value for kind, value in live.items() if kind.startswith("application/")}
        return bundle | view, metadata


def readable(number: float) -> str:
    """A large number as people say it: 6.74 B, 131 M."""
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.3g} {letter}"
    return f"{number:.3g}"


class SizeExplorer(Explorer):
    """How `d_model`, `d_ff` and `n_layers` move a transformer's parameters and FLOPs. It starts at Llama-7B."""

    D_HEAD, VOCAB_SIZE, TOKENS = 128, 32_000, 4096

    def __init__(self) -> None:
        wide = {
            "style": {"description_width": "6em"},
            "layout": {"width": "32em"},
            "continuous_update": False,
        }
        super().__init__(
            {
                "d_model": widgets.IntSlider(4096, 512, 16_384, 512, description="d_model", **wide),
                "d_ff": widgets.IntSlider(11_008, 256, 65_536, 256, description="d_ff", **wide),
                "n_layers": widgets.IntSlider(32, 1, 128, description="n_layers", **wide),
            }
        )

    @classmethod
    def config(cls, d_model: int, d_ff: int, n_layers: int) -> LMConfig:
        """The model at these sizes: heads of 128, a vocabulary of 32,000, SwiGLU."""
        n_heads = d_model // cls.D_HEAD
        return LMConfig(d_model=d_model, d_ff=d_ff, n_layers=n_layers, n_heads=n_heads, vocab_size=cls.VOCAB_SIZE)

    def draw(self, d_model: int, d_ff: int, n_layers: int) -> Picture:
        """Two bars, parameters and forward FLOPs per token, each cut into the model's parts."""
        config = self.config(d_model, d_ff, n_layers)
        parameters, flops = count_parameters(config), count_flops(config, self.TOKENS)
        parameter_share, flop_share = 100 * parameters.share("ffn"), 100 * flops.share("ffn")
        return stacked(
            {
                f"parameters\n{readable(parameters.total)}": parameters.by_part(),
                f"FLOPs per token\n{readable(flops.total / self.TOKENS)}": flops.by_part(),
            },
            title=f"d_model {d_model:,}, d_ff {d_ff:,}, {n_layers} layers, {self.TOKENS:,} tokens of context",
            alt=f"At d_model {d_model:,}, d_ff {d_ff:,} and {n_layers} layers the model has "
            f"{readable(parameters.total)} parameters, {parameter_share:.0f} % of them in the FFN, and a token "
            f"costs {readable(flops.total / self.TOKENS)} FLOPs, {flop_share:.0f} % of them there.",
        )

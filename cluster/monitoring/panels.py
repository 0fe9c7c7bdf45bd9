"""Panels and dashboards in few words, on top of grafana-foundation-sdk: its builders set one field at a time.

    board = Board("dltrain-time", "dltrain / Time", "Where a step's time goes", [run_variable()])
    board.row("Steps", 8, [lines("Step time", "...", "s", Ask("...", "{{run}}"))])
    text = board.json()

Every panel says what it shows and has a unit; positions, ids and the data source are set here.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

try:
    from grafana_foundation_sdk.builders import (
        bargauge,
        common,
        dashboard,
        heatmap,
        prometheus,
        stat,
        statushistory,
        table,
        timeseries,
    )
    from grafana_foundation_sdk.cog.builder import Builder
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models import common as looks
    from grafana_foundation_sdk.models import dashboard as models
    from grafana_foundation_sdk.models import heatmap as heat
    from grafana_foundation_sdk.models import prometheus as queries
except ImportError as error:
    raise ImportError(f"dashboards need grafana-foundation-sdk ({error}): pip install 'dltrain[monitoring]'") from error

__all__ = [
    "Ask",
    "Board",
    "Steps",
    "bars",
    "cells",
    "figure",
    "lines",
    "link_to",
    "links_by_tag",
    "query_variable",
    "sheet",
    "spread",
]

# (from this value on, colour); the first value is None.
Steps = Sequence[tuple[float | None, str]]

_SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
_COLUMNS = 24
_PLAIN: Steps = ((None, "blue"),)


@dataclass(frozen=True)
class Ask:
    """A query and how its series are called: `{{run}}` is the value of the label."""

    expr: str
    legend: str = "{{run}}"


# ---- panels ----


def figure(
    title: str,
    text: str,
    unit: str,
    ask: Ask,
    steps: Steps = _PLAIN,
    decimals: int | None = None,
    to: str = "",
    none: str = "-",
) -> Any:
    """One number a run, with its course behind it.

    Args:
        to: uid of the dashboard that tells more.
        none: what is shown where there is no series.
    """
    panel = _common(stat.Panel(), title, text, unit, steps).no_value(none)
    panel.color_mode(looks.BigValueColorMode.VALUE).graph_mode(looks.BigValueGraphMode.AREA)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    if decimals is not None:
        panel.decimals(decimals)
    if to:
        url = f"/d/{to}?${{datasource:queryparam}}&${{run:queryparam}}&${{__url_time_range}}"
        panel.links([dashboard.DashboardLink("Details").type(models.DashboardLinkType.LINK).url(url)])
    return panel.with_target(_target("A", ask))


def lines(
    title: str,
    text: str,
    unit: str,
    *asks: Ask,
    steps: Steps = (),
    stack: bool = False,
    as_bars: bool = False,
    log: bool = False,
    top: float | None = None,
) -> Any:
    """Curves over time.

    Args:
        steps: drawn as lines where they are given.
        stack: on top of each other; as_bars: for what happens now and then; log: logarithmic; top: of the axis.
    """
    panel = _common(timeseries.Panel(), title, text, unit, steps or _PLAIN)
    panel.color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.PALETTE_CLASSIC))
    panel.line_width(1).fill_opacity(70 if stack else 10).show_points(looks.VisibilityMode.NEVER).span_nulls(False)
    legend = common.VizLegendOptions().display_mode(looks.LegendDisplayMode.TABLE).show_legend(True)
    panel.legend(legend.placement(looks.LegendPlacement.BOTTOM).calcs(["mean", "max", "lastNotNull"]))
    tooltip = common.VizTooltipOptions().mode(looks.TooltipDisplayMode.MULTI)
    panel.tooltip(tooltip.sort(looks.SortOrder.DESCENDING))
    if not log:
        panel.axis_soft_min(0)
    if top is not None:
        panel.max(top)
    if log:
        panel.scale_distribution(common.ScaleDistributionConfig().type(looks.ScaleDistribution.LOG).log(10))
    if stack:
        panel.stacking(common.StackingConfig().mode(looks.StackingMode.NORMAL).group("A"))
    if as_bars:
        panel.draw_style(looks.GraphDrawStyle.BARS).fill_opacity(70)
    if steps:
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(looks.GraphThresholdsStyleMode.LINE))
    return _with_targets(panel, asks)


def bars(title: str, text: str, unit: str, ask: Ask, steps: Steps = _PLAIN) -> Any:
    """A bar for each series, as it is now."""
    panel = _common(bargauge.Panel(), title, text, unit, steps).min(0)
    panel.orientation(looks.VizOrientation.HORIZONTAL).display_mode(looks.BarGaugeDisplayMode.BASIC)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    return panel.with_target(_target("A", ask, instant=True))


def cells(title: str, text: str, unit: str, ask: Ask, steps: Steps) -> Any:
    """A row of coloured cells for each series."""
    panel = _common(statushistory.Panel(), title, text, unit, steps)
    panel.color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
    # It draws nothing where there are more points than pixels.
    panel.show_value(looks.VisibilityMode.NEVER).row_height(0.9).max_data_points(100)
    panel.legend(common.VizLegendOptions().show_legend(False).display_mode(looks.LegendDisplayMode.LIST))
    return panel.with_target(_target("A", ask))


def spread(title: str, text: str, unit: str, ask: Ask, buckets: bool) -> Any:
    """How many are where, over time.

    Args:
        buckets: the series are a histogram's buckets; else they are counted here.
    """
    panel = _common(heatmap.Panel(), title, text, unit, _PLAIN).calculate(not buckets)
    panel.y_axis(heatmap.YAxisConfig().unit(unit))
    panel.color(
        heatmap.HeatmapColorOptions().mode(heat.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64).exponent(0.5)
    )
    return panel.with_target(_target("A", ask, queries.PromQueryFormat.HEATMAP if buckets else None))


def sheet(title: str, text: str, asks: Sequence[Ask], names: dict[str, str], hidden: Sequence[str] = ()) -> Any:
    """A table: one line for each combination of labels, one column for each query, called `Value #A`, `Value #B`.

    Args:
        names: how columns are called; hidden: those that are not shown.
    """
    panel = _common(table.Panel(), title, text, "short", _PLAIN)
    panel.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    options = {"excludeByName": dict.fromkeys(["Time", *hidden], True), "renameByName": names}
    panel.with_transformation(models.DataTransformerConfig(id_val="organize", options=options))
    for letter, ask in zip(string.ascii_uppercase, asks, strict=False):
        panel.with_target(_target(letter, ask, queries.PromQueryFormat.TABLE, instant=True))
    return panel


def _common(panel: Any, title: str, text: str, unit: str, steps: Steps) -> Any:
    found = [models.Threshold(value=value, color=color) for value, color in steps]
    thresholds = dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(found)
    return panel.title(title).description(text).unit(unit).datasource(_SOURCE).thresholds(thresholds)


def _with_targets(panel: Any, asks: Sequence[Ask]) -> Any:
    for letter, ask in zip(string.ascii_uppercase, asks, strict=False):
        panel.with_target(_target(letter, ask))
    return panel


def _target(letter: str, ask: Ask, form: Any = None, instant: bool = False) -> Any:
    target = prometheus.Dataquery().expr(ask.expr).legend_format(ask.legend).ref_id(letter).datasource(_SOURCE)
    if form is not None:
        target.format(form)
    return target.instant() if instant else target.range()


# ---- dashboards ----


def query_variable(name: str, label: str, query: str) -> Any:
    """Values of a label to choose from; at first all, which also takes in series that lack it."""
    variable = dashboard.QueryVariable(name).label(label).query(query).datasource(_SOURCE)
    variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.NUMERICAL_ASC)
    everything = models.VariableOption(selected=True, text="All", value="$__all")
    return variable.multi(True).include_all(True).all_value(".*").current(everything)


class Board:
    """One dashboard, filled row by row."""

    def __init__(self, uid: str, title: str, text: str, variables: Sequence[Any], links: Sequence[Any]) -> None:
        self._board = dashboard.Dashboard(title).uid(uid).description(text).tags(["dltrain"]).timezone("browser")
        self._board.time("now-1h", "now").refresh("30s").tooltip(models.DashboardCursorSync.CROSSHAIR).editable()
        self._board.with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        for variable in variables:
            self._board.with_variable(variable)
        for link in links:
            self._board.link(link)
        self._panels = 0

    def mark(self, name: str, expr: str, color: str, title: str, text: str) -> None:
        """Marks in every panel where a query has a value."""
        self._board.annotation(_Built(_Mark(name, expr, color, title, text)))

    def row(self, title: str, height: int, panels: Sequence[Any]) -> None:
        """Panels side by side, as wide as each other."""
        self._board.with_row(dashboard.Row(title).id(self._next()))
        width, rest = divmod(_COLUMNS, len(panels))
        for index, panel in enumerate(panels):
            self._board.with_panel(panel.id(self._next()).height(height).span(width + (index < rest)))

    def _next(self) -> int:
        self._panels += 1
        return self._panels

    def json(self) -> str:
        """As Grafana reads it."""
        return JSONEncoder(sort_keys=True, indent=1).encode(self._board.build()) + "\n"


# ---- links and marks ----


def links_by_tag(tag: str) -> Any:
    """A list of all dashboards with a tag, which takes the time range and the variables along."""
    link = dashboard.DashboardLink("dltrain").type(models.DashboardLinkType.DASHBOARDS).tags([tag])
    return link.as_dropdown(True).keep_time(True).include_vars(True)


def link_to(title: str, url: str) -> Any:
    """A link that takes the time range along."""
    link = dashboard.DashboardLink(title).type(models.DashboardLinkType.LINK).url(url)
    return link.keep_time(True).target_blank(True)


class _Mark(models.AnnotationQuery):
    """A query of annotations, with what the typed model lacks of Prometheus' own."""

    def __init__(self, name: str, expr: str, color: str, title: str, text: str) -> None:
        super().__init__(name=name, datasource=_SOURCE, enable=True, icon_color=color)
        self._more = {"expr": expr, "titleFormat": title, "textFormat": text, "step": "15s"}

    def to_json(self) -> dict[str, object]:
        return {**super().to_json(), **self._more}


class _Built(Builder[models.AnnotationQuery]):
    """A builder that is done."""

    def __init__(self, value: models.AnnotationQuery) -> None:
        self._value = value

    def build(self) -> models.AnnotationQuery:
        return self._value

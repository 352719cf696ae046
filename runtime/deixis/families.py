"""Which pipeline runs the bundles of a family, and which tasks stand on it: the one place that knows all families."""

from __future__ import annotations

from typing import Any

from deixis.base_pipeline import BasePipeline
from deixis.bundle import Bundle
from deixis.engines import Engine
from deixis.errors import BundleFormatError
from deixis.glamm.pipeline import GlammPipeline
from deixis.glamm.tasks import GlammTasks
from deixis.pipeline import Pipeline
from deixis.pixel_tasks import PixelTasks
from deixis.tasks import Tasks

_PIPELINES: dict[str, type[BasePipeline]] = {kind.family: kind for kind in (Pipeline, GlammPipeline)}
_TASKS: dict[str, type[Tasks[Any, Any]]] = {Pipeline.family: PixelTasks, GlammPipeline.family: GlammTasks}


def make_pipeline(bundle: Bundle, engine: Engine, cache_capacity: int | None = None) -> BasePipeline:
    """The pipeline of a bundle's family. Raises BundleFormatError when this deixis has none, and what it raises."""
    family = bundle.manifest.model.family
    if family not in _PIPELINES:
        known = " and ".join(map(repr, _PIPELINES))
        raise BundleFormatError(
            f"{bundle.path}: this deixis runs models of the families {known}, not {family!r}; upgrade deixis"
        )
    return _PIPELINES[family](bundle, engine, cache_capacity)


def make_tasks(pipeline: BasePipeline) -> Tasks[Any, Any]:
    """The tasks of a pipeline's family."""
    return _TASKS[pipeline.family](pipeline)

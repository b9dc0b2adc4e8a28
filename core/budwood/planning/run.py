"""`budwood.tune`: a run that is planned before its base loads."""

from __future__ import annotations

from functools import partial

from budwood.planning.admission import admit
from budwood.training import loop

tune = partial(loop.tune, planner=admit)
tune.__doc__ = loop.tune.__doc__

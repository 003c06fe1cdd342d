"""Draws frozen reports as text, HTML and live widget; emits intents; never sees a model.

Loading this package registers the views of core values (``core.display.view_of``). The files listed
here import no widget at module level, so that a script does not wait for one.
"""

import qlab.views.adapter.report
import qlab.views.adapter.retention
import qlab.views.cards.compare
import qlab.views.cards.data
import qlab.views.cards.evaluation
import qlab.views.estimate.static
import qlab.views.quantizer.report  # noqa: F401

"""The method's arithmetic (ALSACE, Zhao et al., NAACL 2024, section 3, and what this project adds), in numpy alone.

Everything here works on the scores of parallel groups and sees no label. ``GroupScores``: the scores of one parallel
group, language -> log-probabilities [K] over its K candidates; languages may be missing.
"""

from collections.abc import Mapping

import numpy as np

GroupScores = Mapping[str, np.ndarray]

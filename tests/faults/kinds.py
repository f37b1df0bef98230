"""The five kinds of faults; each module has its cases, a title, what is counted, and how many cases CI runs at least."""

import configs
import kills
import mutations
import output_paths
import tampering

KINDS = {kind.__name__: kind for kind in (kills, output_paths, configs, mutations, tampering)}

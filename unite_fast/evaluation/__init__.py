"""What a run is worth: reconstruction quality, and the quality and diversity of generated images.

The libraries of the metrics are imported where they compute: they take two of the 4.5 seconds in which a process that
trains would start, and most processes measure nothing.
"""

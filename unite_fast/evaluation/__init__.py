"""What a run is worth: reconstruction quality, and the quality and diversity of generated images."""

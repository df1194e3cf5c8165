"""UNITE on molecules: all that the trainer does not have from images already, see `unite_fast.modality`."""

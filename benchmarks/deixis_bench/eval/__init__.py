"""`deixis eval`: bundles and checkpoints measured with the field's metrics, side by side."""

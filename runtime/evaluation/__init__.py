"""What a quantised model answers beside the same model unquantised."""

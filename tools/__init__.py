"""Scripts that are not steps of the paper."""

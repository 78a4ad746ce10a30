"""Whether an artifact is right, and what a device allows it to reach."""

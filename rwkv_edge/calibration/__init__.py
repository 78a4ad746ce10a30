"""Quantization: ranges from real text, Q/DQ insertion, schemes, sensitivity."""

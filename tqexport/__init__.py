"""Take TruncQuant networks to ONNX and TFLite with their 8-bit codes and the shift intact, and prove it."""

"""ONNX files with 8-bit codes and an explicit BitShift."""

"""Files others read: NIR, netx, ONNX and the bundle that holds them, and proof that others read them alike."""

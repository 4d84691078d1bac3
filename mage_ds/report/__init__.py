"""What people look at: progress lines and metrics, TensorBoard, grids of pictures, curves."""

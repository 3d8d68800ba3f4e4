"""What people look at: progress, tables, TensorBoard, figures and the page."""

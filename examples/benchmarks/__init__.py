"""What a step costs: time, memory traffic, compile time, beside Adam and PyTorch."""

"""What the two PyTorch backends share: streams, stacked weights, the choice of a strategy. No op's arithmetic."""

"""The model: tensors in, tensors out. Every other file of this folder is copied to the Hub with a model's weights."""
